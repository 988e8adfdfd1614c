"""How long a free engine waits for callers who have just been answered, before it starts a batch without them.

In a closed loop (each caller sends its next call when it has an answer) the first caller to come back would get a batch
of its own, and small batches cost more per image. Waiting for the others pays if they come back soon, which is learned
from how long callers took before (a mean and a mean deviation, as TCP estimates its round trips, RFC 6298), and if
the CPU is not idle meanwhile: where the threads of inference do not have the CPUs to themselves, the event loop, which
brings the images, uses what they leave.

All times are on the clock of time.monotonic, in seconds.
"""

from collections import deque
from collections.abc import Iterable

PATIENCE = 0.01
"""The longest wait."""
SHARE = 0.75
"""The longest wait, as a share of the duration of the last batch."""
CONTENDED = 1.15
"""Duration of a batch per CPU time of its thread, above which the CPUs count as shared with other threads."""
FORGET = 0.1
"""A caller who has not come back for so long is not expected any more."""


class Patience:
    """Not for several threads at once."""

    def __init__(self) -> None:
        self._answered: deque[tuple[float, int]] = deque()
        """Callers who have not come back: when they were answered, and their images. Oldest first."""
        self._mean, self._deviation = PATIENCE / 5, 0.0
        """Of the time that callers take to come back."""
        self._contention = 1.0
        """Recent mean of duration per CPU time."""
        self._wait = 0.0
        """From a caller's answer; 0: nobody is waited for."""

    def batch(self, seconds: float, cpu_seconds: float) -> None:
        """A batch ended: its duration and the CPU time of its thread."""
        contention = min(seconds / max(cpu_seconds, 1e-6), 2 * CONTENDED)
        self._contention += (contention - self._contention) / 8
        wait = self._mean + self._deviation
        pays = self._contention > CONTENDED and wait < min(PATIENCE, SHARE * seconds)
        self._wait = wait if pays else 0.0

    def answered(self, images: Iterable[int], now: float) -> None:
        """Callers are answered: the images of each."""
        self._answered.extend((now, count) for count in images)

    def came_back(self, now: float) -> None:
        """A call arrives: presumably from the caller who was answered first."""
        while self._answered:
            answered, _ = self._answered.popleft()
            if now - answered < FORGET:
                error = now - answered - self._mean
                self._mean += error / 8
                self._deviation += (abs(error) - self._deviation) / 8
                return

    def expected(self, now: float) -> tuple[int, float]:
        """The images of the callers who are waited for, and for how many more seconds; (0, 0.0) if there are none."""
        images, oldest = 0, now - self._wait
        for answered, count in reversed(self._answered):
            if answered + self._wait <= now:
                break
            images, oldest = images + count, answered
        return images, oldest + self._wait - now
