"""What a model has done since it was loaded, in plain numbers, for clients that ask. (For Prometheus: metrics.py.)"""

import threading
import time
from dataclasses import dataclass, field


@dataclass
class Duration:
    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


@dataclass
class Statistics:
    """Changed by the event loop and by the batcher's thread."""

    success: Duration = field(default_factory=Duration)
    """Calls, from their arrival at the model to their answer."""
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    decode: Duration = field(default_factory=Duration)
    inference: Duration = field(default_factory=Duration)
    """Batches."""
    images: int = 0
    """That were run."""
    by_batch_size: dict[int, Duration] = field(default_factory=dict)
    last: float = 0.0
    """When the last batch ended; seconds since 1970."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def batch(self, images: int, seconds: float) -> None:
        with self._lock:
            self.images += images
            self.inference.add(seconds)
            self.by_batch_size.setdefault(images, Duration()).add(seconds)
            self.last = time.time()

    def call(self, seconds: float, decoded: float | None, queued: float | None) -> None:
        """decoded, queued: seconds, of a call that was answered; None: it failed."""
        with self._lock:
            (self.fail if queued is None else self.success).add(seconds)
            if decoded is not None:
                self.decode.add(decoded)
            if queued is not None:
                self.queue.add(queued)
