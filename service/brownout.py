"""Brownout: how far to lower the budgets of requests that allow it, so that waiting ones finish within a target.

Pure functions and small values: no server and no clock, so that tests/perf/brownout_sim.py simulates what is served.

Work is measured in full images, the compute fractions of a batch's images added up: 1 for an image with every unit
open. Times are in seconds on any one clock. A level of 0 leaves every budget as it is, 1 lowers it to its floor.

Calls of one size have one level. The sizes share the server by max-min fairness: those with the most work are
lowered first, and a size that has no more than an equal share of what fits the target is neither lowered nor refused.
So a flood of large calls is lowered itself, and then refused itself; it does not take the budget of small ones.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MEMORY = 32.0
"""Number of batches after which older measurements hardly count in the cost model."""
SURPRISE = 2.0
"""An outlier counts as at most this many times the expected duration, and at least as its inverse."""
TRUST = 0.05
"""Relative variance of work at which the measured slope counts as much as the previous one."""
HEADROOM = 0.75
"""The share of the target that planning uses, for levels and for how much may wait with all budgets at their floors.
The rest is a reserve for later calls and slower batches."""
LONGEST = 0.3
"""The longest batch, as a share of the target: a new call waits for those that run."""
RECOVERY = 1.0
"""How long the level takes to fall from 1 to 0, as a multiple of the target."""
MAX_RECOVERY = 4.0
"""Seconds; the longest recovery, however large the target."""
STEPS = 100
"""Budgets are lowered to multiples of 1 / STEPS, or to their floor."""


class Cost(NamedTuple):
    """The duration of a batch: seconds = overhead + per_image * work."""

    overhead: float
    per_image: float

    def seconds(self, work: float) -> float:
        """The duration of a batch with this much work."""
        return self.overhead + self.per_image * work


class CostModel:
    """Learns the cost of a batch from the batches that run. Not thread-safe.

    A line through the mean of recent batches, by least squares with exponential forgetting. Batches of equal work say
    nothing about its slope: as long as work does not vary, overhead and slope keep their proportion. An outlier counts
    as at most SURPRISE times the expected duration, so one batch moves an estimate by a few percent.
    """

    def __init__(self, runs: Iterable[tuple[float, float]] = ()):
        """runs: work and seconds of batches that ran already, such as those of the start."""
        self._batches = 0.0
        """Effective number of batches in the means below."""
        self._work = self._seconds = 0.0
        """Means."""
        self._variance = self._covariance = 0.0
        """Variance of work; covariance of work and seconds."""
        self._cost = Cost(0.0, 0.0)
        for work, seconds in runs:
            self.ran(work, seconds)

    @property
    def cost(self) -> Cost:
        """The current estimate; 0 before the first batch."""
        return self._cost

    def ran(self, work: float, seconds: float) -> None:
        """Record a batch: its work, above 0, and its duration."""
        if self._batches:
            expected = self._cost.seconds(work)
            seconds = min(max(seconds, expected / SURPRISE), expected * SURPRISE)
        self._batches = min(self._batches + 1, MEMORY)
        weight = 1 / self._batches
        from_mean = work - self._work, seconds - self._seconds
        self._work += weight * from_mean[0]
        self._seconds += weight * from_mean[1]
        kept = weight * (1 - weight)
        self._variance += kept * from_mean[0] ** 2 - weight * self._variance
        self._covariance += kept * from_mean[0] * from_mean[1] - weight * self._covariance
        self._cost = self._line()

    def _line(self) -> Cost:
        overhead, slope = self._cost if self._cost.per_image else (0.0, 1.0)
        in_proportion = self._seconds / (overhead / slope + self._work)
        trust = TRUST * self._work**2
        slope = (self._covariance + trust * in_proportion) / (self._variance + trust)
        slope = min(max(slope, 0.01 * in_proportion), self._seconds / self._work)  # so that no overhead is negative
        return Cost(self._seconds - slope * self._work, slope)


def size_of(images: int) -> int:
    """The size of a call: 0 for one image, 1 for two, 2 for up to four, 3 for up to eight, and so on."""
    return (images - 1).bit_length()


class Waiting(NamedTuple):
    """The images of a call that wait."""

    images: int
    arrived: float
    own: float
    """The compute fraction that each image would spend at its own budget."""
    floor: float
    """The compute fraction that an image may be lowered to; equal to `own` if it may not be."""
    deadline: float = math.inf
    turns: int = 0
    """Number of batches that had images of the call."""
    size: int = 0
    """The size of the whole call, by `size_of`."""


@dataclass(frozen=True)
class Engines:
    """The engines that run the batches."""

    count: int
    max_batch: int
    busy: float = 0.0
    """Engine seconds until the current batches end, summed over the engines."""

    def seconds(self, images: int, work: float, cost: Cost) -> float:
        """How long until these images, with this much work in total, have run after the current batches."""
        rounds = math.ceil(images / (self.count * self.max_batch))
        return (self.busy + cost.per_image * work) / self.count + rounds * cost.overhead


def needed(
    waiting: Sequence[Waiting], cost: Cost, engines: Engines, now: float, target: float, others: Collection[int] = ()
) -> dict[int, float]:
    """By size of the calls that wait, the lowest levels, 0 to 1, at which they finish within the target; 1 if none is
    enough. Of several sizes none is lowered below an equal share of what fits the target.

    waiting: in the order of their turns. A call that is larger than a batch takes several turns, and has the target for
    each of them, so a large call alone lowers nobody. A deadline nearer than the target takes its place, unless it
    cannot be met at any level. others: sizes that count as if calls of them waited, such as those that waited just now
    and made others late.
    """
    # Images of a round run at the same time on all engines, and finish together. With less work, by x, that is at
    # now + busy + rounds * overhead + each * (work - x). Work and what may be saved of it: up to and with the round.
    levels = dict.fromkeys(sorted({*others, *(call.size for call in waiting)}), 0.0)
    work, saving = levels.copy(), levels.copy()
    each = cost.per_image / engines.count
    images = 0
    for of_round in _rounds(waiting, engines, target):
        for turn in of_round:
            images += turn.images
            work[turn.size] += turn.images * turn.own
            saving[turn.size] += turn.images * (turn.own - turn.floor)
        finish = now + engines.seconds(images, sum(work.values()), cost)
        soonest = finish - each * sum(saving.values())
        due = min(turn.deadline if soonest <= turn.deadline < turn.due else turn.due for turn in of_round)
        if finish > due and soonest < finish:
            fits = sum(work.values()) - (finish - due) / each
            most = fits if len(levels) == 1 else _share(work, saving, fits, HEADROOM * target / each / len(levels))
            for size in levels:
                if work[size] > most and saving[size] > 0:
                    levels[size] = max(levels[size], min(1.0, (work[size] - most) / saving[size]))
    return levels


def _share(work: Mapping[int, float], saving: Mapping[int, float], fits: float, least: float) -> float:
    """The most work that a size may spend so that all together spend what fits; at least `least`. A size spends no less
    than it cannot save. fits: less than all work."""

    def spent(most: float) -> float:
        return sum(max(work[size] - saving[size], min(work[size], most)) for size in work)

    low, spent_low = least, spent(least)
    for high in sorted([*work.values(), *(work[size] - saving[size] for size in work)]):  # between them it is linear
        if spent_low >= fits:
            break
        if high > low:
            spent_high = spent(high)
            if spent_high >= fits:
                return low + (high - low) * (fits - spent_low) / (spent_high - spent_low)
            low, spent_low = high, spent_high
    return low


class _Turn(NamedTuple):
    """Images of a call that run in one batch. due: by the target; deadline: of the call; both with headroom."""

    images: int
    size: int
    own: float
    floor: float
    due: float
    deadline: float


def _rounds(waiting: Sequence[Waiting], engines: Engines, target: float) -> Iterable[list[_Turn]]:
    """The images that run at the same time, a batch on each engine."""
    turns = deque((call, call.images, HEADROOM * target * (call.turns + 1)) for call in waiting)
    room, of_round = engines.count * engines.max_batch, list[_Turn]()
    while turns:
        call, left, within = turns.popleft()
        images = min(left, engines.max_batch, room)
        deadline = call.arrived + HEADROOM * (call.deadline - call.arrived)
        of_round.append(_Turn(images, call.size, call.own, call.floor, call.arrived + within, deadline))
        room -= images
        if images < min(left, engines.max_batch):
            turns.appendleft((call, left - images, within))
        elif left > images:
            turns.append((call, left - images, within + HEADROOM * target))
        if not room or not turns:
            yield of_round
            room, of_round = engines.count * engines.max_batch, []


def full(images: int, least: float, cost: Cost, engines: Engines, target: float) -> bool:
    """Whether these images would run too late even with all budgets at their floors. least: their work then."""
    return engines.seconds(images, least, cost) > HEADROOM * target


def largest_batch(cost: Cost, target: float, max_batch: int) -> int:
    """The images of a batch that takes LONGEST of the target at budget 1: at least 1, at most max_batch."""
    if not cost.per_image:
        return max_batch
    return max(1, min(max_batch, int((LONGEST * target - cost.overhead) / cost.per_image)))


@dataclass(slots=True)
class _Sum:
    """Sums over the waiting calls of a size."""

    calls: int = 0
    images: int = 0
    own: float = 0.0
    least: float = 0.0


class Waits:
    """Sums over the waiting images, by the size of their calls. Not thread-safe."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sum] = {}

    def count(self, size: int, calls: int, images: int, own: float, floor: float) -> None:
        """Add calls of a size with some of their images, or subtract them. own, floor: as in Waiting."""
        total = self._sums.setdefault(size, _Sum())
        total.calls += calls
        total.images += images
        total.own, total.least = (
            (total.own + images * own, total.least + images * floor) if total.images else (0.0, 0.0)
        )

    @property
    def least(self) -> tuple[int, float]:
        """All images, and their work at their floors."""
        sums = self._sums.values()
        return sum(total.images for total in sums), sum(total.least for total in sums)

    def full(self, call: Waiting, level: Callable[[int], float], cost: Cost, engines: Engines, target: float) -> bool:
        """Whether a new call would be late even with the budgets of its size at their floors. Not while its size has no
        more than an equal share. level: of the other sizes, which keep it. Only the next turn of each call counts,
        since others do not wait for more."""
        images = min(call.images, engines.max_batch)
        least = images * call.floor
        all_images, all_work, sizes = 0, 0.0, 1
        for size, total in self._sums.items():
            if not total.images:
                continue
            turns = min(total.images, total.calls * engines.max_batch)
            part = turns / total.images
            if size == call.size:
                images += turns
                least += part * total.least
            else:
                sizes += 1
                all_images += turns
                all_work += part * (total.own - level(size) * (total.own - total.least))
        return full(images + all_images, least + all_work, cost, engines, target) and full(
            sizes * images, sizes * least, cost, engines, target
        )


class Level:
    """The level over time: it rises at once and falls slowly, so that a short lull does not make it swing."""

    def __init__(self, target: float):
        """target: seconds."""
        self._recovery = min(RECOVERY * target, MAX_RECOVERY)
        self._level, self._since = 0.0, -math.inf

    def at(self, now: float) -> float:
        """The level, if none was needed since it was last raised."""
        return max(0.0, self._level - (now - self._since) / self._recovery)

    def raised(self, needed: float, now: float) -> float:
        """Record the level needed; returns the level from now on, which is higher while it still falls."""
        self._level, self._since = max(needed, self.at(now)), now
        return self._level


class Levels:
    """The level of each size of calls over time."""

    def __init__(self, target: float):
        """target: seconds."""
        self._target = target
        self._levels: dict[int, Level] = {}
        """Replaced as a whole: `highest` may be called from any thread."""

    def at(self, size: int, now: float) -> float:
        """The level of calls of a size."""
        return self._levels[size].at(now) if size in self._levels else 0.0

    def highest(self, now: float) -> float:
        """The level of the calls that are lowered most."""
        return max((level.at(now) for level in self._levels.values()), default=0.0)

    def lowered(self, now: float) -> list[int]:
        """The sizes whose calls are lowered."""
        return [size for size, level in self._levels.items() if level.at(now)]

    def raised(self, needed: Mapping[int, float], now: float) -> None:
        """needed: by size, of the sizes that wait."""
        if new := needed.keys() - self._levels.keys():
            self._levels = {**self._levels, **{size: Level(self._target) for size in new}}
        for size, level in needed.items():
            self._levels[size].raised(level, now)


def lowered(own: float, floor: float, level: float) -> float:
    """The budget at a level: from own, at 0, to floor, at 1."""
    if not level or floor >= own:
        return own
    budget = own - level * (own - floor)
    return min(own, max(floor, math.floor(budget * STEPS + 1e-9) / STEPS))
