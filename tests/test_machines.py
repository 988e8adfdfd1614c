"""Real machines: folders of other users, terminals that close, no home folder, proxies, other encodings."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import MODELS, ROOT, SAMPLES, SMALL, ServerProcess, run_main, serving, start_server, stop_server

from export.bundle import Bundle
from service.client import AsyncClient, Client, is_loopback
from service.client.__main__ import main
from training.steering import NEUTRAL, profiles_to_json

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY")
SHIRT = SAMPLES / "Shirt" / "00562.png"


def client(server: ServerProcess, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "service.client", *arguments, "--address", server.address]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, cwd=ROOT, text=True, timeout=60, **options)


@pytest.mark.parametrize("name", PROXIES)
async def test_clients_of_this_machine_use_no_proxy(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Client(server.address, timeout=5, attempts=1) as blocking:
        assert blocking.predict([SHIRT.read_bytes()]).receipt.model == "fashion_mnist"
    async with AsyncClient(server.address, timeout=5, attempts=1) as other:
        assert (await other.predict([SHIRT.read_bytes()])).receipt.model == "fashion_mnist"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:8001", True), ("127.8.8.8:1", True), ("localhost:8001", True), ("[::1]:8001", True),
        ("dns:///localhost:8001", True), ("ipv4:127.0.0.1:8001", True), ("unix:/run/steervit.sock", True),
        ("models.example:8001", False), ("dns:///steervit:8001", False), ("10.0.0.1:8001", False),
        ("localhost.example:8001", False), ("[2001:db8::1]:8001", False),
    ],
)  # fmt: skip
def test_loopback_addresses_are_recognised(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


def test_remote_addresses_go_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        asked: list[bytes] = []

        def answer() -> None:
            connection, _ = proxy.accept()
            asked.append(connection.recv(1000))
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with Client("steervit.invalid:8001", timeout=5, attempts=1) as remote, contextlib.suppress(grpc.RpcError):
            remote.predict([b"x"])
        thread.join(10)
    assert asked[0].startswith(b"CONNECT steervit.invalid:8001 ")


def test_an_async_client_may_be_older_than_its_event_loop(server: ServerProcess) -> None:
    other = AsyncClient(server.address)

    async def ask() -> str:
        try:
            return (await other.predict([SHIRT.read_bytes()], terms=NEUTRAL)).receipt.model
        finally:
            await other.close()

    for _ in range(2):  # each with a loop of its own
        assert asyncio.run(ask()) == "fashion_mnist"
    asyncio.run(AsyncClient(server.address).close())


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz", "/nothing"])
def test_head_has_the_headers_of_get_and_no_body(server: ServerProcess, path: str) -> None:
    where = server.metrics_url.removeprefix("http://").partition("/")[0]
    answers = []
    for method in ("GET", "HEAD"):
        connection = http.client.HTTPConnection(where, timeout=10)
        connection.request(method, path)
        answer = connection.getresponse()
        answers.append((answer.status, answer.getheader("Content-Type"), len(answer.read())))
        connection.close()
    (status, kind, size), (same, like, none) = answers
    assert (status, kind, 0) == (same, like, none)
    assert size > 0


def test_more_files_than_a_call_takes_are_sent_in_several(server: ServerProcess, tmp_path: Path) -> None:
    files = [str(path) for path in sorted(SAMPLES.glob("*/*.png"))] * 3
    for command in ("predict", "compare"):
        done = run_main(main, command, "--address", server.address, *files)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(".png") == 300
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    done = run_main(main, "predict", "--address", server.address, *files[:70], str(broken))
    assert done.returncode == 1
    assert done.stderr.startswith("INVALID_ARGUMENT: images[6].encoded")
    assert done.stderr.endswith(f"({broken})\n")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[ServerProcess]:
    """A profile whose name is not ASCII."""
    folder = tmp_path_factory.mktemp("profiles")
    profiles = profiles_to_json([replace(bundle.profiles["Shirt"], name="café")])
    content = {**profiles, "gates_sae_digest": bundle.manifest.gates_sae_digest}
    (folder / "extra.json").write_text(json.dumps(content))
    with serving(MODELS, "--profiles-dir", str(folder)) as running:
        yield running


def test_terminals_without_unicode_get_escapes(labelled: ServerProcess) -> None:
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = client(labelled, "profiles", env={**ascii_only, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf\\xe9" in done.stdout
    done = client(labelled, "predict", "--profile", "café", str(SHIRT), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "profile caf\\xe9" in done.stdout


def test_a_client_whose_output_cannot_be_written_says_so(server: ServerProcess) -> None:
    with open("/dev/full", "w") as full:
        done = client(server, "profiles", stdout=full)
    assert (done.returncode, done.stderr) == (1, "standard output: No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    done = client(server, "profiles", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def served(*, shell: str, **options: Any) -> None:
    """A server started by a shell becomes ready on a port of its own, answers, and stops with 0."""
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as also_free:
        port, metrics = free.getsockname()[1], also_free.getsockname()[1]
    command = [sys.executable, "-m", "service", "--repository", str(SMALL)]
    command += ["--port", str(port), "--metrics-port", str(metrics)]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {shell}', "sh", *command], cwd=ROOT, **options)
    try:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)])
        grpc.channel_ready_future(channel).result(timeout=30)
        with Client(f"127.0.0.1:{port}") as asking:
            assert asking.predict([SHIRT.read_bytes()]).receipt.model == "small"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "shell",
    [">/dev/full", ">&-", ">/dev/full 2>/dev/full", ">&- 2>&- <&-", "| true"],
    ids=["full", "closed", "all full", "all closed", "reader gone"],
)
def test_a_server_outlives_its_terminal(shell: str) -> None:
    if shell == "| true":
        reading, writing = os.pipe()
        os.close(reading)
        served(shell="", stdout=writing)
        os.close(writing)
    else:
        served(shell=shell)


AS_NOBODY = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
"""Runs a command as a user whom this machine does not know, who may read what ours may."""


def test_a_user_without_a_home_and_a_name_can_serve() -> None:
    bare = {"PATH": os.environ["PATH"], "STEERVIT_TUNE": "off", "PROMETHEUS_MULTIPROC_DIR": "/nowhere"}
    with serving(SMALL, prefix=AS_NOBODY, env=bare) as running:
        done = client(running, "predict", str(SHIRT), env=bare)
        assert (done.returncode, done.stderr) == (0, "")
        assert "steervit_images_total" in running.page()


def test_folders_that_are_no_models_are_passed_over(tmp_path: Path) -> None:
    shutil.copytree(SMALL / "small", tmp_path / "small")
    (tmp_path / "lost+found").mkdir(mode=0)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "README").write_text("models")
    running = start_server(tmp_path, "--model-control", "poll", "--poll-seconds", "0.1", prefix=AS_NOBODY)
    with Client(running.address) as asking:
        assert asking.predict([SHIRT.read_bytes()]).receipt.model == "small"
        (tmp_path / "small").chmod(0)
        time.sleep(0.5)
        assert asking.predict([SHIRT.read_bytes()]).receipt.model == "small", "rather retained than lost"
        (tmp_path / "small").chmod(0o755)
    assert 1 <= len(re.findall(r"lost\+found.* Permission denied", stop_server(running))) < 9, (
        "said when it changes, not at each look"
    )
