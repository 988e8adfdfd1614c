"""Measures what brownout costs: runs images that it lowered at their own budgets too, once no budgets are lowered.

A server in brownout must not get more work, so these images wait. After a long brownout only the last ones are left.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from service.batcher import Batcher
from service.engine import Outputs
from service.errors import Overloaded, Stopping
from service.steering import Steering

KEPT = 64
"""Limit of the images that wait."""
PAUSE = 0.5
"""Seconds between checks of the level."""


class LoweredShadow:
    """Keeps some of the lowered images and runs them later. Used from the event loop."""

    def __init__(self, batcher: Batcher, fraction: float, most_work: float, count: Callable[[Steering, bool], None]):
        """fraction: of the lowered images; most_work: in the queue, above which they wait; count(steering, agreed):
        called for each image, agreed: whether both budgets gave the same label."""
        self._batcher, self._fraction, self._most_work, self._count = batcher, fraction, most_work, count
        self._kept: deque[tuple[NDArray[np.uint8], Steering, int]] = deque(maxlen=KEPT)
        """An image (1, height, width, channels), its steering, and its label at the lowered budget."""
        self._running: asyncio.Task[None] | None = None

    def lowered(self, pixels: NDArray[np.uint8], steering: Steering, outputs: Outputs) -> None:
        """Keep some images of a lowered call. steering: as the call requested it."""
        for index, label in enumerate(outputs.logits.argmax(1).tolist()):
            if random.random() < self._fraction:
                part = slice(index, index + 1)
                self._kept.append((pixels[part].copy(), replace(steering.rows(part), permission=None), label))
        if self._kept and (self._running is None or self._running.done()):
            self._running = asyncio.create_task(self._run())

    def close(self) -> None:
        """Forget the images."""
        if self._running:
            self._running.cancel()

    async def _run(self) -> None:
        while self._kept:
            if self._batcher.level or self._batcher.work > self._most_work:
                await asyncio.sleep(PAUSE)
                continue
            pixels, steering, label = self._kept.popleft()
            try:
                answer = await self._batcher.submit(pixels, steering, math.inf)
            except Overloaded:
                continue
            except Stopping:
                return
            self._count(steering, int(answer.outputs.logits[0].argmax()) == label)
