"""A bounded queue of images and the threads that run them in batches. Images with different steering share a batch.

A batch starts as soon as an engine is free, and what arrives meanwhile is the next one. Each engine takes its equal
share of all images in play: those that wait, those that run, and those expected from callers who have just been
answered (patience.py), for which it waits.

Calls take turns: of a call that is larger than a batch, one batch runs, and the rest joins the end of the queue. So a
small call waits for at most one batch of each call before it, however large they are.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine import Outputs, joined
from service.errors import Expired, InvalidRequest, Overloaded, Stopping
from service.patience import PATIENCE, Patience
from service.steering import Steering, stack
from training.steering import SteeringArrays


class Runs(Protocol):
    """What the batcher needs of an engine."""

    def run(
        self, images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False, digest: str = ""
    ) -> Outputs:
        """images: uint8 (B, height, width, channels); steering arrays (B, S, T). residual: whether to return residuals.

        digest: of the terms, if they are the same for all images and have a graph of their own; else "".
        """
        ...


class Specialists(Protocol):
    """What the batcher needs to know of graphs that answer for one steering alone."""

    @property
    def specialised(self) -> Collection[str]:
        """The digests of those steerings."""
        ...

    def seconds(self, rows: int, digest: str = "") -> float:
        """That a batch takes; digest: in the graph for that steering."""
        ...


@dataclass(frozen=True)
class Answer:
    """The outputs of one call, and how long it waited."""

    outputs: Outputs
    """Of the images of one call; seconds: during which its batches ran, those that ran side by side counted once."""
    queue_seconds: float
    """From the call's arrival to the start of its last batch."""


@dataclass(frozen=True)
class BatchStats:
    """What happened in one batch."""

    images: int
    seconds: float
    queue_seconds: tuple[float, ...]
    """Of each call that this batch completes."""
    specialised: bool = False
    """Whether a graph for the images' profile alone ran."""


@dataclass(slots=True, eq=False)
class _Call:
    images: NDArray[np.uint8]
    steering: Steering
    residual: bool
    deadline: float
    """On the clock of time.monotonic; infinite: none."""
    arrived: float
    future: "asyncio.Future[Answer]"
    taken: int = 0
    """Images that have left the queue; the others wait."""
    parts: "list[tuple[int, float, Outputs]]" = field(default_factory=list)
    """The answers so far: the position of the first image, when its batch started, and the outputs."""
    answered: int = 0
    """Images of the parts."""

    @property
    def waiting(self) -> int:
        return len(self.images) - self.taken

    def add(self, first: int, started: float, outputs: Outputs) -> Answer | None:
        """The answer to the whole call, once this was the last part of it."""
        waited = started - self.arrived
        if len(outputs.logits) == len(self.images):
            return Answer(outputs, waited)
        self.parts.append((first, started, outputs))
        self.answered += len(outputs.logits)
        if self.answered < len(self.images):
            return None
        whole = joined([outputs for _, _, outputs in sorted(self.parts, key=lambda part: part[0])])
        seconds, until = 0.0, 0.0
        for _, begun, part in sorted(self.parts, key=lambda part: part[1]):
            seconds += max(0.0, begun + part.seconds - max(begun, until))
            until = max(until, begun + part.seconds)
        return Answer(replace(whole, seconds=seconds), waited)


class _Piece(NamedTuple):
    """Images of a call in a batch."""

    call: _Call
    first: int
    size: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.size)


LONE_AFTER = 3
"""Images in a row that met no others, after which the lone engine runs those that follow."""
HANGS_AFTER = 300.0
"""Seconds of one batch after which it counts as hanging."""
Result = Answer | Exception


class Batcher:
    """`submit` from the event loop; inference happens in a thread for each engine.

    on_batch: called from those threads, one at a time; on_drop(reason, images): from any.
    """

    def __init__(
        self,
        engines: Sequence[Runs],
        max_batch: int,
        max_delay: float,
        max_queue: int,
        on_batch: Callable[[BatchStats], None],
        on_drop: Callable[[str, int], None],
        name: str,
        lone: Runs | None = None,
        specialists: Specialists | None = None,
    ):
        """engines: one for each batch at a time; the same one several times if its `run` may be called from several
        threads. lone: runs images that are alone in here, after LONE_AFTER such in a row.
        specialists: where there are graphs for one steering alone: batches are of one steering when that is faster.
        max_batch, max_queue: images; max_delay: seconds that a batch waits to fill up.
        """
        self._lone = lone
        self._specialists = specialists if specialists and specialists.specialised else None
        self._max_batch, self._max_delay, self._max_queue = max_batch, max_delay, max_queue
        self._on_batch, self._on_drop = on_batch, on_drop
        self._queue: deque[_Call] = deque()
        self._queued = 0
        self._seconds_per_image = 0.0
        """Recent mean, of all engines together: predicts how long the queue takes."""
        self._cancelled = False
        """Whether a call was, since the queue was last looked through."""
        self._lock = threading.Lock()
        self._free = [threading.Condition(self._lock) for _ in engines]
        """By which the thread of each engine is woken."""
        self._waiting: list[int] = []
        """Engines whose threads wait. The last one is woken first: its data are in the CPU's caches still."""
        self._counting = threading.Lock()
        self._wake_scheduled = False
        self._closed = False
        self._running = [0] * len(engines)
        """Images in the batch of each engine."""
        self._patience = Patience()
        self._timed = 0
        """Threads that wait for a limited time."""
        self._lone_in_a_row = 0
        """Images that were alone in here, since the last one that was not."""
        self._started = [math.inf] * len(engines)
        """When the batch of each engine started; infinite: it has none."""
        self._threads = [
            threading.Thread(target=self._work, args=(index, engine), name=f"batcher-{name}-{index}", daemon=True)
            for index, engine in enumerate(engines)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Images waiting."""
        return self._queued

    @property
    def alive(self) -> bool:
        """Whether every thread is there and makes progress."""
        return (
            all(thread.is_alive() for thread in self._threads) and time.monotonic() - min(self._started) < HANGS_AFTER
        )

    async def submit(
        self, images: NDArray[np.uint8], steering: Steering, deadline: float, residual: bool = False
    ) -> Answer:
        """images (B, height, width, channels), any B >= 1. Cancelling drops what has not been run yet.

        Raises InvalidRequest for more images than the queue ever takes, Overloaded when it has no room for all now,
        Expired when the deadline passes first, and Stopping after close.
        """
        count = len(images)
        if count > self._max_queue:
            raise InvalidRequest(
                f"{count} images (in Compare each counts twice) exceed the queue limit of {self._max_queue}"
            )
        loop = asyncio.get_running_loop()
        call = _Call(images, steering, residual, deadline, time.monotonic(), loop.create_future())
        with self._lock:
            if self._closed:
                raise Stopping("the server is shutting down; try another one")
            if self._queued + count > self._max_queue and self._cancelled:
                self._drop_finished()
            if self._queued + count > self._max_queue:
                raise Overloaded(
                    f"queue full: {self._queued} queued + {count} new > limit {self._max_queue}. Try again later",
                    retry_after_seconds=min(5.0, 0.05 + 1.5 * self._queued * self._seconds_per_image),
                )
            if self._queued or any(self._running):
                self._lone_in_a_row = 0
            self._queue.append(call)
            self._queued += count
            self._patience.came_back(call.arrived)
        if not self._wake_scheduled:  # once for all calls that arrive in this turn of the loop
            self._wake_scheduled = True
            loop.call_soon(self._wake)
        try:
            return await call.future
        except asyncio.CancelledError:
            self._cancelled = True
            raise

    def close(self) -> None:
        """Refuse new images, run those that wait, end the threads."""
        with self._lock:
            self._closed = True
            self._notify(len(self._free))
        for thread in self._threads:
            thread.join()

    def _wake(self) -> None:
        self._wake_scheduled = False
        with self._lock:
            if not self._timed or self._queued >= self._share(self._patience.expected(time.monotonic())[0]):
                self._notify(self._queued)  # as many engines as there are images, at most

    def _notify(self, engines: int) -> None:
        """Wake so many, as far as there are any; with the lock held."""
        for _ in range(min(engines, len(self._waiting))):
            self._free[self._waiting.pop()].notify()

    def _work(self, index: int, engine: Runs) -> None:
        while taken := self._next_batch(index):
            batch, alone = taken
            self._run(index, self._lone if self._lone and alone else engine, batch)
            self._started[index] = math.inf

    def _run(self, index: int, engine: Runs, batch: Sequence[_Piece]) -> None:
        """Run and answer a batch. When the provider fails, each piece alone: one may have been too much for it."""
        start, cpu = time.monotonic(), time.thread_time()
        images = [piece.call.images[piece.rows] for piece in batch]
        digest = self._common(batch)
        try:
            outputs = engine.run(
                np.concatenate(images) if len(images) > 1 else images[0],
                stack([piece.call.steering.rows(piece.rows) for piece in batch], [piece.size for piece in batch]),
                any(piece.call.residual for piece in batch),
                digest,
            )
        except Exception as error:  # whatever the provider raises is the answer to a call, not the end of the thread
            if len(batch) == 1:
                self._answer(index, [(batch[0].call, error)])
                return
            for piece in batch:
                self._run(index, engine, [piece])
            return
        count = len(outputs.logits)
        results: list[tuple[_Call, Answer]] = []
        with self._counting:
            seconds, cpu_seconds = time.monotonic() - start, time.thread_time() - cpu
            weight = 0.1 if self._seconds_per_image else 1.0  # the first one counts fully
            self._seconds_per_image += weight * (seconds / (count * len(self._threads)) - self._seconds_per_image)
            first = 0
            for piece in batch:
                part = outputs.rows(slice(first, first + piece.size)) if len(batch) > 1 else outputs
                first += piece.size
                if answer := piece.call.add(piece.first, start, part):
                    results.append((piece.call, answer))
            waited = tuple(answer.queue_seconds for _, answer in results)
            self._on_batch(BatchStats(count, outputs.seconds, waited, bool(digest)))
        self._answer(index, results, (seconds, cpu_seconds))

    def _answer(
        self, index: int, results: "Sequence[tuple[_Call, Result]]", took: tuple[float, float] | None = None
    ) -> None:
        """Settle the calls that are complete. took: duration and CPU time of the engine's batch, unless it failed."""
        with self._lock:
            self._running[index] = 0
            if took:
                self._patience.batch(*took)
            self._patience.answered((len(call.images) for call, _ in results), time.monotonic())
        _settle(results)

    def _next_batch(self, index: int) -> tuple[list[_Piece], bool] | None:
        """Wait for images and take this engine's share; while the batch is not full, also until its oldest call is
        max_delay old. None when closed and empty. With it, whether it is for the lone engine."""
        with self._lock:
            wait: float | None
            while True:
                self._drop_finished()
                now = time.monotonic()
                expected, patience = self._patience.expected(now)
                share = self._share(expected)
                if self._queue:
                    arrived = self._queue[0].arrived
                    patience = min(patience, arrived + PATIENCE - now) if self._queued < share else 0.0
                    wait = remaining = max(patience, arrived + self._max_delay - now)
                    if remaining <= 0 or self._queued >= self._max_batch or self._closed:
                        break
                elif self._closed:
                    return None
                else:
                    wait = patience if expected else None
                self._timed += wait is not None
                self._waiting.append(index)
                self._free[index].wait(wait)
                if index in self._waiting:  # nobody woke it
                    self._waiting.remove(index)
                self._timed -= wait is not None
            alone = self._queued == 1 and not any(self._running)
            self._lone_in_a_row += alone
            batch = self._take(share)
            self._running[index] = sum(piece.size for piece in batch)
            self._started[index] = now
            if self._queued:
                self._notify(self._queued)
            return batch, alone and self._lone_in_a_row > LONE_AFTER

    def _share(self, expected: int) -> int:
        """Images that an engine takes, at most a batch. expected: from callers who have just been answered."""
        in_play = self._queued + sum(self._running) + expected
        return max(1, min(self._max_batch, math.ceil(in_play / len(self._running))))

    def _take(self, most: int) -> list[_Piece]:
        """At most so many images, those of the oldest call among them. A call is split only where it is larger."""
        if not self._by_steering(most):
            return self._first(self._queue, most)
        key = self._key(self._queue[0])
        batch = self._first(deque(call for call in self._queue if self._key(call) == key), most)
        begun = {id(piece.call) for piece in batch}
        rest = [call for call in self._queue if id(call) not in begun]
        self._queue = deque([*rest, *(piece.call for piece in batch if piece.call.waiting)])
        return batch

    def _first(self, queue: deque[_Call], most: int) -> list[_Piece]:
        """Take from the queue in its order; what is left of a large call joins its end."""
        batch: list[_Piece] = []
        count = 0
        while queue and count + (size := min(queue[0].waiting, most)) <= most:
            call = queue.popleft()
            batch.append(_Piece(call, call.taken, size))
            call.taken += size
            count += size
            if call.waiting:
                queue.append(call)
        self._queued -= count
        return batch

    def _by_steering(self, most: int) -> bool:
        """Whether the calls with the oldest one's steering, in the graph for it, take less time an image than whatever
        is next in the queue together."""
        if self._specialists is None or not (key := self._key(self._queue[0])):
            return False
        mixed = alike = 0
        for call in self._queue:
            mixed += min(call.waiting, most - mixed)
            if self._key(call) == key:
                alike += min(call.waiting, most - alike)
        return self._specialists.seconds(alike, key) / alike < self._specialists.seconds(mixed) / mixed

    def _common(self, batch: Sequence[_Piece]) -> str:
        """The digest of the steering of all calls of a batch, if there is a graph for it alone that can answer."""
        if self._specialists is None:
            return ""
        keys = {self._key(piece.call) for piece in batch}
        return keys.pop() if len(keys) == 1 else ""

    def _key(self, call: _Call) -> str:
        """The digest of the call's steering, if there is a graph for it alone that can answer; else ""."""
        digest = call.steering.digest
        there = self._specialists is not None and digest in self._specialists.specialised
        return digest if there and not call.residual else ""

    def _drop_finished(self) -> None:
        """Remove cancelled and expired calls, and those of which a part failed."""
        now, self._cancelled = time.monotonic(), False
        if not any(call.deadline <= now or call.future.done() for call in self._queue):
            return
        kept: deque[_Call] = deque()
        for call in self._queue:
            expired = call.deadline <= now and not call.future.done()
            if not expired and not call.future.done():
                kept.append(call)
                continue
            self._queued -= call.waiting
            self._on_drop("deadline" if expired else "cancelled", call.waiting)
            if expired:
                late = Expired("the deadline passed while the images waited; allow more time or send fewer")
                _settle([(call, late)])
        self._queue = kept


def _settle(results: "Sequence[tuple[_Call, Result]]") -> None:
    """Hand results to the event loop, all at once: waking it costs more than an answer."""
    if not results:
        return

    def settle() -> None:
        for call, result in results:
            if call.future.done():
                continue
            if isinstance(result, Exception):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)

    # the loop is closed: nobody waits any more
    with contextlib.suppress(RuntimeError):
        results[0][0].future.get_loop().call_soon_threadsafe(settle)
