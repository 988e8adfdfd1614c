"""Puts the parts together: the gRPC server with its services, health and reflection, and the HTTP pages."""

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from service import transport
from service.config import Settings
from service.guard import Guard
from service.limits import ClientLimits
from service.metrics import Metrics
from service.open_inference import OpenInferenceService
from service.pages import Pages
from service.pb import open_inference_pb2, steering_pb2
from service.profiles import ProfileFolder, Served
from service.repository import Repository
from service.steering_api import SteeringService
from service.tls import Certificates

if TYPE_CHECKING:
    from service.tracing import Tracing

log = logging.getLogger("steervit.server")
HANGS_AFTER = 60.0
"""Seconds without a turn of the event loop after which it counts as hanging."""
DESCRIPTORS = [
    service for file in (steering_pb2, open_inference_pb2) for service in file.DESCRIPTOR.services_by_name.values()
]
SERVICES = tuple(service.full_name for service in DESCRIPTORS)
METHODS = tuple(f"/{service.full_name}/{method.name}" for service in DESCRIPTORS for method in service.methods)


class NotServed(grpc.GenericRpcHandler):
    """Answers the methods of the Open Inference Protocol that are not implemented: streams, shared memory, tracing."""

    def __init__(self, unserved: transport.Unserved):
        self._unserved = unserved

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """A handler that answers UNIMPLEMENTED to a method of the Open Inference Protocol; None for other methods."""
        name = details.method
        if not name.startswith("/inference.GRPCInferenceService/"):
            return None

        async def refuse(_: Any, context: Any) -> None:
            self._unserved("unknown_method", name, context)
            served = ", ".join(method.rpartition("/")[2] for method in METHODS if method.startswith("/inference."))
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED, f"{name.rpartition('/')[2][:100]} is not served; allowed: {served}"
            )

        return grpc.stream_stream_rpc_method_handler(refuse)


class Health(health.aio.HealthServicer):  # type: ignore[misc]
    """gRPC's health service. Its watches end when the server stops; otherwise they would delay it by drain_seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The status of every service."""
        known = (health_pb2.HealthCheckResponse(status=status) for status in self._server_status.values())
        return health_pb2.HealthListResponse(statuses=dict(zip(self._server_status, known, strict=True)))

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Send the status of a service, and each change, until the client disconnects or the watches end."""
        watch = asyncio.create_task(super().Watch(request, context))
        ended = asyncio.create_task(self._ended.wait())
        try:
            done, _ = await asyncio.wait((watch, ended), return_when=asyncio.FIRST_COMPLETED)
            if watch in done:
                watch.result()  # raises what it raised
        finally:
            watch.cancel()
            ended.cancel()

    def end_watches(self) -> None:
        """End all watches, later ones included."""
        self._ended.set()


class Server:
    """The whole server. `start` returns when it is ready, `stop` when all accepted calls are answered."""

    def __init__(self, settings: Settings):
        """Loads the repository. Raises BundleError, EngineError or LimitsError."""
        self._settings = settings
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        self._metrics = Metrics(
            CollectorRegistry(), settings.max_profile_series, settings.revision, settings.head_series
        )
        self._taking = False
        """Whether calls are accepted: the server has started and is not stopping."""
        self._metrics.ready = lambda: self.ready and self.alive
        self._profiles = ProfileFolder(settings.profiles_dir, self._metrics)
        self._repository = Repository(settings, self._metrics, self._profiles)
        self._metrics.unused_profiles = lambda: self._profiles.unused(model.own for model in self._repository.models)
        self._read_profiles()
        for bundle, default in self._served():
            self._profiles.check_default(bundle, default)
        self._health = Health()
        self._watching: list[asyncio.Task[None]] = []
        self._tracing = _tracing(settings)
        self._limits = ClientLimits(settings.client_limits, self._metrics) if settings.client_limits else None
        self._guard = Guard(self._metrics, settings.access_log, self._tracing, self._limits)
        self._beat = math.inf
        """The time of the last turn of the event loop."""
        self.port = self.metrics_port = 0

    async def start(self) -> None:
        """Start serving. Raises OSError when a port is taken or a TLS file cannot be used."""
        settings = self._settings
        self._server = transport.server(_options(settings), self._guard.unserved)
        typed = SteeringService(self._repository, settings)
        open_inference = OpenInferenceService(self._repository, settings, lambda: self.ready and self.alive)
        handlers = (self._guard.handler(s, d) for s, d in zip((typed, open_inference), DESCRIPTORS, strict=True))
        self._server.add_generic_rpc_handlers((*handlers, NotServed(self._guard.unserved)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(names), self._server
        )
        address = f"{settings.url_host}:{settings.port}"
        certificates = Certificates(settings) if settings.tls_certificate else None
        if certificates:
            self._metrics.certificates = certificates.expiry
        try:
            if certificates:
                self.port = self._server.add_secure_port(address, certificates.credentials())
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            if certificates:
                certificates.check()
            raise OSError(f"--port is {settings.port}: cannot bind {settings.host}:{settings.port}: {error}") from error
        self._pages = Pages(settings.host, settings.metrics_port, self._metrics_page, self)
        self.metrics_port = self._pages.port
        await self._server.start()
        if settings.model_control == "poll":
            self._watching.append(asyncio.create_task(self._repository.watch()))
        watch = self._profiles.watch(settings.poll_seconds, self._served, self._repository.use_profiles)
        self._watching.append(asyncio.create_task(watch))
        if self._limits:
            self._watching.append(asyncio.create_task(self._limits.watch(settings.poll_seconds)))
        self._taking = True
        await self._set_health(self.ready and self.alive)
        self._watching.append(asyncio.create_task(self._follow_state()))

    @property
    def alive(self) -> bool:
        """Whether inference threads and, while calls are accepted, the event loop make progress."""
        return self._repository.alive and (not self._taking or time.monotonic() - self._beat < HANGS_AFTER)

    @property
    def ready(self) -> bool:
        """Whether calls are accepted, and the profile folder has been valid at least once."""
        return self._taking and not self._profiles.pending

    @property
    def reason(self) -> str:
        """Why the server is not ready, or what is wrong although it is; "" if nothing is."""
        if not self._taking:
            return "it starts or stops"
        if not self.alive:
            return "an inference thread has ended or hangs"
        if problem := self._profiles.problem:
            return problem if self._profiles.pending else f"degraded, as profiles are unchanged: {problem}"
        if self._repository.problem:
            return f"degraded, as the repository's last valid state is served: {self._repository.problem}"
        if self._limits and self._limits.problem:
            return f"degraded, as the limits of clients are unchanged: {self._limits.problem}"
        return ""

    def _metrics_page(self, accepted: str) -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics, which has exemplars, if there are traces and the scraper accepts
        it."""
        if self._tracing and "application/openmetrics-text" in accepted:
            of_process = openmetrics.generate_latest(self._process)  # type: ignore[no-untyped-call]
            return self._metrics.page.text(openmetrics=True).encode() + of_process, openmetrics.CONTENT_TYPE_LATEST
        return self._metrics.page.text().encode() + generate_latest(self._process), CONTENT_TYPE_PLAIN_0_0_4

    def _served(self) -> list[Served]:
        return [(model.own, model.settings.default_profile) for model in self._repository.models]

    def _read_profiles(self) -> None:
        if self._profiles.refresh(self._served()):
            self._repository.use_profiles()

    async def reload(self) -> None:
        """Read the profile folder and the limits of clients now and, with --model-control poll, scan the repository."""
        log.info("reading the folders")
        if await asyncio.get_running_loop().run_in_executor(None, self._profiles.refresh, self._served()):
            self._repository.use_profiles()
        if self._limits:
            await self._limits.refresh()
        if self._settings.model_control == "poll":
            await self._repository.look()

    async def stop(self) -> None:
        """Report NOT_SERVING, wait drain_delay_seconds, refuse new calls, answer the accepted ones, release everything.

        gRPC cancels calls that arrive while it shuts down, and clients do not retry those. The delay gives clients that
        watch the health service time to disconnect.
        """
        self._taking = False
        await self._set_health(False)
        for task in self._watching:
            task.cancel()
        await asyncio.sleep(self._settings.drain_delay_seconds)
        self._health.end_watches()
        await self._server.stop(self._settings.drain_seconds)
        accepted, answered = self._guard.accepted, self._guard.answered
        log.info("stopped: %d calls accepted, %d answered, %d cancelled", accepted, answered, accepted - answered)
        await asyncio.get_running_loop().run_in_executor(None, self._repository.close)
        if self._tracing:
            await asyncio.get_running_loop().run_in_executor(None, self._tracing.close)
        self._pages.close()

    async def _follow_state(self) -> None:
        """Report NOT_SERVING while the server is not ready, or while an inference thread hangs or has ended, since
        calls would wait for it."""
        serving = self.ready and self.alive
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(1)
            if serving != (self.ready and self.alive):
                serving = not serving
                log.warning("ready again" if serving else "not ready: %s", *[self.reason] * (not serving))
                await self._set_health(serving)

    async def _set_health(self, serving: bool) -> None:
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if serving else response.NOT_SERVING
        for service in ("", *SERVICES):
            await self._health.set(service, status)


def _tracing(settings: Settings) -> "Tracing | None":
    if not settings.otlp_endpoint:
        return None
    from service.tracing import Tracing  # the SDK is an extra, and slow to import

    return Tracing(settings.otlp_endpoint, settings.revision)


def _options(settings: Settings) -> list[tuple[str, int]]:
    size, ping = settings.max_message_mb * 2**20, round(1000 * settings.keepalive_seconds)
    options = [
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", -1),  # no limit
        ("grpc.max_concurrent_streams", settings.max_streams),
        ("grpc.http.overload_protection", 0),  # it would also refuse calls within the limit
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients may send keepalive pings too
        ("grpc.keepalive_time_ms", ping),
        ("grpc.keepalive_timeout_ms", ping),
    ]
    if settings.max_connection_age_seconds:
        grace = round(1000 * settings.max_connection_age_grace_seconds)
        options.append(("grpc.max_connection_age_ms", round(1000 * settings.max_connection_age_seconds)))
        options.append(("grpc.max_connection_age_grace_ms", grace))
    return options
