"""Real registries for the tests (Debian's docker-registry), with what stands around one: tokens, and bad networks."""

import base64
import contextlib
import datetime
import functools
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import NameOID

USER, PASSWORD = "publisher", "open sesame"
HTPASSWD = f"{USER}:$2b$04$bUXfsJjK11SsVvsBKgAVAu7NV.6rVXD/2JWhMU7QuuNW.1qjvQlxK\n"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@dataclass(frozen=True)
class Registry:
    host: str
    data: Path

    def blob(self, digest: str) -> Path:
        """Where the registry keeps a blob."""
        sha256 = digest.removeprefix("sha256:")
        return self.data / "docker/registry/v2/blobs/sha256" / sha256[:2] / sha256 / "data"


@contextlib.contextmanager
def registry(folder: Path, address: str = "127.0.0.1:0", **settings: Any) -> Iterator[Registry]:
    """settings: sections of its configuration; those of `http` are added to the address."""
    config = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        **settings,
        "http": {"addr": address, "secret": "-", **settings.get("http", {})},
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if listening := re.search(r"listening on ([\d.]+:\d+)", line):
                    break
            else:
                raise AssertionError("".join(lines))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Registry(listening[1], folder / "data")
        finally:
            process.kill()


@dataclass
class Tokens:
    """A token service, as registries send their clients to one."""

    settings: dict[str, Any] = field(default_factory=dict)
    """`auth` of the registry's configuration."""
    asked: list[tuple[str, bool]] = field(default_factory=list)
    """Each token's scope, and whether it was the publisher who asked."""


@contextlib.contextmanager
def tokens(folder: Path) -> Iterator[Tokens]:
    """Everybody may pull; the publisher may push."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")])
    now = time.time()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(_date(now - 60)).not_valid_after(_date(now + 3600))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "tokens.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    chain = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()
    service = Tokens()

    def token(scope: str, publisher: bool) -> str:
        _, repository, actions = scope.split(":")
        granted = [action for action in actions.split(",") if publisher or action == "pull"]
        access = [{"type": "repository", "name": repository, "actions": granted}]
        times = {"exp": int(now) + 3600, "nbf": int(now) - 60, "iat": int(now) - 60}
        claims = {"iss": "tokens", "sub": "", "aud": "registry", "jti": "1", "access": access, **times}
        parts = [{"typ": "JWT", "alg": "ES256", "x5c": [chain]}, claims]
        text = ".".join(_base64(json.dumps(part).encode()) for part in parts)
        r, s = utils.decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scope = parse_qs(urlsplit(self.path).query)["scope"][0]
            publisher = self.headers["Authorization"] == f"Basic {BASIC}"
            service.asked.append((scope, publisher))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"token": token(scope, publisher)}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with _serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        realm = f"http://127.0.0.1:{port}/token"
        service.settings = {
            "token": {
                "realm": realm, "service": "registry", "issuer": "tokens", "rootcertbundle": str(folder / "tokens.pem"),
            }
        }  # fmt: skip
        yield service


def _date(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@contextlib.contextmanager
def _serving(server: ThreadingHTTPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def files_at(folder: Path, host: str = "127.0.0.1") -> Iterator[tuple[str, list[Message]]]:
    """A web server of a folder: its address, and the headers of each request."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.headers)
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with _serving(ThreadingHTTPServer((host, 0), handler)) as port:
        yield f"http://{host}:{port}", requests


@dataclass
class Line:
    """A connection to a registry that breaks."""

    host: str
    sent: int = 0
    """Bytes to the client."""
    limit: float = float("inf")
    """Bytes to the client on a connection, then it is cut."""
    wait: Callable[[int], None] = lambda sent: None
    """Called with the bytes so far before each further part."""
    changes: Callable[[bytes], bytes] = lambda part: part
    """What the client gets of a part; as many bytes."""


@contextlib.contextmanager
def line_to(host: str) -> Iterator[Line]:
    """A proxy in front of a registry."""
    name, _, port = host.partition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = Line(f"127.0.0.1:{listener.getsockname()[1]}")

        def up(client: socket.socket, server: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while part := client.recv(1 << 16):
                    server.sendall(part)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_WR)

        def connection(client: socket.socket) -> None:
            left = line.limit
            with client, socket.create_connection((name, int(port))) as server, contextlib.suppress(OSError):
                threading.Thread(target=up, args=(client, server), daemon=True).start()
                while part := server.recv(1 << 16):
                    line.wait(line.sent)
                    part = part[: int(min(left, len(part)))]
                    client.sendall(line.changes(part))
                    line.sent += len(part)
                    left -= len(part)
                    if left <= 0:
                        client.shutdown(socket.SHUT_RDWR)  # although `up` reads from it
                        break

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=connection, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield line
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def hub_mirror(repository: Path) -> Iterator[str]:
    """The part of the Hub's HTTP API that reads the files of the repository org/models. Its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.answer(200, json.dumps([self.entry(repository / path) for path in asked["paths"]]).encode())

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if found := re.fullmatch("/org/models/resolve/main/(.*)", path):
                start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                content = (repository / found[1]).read_bytes()
                self.answer(206, content[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(content)}")
            elif found := re.fullmatch("/api/models/org/models/tree/main/(.*)", unquote(path)):
                self.answer(200, json.dumps([self.entry(file) for file in (repository / found[1]).iterdir()]).encode())
            else:
                self.answer(200, json.dumps({"id": "org/models", "sha": "0" * 40, "siblings": []}).encode())

        def entry(self, path: Path) -> dict[str, Any]:
            kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
            return {"path": str(path.relative_to(repository)), "oid": "0" * 40, **kind}

        def log_message(self, *_: Any) -> None:
            pass

    with _serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}"
