"""A bounded queue of images, and the threads that run them in batches. Images with different steering share a batch.

A batch starts as soon as an engine is free; images that arrive meanwhile form the next one. Each engine takes an equal
share of all images in play: those that wait, those that run, and those expected from callers who have just been
answered (patience.py), for which it waits. calls.py chooses the images of a batch.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.calls import Answer, Call, CallQueue, Piece, Ran, Result, Specialists, settle
from service.engine import Outputs
from service.errors import InvalidRequest, Overloaded, Stopping
from service.lowering import Brownout
from service.patience import PATIENCE, Patience
from service.steering import Steering, stack
from training.steering import SteeringArrays


class Runs(Protocol):
    """An engine, as the batcher uses it."""

    def run(
        self, images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False, digest: str = ""
    ) -> Outputs:
        """images: uint8 (B, height, width, channels); steering arrays (B, S, T). residual: whether to return residuals.

        digest: of the terms, if all images have the same and there is a graph for them; else "".
        """
        ...


@dataclass(frozen=True)
class BatchStats:
    """The counts of one batch."""

    images: int
    seconds: float
    queue_seconds: tuple[float, ...]
    """Waiting times of the calls that this batch completes."""
    specialised: bool = False
    """Whether a graph for the images' profile alone ran."""


LONE_AFTER = 3
"""The lone engine takes over after this many consecutive images that met no others."""
HANGS_AFTER = 300.0
"""Seconds after which a batch counts as hanging."""


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
        brownout: Brownout | None = None,
    ):
        """engines: one for each concurrent batch; the same one several times if its `run` is thread-safe. lone: runs
        single images that meet no others, after LONE_AFTER such in a row. specialists: graphs for one steering alone;
        batches are of one steering when that is faster. brownout: None: budgets are never lowered. max_batch: images;
        max_queue: images at full budget; max_delay: seconds that a batch waits to fill up.
        """
        self._lone = lone
        self._max_batch = brownout.max_batch if brownout else max_batch
        self._max_delay, self._max_queue = max_delay, max_queue
        self._on_batch, self._brownout = on_batch, brownout
        self._queue = CallQueue(
            specialists if specialists and specialists.specialised else None,
            on_drop,
            brownout.waits if brownout else None,
        )
        self._seconds_per_work = 0.0
        """Recent mean time of an image at budget 1, over all engines: predicts how long the queue takes."""
        self._lock = threading.Lock()
        self._free = [threading.Condition(self._lock) for _ in engines]
        """Wakes the thread of each engine."""
        self._waiting: list[int] = []
        """Engines whose threads wait. The last one is woken first: its data are still in the CPU's caches."""
        self._counting = threading.Lock()
        self._wake_scheduled = False
        self._closed = False
        self._running = [0] * len(engines)
        """Images in the current batch of each engine."""
        self._patience = Patience()
        self._timed = 0
        """Threads that wait with a time limit."""
        self._lone_in_a_row = 0
        """Consecutive images that met no others."""
        self._started = [math.inf] * len(engines)
        """When the batch of each engine started; infinite without a batch."""
        self._threads = [
            threading.Thread(target=self._work, args=(index, engine), name=f"batcher-{name}-{index}", daemon=True)
            for index, engine in enumerate(engines)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Images waiting."""
        return self._queue.images

    @property
    def work(self) -> float:
        """Images waiting, at full budget: each counts as its budget, or as its floor in brownout."""
        return self._queue.work

    @property
    def level(self) -> float:
        """The level of brownout, 0 to 1."""
        return self._brownout.level(time.monotonic()) if self._brownout else 0.0

    @property
    def alive(self) -> bool:
        """Whether every thread runs and makes progress."""
        return (
            all(thread.is_alive() for thread in self._threads) and time.monotonic() - min(self._started) < HANGS_AFTER
        )

    async def submit(
        self,
        images: NDArray[np.uint8],
        steering: Steering,
        deadline: float,
        residual: bool = False,
        ran: list[Ran] | None = None,
    ) -> Answer:
        """images (B, height, width, channels), any B >= 1. Cancelling drops the images that have not run yet. ran: gets
        the batches that have run some of them.

        Raises InvalidRequest for more work than the queue's limit, Overloaded when the queue is full, Expired when
        the deadline passes first, and Stopping after close.
        """
        loop = asyncio.get_running_loop()
        call = Call(images, steering, residual, deadline, time.monotonic(), loop.create_future(), ran=ran)
        if self._brownout and steering.permission:
            call.room = steering.permission.floor
        elif steering.budget is not None:
            call.room = steering.budget
        work = len(images) * call.room
        if work > self._max_queue:
            raise InvalidRequest(
                f"{work:g} images at full budget (in Compare each counts twice) exceed the queue limit of "
                f"{self._max_queue}"
            )
        with self._lock:
            if self._closed:
                raise Stopping("the server is shutting down; try another one")
            if self._brownout:
                self._brownout.enter(call)
            if self._queue.work + work > self._max_queue and self._queue.has_cancelled:
                self._queue.drop_finished()
            if (queued := self._queue.work) + work > self._max_queue:
                raise Overloaded(
                    f"queue full: {queued:g} queued + {work:g} new > limit {self._max_queue}. Try again later",
                    retry_after_seconds=min(5.0, 0.05 + 1.5 * self._queue_seconds(call.arrived)),
                )
            if queued and self._brownout and self._brownout.full(call, call.arrived):
                raise Overloaded(
                    f"queue full: {self._queue.images} queued + {len(images)} new images would be late at their lowest "
                    "budgets. Try again later",
                    retry_after_seconds=min(5.0, 0.05 + 1.5 * self._queue_seconds(call.arrived)),
                )
            if queued or any(self._running):
                self._lone_in_a_row = 0
            self._queue.append(call)
            self._patience.came_back(call.arrived)
        if not self._wake_scheduled:  # once for all calls that arrive in this turn of the loop
            self._wake_scheduled = True
            loop.call_soon(self._wake)
        try:
            return await call.future
        except asyncio.CancelledError:
            self._queue.has_cancelled = True
            raise

    def close(self) -> None:
        """Refuse new images, run those that wait, and end the threads."""
        with self._lock:
            self._closed = True
            self._notify(len(self._free))
        for thread in self._threads:
            thread.join()

    def _queue_seconds(self, now: float) -> float:
        """How long the queue is expected to take."""
        if self._brownout:
            return self._brownout.seconds(now)
        return self._queue.work * self._seconds_per_work

    def _wake(self) -> None:
        self._wake_scheduled = False
        with self._lock:
            if not self._timed or self._queue.images >= self._share(self._patience.expected(time.monotonic())[0]):
                self._notify(self._queue.images)  # at most one engine for each image

    def _notify(self, engines: int) -> None:
        """Wake at most so many waiting engines; with the lock held."""
        for _ in range(min(engines, len(self._waiting))):
            self._free[self._waiting.pop()].notify()

    def _work(self, index: int, engine: Runs) -> None:
        while taken := self._next_batch(index):
            batch, alone = taken
            self._run(index, self._lone if self._lone and alone else engine, batch)
            self._started[index] = math.inf

    def _run(self, index: int, engine: Runs, batch: Sequence[Piece]) -> None:
        """Run and answer a batch. If the provider fails, run each piece alone: one may have been too large for it."""
        start, cpu = time.monotonic(), time.thread_time()
        images = [piece.call.images[piece.rows] for piece in batch]
        digest = self._queue.common_digest(batch)
        try:
            pixels = np.concatenate(images) if len(images) > 1 else images[0]
            steering = stack([piece.call.steering.rows(piece.rows) for piece in batch], [piece.size for piece in batch])
            inference = time.monotonic()
            outputs = engine.run(pixels, steering, any(piece.call.residual for piece in batch), digest)
        except Exception as error:  # whatever the provider raises is the answer to its calls; the thread continues
            if len(batch) == 1:
                self._answer(index, [(batch[0].call, error)])
                return
            for piece in batch:
                self._run(index, engine, [piece])
            return
        count = len(outputs.logits)
        results: list[tuple[Call, Answer]] = []
        with self._counting:
            seconds, cpu_seconds = time.monotonic() - start, time.thread_time() - cpu
            work = sum(piece.call.room * piece.size for piece in batch)
            weight = 0.1 if self._seconds_per_work else 1.0  # the first one counts fully
            self._seconds_per_work += weight * (seconds / (work * len(self._threads)) - self._seconds_per_work)
            if self._brownout and engine is not self._lone:
                self._brownout.ran(batch, outputs, seconds)
                self._max_batch = self._brownout.max_batch
            first = 0
            for piece in batch:
                part = outputs.rows(slice(first, first + piece.size)) if len(batch) > 1 else outputs
                first += piece.size
                if piece.call.ran is not None:
                    piece.call.ran.append(Ran(start, start + seconds, inference, outputs.seconds, count))
                if answer := piece.call.add(piece.first, start, part):
                    results.append((piece.call, answer))
            waited = tuple(answer.queue_seconds for _, answer in results)
            self._on_batch(BatchStats(count, outputs.seconds, waited, bool(digest)))
        self._answer(index, results, (seconds, cpu_seconds))

    def _answer(
        self, index: int, results: Sequence[tuple[Call, Result]], took: tuple[float, float] | None = None
    ) -> None:
        """Settle complete calls. took: duration and CPU time of the engine's batch, unless it failed."""
        with self._lock:
            self._running[index] = 0
            if self._brownout:
                self._brownout.ended(index)
            if took:
                self._patience.batch(*took)
            self._patience.answered((len(call.images) for call, _ in results), time.monotonic())
        settle(results)

    def _next_batch(self, index: int) -> tuple[list[Piece], bool] | None:
        """Wait for images and take this engine's share, and whether the lone engine is to run it. A batch that is not
        full waits until its oldest call is max_delay old. None when closed and empty."""
        with self._lock:
            wait: float | None
            while True:
                self._queue.drop_finished()
                now = time.monotonic()
                expected, patience = self._patience.expected(now)
                share = self._share(expected)
                queued = self._queue.images
                if oldest := self._queue.oldest:
                    arrived = oldest.arrived
                    patience = min(patience, arrived + PATIENCE - now) if queued < share else 0.0
                    wait = remaining = max(patience, arrived + self._max_delay - now)
                    if remaining <= 0 or queued >= self._max_batch or self._closed:
                        break
                elif self._closed:
                    return None
                else:
                    wait = patience if expected else None
                self._timed += wait is not None
                self._waiting.append(index)
                self._free[index].wait(wait)
                if index in self._waiting:  # the wait timed out
                    self._waiting.remove(index)
                self._timed -= wait is not None
            alone = queued == 1 and not any(self._running)
            self._lone_in_a_row += alone
            if self._brownout:
                self._brownout.raise_level(self._queue, now)
            batch = self._queue.take(share)
            if self._brownout:
                self._brownout.lower(self._queue, batch, index, now)
            self._running[index] = sum(piece.size for piece in batch)
            self._started[index] = now
            if self._queue.images:
                self._notify(self._queue.images)
            return batch, alone and self._lone_in_a_row > LONE_AFTER

    def _share(self, expected: int) -> int:
        """Images that an engine takes, at most a batch. expected: images of callers who have just been answered."""
        in_play = self._queue.images + sum(self._running) + expected
        return max(1, min(self._max_batch, math.ceil(in_play / len(self._running))))
