"""Errors of delivery, and retries."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

ATTEMPTS = 5
FIRST_WAIT = 1.0
"""Seconds before the second attempt; doubled for each further one."""
T = TypeVar("T")


class DeliveryError(Exception):
    """A delivery fails; the message names the address, the value and what is allowed."""


class Interrupted(DeliveryError):
    """The connection was lost or the server is busy; another attempt may succeed."""


def retried(action: Callable[[], T]) -> T:
    """The result of the action, which is tried again after an Interrupted, up to ATTEMPTS times in all."""
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except Interrupted as error:
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            print(f"{error}; attempt {attempt} of {ATTEMPTS}, the next one in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    return action()
