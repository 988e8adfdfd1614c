"""What can go wrong on the way, and what is worth another try."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

ATTEMPTS = 5
FIRST_WAIT = 1.0
"""Seconds before the second attempt; doubled for each further one."""
T = TypeVar("T")


class DeliveryError(Exception):
    """Something cannot be delivered; the message names the address, the value and what is allowed."""


class Interrupted(DeliveryError):
    """The connection was lost or the other side is busy: another attempt may succeed."""


def retried(action: Callable[[], T]) -> T:
    """What the action returns; after an Interrupted it is tried again, ATTEMPTS times in all."""
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except Interrupted as error:
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            print(f"{error}; attempt {attempt} of {ATTEMPTS}, the next one in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    return action()
