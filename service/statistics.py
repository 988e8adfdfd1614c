"""What a model has done since it was loaded, in plain numbers, for clients that ask. (For Prometheus: metrics.py.)"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.batcher import Answer


@dataclass
class Duration:
    """How many there were, and how long they took together."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one that took so many seconds."""
        self.count += 1
        self.seconds += seconds


@dataclass
class Statistics:
    """Calls are counted by the event loop, batches by the batcher's thread."""

    success: Duration = field(default_factory=Duration)
    """Calls, from their arrival at the model to their answer."""
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    """This and the next three: of the calls that were answered."""
    decode: Duration = field(default_factory=Duration)
    """Raw pixels take no time, and are counted."""
    inference: Duration = field(default_factory=Duration)
    """Of each call the time of its batches, which are others' too."""
    output: Duration = field(default_factory=Duration)
    """The rest of a call: from inference to its answer."""
    batches: dict[int, Duration] = field(default_factory=dict)
    """By their size, images."""
    last: float = 0.0
    """When the last batch ended; seconds since 1970."""

    def call(self, seconds: float, decoded: float | None, answer: Answer | None) -> None:
        """decoded: seconds that it took. Without an answer, a call that failed."""
        if answer is None or decoded is None:
            self.fail.add(seconds)
            return
        self.success.add(seconds)
        self.queue.add(answer.queue_seconds)
        self.decode.add(decoded)
        self.inference.add(answer.outputs.seconds)
        # A call of several batches waits for its last one while the first ones run: the parts can exceed the whole.
        self.output.add(max(0.0, seconds - decoded - answer.queue_seconds - answer.outputs.seconds))

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """What raises in here is a call that failed."""
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self.call(time.perf_counter() - start, None, None)
            raise

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch that has just ended, by its images. seconds: its duration."""
        self.batches.setdefault(images, Duration()).add(seconds)
        self.last = time.time()
