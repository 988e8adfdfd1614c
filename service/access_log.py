"""The record of the current call, for its metrics, its line in the access log, and its trace."""

import json
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.calls import Ran

if TYPE_CHECKING:
    from service.limits import Admission

CLIENT = "x-client-name"
"""The metadata with which a client names itself."""
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""The metadata `traceparent` as defined by W3C Trace Context; the group is the trace id."""
PROBES = re.compile(".+/(ServerLive|ServerReady|ModelReady)")
"""Methods whose calls are not logged."""


@dataclass(slots=True)
class Course:
    """The timeline of a traced call. Times are those of time.monotonic, in seconds."""

    decoding: tuple[float, float] | None = None
    """Start and duration of decoding its images; None for raw pixels."""
    queued: float | None = None
    """The time when its images entered the queue."""
    batches: list[Ran] = field(default_factory=list)
    """The batches that ran its images."""
    trace_id: str = ""
    """Trace id of its spans; "" before they are created, or if there are none."""
    span_id: str = ""
    """Id of the call's own span."""


@dataclass(slots=True)
class Record:
    """What is known about a call. Empty or None: unknown, or not applicable."""

    model: str = ""
    version: str = ""
    profile: str = ""
    """Name of its profile; `custom`: inline terms."""
    group: str = ""
    """The group of its profile, as in counting.GROUPS; "" until its images are about to run."""
    images: int | None = None
    budget: float | None = None
    """The requested budget."""
    budget_applied: float | None = None
    """The applied budget, if the server lowered it."""
    queue_seconds: float | None = None
    inference_seconds: float | None = None
    decode_seconds: float | None = None
    refused: str = ""
    """The reason for a refusal, in a word, unless it was the request's content."""
    admission: "Admission | None" = None
    """None: no limits by client."""
    course: Course | None = None
    """None: the call is not traced."""


_CURRENT: ContextVar[Record] = ContextVar("record")
_OUTSIDE = Record()
"""The record outside of any call, as in tests: written, but never read."""


def begin(traced: bool = False) -> Record:
    """Create the record of a new call and make it the current one of this task. traced: with a Course."""
    record = Record(course=Course() if traced else None)
    _CURRENT.set(record)
    return record


def current() -> Record:
    """The record of the call that this task is answering."""
    return _CURRENT.get(_OUTSIDE)


class Line(dict[str, Any]):
    """A line of the access log: JSON, even in a text log."""

    def __str__(self) -> str:
        return json.dumps(self)


def line(
    record: Record, method: str, code: str, seconds: float, request_id: str, sizes: tuple[int, int], context: Any
) -> Line:
    """The line of an answered call, without unknown fields. sizes: of the request and the answer, in bytes."""
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
    """The name in the certificate of a call's client; "" without a certificate."""
    properties: dict[str, list[bytes]] = context.auth_context()
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for name in properties.get(key) or ():
            if name:
                return name.decode(errors="replace")
    return ""
