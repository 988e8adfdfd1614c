"""The policy of brownout: by hand, by properties, and simulated (tests/perf/brownout_sim.py)."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.brownout import (
    HEADROOM,
    MAX_RECOVERY,
    Cost,
    CostModel,
    Engines,
    Level,
    Waiting,
    full,
    largest_batch,
    lowered,
    needed,
)
from tests.perf.brownout_sim import Machine, Policy, main, serve

TARGET = 1 / HEADROOM
"""So that images are due 1 s after they arrive."""
COST = Cost(0.0, 0.1)
ONE = Engines(1, 4)
fractions = st.floats(0.05, 1.0)


@st.composite
def calls(draw: st.DrawFn, near: bool = False) -> Waiting:
    """near: some with a deadline."""
    own = draw(fractions)
    floor = own * draw(st.one_of(st.just(1.0), st.floats(0.1, 0.9)))
    arrived = draw(st.floats(-2, 0))
    # not a round number, so that rounding does not decide whether a deadline can be met
    deadline = draw(st.floats(0.01, 3)) + 1e-3 * math.pi if near and draw(st.booleans()) else math.inf
    return Waiting(draw(st.integers(1, 40)), arrived, own, floor, arrived + deadline)


costs = st.builds(Cost, st.floats(0, 0.1), st.floats(1e-4, 0.1))
engines = st.builds(Engines, st.integers(1, 4), st.integers(1, 16), st.floats(0, 2))


def at_level(waiting: list[Waiting], level: float) -> list[Waiting]:
    """Their own budgets lowered."""
    return [call._replace(own=call.own - level * (call.own - call.floor)) for call in waiting]


def test_levels_worked_out_by_hand() -> None:
    def level(*waiting: Waiting, of: Engines = ONE, cost: Cost = COST, now: float = 0.0) -> float:
        return needed(waiting, cost, of, now, TARGET)

    full_images = Waiting(1, 0.0, 1.0, 0.5)
    assert level() == 0
    assert level(*[full_images] * 10) == 0  # 10 x 0.1 s = 1 s
    assert level(*[full_images] * 12) == pytest.approx(0.2 / 0.6)  # 1.2 s; 0.6 s may be saved
    assert level(*[full_images] * 20) == pytest.approx(1)
    assert level(*[full_images] * 40) == 1
    assert level(*[full_images] * 12, of=Engines(2, 4)) == 0
    assert level(*[full_images] * 10, of=Engines(2, 4, busy=1.2)) == pytest.approx(0.1 / 0.25)  # 0.6 + 0.5 s
    assert level(*[full_images] * 10, cost=Cost(0.1, 0.1)) == pytest.approx(0.3 / 0.5)  # three batches: 1.3 s
    assert level(*[full_images] * 4, now=0.8) == pytest.approx(0.2 / 0.2)
    # one that may not be lowered: the others give way
    kept = Waiting(1, 0.0, 1.0, 1.0)
    assert level(kept, *[full_images] * 11) == pytest.approx(0.2 / 0.55)
    assert level(*[kept] * 12) == 0
    # an early call that may not be lowered, behind others: they give way as far as they can
    assert level(*[full_images] * 4, Waiting(4, -0.5, 1.0, 1.0)) == 1
    assert level(*[full_images] * 4, Waiting(4, -0.3, 1.0, 1.0)) == pytest.approx(0.1 / 0.2)
    # a deadline nearer than the target; half of the target would be 0.375 s
    soon = Waiting(4, 0.0, 1.0, 0.5, 0.3 / HEADROOM)
    assert level(soon) == pytest.approx(0.1 / 0.2)
    assert level(soon._replace(deadline=0.19 / HEADROOM)) == 0  # not met at any level
    # 40 images of one call, a target for each batch of 4; of ten calls they are late
    assert level(Waiting(40, 0.0, 1.0, 0.5)) == 0
    assert level(*[Waiting(4, 0.0, 1.0, 0.5)] * 10) == 1
    # a late batch of a call that had one before
    assert level(Waiting(4, 0.0, 1.0, 0.5, turns=1), now=0.8) == 0


@given(st.lists(calls(near=True), max_size=20), costs, engines, st.floats(0.05, 3))
def test_a_level_is_enough_and_no_lower_one_is(waiting: list[Waiting], cost: Cost, of: Engines, target: float) -> None:
    level = needed(waiting, cost, of, 0.0, target)
    assert 0 <= level <= 1
    if level < 1:
        assert needed(at_level(waiting, level), cost, of, 0.0, target) < 1e-6
    if level > 1e-3:
        assert needed(at_level(waiting, level - 1e-3), cost, of, 0.0, target) > 0


@given(st.lists(calls(), max_size=12), st.lists(calls(), max_size=12), costs, engines, st.floats(0.05, 3))
def test_a_longer_queue_never_lowers_the_level(
    waiting: list[Waiting], more: list[Waiting], cost: Cost, of: Engines, target: float
) -> None:
    # single images: of large calls the later turns would move
    first, rest = ([call._replace(images=1) for call in part] for part in (waiting, more))
    assert needed(first + rest, cost, of, 0.0, target) >= needed(first, cost, of, 0.0, target) - 1e-9
    assert needed([], cost, of, 0.0, target) == 0


@given(fractions, fractions, st.floats(0, 1), st.floats(0, 1))
def test_budgets_stay_between_floor_and_own(own: float, floor: float, level: float, higher: float) -> None:
    budget = lowered(own, floor, level)
    if floor >= own:
        assert budget == own
        return
    assert floor <= budget <= own
    assert budget <= own - level * (own - floor) + 1e-9 or budget == floor
    assert budget > own - level * (own - floor) - 0.01 - 1e-9
    assert lowered(own, floor, max(level, higher)) <= budget
    assert (lowered(own, floor, 0.0), lowered(own, floor, 1.0)) == (own, floor)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 3)), min_size=1), st.floats(0.01, 10))
def test_the_level_rises_at_once_and_falls_slowly(steps: list[tuple[float, float]], target: float) -> None:
    level, now, before, recovery = Level(target), 0.0, 0.0, min(2 * target, MAX_RECOVERY)
    for need, after in steps:
        now += after
        assert level.at(now) == pytest.approx(max(0.0, before - after / recovery))
        before = level.raised(need, now)
        assert need <= before <= 1
        assert before == max(need, level.at(now))
    assert level.at(now + 4.001) == 0


def test_the_cost_of_a_batch_is_learned() -> None:
    rng = np.random.default_rng(1)
    true = Cost(0.02, 0.05)
    model = CostModel([(1.0, 0.07), (8.0, 0.42)])
    assert model.cost == pytest.approx(tuple(true), rel=0.2)
    for work in rng.uniform(0.5, 8, 200):
        model.ran(work, true.seconds(work) * rng.lognormal(0, 0.1))
    for work in (1.0, 4.0, 8.0):
        assert model.cost.seconds(work) == pytest.approx(true.seconds(work), rel=0.15)
    # batches of one size only: the proportion stays, whatever the noise
    for _ in range(300):
        model.ran(4.0, true.seconds(4.0) * rng.lognormal(0, 0.1))
    assert model.cost.seconds(4.0) == pytest.approx(true.seconds(4.0), rel=0.1)
    assert model.cost.seconds(1.0) == pytest.approx(true.seconds(1.0), rel=0.3)
    # the machine gets three times slower
    for work in rng.uniform(0.5, 8, 150):
        model.ran(work, 3 * true.seconds(work))
    assert model.cost.seconds(4.0) == pytest.approx(3 * true.seconds(4.0), rel=0.1)
    assert CostModel().cost == (0, 0)


@given(st.floats(0, 1e9), st.floats(0.3, 8), st.integers(0, 2**16))
def test_one_batch_moves_an_estimate_by_little(seconds: float, work: float, seed: int) -> None:
    rng, true = np.random.default_rng(seed), Cost(0.02, 0.05)
    model = CostModel([(float(w), true.seconds(w)) for w in rng.uniform(0.5, 8, 64)])
    before = model.cost
    model.ran(work, seconds)
    for of in (1.0, 4.0, 8.0):
        assert model.cost.seconds(of) == pytest.approx(before.seconds(of), rel=0.25)
    assert model.cost.overhead >= 0
    assert model.cost.per_image > 0


def test_batches_and_queues_fit_the_target() -> None:
    assert [largest_batch(Cost(0.01, 0.05), target, 8) for target in (1.0, 0.1, 10.0)] == [3, 1, 8]
    assert largest_batch(Cost(0.0, 0.0), 1.0, 8) == 8
    assert not full(8, 8.0, COST, ONE, 1.0)  # 0.8 s
    assert full(9, 9.0, COST, ONE, 1.0)
    assert not full(20, 8.0, COST, ONE, 1.0)  # 20 images at 0.4


MACHINE = Machine()
BROWNOUT = Policy("brownout", 1.0, floor=0.4)


def steady(load: float, seconds: float) -> np.ndarray:
    return np.arange(0, seconds, 1 / (load * MACHINE.capacity))


@pytest.mark.parametrize(("load", "budget"), [(0.9, 1.0), (1.5, 0.64), (2.0, 0.475)])
def test_a_constant_load_has_a_constant_level(load: float, budget: float) -> None:
    outcome = serve(steady(load, 60), MACHINE, BROWNOUT, seed=0)
    levels = np.array([level for time, level in outcome.levels if time > 10])
    assert outcome.refused == 0
    assert max(outcome.seconds) < 1
    assert np.mean(outcome.budgets[len(outcome.budgets) // 3 :]) == pytest.approx(budget, abs=0.03)
    assert levels.std() < 0.06, "it swings"


def test_the_level_returns_to_zero_and_calls_without_permission_are_kept() -> None:
    arrivals = np.concatenate([steady(1.5, 20), 20 + steady(0.5, 20)])
    outcome = serve(arrivals, MACHINE, BROWNOUT, seed=0, permitted=0.8)
    assert max(level for time, level in outcome.levels if time < 20) > 0.8
    assert max(level for time, level in outcome.levels if time > 25) == 0
    may = np.random.default_rng(0).random(len(arrivals)) < 0.8
    assert outcome.refused == 0
    assert all(budget == 1 for budget, allowed in zip(outcome.budgets, may, strict=True) if not allowed)
    assert min(outcome.budgets) >= 0.4


def test_the_simulation_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = tmp_path / "plots" / "brownout.png"
    assert main(["--servers", "2", "--loads", "2", "--seconds", "20", "--plot", str(drawn)]) == 0
    assert drawn.stat().st_size > 10_000
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("poisson 2")]
    in_time = {row[2]: float(row[-4]) for row in rows}
    assert in_time["brownout"] > 0.98 > 0.6 > in_time["reject-only"]
