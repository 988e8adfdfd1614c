"""What is known of the call that is being answered: for its counts, and for a line in the access log."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Record:
    """A call, as far as it is known. Empty: not known, or it has none."""

    model: str = ""
    version: str = ""


_CURRENT: ContextVar[Record] = ContextVar("record")
_OUTSIDE = Record()
"""Of what is answered to nobody, as in tests: written, and never read."""


def begin() -> Record:
    """The record of a new call, which is the current one of this task from now on."""
    record = Record()
    _CURRENT.set(record)
    return record


def current() -> Record:
    """The record of the call that this task answers."""
    return _CURRENT.get(_OUTSIDE)
