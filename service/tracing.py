"""Traces of calls for an OpenTelemetry collector. The only file that knows OpenTelemetry's SDK, which is an extra.

A call's spans are made after its end, from the times in its record: a call in progress costs nothing. Names and
attributes are those of OpenTelemetry's semantic conventions for gRPC; those of our own begin with `steervit.`.
"""

import re
import threading
import time
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, format_span_id, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.access_log import Course, Record

CLOSE_SECONDS = 3.0
"""How long the stopping server waits for the collector to take the last spans."""
FAILURES = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
"""Statuses that the conventions count as errors of the server; other errors are those of clients."""
PEER = re.compile(r"ipv[46]:\[?([^\]]+)\]?:([0-9]+)")


class Tracing:
    """Makes the spans of calls and sends them, in a thread of its own."""

    def __init__(self, endpoint: str, revision: str):
        """endpoint: URL of a collector, without /v1/traces; revision: of the source."""
        own = {"service.name": "steervit", "service.version": version("steervit"), "vcs.ref.head.revision": revision}
        resource = Resource.create({**own, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint}/v1/traces")))
        self._tracer = self._provider.get_tracer("steervit")
        self._propagator = TraceContextTextMapPropagator()

    def ended(
        self, record: Record, course: Course, path: str, code: str, seconds: float, request_id: str, context: Any
    ) -> None:
        """Make the spans of a call that ends now, and note their IDs in its course; not if it is not sampled. seconds:
        its duration."""
        now = time.monotonic()
        to_unix = time.time() - now
        carried = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        parent = self._propagator.extract(carried, Context())
        start = _nanoseconds(now - seconds + to_unix)
        call = self._tracer.start_span(path[1:], parent, SpanKind.SERVER, start_time=start)
        if call.is_recording():
            call.set_attributes(_attributes(record, path, code, request_id, context))
            if code in FAILURES:
                call.set_attribute("error.type", code)
                call.set_status(StatusCode.ERROR)
            self._add_course(course, record.queue_seconds, call, now, to_unix)
        call.end(_nanoseconds(now + to_unix))
        of = call.get_span_context()
        if of.trace_flags.sampled:
            course.trace_id, course.span_id = format_trace_id(of.trace_id), format_span_id(of.span_id)

    def close(self) -> None:
        """Send the remaining spans, waiting at most CLOSE_SECONDS."""
        sending = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)

    def _add_course(self, course: Course, waited: float | None, call: Span, now: float, to_unix: float) -> None:
        """Add the spans within a call's. waited: how long its images were queued; None: until it ended."""

        def add(name: str, within: Span, start: float, end: float, **attributes: int) -> Span:
            span = self._tracer.start_span(
                name,
                set_span_in_context(within, Context()),
                attributes={f"steervit.{key}": value for key, value in attributes.items()},
                start_time=_nanoseconds(start + to_unix),
            )
            span.end(_nanoseconds(end + to_unix))
            return span

        if course.decoding:
            start, seconds = course.decoding
            add("decode", call, start, start + seconds)
        if course.queued is not None:
            add("queue", call, course.queued, now if waited is None else course.queued + waited)
        for ran in course.batches:
            batch = add("batch", call, ran.started, ran.ended, batch_images=ran.images)
            add("inference", batch, ran.inference, ran.inference + ran.seconds)


def _attributes(record: Record, path: str, code: str, request_id: str, context: Any) -> dict[str, str | int | float]:
    """The attributes of a call's span."""
    peer = PEER.fullmatch(unquote(context.peer()))
    known = {
        "rpc.system.name": "grpc",
        "rpc.method": path[1:],
        "rpc.response.status_code": code,
        "network.peer.address": peer[1] if peer else None,
        "network.peer.port": int(peer[2]) if peer else None,
        "steervit.model": record.model or None,
        "steervit.version": record.version or None,
        "steervit.profile": record.profile or None,
        "steervit.images": record.images,
        "steervit.budget": record.budget,
        "steervit.budget_applied": record.budget_applied,
        "steervit.request_id": request_id,
    }
    return {key: value for key, value in known.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
