"""Wraps every RPC: parses the message, turns errors into statuses, and counts, times, logs and traces the call."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from service.access_log import PROBES, Record, begin, line
from service.errors import STATUS, InvalidRequest, OverLimit, Overloaded, RequestError
from service.limits import ClientLimits
from service.metrics import WITH_IMAGES, Metrics

if TYPE_CHECKING:
    from service.tracing import Tracing

log = logging.getLogger("steervit.requests")
MAX_SENTENCE = 620
"""Longest message in characters. Percent-encoded, at up to 12 bytes each, it fits the 8 kB that gRPC allows."""
REQUEST_ID = "x-request-id"
SLACK = 0.05, 0.01
"""How much gRPC may round a deadline up: in seconds, and as a share of the call's timeout."""
Call = Callable[[Any, Any], Awaitable[Any]]
Sizes = tuple[int, int]
"""Sizes of a request and its answer, in bytes."""


class Guard:
    """Creates the handlers of the services, and counts all their calls."""

    def __init__(
        self,
        metrics: Metrics,
        access_log: float = 0.0,
        tracing: "Tracing | None" = None,
        limits: ClientLimits | None = None,
    ):
        """access_log: the share of calls that are logged at level info; the others are logged at debug. tracing: None:
        no call is traced. limits: None: no limits by client."""
        self._metrics, self._access_log, self._tracing, self._limits = metrics, access_log, tracing, limits
        self.accepted = self.answered = 0
        """Calls that entered a handler, and those of them that were answered instead of cancelled."""

    def handler(self, servicer: Any, service: Any) -> grpc.GenericRpcHandler:
        """The gRPC handler of a service. servicer: has a coroutine method(request, context) for each method of
        `service`, a service descriptor; it returns a message, or a serialised one."""
        paths = {method: f"/{service.full_name}/{method.name}" for method in service.methods}
        self._metrics.known_methods(list(paths.values()))
        # messages are parsed in `guarded`, so that an invalid one is answered and counted like any other bad request
        methods: dict[str, Any] = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._guarded(getattr(servicer, method.name), path, GetMessageClass(method.input_type)),
                response_serializer=_written,
            )
            for method, path in paths.items()
        }
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def unserved(self, why: Literal["oversized", "unknown_method"], path: str, context: Any) -> None:
        """Count and log a call that reaches no handler. path: of its method, as sent by the client."""
        self._metrics.unserved[why].inc()
        code = "RESOURCE_EXHAUSTED" if why == "oversized" else "UNIMPLEMENTED"
        self._log(Record(refused=why), path[:100], code, 0.0, _request_id(context), (0, 0), context)

    def _log(self, record: Record, path: str, code: str, seconds: float, name: str, sizes: Sizes, context: Any) -> None:
        level = logging.INFO if random.random() < self._access_log else logging.DEBUG
        if log.isEnabledFor(level):
            log.log(level, line(record, path, code, seconds, name, sizes, context))

    def _guarded(self, call: Call, path: str, kind: Any) -> Call:
        logged = not PROBES.fullmatch(path)
        tracing, limits = (self._tracing, self._limits) if logged else (None, None)
        with_images = bool(WITH_IMAGES.fullmatch(path))

        async def guarded(message: bytes, context: Any) -> Any:
            start, code, answered, answer = time.perf_counter(), "OK", True, None
            received, counted = len(message), True
            allowed, name, record = context.time_remaining(), _request_id(context), begin(tracing is not None)
            context.set_trailing_metadata(_named(name))
            self.accepted += 1
            self._metrics.in_flight.inc()
            try:
                if limits:
                    record.admission = limits.arrived(context)
                    record.admission.enter(with_images)
                answer = await call(_parsed(message, kind), context)
                return answer
            except RequestError as error:
                code, record.refused = STATUS[type(error)].name, error.reason
                counted = not isinstance(error, OverLimit)  # neither a failure of the server nor a fast answer
                refusal = STATUS[type(error)], _sentence(error), (*_named(name), *_trailers(error))
            except asyncio.CancelledError:
                code, answered = "DEADLINE_EXCEEDED" if _is_over(context, allowed) else "CANCELLED", False
                raise
            except Exception:
                code = "INTERNAL"
                log.exception("%s failed, request %s", path, name, extra={"method": path, "request_id": name})
                sentence = f"the server failed on this request; its log has the cause under request {name}"
                refusal = grpc.StatusCode.INTERNAL, sentence, _named(name)
            finally:
                seconds = time.perf_counter() - start
                self._metrics.in_flight.dec()
                self.answered += answered
                if record.admission:
                    record.admission.leave()
                if counted:
                    self._metrics.request(path, code, seconds, (record.model, record.version))
                    if record.group:
                        self._metrics.with_images(record, seconds, received, _size(answer))
                if tracing and record.course:
                    tracing.ended(record, record.course, path, code, seconds, name, context)
                    if counted:
                        self._metrics.traced(path, seconds, record, record.course)
                if logged:
                    self._log(record, path, code, seconds, name, (received, _size(answer)), context)
            # here, and without the message: the exception from abort would keep both alive until a garbage collection
            del message
            return await context.abort(*refusal)

        return guarded


def _is_over(context: Any, allowed: float | None) -> bool:
    """Whether a cancelled call is past its deadline, and not cancelled by its client. allowed: its timeout in
    seconds."""
    return allowed is not None and context.time_remaining() <= SLACK[0] + SLACK[1] * allowed


def _parsed(message: bytes, kind: Any) -> Any:
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise InvalidRequest(
            f"the request is not a {kind.DESCRIPTOR.full_name} message ({len(message)} bytes that cannot be read); "
            "allowed: its binary form"
        ) from error


def _size(answer: Any) -> int:
    """The size of an answer in bytes; 0 without one."""
    return 0 if answer is None else len(answer) if isinstance(answer, bytes) else answer.ByteSize()


def _written(answer: Any) -> bytes:
    written: bytes = answer if isinstance(answer, bytes) else answer.SerializeToString()
    return written


def _sentence(error: RequestError) -> str:
    """The message, with its middle cut out if it is too long: gRPC drops a status with oversized headers."""
    text = str(error)
    return text if len(text) <= MAX_SENTENCE else f"{text[:400]} [...] {text[-200:]}"


def _request_id(context: Any) -> str:
    """The request id from the client (metadata x-request-id), or a random one."""
    for key, value in context.invocation_metadata() or ():
        fits = key == REQUEST_ID and isinstance(value, str) and 0 < len(value) <= 128
        if fits and value.isascii() and value.isprintable():
            return str(value)
    return f"{random.getrandbits(64):016x}"


def _named(name: str) -> tuple[tuple[str, str | bytes], ...]:
    """The trailer with the request id."""
    return ((REQUEST_ID, name),)


def _trailers(error: RequestError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailers of an error. For an overload: when to retry, as RetryInfo and as the trailer that gRPC's retries
    follow."""
    if not isinstance(error, Overloaded):
        return ()
    milliseconds = round(error.retry_after_seconds * 1000)
    delay = Duration()
    delay.FromMilliseconds(milliseconds)
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message=_sentence(error))
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return (("grpc-retry-pushback-ms", str(milliseconds)), ("grpc-status-details-bin", status.SerializeToString()))
