"""What is known of the call that is being answered: for its counts, its line in the access log, and its trace."""

import json
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.calls import Ran

if TYPE_CHECKING:
    from service.limits import Admission

CLIENT = "x-client-name"
"""Metadata in which a client says who it is."""
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""Metadata `traceparent`, as of the W3C recommendation Trace Context; the group is the trace id."""
PROBES = re.compile(".+/(ServerLive|ServerReady|ModelReady)")
"""Methods whose calls are in no log."""


@dataclass(slots=True)
class Course:
    """When a traced call was where. Times are those of time.monotonic, in seconds."""

    decoding: tuple[float, float] | None = None
    """When its images began to be decoded, and how long that took; None for pixels."""
    queued: float | None = None
    """When its images joined the queue."""
    batches: list[Ran] = field(default_factory=list)
    """Those that have run some of them."""
    trace_id: str = ""
    """Of its spans; "" before they are made, and without any."""
    span_id: str = ""
    """Of the call's own span."""


@dataclass(slots=True)
class Record:
    """A call, as far as it is known. Empty, None: not known, or it has none."""

    model: str = ""
    version: str = ""
    profile: str = ""
    """`custom`: inline terms."""
    group: str = ""
    """Of its profile, as in counting.GROUPS; "" until its images are about to run."""
    images: int | None = None
    budget: float | None = None
    """As asked for."""
    budget_applied: float | None = None
    """If the server lowered it."""
    queue_seconds: float | None = None
    inference_seconds: float | None = None
    decode_seconds: float | None = None
    refused: str = ""
    """Why, in a word, if it was not for what the request says."""
    admission: "Admission | None" = None
    """None: no limits by client."""
    course: Course | None = None
    """None: the call is not traced."""


_CURRENT: ContextVar[Record] = ContextVar("record")
_OUTSIDE = Record()
"""Of what is answered to nobody, as in tests: written, and never read."""


def begin(traced: bool = False) -> Record:
    """The record of a new call, which is the current one of this task from now on. traced: with its course."""
    record = Record(course=Course() if traced else None)
    _CURRENT.set(record)
    return record


def current() -> Record:
    """The record of the call that this task answers."""
    return _CURRENT.get(_OUTSIDE)


class Line(dict[str, Any]):
    """A line of the access log: JSON, in a log of text too."""

    def __str__(self) -> str:
        return json.dumps(self)


def line(
    record: Record, method: str, code: str, seconds: float, request_id: str, sizes: tuple[int, int], context: Any
) -> Line:
    """The line of an answered call, without what is not known. sizes: bytes of the request and of the answer."""
    metadata = dict(context.invocation_metadata() or ())
    trace = TRACEPARENT.fullmatch(str(metadata.get("traceparent", "")))
    fields = {
        "method": method,
        "code": code,
        "model": record.model,
        "version": record.version,
        "profile": record.profile,
        "images": record.images,
        "budget": record.budget,
        "budget_applied": record.budget_applied,
        "refused": record.refused,
        "duration_ms": _milliseconds(seconds),
        "decode_ms": _milliseconds(record.decode_seconds),
        "queue_ms": _milliseconds(record.queue_seconds),
        "inference_ms": _milliseconds(record.inference_seconds),
        "request_bytes": sizes[0],
        "response_bytes": sizes[1],
        "peer": context.peer(),
        "client": str(metadata.get(CLIENT, ""))[:128],
        "certificate": certificate_name(context),
        "request_id": request_id,
        "trace_id": trace[1] if trace else record.course.trace_id if record.course else "",
    }
    return Line((name, value) for name, value in fields.items() if value not in ("", None))


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def certificate_name(context: Any) -> str:
    """The name in the certificate of a call's client; "" without one."""
    properties: dict[str, list[bytes]] = context.auth_context()
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for name in properties.get(key) or ():
            if name:
                return name.decode(errors="replace")
    return ""
