"""How long engines wait for callers who have just been answered, by hand-worked numbers."""

import pytest

from service.patience import FORGET, PATIENCE, Patience


def contended() -> Patience:
    """After two batches of 10 ms that had a CPU for half of it: contention 1, then 1.125, then 1.234."""
    patience = Patience()
    for _ in range(2):
        patience.batch(0.010, 0.005)
    return patience


def test_callers_are_expected_for_as_long_as_they_usually_take_to_return() -> None:
    patience = contended()
    patience.answered([4, 1], 1.0)
    assert patience.expected(1.0015) == (5, pytest.approx(0.0005))  # of PATIENCE / 5, the first guess
    patience.came_back(1.0015)  # the caller with 4 images, half a millisecond early
    assert patience.expected(1.0015) == (1, pytest.approx(0.0005))
    assert patience.expected(1.0021) == (0, pytest.approx(0))
    patience.batch(0.010, 0.005)
    patience.answered([2], 2.0)
    assert patience.expected(2.0) == (2, pytest.approx(0.0019375 + 0.0000625))  # mean and deviation, each moved by 1/8


@pytest.mark.parametrize(
    ("seconds", "cpu_seconds"), [(0.010, 0.010), (0.0025, 0.001)], ids=["CPUs of its own", "batch too short to wait"]
)
def test_nobody_is_waited_for_where_it_does_not_pay(seconds: float, cpu_seconds: float) -> None:
    patience = contended()
    for _ in range(9):
        patience.batch(seconds, cpu_seconds)
    patience.answered([1], 1.0)
    assert patience.expected(1.0) == (0, 0)


def test_nobody_waits_for_slow_or_missing_callers() -> None:
    patience = contended()
    for turn in range(40):  # each is back only after 20 ms
        patience.answered([1], turn)
        patience.came_back(turn + 2 * PATIENCE)
    patience.answered([1], 50.0)
    patience.came_back(50.0 + 2 * FORGET)  # another caller: this does not count as a return
    patience.batch(1.0, 0.5)
    patience.answered([1], 60.0)
    assert patience.expected(60.0) == (0, 0)
