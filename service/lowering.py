"""Brownout in a server: the policy of brownout.py over the calls of a batcher.

The batcher holds its lock around every method but `ran`, which it calls from one thread at a time.
"""

from collections.abc import Iterable, Sequence

from service.brownout import (
    CostModel,
    Engines,
    Levels,
    Waiting,
    Waits,
    largest_batch,
    lowered,
    needed,
    size_of,
)
from service.calls import Call, CallQueue, Lowered, Piece
from service.engine import Outputs
from training.steering import SteeringArrays


class Brownout:
    """The cost of a batcher's batches, as far as it is known, and how far budgets are lowered now."""

    def __init__(self, target: float, dense: int, engines: int, max_batch: int, runs: Iterable[tuple[float, float]]):
        """target: seconds; dense: multiply-accumulates of an image with every unit open; runs: work and seconds of
        batches that ran at the start."""
        self._target, self._dense, self._max_batch = target, dense, max_batch
        self._model, self._levels = CostModel(runs), Levels(target)
        self.waits = Waits()
        """Sums over the waiting calls; the queue keeps them up to date."""
        self._spend: dict[str, float] = {}
        """Recent mean compute fraction of images without a budget, by profile."""
        self._ends = [0.0] * engines
        """When each engine's batch is expected to end."""

    def level(self, now: float) -> float:
        """The highest level of all sizes, 0 to 1: how far budgets are lowered towards their floors."""
        return self._levels.highest(now)

    @property
    def max_batch(self) -> int:
        """The size of the largest batch that leaves enough of the target to the calls that wait meanwhile."""
        return largest_batch(self._model.cost, self._target, self._max_batch)

    def enter(self, call: Call) -> None:
        """Set the compute fraction that a new call is expected to spend, and its floor."""
        steering = call.steering
        call.own = self._spend.get(steering.profile, 1.0) if steering.budget is None else steering.budget
        call.floor = min(call.own, steering.permission.floor) if steering.permission else call.own

    def full(self, call: Call, now: float) -> bool:
        """Whether a new call would be late even with the budgets of its size at their floors."""
        new = Waiting(call.waiting, now, call.own, call.floor, size=size_of(len(call.images)))
        return self.waits.full(
            new, lambda size: self._levels.at(size, now), self._model.cost, self._engines(now), self._target
        )

    def seconds(self, now: float) -> float:
        """The least time that the queue takes."""
        images, work = self.waits.least
        return self._engines(now).seconds(images, work, self._model.cost)

    def raise_level(self, queue: CallQueue, now: float) -> None:
        """Raise the level as needed, before a batch is taken from the queue."""
        engines = self._engines(now)
        waiting = [
            Waiting(
                call.waiting, call.arrived, call.own, call.floor, call.deadline, call.taken // engines.max_batch,
                size_of(len(call.images)),
            )
            for call in queue
        ]  # fmt: skip
        others = self._levels.lowered(now)
        self._levels.raised(needed(waiting, self._model.cost, engines, now, self._target, others), now)

    def lower(self, queue: CallQueue, batch: Sequence[Piece], engine: int, now: float) -> None:
        """Lower the budgets of the calls that this batch begins. A call keeps the budget of its first batch."""
        arrays = dict[tuple[int, float], SteeringArrays]()
        for call, first, _ in batch:
            if first:
                continue
            if permission := call.steering.permission:
                budget = lowered(call.own, permission.floor, self._levels.at(size_of(len(call.images)), now))
                if budget < call.own:
                    key = id(permission.without), budget
                    if key not in arrays:
                        arrays[key] = permission.at(budget)
                    call.lowered = Lowered(budget, call.own)
                    call.steering = call.steering.at(budget, arrays[key])
            queue.fix(call, call.lowered.budget if call.lowered else call.own)
        work = sum(call.own * size for call, _, size in batch)
        self._ends[engine] = now + self._model.cost.seconds(work)

    def ended(self, engine: int) -> None:
        """Record that an engine's batch has ended."""
        self._ends[engine] = 0.0

    def ran(self, batch: Sequence[Piece], outputs: Outputs, seconds: float) -> None:
        """Learn from a batch."""
        spent = outputs.macs / self._dense  # (B,)
        self._model.ran(float(spent.sum()), seconds)
        row = 0
        for call, _, size in batch:
            if call.steering.budget is None:
                profile, mean = call.steering.profile, float(spent[row : row + size].mean())
                before = self._spend.get(profile, mean)
                self._spend[profile] = before + 0.1 * (mean - before)
            row += size

    def _engines(self, now: float) -> Engines:
        return Engines(len(self._ends), self.max_batch, sum(max(0.0, end - now) for end in self._ends))
