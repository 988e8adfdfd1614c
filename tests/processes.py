"""Real processes for the tests: a server on free ports, and the command lines."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "deploy" / "models"
COMMITTED = max((MODELS / "fashion_mnist").glob("*/"), key=lambda folder: int(folder.name))
"""The folder of the committed bundle; its name is the version."""
SAMPLES = ROOT / "deploy" / "samples"
SMALL = ROOT / "tests" / "bundles"
"""A repository of a small model, as the exporter wrote it in version 2 of the schema. It is loaded at once."""
# Other clients than ours must reach these servers without a proxy of the machine.
os.environ["no_proxy"] = ",".join(filter(None, (os.environ.get("no_proxy"), "127.0.0.1,localhost,::1")))


@dataclass(frozen=True)
class ServerProcess:
    process: "subprocess.Popen[str]"
    address: str
    metrics_url: str
    start_seconds: float
    """Time until the server was ready."""

    def page(self, path: str = "metrics") -> str:
        with urllib.request.urlopen(self.metrics_url.replace("metrics", path), timeout=10) as answer:
            return str(answer.read().decode())

    def count(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.page().splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found:
                there = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[1] or ""))
                if labels.items() <= there.items():
                    total += float(found[2])
        return total

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def start_server(
    repository: Path,
    *flags: str,
    program: Sequence[str] = ("-m", "service"),
    prefix: Sequence[str] = (),
    **options: Any,
) -> ServerProcess:
    """program: what Python runs. prefix: a command that runs the command after it. options: of subprocess.Popen."""
    command = [*prefix, sys.executable, *program, "--repository", str(repository), "--port", "0", "--metrics-port", "0"]
    options = {"stderr": subprocess.PIPE, "cwd": ROOT, **options}
    begun = time.perf_counter()
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    ready = re.match(r"(?:not )?ready: grpc (\S+), metrics (\S+)", process.stdout.readline())
    if not ready:
        _, errors = process.communicate(timeout=30)
        raise AssertionError(f"the server did not start: {errors}")
    return ServerProcess(process, ready[1], ready[2], time.perf_counter() - begun)


def stop_server(server: ServerProcess) -> str:
    """Stop a server, which must exit with 0. Returns its log, unless that goes elsewhere."""
    server.process.send_signal(signal.SIGTERM)
    try:
        _, log = server.process.communicate(timeout=60)
    finally:
        server.process.kill()
    assert server.process.returncode == 0
    return log or ""


@contextlib.contextmanager
def serving(repository: Path, *flags: str, **options: Any) -> Iterator[ServerProcess]:
    """A server that must exit with 0. options: of start_server."""
    server = start_server(repository, *flags, **options)
    try:
        yield server
    finally:
        stop_server(server)


def run_module(
    *arguments: str, timeout: float = 600, prefix: Sequence[str] = (), **environment: str
) -> "subprocess.CompletedProcess[str]":
    """python -m ..., from the root, its output captured. prefix: a command that runs the command after it."""
    command = [*prefix, sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=os.environ | environment
    )


def run_main(main: Callable[[list[str]], int], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the main of a package in this process, like `python -m` with these arguments. Faster where a process of its
    own would spend most of its time importing torch."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main(list(arguments))
        except SystemExit as end:  # argparse
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), errors.getvalue())


def until(holds: Callable[[], bool], seconds: float = 60.0, found: Callable[[], object] = lambda: "") -> None:
    """Wait until something holds. found: for the message, what there is instead."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"it did not come true in time {found()}"
        time.sleep(0.05)
