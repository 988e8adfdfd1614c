"""How long a free engine waits for callers who have just been answered, before it starts a batch without them.

In a closed loop each caller sends its next call when it has an answer. The first caller to return would get a batch of
its own, and small batches cost more per image. Waiting for the others pays if they return soon and if the CPU is not
idle meanwhile. How soon they return is estimated from earlier returns, by a mean and a mean deviation as TCP estimates
its round trips (RFC 6298). The CPU is not idle if inference threads share the CPUs with the event loop, which brings
the images.

All times are on the clock of time.monotonic, in seconds.
"""

from collections import deque
from collections.abc import Iterable

PATIENCE = 0.01
"""The longest wait."""
SHARE = 0.75
"""The longest wait, as a share of the duration of the last batch."""
CONTENDED = 1.15
"""Ratio of a batch's duration to its thread's CPU time above which the CPUs count as shared with other threads."""
FORGET = 0.1
"""Seconds after which a caller who has not returned is no longer expected."""


class Patience:
    """The callers who have just been answered, and how long to wait for them. Not thread-safe."""

    def __init__(self) -> None:
        self._answered: deque[tuple[float, int]] = deque()
        """Callers who have not returned: when they were answered, and their images. Oldest first."""
        self._mean, self._deviation = PATIENCE / 5, 0.0
        """Mean and mean deviation of the time that callers take to return."""
        self._contention = 1.0
        """Recent mean ratio of a batch's duration to CPU time."""
        self._wait = 0.0
        """How long to wait for a caller after its answer, seconds; 0: not at all."""

    def batch(self, seconds: float, cpu_seconds: float) -> None:
        """Record the duration of a batch and the CPU time of its thread."""
        contention = min(seconds / max(cpu_seconds, 1e-6), 2 * CONTENDED)
        self._contention += (contention - self._contention) / 8
        wait = self._mean + self._deviation
        pays = self._contention > CONTENDED and wait < min(PATIENCE, SHARE * seconds)
        self._wait = wait if pays else 0.0

    def answered(self, images: Iterable[int], now: float) -> None:
        """Record that callers were answered. images: of each of them."""
        self._answered.extend((now, count) for count in images)

    def came_back(self, now: float) -> None:
        """Record a new call, presumably from the caller who was answered first."""
        while self._answered:
            answered, _ = self._answered.popleft()
            if now - answered < FORGET:
                error = now - answered - self._mean
                self._mean += error / 8
                self._deviation += (abs(error) - self._deviation) / 8
                return

    def expected(self, now: float) -> tuple[int, float]:
        """The images of the expected callers, and for how many more seconds to wait; (0, 0.0) for none."""
        images, oldest = 0, now - self._wait
        for answered, count in reversed(self._answered):
            if answered + self._wait <= now:
                break
            images, oldest = images + count, answered
        return images, oldest + self._wait - now
