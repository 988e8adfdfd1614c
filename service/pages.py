"""The HTTP pages beside gRPC: /metrics, /livez, /readyz."""

import gzip
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

log = logging.getLogger("steervit.pages")


class State(Protocol):
    """The server's state, as the probes report it."""

    @property
    def alive(self) -> bool:
        """Whether the server makes progress."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the server takes requests."""
        ...

    @property
    def reason(self) -> str:
        """Why the server is not ready, or what is wrong although it is; "" if nothing is."""
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
    """Seconds for a request to arrive: a silent connection does not hold a thread forever."""

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class Pages:
    """HTTP in a thread of its own: /metrics, /livez (its threads make progress), /readyz (takes requests; with the
    reason if not)."""

    def __init__(self, host: str, port: int, metrics: Callable[[str], tuple[bytes, str]], state: State):
        """metrics: returns the page of metrics and its content type, given the value of Accept. Raises OSError when the
        port is taken."""

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            method, path, packed = environ["REQUEST_METHOD"], environ["PATH_INFO"], False
            states = {"/livez": state.alive, "/readyz": state.ready and state.alive}
            kind = "text/plain; charset=utf-8"
            if method not in ("GET", "HEAD"):
                status, body = "405 Method Not Allowed", b"Method Not Allowed\n"
            elif path == "/metrics":
                status, (body, kind) = "200 OK", metrics(environ.get("HTTP_ACCEPT", ""))
                if packed := "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
                    body = gzip.compress(body, 1)  # the cheapest level; it releases the interpreter's lock
            else:
                known = path in states
                status = "404 Not Found" if not known else "200 OK" if states[path] else "503 Service Unavailable"
                reason = state.reason[:1000] if path == "/readyz" else ""
                body = (f"{status[4:]}\n" + f"{reason}\n" * bool(reason)).encode()
            headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
            start_response(status, headers + [("Content-Encoding", "gzip")] * packed)
            return [] if method == "HEAD" else [body]

        kind = _Version6 if ":" in host else _ThreadingWSGIServer
        try:
            self._http = make_server(host, port, app, kind, _QuietHandler)
        except OSError as error:
            raise OSError(f"--metrics-port is {port}: cannot bind {host}:{port}: {error.strerror}") from error
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, name="pages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and release the port, without waiting for requests in progress."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
