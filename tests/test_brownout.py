"""The policy of brownout: by hand, by properties, and simulated (tests/perf/brownout_sim.py)."""

import asyncio
import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.brownout import (
    HEADROOM,
    MAX_RECOVERY,
    RECOVERY,
    Cost,
    CostModel,
    Engines,
    Level,
    Levels,
    Waiting,
    Waits,
    full,
    largest_batch,
    lowered,
    needed,
    size_of,
)
from service.calls import Call, CallQueue, Piece
from service.lowering import Brownout
from service.steering import Permission, Steering
from tests.perf.brownout_sim import Machine, Policy, flood, main, serve
from training.steering import SteeringArrays

TARGET = 1 / HEADROOM
"""Images are due 1 s after they arrive."""
COST = Cost(0.0, 0.1)
ONE = Engines(1, 4)
fractions = st.floats(0.05, 1.0)


@st.composite
def calls(draw: st.DrawFn, near: bool = False) -> Waiting:
    """A waiting call. near: it may have a deadline."""
    own = draw(fractions)
    floor = own * draw(st.one_of(st.just(1.0), st.floats(0.1, 0.9)))
    arrived = draw(st.floats(-2, 0))
    # not a round number, so that rounding does not decide whether a deadline can be met
    deadline = draw(st.floats(0.01, 3)) + 1e-3 * math.pi if near and draw(st.booleans()) else math.inf
    images = draw(st.integers(1, 40))
    return Waiting(images, arrived, own, floor, arrived + deadline, size=size_of(images))


costs = st.builds(Cost, st.floats(0, 0.1), st.floats(1e-4, 0.1))
engines = st.builds(Engines, st.integers(1, 4), st.integers(1, 16), st.floats(0, 2))


def at_level(waiting: list[Waiting], level: float | dict[int, float]) -> list[Waiting]:
    """The calls with budgets lowered to the level, or to that of their size."""
    return [
        call._replace(own=call.own - of * (call.own - call.floor))
        for call in waiting
        for of in (level if isinstance(level, float) else level[call.size],)
    ]


def alike(*waiting: Waiting) -> list[Waiting]:
    """Calls of one size."""
    return [call._replace(size=0) for call in waiting]


def level_of(waiting: list[Waiting], cost: Cost, of: Engines, now: float, target: float) -> float:
    """The level for calls of one size."""
    return needed(waiting, cost, of, now, target).get(0, 0.0)


def test_levels_worked_out_by_hand() -> None:
    def level(*waiting: Waiting, of: Engines = ONE, cost: Cost = COST, now: float = 0.0) -> float:
        return level_of([*waiting], cost, of, now, TARGET)

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
    waiting = alike(*waiting)
    level = level_of(waiting, cost, of, 0.0, target)
    assert 0 <= level <= 1
    if level < 1:
        assert level_of(at_level(waiting, level), cost, of, 0.0, target) < 1e-6
    if level > 1e-3:
        assert level_of(at_level(waiting, level - 1e-3), cost, of, 0.0, target) > 0


@given(st.lists(calls(), max_size=12), st.lists(calls(), max_size=12), costs, engines, st.floats(0.05, 3))
def test_a_longer_queue_never_lowers_the_level(
    waiting: list[Waiting], more: list[Waiting], cost: Cost, of: Engines, target: float
) -> None:
    # single images: of large calls the later turns would move
    first, rest = ([call._replace(images=1, size=0) for call in part] for part in (waiting, more))
    assert level_of(first + rest, cost, of, 0.0, target) >= level_of(first, cost, of, 0.0, target) - 1e-9
    assert needed([], cost, of, 0.0, target) == {}


def test_levels_by_size_worked_out_by_hand() -> None:
    def levels(*waiting: Waiting) -> dict[int, float]:
        return needed(waiting, COST, ONE, 0.0, TARGET)

    assert [size_of(images) for images in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    small, large = Waiting(1, 0.0, 1.0, 0.5, size=0), Waiting(4, 0.0, 1.0, 0.5, size=2)
    assert levels(*[large] * 2, *[small] * 2) == {0: 0, 2: 0}  # 1 s
    assert levels(*[large] * 2, *[small] * 4) == {0: 0, 2: pytest.approx(0.2 / 0.4)}  # 1.2 s, and 0.8 of large calls
    assert levels(*[large] * 2, *[small] * 8) == {0: pytest.approx(0.3 / 0.4), 2: pytest.approx(0.3 / 0.4)}
    # an equal share is 0.5 s: what one size cannot save is not asked of another that has no more
    assert levels(*[large] * 2, *[small] * 11) == {0: 1, 2: pytest.approx(0.3 / 0.4)}
    assert levels(*[large] * 4, *[small] * 5) == {0: 0, 2: 1}
    assert levels(*[large] * 4, *[small] * 6) == {0: pytest.approx(0.1 / 0.3), 2: 1}
    # the large ones have just gone, and small ones are late
    late = [small._replace(arrived=-2.0)] * 5
    assert needed(late, COST, ONE, 0.0, TARGET) == {0: 1}
    assert needed(late, COST, ONE, 0.0, TARGET, [2]) == {0: 0, 2: 0}
    kept = large._replace(floor=1.0)
    assert levels(*[kept] * 4, *[small] * 5) == {0: 0, 2: 0}


@given(st.lists(calls(near=True), min_size=1, max_size=20), costs, engines, st.floats(0.05, 3))
def test_a_size_within_its_share_is_not_lowered_however_often_it_is_checked(
    waiting: list[Waiting], cost: Cost, of: Engines, target: float
) -> None:
    levels = needed(waiting, cost, of, 0.0, target)
    assert list(levels) == sorted({call.size for call in waiting})
    share = HEADROOM * target * of.count / cost.per_image / len(levels)
    for size, level in levels.items():
        assert 0 <= level <= 1
        if len(levels) > 1 and sum(call.images * call.own for call in waiting if call.size == size) <= share:
            assert level == 0
    again = needed(at_level(waiting, levels), cost, of, 0.0, target)
    assert all(again[size] < 1e-6 for size, level in levels.items() if level < 0.999)


def test_each_size_has_a_level_of_its_own() -> None:
    levels = Levels(1.0)
    levels.raised({0: 0.6, 3: 0.2}, 0.0)
    levels.raised({3: 1.0}, 0.4 * RECOVERY)
    assert [levels.at(size, 0.4 * RECOVERY) for size in (0, 1, 3)] == pytest.approx([0.2, 0.0, 1.0])
    assert levels.highest(0.4 * RECOVERY) == 1


def test_a_full_queue_by_hand() -> None:
    """0.75 of the second may be filled."""
    waits = Waits()

    def full(call: Waiting, levels: dict[int, float]) -> bool:
        return waits.full(call, lambda size: levels.get(size, 0.0), COST, ONE, 1.0)

    small, large = Waiting(1, 0.0, 1.0, 0.4, size=0), Waiting(4, 0.0, 1.0, 0.4, size=2)
    for call in [small] * 5:
        waits.count(call.size, 1, call.images, call.own, call.floor)
    assert not full(large, {})  # 0.5 + 0.16 s
    assert not full(large._replace(floor=0.9), {})  # 0.5 + 0.36 s, but 0.36 is less than half of 0.75
    waits.count(2, 2, 8, 1.0, 0.4)
    assert full(large, {})  # 0.5 + 0.48 s, and 0.48 is more than half of 0.75
    assert not full(large, {0: 0.8})  # 0.26 + 0.48 s
    assert not full(small, {2: 1.0})  # 0.24 + 0.32 s
    waits.count(2, 10, 40, 1.0, 0.4)
    assert not full(small, {2: 1.0})  # 0.24 + 1.92 s, but 0.24 is less than half of 0.75
    waits.count(2, -12, -48, 1.0, 0.4)
    waits.count(6, 2, 80, 1.0, 0.4)  # two calls of 40 images: their next turns are 8 images, as above
    assert full(large._replace(size=6), {})
    assert not full(large._replace(size=6), {0: 0.8})


@given(st.lists(calls(), max_size=20), calls(), costs, engines, st.floats(0.05, 3), st.floats(0, 1))
def test_a_call_that_allows_more_is_not_refused_sooner(
    waiting: list[Waiting], call: Waiting, cost: Cost, of: Engines, target: float, level: float
) -> None:
    waits = Waits()
    for each in (*waiting, call):
        waits.count(each.size, 1, each.images, each.own, each.floor)
    waits.count(call.size, -1, -call.images, call.own, call.floor)
    kept = waits.full(call._replace(floor=call.own), lambda _: level, cost, of, target)
    assert kept or not waits.full(call, lambda _: level, cost, of, target)


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
    level, now, before, recovery = Level(target), 0.0, 0.0, min(RECOVERY * target, MAX_RECOVERY)
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
    assert [largest_batch(Cost(0.01, 0.05), target, 8) for target in (1.0, 0.1, 10.0)] == [5, 1, 8]
    assert largest_batch(Cost(0.0, 0.0), 1.0, 8) == 8
    assert not full(7, 7.0, COST, ONE, 1.0)  # 0.7 s
    assert full(8, 8.0, COST, ONE, 1.0)
    assert not full(18, 7.2, COST, ONE, 1.0)  # 18 images at 0.4


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


def test_a_flood_of_large_calls_does_not_take_the_budget_of_small_ones() -> None:
    """Calls of 8 images at three times the capacity for half of the time, beside calls of one image at half of it."""
    arrivals, images = flood(MACHINE.capacity, 60, 8, seed=0)
    small = images == 1
    fair, alike = (
        serve(arrivals, MACHINE, Policy("brownout", 1.0, floor=0.4, by_size=by_size), 0, images=images)
        for by_size in (True, False)
    )
    budgets = [float(outcome.budgets[small & ~np.isnan(outcome.seconds)].mean()) for outcome in (fair, alike)]
    assert budgets[0] > 0.9
    assert budgets[1] < 0.8
    assert (fair.seconds[small] < 1).mean() > 0.98
    assert np.isnan(fair.seconds[small]).mean() <= np.isnan(alike.seconds[small]).mean()
    assert fair.budgets[~small].mean() < 0.8


@pytest.mark.parametrize("load", [1.2, 2.0])
def test_allowing_brownout_makes_no_call_later_or_refused_more_often(load: float) -> None:
    arrivals = steady(load, 60)
    outcome = serve(arrivals, MACHINE, BROWNOUT, seed=0, permitted=0.5)
    may = np.random.default_rng(0).random(len(arrivals)) < 0.5
    refused = np.isnan(outcome.seconds)
    assert refused[may].mean() <= refused[~may].mean()
    for share in (0.5, 0.99):
        with_, without = (np.nanquantile(outcome.seconds[of], share) for of in (may, ~may))
        assert with_ < without + 0.02
    assert outcome.budgets[may].mean() < 0.95
    assert (outcome.budgets[~may] == 1).all()


PLAIN = SteeringArrays(*(np.zeros((1, 1, 1), kind) for kind in (np.int64, np.float32, np.float32)))


def test_lowered_images_keep_the_gate_biases_of_their_steering() -> None:
    """Each image its own; the dial's are the same for all."""
    own = np.array([[[1.0, -1.0]], [[2.0, 0.0]]], np.float32)  # (B, G, U)
    rows = SteeringArrays(PLAIN.latent, PLAIN.scale, PLAIN.shift, own)
    for arrays, biases in ((PLAIN, [[[5, 5]]]), (rows, [[[6, 4]], [[7, 5]]])):
        lowered_arrays = Permission(0.3, arrays, lambda budget: np.full((1, 2), 10 * budget, np.float32)).at(0.5)
        assert lowered_arrays.gate_bias is not None
        assert lowered_arrays.gate_bias.tolist() == biases


def test_what_calls_spend_is_learned_by_profile_and_limits_how_far_they_are_lowered() -> None:
    """Of 100 MACs, images of profile a spend 50, and those of b 90; c has budgets."""

    def call(profile: str, images: int, budget: float | None = None) -> Call:
        steering = Steering(PLAIN, profile, False, "", budget=budget, permission=Permission(0.7, PLAIN, lambda _: None))
        return Call(np.zeros((images, 1, 1, 1), np.uint8), steering, False, math.inf, 0.0, cast(Any, None))

    def spends(profile: str, budget: float | None = None) -> tuple[float, float]:
        brownout.enter(new := call(profile, 1, budget))
        return new.own, new.floor

    brownout = Brownout(1.0, 100, 1, 8, [(1.0, 0.1)])
    assert spends("a") == (1.0, 0.7)
    batch = [Piece(call(*of), 0, of[1]) for of in (("a", 1), ("c", 1, 0.2), ("b", 2))]  # type: ignore[misc]
    outputs: Any = SimpleNamespace(macs=np.array([50, 20, 90, 90]))
    for _ in range(2):
        brownout.ran(batch, outputs, 0.2)
    assert spends("a") == (0.5, 0.5)  # less than the floor: not lowered
    assert spends("b") == (0.9, 0.7)
    assert spends("c") == (1.0, 0.7)
    assert spends("b", 0.6) == (0.6, 0.6)


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=12), st.integers(1, 8))
def test_turns_do_not_depend_on_permissions(asked: list[tuple[int, bool]], most: int) -> None:
    """asked: the images of each call, and whether it may be lowered."""
    permission = Permission(0.3, PLAIN, lambda _: None)

    def order(permitted: bool, loop: asyncio.AbstractEventLoop) -> list[list[tuple[int, int, int]]]:
        queue = CallQueue(None, lambda *_: None, Waits())
        numbers = {}
        for number, (images, may) in enumerate(asked):
            steering = Steering(PLAIN, "", False, "", permission=permission if may and permitted else None)
            call = Call(np.zeros((images, 1, 1, 1), np.uint8), steering, False, math.inf, 0.0, loop.create_future())
            call.floor = permission.floor if steering.permission else 1.0
            numbers[id(call)] = number
            queue.append(call)
        taken = []
        while queue.images:
            batch = queue.take(most)
            for call, first, _ in batch:
                if not first:
                    queue.fix(call, call.floor)
            taken.append([(numbers[id(call)], first, size) for call, first, size in batch])
        assert queue.work == 0
        return taken

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        assert order(True, loop) == order(False, loop)


def test_the_simulation_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = tmp_path / "plots" / "brownout.png"
    assert main(["--servers", "2", "--loads", "2", "--seconds", "12", "--plot", str(drawn)]) == 0
    assert drawn.stat().st_size > 10_000
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("poisson 2")]
    in_time = {row[2]: float(row[-4]) for row in rows}
    assert in_time["brownout"] > 0.98 > 0.6 > in_time["reject-only"]
