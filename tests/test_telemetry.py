"""No process of ours uses the network or writes files outside of its own folders, as watched by strace."""

import ast
import os
import re
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
"""The caches that SECURITY.md names: Matplotlib's, with the folders that it creates for it."""
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
    """The URL of a proxy that never answers, and the first lines of the requests that it gets."""
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
    """Every proxy variable names a proxy that never answers; the terminal has ASCII only."""
    home = tmp_path / "home"
    home.mkdir()
    with proxy() as (url, asked):
        environment = dict.fromkeys(PROXIES, url) | {"HOME": str(home), "PYTHONIOENCODING": "ascii", "no_proxy": ""}
        done = run_module("service.demo", prefix=strace.prefix(log), **environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"block  \d \\u2502[# ]*##", done.stdout), "the map of heads in characters that ASCII has"
    assert asked == []
    traced = strace.read(log)
    assert traced.remote == frozenset()
    assert outside(traced) == []
    assert list(home.iterdir()) == []


@pytest.mark.slow
def test_a_training_makes_no_connection_and_writes_only_into_its_folder(log: Path, smoke_run: Path) -> None:
    traced = strace.read(smoke_run.parent / "trace")
    assert traced.remote == frozenset()
    assert any(path.parent == smoke_run and "report.html" in path.name for path in traced.written)
    assert outside(traced, smoke_run) == []


@pytest.mark.slow
def test_an_export_makes_no_connection_and_writes_only_into_the_repository(log: Path, smoke_models: Path) -> None:
    traced = strace.read(smoke_models.parent / "trace")
    assert traced.remote == frozenset()
    assert any(path.is_relative_to(smoke_models) for path in traced.written)
    assert outside(traced, smoke_models) == []


def test_the_trace_shows_files_of_onnxruntime_and_name_lookups(log: Path, tmp_path: Path) -> None:
    """Without this the tests above could not fail."""
    home = tmp_path / "home"
    code = "import socket, onnxruntime; onnxruntime.SessionOptions(); socket.gethostbyname('telemetry.invalid')"
    command = [*strace.prefix(log), sys.executable, "-c", code]
    subprocess.run(command, env=os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home)}, capture_output=True)
    traced = strace.read(log)
    assert any(":53" in address or "systemd" in address for address in traced.remote)
    assert any("onnxruntime" in str(path) and path.is_relative_to(home) for path in traced.written)


def test_every_package_turns_telemetry_off_before_it_imports_onnxruntime() -> None:
    """In __init__ files, which are imported first. (These tests have imported conftest.py.)"""
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
    """For other programs in the image too."""
    assert rehearsal.environment(rehearsal.stages()[target])["ORT_DISABLE_TELEMETRY"] == "1"
