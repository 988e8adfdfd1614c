"""The statistics of a model since it was loaded, for clients that request them. (For Prometheus: metrics.py.)"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.calls import Answer


@dataclass
class Duration:
    """A count, and the sum of the durations."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more, with this duration."""
        self.count += 1
        self.seconds += seconds


@dataclass
class Statistics:
    """Counts of calls, made on the event loop, and of batches, made in the batcher's threads."""

    success: Duration = field(default_factory=Duration)
    """Calls, from their arrival at the model to their answer."""
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    """This field and the next three count answered calls."""
    decode: Duration = field(default_factory=Duration)
    """Calls with raw pixels count as 0 s."""
    inference: Duration = field(default_factory=Duration)
    """For each call, the time of its batches, which it shares with other calls."""
    output: Duration = field(default_factory=Duration)
    """The rest of a call, from inference to its answer."""
    batches: dict[int, Duration] = field(default_factory=dict)
    """By size in images."""
    last: float = 0.0
    """When the last batch ended; seconds since 1970."""

    def call(self, seconds: float, decoded: float | None, answer: Answer | None) -> None:
        """Count a call. decoded: seconds of decoding. A call without an answer counts as failed."""
        if answer is None or decoded is None:
            self.fail.add(seconds)
            return
        self.success.add(seconds)
        self.queue.add(answer.queue_seconds)
        self.decode.add(decoded)
        self.inference.add(answer.outputs.seconds)
        # A call of several batches waits for the last one while the first ones run, so the parts may exceed the whole.
        self.output.add(max(0.0, seconds - decoded - answer.queue_seconds - answer.outputs.seconds))

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Count a call as failed if the context raises."""
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
