"""No process of ours asks the network for anything, or leaves files where it was not told to; strace watches."""

import ast
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import rehearsal
import strace
from processes import ROOT, run_module

from deploy.sbom import TARGETS

CACHES = [Path.home() / ".cache" / "matplotlib", Path.home() / ".config", Path.home() / ".cache"]
"""What SECURITY.md names: Matplotlib's, with the folders that it makes for it."""
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    if not strace.prefix(tmp_path / "trace"):
        pytest.skip("strace is not installed")
    return tmp_path / "trace"


def outside(traced: strace.Traced, *folders: Path) -> list[str]:
    return [path for path in traced.written_outside(*folders, CACHES[0]) if Path(path) not in CACHES]


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """The URL of a proxy that answers nobody, and the first lines of what it is sent."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # closed
                    return
                with connection:
                    asked.append(connection.recv(1000).decode().partition("\r\n")[0])

        thread = threading.Thread(target=listen)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_the_demo_needs_no_network_no_home_no_proxy_and_no_unicode(log: Path, tmp_path: Path) -> None:
    """Every variable that names a proxy names one that answers nobody; the terminal has ASCII."""
    home = tmp_path / "home"
    home.mkdir()
    with proxy() as (url, asked):
        environment = dict.fromkeys(PROXIES, url) | {"HOME": str(home), "PYTHONIOENCODING": "ascii", "no_proxy": ""}
        done = run_module("service.demo", prefix=strace.prefix(log), **environment)
    assert done.returncode == 0, done.stderr
    assert "block  2 \\u2502##" in done.stdout, "the map of heads in characters that ASCII has"
    assert asked == []
    traced = strace.read(log)
    assert traced.remote == frozenset()
    assert outside(traced) == []
    assert list(home.iterdir()) == []


@pytest.mark.slow
def test_a_training_asks_nobody_and_writes_into_its_folder(log: Path, smoke_run: Path) -> None:
    traced = strace.read(smoke_run.parent / "trace")
    assert traced.remote == frozenset()
    assert any(path.parent == smoke_run and "report.html" in path.name for path in traced.written)
    assert outside(traced, smoke_run) == []


@pytest.mark.slow
def test_an_export_asks_nobody_and_writes_into_the_repository(log: Path, smoke_models: Path) -> None:
    traced = strace.read(smoke_models.parent / "trace")
    assert traced.remote == frozenset()
    assert any(path.is_relative_to(smoke_models) for path in traced.written)
    assert outside(traced, smoke_models) == []


def test_what_onnxruntime_would_write_and_a_name_that_is_looked_up_are_seen(log: Path, tmp_path: Path) -> None:
    """Without this the tests above could not fail."""
    home = tmp_path / "home"
    code = "import socket, onnxruntime; onnxruntime.SessionOptions(); socket.gethostbyname('telemetry.invalid')"
    command = [*strace.prefix(log), sys.executable, "-c", code]
    subprocess.run(command, env=os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home)}, capture_output=True)
    traced = strace.read(log)
    assert any(":53" in address or "systemd" in address for address in traced.remote)
    assert any("onnxruntime" in str(path) and path.is_relative_to(home) for path in traced.written)


def test_every_package_that_imports_onnxruntime_turns_telemetry_off_before() -> None:
    """In packages, whose own __init__ comes first; a test of ours has been through conftest.py."""
    packages = {"training", "service", "service.client"}
    folders = ("training", "export", "service", "tests")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                packages.add(".".join(path.relative_to(ROOT).parent.parts))
    assert packages >= {"export", "service", "tests.perf"}
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    for package in packages - {"tests"}:
        code = f"import {package}, os, sys; assert 'onnxruntime' not in sys.modules; "
        code += "print(os.environ['ORT_DISABLE_TELEMETRY'])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout == "1\n", f"{package}: {done.stderr}"


@pytest.mark.parametrize("target", TARGETS)
def test_telemetry_is_off_in_the_image(target: str) -> None:
    """For other programs in it than ours, too."""
    assert rehearsal.environment(rehearsal.stages()[target])["ORT_DISABLE_TELEMETRY"] == "1"
