"""A bounded queue of images and one thread that runs them in batches. Images with different steering share a batch.

Calls take turns: of a call that is larger than a batch, one batch of images stands in the queue, and the next one joins
its end when that is taken. So a small call waits for one batch of each call before it at most, however large they are.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine import Outputs, joined
from service.errors import Expired, InvalidRequest, Overloaded, Stopping
from service.steering import Steering, stack
from training.steering import SteeringArrays


class Runs(Protocol):
    """What the batcher needs of an engine."""

    def run(self, images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False) -> Outputs: ...


@dataclass(frozen=True)
class Answer:
    outputs: Outputs
    """Of the images of one call; seconds: of its batches together."""
    queue_seconds: float
    """From the call's arrival to the start of its last batch."""


@dataclass(frozen=True)
class BatchStats:
    """What happened in one batch."""

    images: int
    seconds: float
    queue_seconds: tuple[float, ...]
    """Of each piece of a call in the batch."""


@dataclass(frozen=True)
class _Piece:
    """Images of one call, at most a batch."""

    images: NDArray[np.uint8]
    steering: Steering
    residual: bool
    deadline: float
    """On the clock of time.monotonic; infinite: none."""
    arrived: float
    future: "asyncio.Future[tuple[Outputs, float]]"
    following: "_Piece | None" = None
    """What comes after it of the same call; not in the queue yet."""

    def chain(self) -> "Iterator[_Piece]":
        """This one and what comes after it."""
        piece: _Piece | None = self
        while piece:
            yield piece
            piece = piece.following


HANGS_AFTER = 300.0
"""Seconds of one batch after which it is taken to hang."""
Result = tuple[Outputs, float] | Exception
"""What becomes of a piece: its outputs and the seconds that it waited, or what went wrong."""


class Batcher:
    """`submit` from the event loop; inference happens in a thread of its own.

    on_batch: called from that thread; on_drop(reason, images): from either.
    """

    def __init__(
        self,
        engine: Runs,
        max_batch: int,
        max_delay: float,
        max_queue: int,
        on_batch: Callable[[BatchStats], None],
        on_drop: Callable[[str, int], None],
        name: str,
    ):
        """max_batch, max_queue: images; max_delay: seconds that a batch waits to fill up."""
        self._engine = engine
        self._max_batch, self._max_delay, self._max_queue = max_batch, max_delay, max_queue
        self._on_batch, self._on_drop = on_batch, on_drop
        self._queue: deque[_Piece] = deque()
        self._queued = 0
        self._seconds_an_image = 0.0
        """Of late: how long what waits will take."""
        self._cancelled = False
        """Whether a call was, since the queue was last looked through."""
        self._changed = threading.Condition()
        self._closed = False
        self._batch_started = math.inf
        """That is being run."""
        self._thread = threading.Thread(target=self._work, name=f"batcher-{name}", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Images waiting."""
        return self._queued

    @property
    def alive(self) -> bool:
        """Whether the thread is there and gets on."""
        return self._thread.is_alive() and time.monotonic() - self._batch_started < HANGS_AFTER

    async def submit(
        self, images: NDArray[np.uint8], steering: Steering, deadline: float, residual: bool = False
    ) -> Answer:
        """images (B, height, width, channels), any B >= 1. Cancelling drops what has not been run yet.

        Raises InvalidRequest for more images than the queue ever takes, Overloaded when it has no room for all now,
        Expired when the deadline passes first, and Stopping after close.
        """
        if len(images) > self._max_queue:
            raise InvalidRequest(
                f"images are {len(images)} to run (in Compare each twice); allowed: {self._max_queue}, "
                "as many as may wait"
            )
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        step = self._max_batch
        first: _Piece | None = None
        for start in reversed(range(0, len(images), step)):
            part = slice(start, start + step)
            first = _Piece(images[part], steering.rows(part), residual, deadline, now, loop.create_future(), first)
        assert first, "a call has images"
        pieces = list(first.chain())
        with self._changed:
            if self._closed:
                raise Stopping("the server is shutting down; try another one")
            if self._queued + len(images) > self._max_queue and self._cancelled:
                self._drop_finished()
            if self._queued + len(images) > self._max_queue:
                raise Overloaded(
                    f"{self._queued} images wait already and {len(images)} are given; allowed: {self._max_queue} "
                    "together. Try again later",
                    retry_after_seconds=min(5.0, 0.05 + 1.5 * self._queued * self._seconds_an_image),
                )
            self._queue.append(first)
            self._queued += len(images)
            self._changed.notify()
        futures = [piece.future for piece in pieces]
        try:
            parts = await asyncio.gather(*futures) if len(futures) > 1 else [await futures[0]]
        except BaseException:
            for future in futures:
                future.cancel()
            self._cancelled = True
            raise
        return Answer(joined([outputs for outputs, _ in parts]), max(waited for _, waited in parts))

    def close(self) -> None:
        """Refuse new images, run those that wait, end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._batch_started = time.monotonic()
            self._run(batch)
            self._batch_started = math.inf

    def _run(self, batch: list[_Piece]) -> None:
        """Run and answer them. When the provider fails, each alone: it may have been too much of one of them only."""
        start = time.monotonic()
        images = [piece.images for piece in batch]
        try:
            outputs = self._engine.run(
                np.concatenate(images) if len(images) > 1 else images[0],
                stack([piece.steering for piece in batch], [len(piece.images) for piece in batch]),
                any(piece.residual for piece in batch),
            )
        except Exception as error:  # whatever the provider raises is the answer to a call, not the end of the thread
            if len(batch) == 1:
                _settle([(batch[0], error)])
                return
            for piece in batch:
                self._run([piece])
            return
        count = sum(map(len, images))
        weight = 0.1 if self._seconds_an_image else 1.0  # the first one is taken as it is
        self._seconds_an_image += weight * ((time.monotonic() - start) / count - self._seconds_an_image)
        waited = tuple(start - piece.arrived for piece in batch)
        self._on_batch(BatchStats(count, outputs.seconds, waited))
        results: list[tuple[_Piece, Result]] = []
        first = 0
        for piece, seconds in zip(batch, waited, strict=True):
            rows = slice(first, first + len(piece.images))
            first = rows.stop
            results.append((piece, (outputs.rows(rows), seconds)))
        _settle(results)

    def _next_batch(self) -> list[_Piece]:
        """Wait for a batch: full, or its oldest piece max_delay old. [] when closed and empty."""
        with self._changed:
            while True:
                self._drop_finished()
                if self._queue:
                    wait = self._queue[0].arrived + self._max_delay - time.monotonic()
                    if self._queued >= self._max_batch or wait <= 0 or self._closed:
                        return self._take()
                    self._changed.wait(wait)
                elif self._closed:
                    return []
                else:
                    self._changed.wait()

    def _take(self) -> list[_Piece]:
        batch: list[_Piece] = []
        count = 0
        while self._queue and count + len(self._queue[0].images) <= self._max_batch:
            piece = self._queue.popleft()
            batch.append(piece)
            count += len(piece.images)
            if piece.following:
                self._queue.append(piece.following)
        self._queued -= count
        return batch

    def _drop_finished(self) -> None:
        """Take out what nobody waits for any more: cancelled calls, and those whose deadline has passed."""
        now, self._cancelled = time.monotonic(), False
        kept: deque[_Piece] = deque()
        for piece in self._queue:
            expired = piece.deadline <= now
            if not expired and not piece.future.cancelled():
                kept.append(piece)
                continue
            count = sum(len(part.images) for part in piece.chain())
            self._queued -= count
            self._on_drop("deadline" if expired else "cancelled", count)
            if expired:
                late = Expired("the deadline passed while the images waited; allow more time or send fewer")
                _settle([(piece, late)])
        self._queue = kept


def _settle(results: "Sequence[tuple[_Piece, Result]]") -> None:
    """Hand results to the event loop, all at once: waking it costs more than an answer."""

    def settle() -> None:
        for piece, result in results:
            if piece.future.done():
                continue
            if isinstance(result, Exception):
                piece.future.set_exception(result)
            else:
                piece.future.set_result(result)

    # the loop is closed: nobody waits any more
    with contextlib.suppress(RuntimeError):
        results[0][0].future.get_loop().call_soon_threadsafe(settle)
