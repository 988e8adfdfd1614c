"""The HTTP pages beside gRPC: /metrics, /livez, /readyz."""

import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

log = logging.getLogger("steervit.pages")


class State(Protocol):
    """The state that the probes report."""

    @property
    def alive(self) -> bool:
        """Whether the server makes progress."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not ready, or what is wrong though it is; "" when all is well."""
        ...


class _ThreadingWSGIServer(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128
    """Connections waiting to be accepted. With the default of 5, probes would be refused."""

    def server_bind(self) -> None:
        """Bind without http.server's look-up of the host's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Version6(_ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = 10
    """Seconds for a request to arrive: a silent connection does not hold a thread for ever."""

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class Pages:
    """HTTP in a thread of its own: /metrics, /livez (its threads make progress), /readyz (takes requests; with the
    reason if not)."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, state: State):
        """Raises OSError when the port is taken."""
        metrics_page = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            method, head = environ["REQUEST_METHOD"], list[Any]()
            if method == "HEAD":  # Prometheus's client library answers GET only
                environ = {**environ, "REQUEST_METHOD": "GET"}
            body = b"".join(answer(environ, lambda status, headers: head.extend((status, headers))))
            status, headers = head
            start_response(status, [*headers, ("Content-Length", str(len(body)))])
            return [] if method == "HEAD" else [body]

        def answer(environ: dict[str, Any], start_response: Callable[[str, list[Any]], Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                page: Iterable[bytes] = metrics_page(environ, start_response)
                return page
            states = {"/livez": state.alive, "/readyz": state.ready and state.alive}
            status = "404 Not Found" if path not in states else "200 OK" if states[path] else "503 Service Unavailable"
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            reason = state.reason[:1000] if path == "/readyz" else ""
            return [f"{status[4:]}\n".encode(), *[f"{reason}\n".encode()] * bool(reason)]

        kind = _Version6 if ":" in host else _ThreadingWSGIServer
        try:
            self._http = make_server(host, port, app, kind, _QuietHandler)
        except OSError as error:
            raise OSError(f"metrics port {port} of {host} cannot be bound: {error.strerror}") from error
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, name="pages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and release the port, without waiting for requests in progress."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
