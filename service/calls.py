"""The calls that wait for inference, and the choice of images for the next batch.

Calls take turns: a call that is larger than a batch runs one batch, and its rest joins the end of the queue. So a small
call waits for at most one batch of each call before it, however large those calls are.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.brownout import Waits, size_of
from service.engine import Outputs, joined
from service.errors import Expired
from service.steering import Steering


class Specialists(Protocol):
    """Graphs that are specialised for one steering each."""

    @property
    def specialised(self) -> Collection[str]:
        """The digests of these steerings."""
        ...

    def seconds(self, rows: int, digest: str = "") -> float:
        """The duration of a batch. digest: of the steering whose graph runs it; "": the general graph."""
        ...


class Lowered(NamedTuple):
    """What brownout did to a call."""

    budget: float
    """The budget that applies to its images."""
    own: float
    """The compute fraction that each image was expected to spend without brownout."""


class Ran(NamedTuple):
    """A batch that has run, as a trace shows it. Times are those of time.monotonic, in seconds."""

    started: float
    ended: float
    inference: float
    """When the inference started."""
    seconds: float
    """Duration of the inference."""
    images: int
    """Number of images, those of other calls included."""


@dataclass(frozen=True)
class Answer:
    """The outputs of one call, and how long it waited."""

    outputs: Outputs
    """The outputs for the call's images; seconds: time in which its batches ran, concurrent ones counted once."""
    queue_seconds: float
    """From the call's arrival to the start of its last batch."""
    lowered: Lowered | None = None
    """None: the images ran at their own budget."""


@dataclass(slots=True, eq=False)
class Call:
    """A call, from its arrival to its answer."""

    images: NDArray[np.uint8]
    steering: Steering
    residual: bool
    deadline: float
    """On the clock of time.monotonic; infinite: none."""
    arrived: float
    future: "asyncio.Future[Answer]"
    taken: int = 0
    """Images that have left the queue."""
    parts: "list[tuple[int, float, Outputs]]" = field(default_factory=list)
    """The answers so far: the position of the first image, when its batch started, and the outputs."""
    answered: int = 0
    """Number of images in the parts."""
    room: float = 1.0
    """Room that an image takes in the queue: its budget, or the lowest that brownout may apply; 1 without a budget."""
    own: float = 1.0
    """The compute fraction that an image is expected to spend; estimated only with brownout."""
    floor: float = 1.0
    """The lowest compute fraction that brownout may apply."""
    lowered: Lowered | None = None
    ran: list[Ran] | None = None
    """The batches that have run images of the call; None: not recorded."""

    @property
    def waiting(self) -> int:
        """Images that are still in the queue."""
        return len(self.images) - self.taken

    def add(self, first: int, started: float, outputs: Outputs) -> Answer | None:
        """Add a part. Returns the answer to the whole call once this was its last part."""
        waited = started - self.arrived
        if len(outputs.logits) == len(self.images):
            return Answer(outputs, waited, self.lowered)
        self.parts.append((first, started, outputs))
        self.answered += len(outputs.logits)
        if self.answered < len(self.images):
            return None
        whole = joined([outputs for _, _, outputs in sorted(self.parts, key=lambda part: part[0])])
        seconds, until = 0.0, 0.0
        for _, begun, part in sorted(self.parts, key=lambda part: part[1]):
            seconds += max(0.0, begun + part.seconds - max(begun, until))
            until = max(until, begun + part.seconds)
        return Answer(replace(whole, seconds=seconds), waited, self.lowered)


class Piece(NamedTuple):
    """The images of a call in a batch."""

    call: Call
    first: int
    size: int

    @property
    def rows(self) -> slice:
        """The rows of these images in the call."""
        return slice(self.first, self.first + self.size)


Result = Answer | Exception


def settle(results: Sequence[tuple[Call, Result]]) -> None:
    """Hand results to the event loop, all at once: waking it costs more than sending an answer."""
    if not results:
        return

    def set_results() -> None:
        for call, result in results:
            if call.future.done():
                continue
            if isinstance(result, Exception):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits any more
        results[0][0].future.get_loop().call_soon_threadsafe(set_results)


class CallQueue:
    """Calls in the order of their turns. Not thread-safe."""

    def __init__(
        self, specialists: Specialists | None, on_drop: Callable[[str, int], None], waits: Waits | None = None
    ):
        """specialists: None without graphs for one steering alone; on_drop(reason, images): called for each dropped
        call; waits: of brownout, kept up to date."""
        self._specialists, self._on_drop, self._waits = specialists, on_drop, waits
        self._calls: deque[Call] = deque()
        self.images = 0
        """Images that wait."""
        self.work = 0.0
        """Sum of the room that they take, in images at full budget."""
        self.has_cancelled = False
        """Whether a call was cancelled since the last drop_finished."""

    @property
    def oldest(self) -> Call | None:
        """The call whose turn is next."""
        return self._calls[0] if self._calls else None

    def append(self, call: Call) -> None:
        """Add a new call."""
        self._calls.append(call)
        self._count(call, call.waiting, 1)

    def fix(self, call: Call, budget: float) -> None:
        """Set what each image of a call spends from now on, those in the queue included."""
        waits = self._waits if call.waiting else None
        if waits:
            waits.count(size_of(len(call.images)), -1, -call.waiting, call.own, call.floor)
        call.own = call.floor = budget
        if waits:
            waits.count(size_of(len(call.images)), 1, call.waiting, call.own, call.floor)

    def __iter__(self) -> Iterator[Call]:
        """In the order of their turns."""
        return iter(self._calls)

    def take(self, most: int) -> list[Piece]:
        """Remove at most `most` images, those of the next call among them. Only a call larger than that is split."""
        if not self._by_steering(most):
            return self._take_first(self._calls, most)
        key = self._key(self._calls[0])
        batch = self._take_first(deque(call for call in self._calls if self._key(call) == key), most)
        begun = {id(piece.call) for piece in batch}
        rest = [call for call in self._calls if id(call) not in begun]
        self._calls = deque([*rest, *(piece.call for piece in batch if piece.call.waiting)])
        return batch

    def common_digest(self, batch: Sequence[Piece]) -> str:
        """The digest that all calls of a batch share, if a specialised graph can answer them; else ""."""
        if self._specialists is None:
            return ""
        keys = {self._key(piece.call) for piece in batch}
        return keys.pop() if len(keys) == 1 else ""

    def drop_finished(self) -> None:
        """Remove cancelled and expired calls, and calls with a failed part."""
        now, self.has_cancelled = time.monotonic(), False
        if not any(call.deadline <= now or call.future.done() for call in self._calls):
            return
        kept: deque[Call] = deque()
        for call in self._calls:
            expired = call.deadline <= now and not call.future.done()
            if not expired and not call.future.done():
                kept.append(call)
                continue
            self._count(call, -call.waiting, -1)
            self._on_drop("deadline" if expired else "cancelled", call.waiting)
            if expired:
                late = Expired("the deadline passed while the images waited; allow more time or send fewer")
                settle([(call, late)])
        self._calls = kept

    def _take_first(self, calls: deque[Call], most: int) -> list[Piece]:
        """Take calls in their order; the rest of a large one joins the end."""
        batch: list[Piece] = []
        count = 0
        while calls and count + (size := min(calls[0].waiting, most)) <= most:
            call = calls.popleft()
            batch.append(Piece(call, call.taken, size))
            call.taken += size
            count += size
            self._count(call, -size, 0 if call.waiting else -1)
            if call.waiting:
                calls.append(call)
        return batch

    def _count(self, call: Call, images: int, calls: int) -> None:
        self.images += images
        self.work = self.work + images * call.room if self.images else 0.0
        if self._waits:
            self._waits.count(size_of(len(call.images)), calls, images, call.own, call.floor)

    def _by_steering(self, most: int) -> bool:
        """Whether a batch of the next call's steering, in the graph for it, takes less time per image than a batch of
        the next calls of any steering."""
        if self._specialists is None or not (key := self._key(self._calls[0])):
            return False
        mixed = alike = 0
        for call in self._calls:
            mixed += min(call.waiting, most - mixed)
            if self._key(call) == key:
                alike += min(call.waiting, most - alike)
        return self._specialists.seconds(alike, key) / alike < self._specialists.seconds(mixed) / mixed

    def _key(self, call: Call) -> str:
        """The digest of the call's steering, if a specialised graph can answer it; else ""."""
        digest, biased = call.steering.digest, call.steering.arrays.gate_bias is not None
        specialised = self._specialists is not None and digest in self._specialists.specialised
        return digest if specialised and not biased and not call.residual else ""
