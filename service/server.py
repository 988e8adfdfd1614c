"""Puts the parts together: the gRPC server with its guard, health and reflection, and the HTTP pages."""

import asyncio
import logging
import socketserver
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, make_wsgi_app

from export.bundle import Bundle
from service.config import Settings
from service.errors import STATUS, InvalidRequest, Overloaded, RequestError
from service.metrics import Metrics
from service.open_inference import OpenInferenceService
from service.pb import open_inference_pb2, steering_pb2
from service.pb.open_inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from service.pb.steering_pb2_grpc import add_SteeringServiceServicer_to_server
from service.profiles import ProfileFolder
from service.repository import Repository
from service.steering_api import SteeringService
from service.tls import Certificates

log = logging.getLogger("steervit.server")
DESCRIPTORS = [
    service for file in (steering_pb2, open_inference_pb2) for service in file.DESCRIPTOR.services_by_name.values()
]
SERVICES = tuple(service.full_name for service in DESCRIPTORS)
MAX_SENTENCE = 620
"""Characters; at 12 bytes each, percent-encoded, they fit the 8 kB that gRPC allows."""
METHODS = tuple(f"/{service.full_name}/{method.name}" for service in DESCRIPTORS for method in service.methods)


class NotServed(grpc.GenericRpcHandler):
    """Says so of the protocol's other calls: streams, shared memory, tracing."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name = details.method
        if not name.startswith("/inference.GRPCInferenceService/"):
            return None

        async def refuse(_: Any, context: Any) -> None:
            served = ", ".join(method.rpartition("/")[2] for method in METHODS if method.startswith("/inference."))
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED, f"{name.rpartition('/')[2][:100]} is not served; allowed: {served}"
            )

        return grpc.stream_stream_rpc_method_handler(refuse)


class Guard(grpc.aio.ServerInterceptor):
    """Turns errors into statuses, and counts and times every RPC of ours."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        metrics.known_methods(METHODS)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or details.method not in METHODS:
            return handler

        async def guarded(message: bytes, context: Any) -> Any:
            start, code = time.perf_counter(), "OK"
            try:
                return await handler.unary_unary(_request(handler.request_deserializer, message), context)
            except RequestError as error:
                code = STATUS[type(error)].name
                await context.abort(STATUS[type(error)], _sentence(error), _trailers(error))
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except Exception:
                code = "INTERNAL"
                log.exception("%s failed", details.method)
                await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this request; its log says more")
            finally:
                self._metrics.request(details.method, code, time.perf_counter() - start)

        return grpc.unary_unary_rpc_method_handler(guarded, None, handler.response_serializer)


def _request(read: Callable[[bytes], Any], message: bytes) -> Any:
    """The request, read here rather than by gRPC, which answers UNKNOWN to what it cannot read."""
    try:
        return read(message)
    except DecodeError as error:
        raise InvalidRequest(
            f"the message ({len(message)} bytes) is not one of this call; allowed: what the server's reflection says"
        ) from error


def _sentence(error: RequestError) -> str:
    """A client gets no status at all whose headers are too long, so a long value loses its middle."""
    said = str(error)
    return said if len(said) <= MAX_SENTENCE else f"{said[:400]} [...] {said[-200:]}"


def _trailers(error: RequestError) -> tuple[tuple[str, str | bytes], ...]:
    """For an overload: when to try again, as RetryInfo and as the trailer that gRPC's own retries obey."""
    if not isinstance(error, Overloaded):
        return ()
    milliseconds = round(error.retry_after_seconds * 1000)
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message=str(error))
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(nanos=milliseconds * 1_000_000)))
    return (("grpc-retry-pushback-ms", str(milliseconds)), ("grpc-status-details-bin", status.SerializeToString()))


class Server:
    """The whole server. `start` returns when it is ready, `stop` when everything accepted is answered."""

    def __init__(self, settings: Settings):
        """Loads the repository. Raises BundleError or EngineError."""
        self._settings = settings
        self._registry = CollectorRegistry()
        self._metrics = Metrics(self._registry, settings.max_profile_series)
        self.ready = False
        self._profiles = ProfileFolder(settings.profiles_dir, self._metrics)
        self._repository = Repository(settings, self._metrics, self._profiles)
        self._read_profiles()
        self._health = health.aio.HealthServicer()
        self._watching: list[asyncio.Task[None]] = []
        self.port = self.metrics_port = 0

    async def start(self) -> None:
        """Raises OSError when a port is taken."""
        settings = self._settings
        age = round(1000 * settings.max_connection_age_seconds)
        self._server = grpc.aio.server(
            interceptors=[Guard(self._metrics)],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_mb * 2**20),
                ("grpc.max_send_message_length", settings.max_message_mb * 2**20),
                ("grpc.max_concurrent_streams", settings.max_streams),
                ("grpc.http.overload_protection", 0),  # it also refuses calls of clients that keep to the limit
                ("grpc.so_reuseport", 0),
                *[("grpc.max_connection_age_ms", age)] * (age > 0),
            ],
        )
        add_SteeringServiceServicer_to_server(  # type: ignore[no-untyped-call]
            SteeringService(self._repository, settings), self._server
        )
        add_GRPCInferenceServiceServicer_to_server(  # type: ignore[no-untyped-call]
            OpenInferenceService(self._repository, settings, lambda: self.ready), self._server
        )
        self._server.add_generic_rpc_handlers((NotServed(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            self._server,
        )
        try:
            address = f"{settings.host}:{settings.port}"
            if settings.tls_certificate:
                self.port = self._server.add_secure_port(address, Certificates(settings).credentials())
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"port {settings.port} of {settings.host} cannot be listened on: {error}") from error
        self._pages = Pages(settings.host, settings.metrics_port, self._registry, self)
        self.metrics_port = self._pages.port
        await self._server.start()
        if settings.model_control == "poll":
            self._watching.append(asyncio.create_task(self._repository.watch()))
        watch = self._profiles.watch(settings.poll_seconds, self._bundles, self._repository.use_profiles)
        self._watching.append(asyncio.create_task(watch))
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self.ready = True

    @property
    def alive(self) -> bool:
        return self._repository.alive

    def _bundles(self) -> list[Bundle]:
        return [model.bundle for model in self._repository.models]

    def _read_profiles(self) -> None:
        if self._profiles.refresh(self._bundles()):
            self._repository.use_profiles()

    async def stop(self) -> None:
        """Say so, refuse new calls, answer the accepted ones (for at most drain_seconds), release everything."""
        self.ready = False
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        for task in self._watching:
            task.cancel()
        await self._server.stop(self._settings.drain_seconds)
        await asyncio.get_running_loop().run_in_executor(None, self._repository.close)
        self._pages.close()

    async def _set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


class _ThreadingWSGIServer(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class Pages:
    """HTTP in a thread of its own: /metrics, /livez (inference threads run), /readyz (takes requests)."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, server: Server):
        """Raises OSError when the port is taken."""
        metrics_page = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                page: Iterable[bytes] = metrics_page(environ, start_response)
                return page
            states = {"/livez": server.alive, "/readyz": server.ready and server.alive}
            status = "404 Not Found" if path not in states else "200 OK" if states[path] else "503 Service Unavailable"
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{status[4:]}\n".encode()]

        try:
            self._http = make_server(host, port, app, _ThreadingWSGIServer, _QuietHandler)
        except OSError as error:
            raise OSError(f"metrics port {port} of {host} cannot be listened on: {error.strerror}") from error
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, name="pages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
