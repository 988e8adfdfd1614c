"""Real parts for the tests: the committed bundle, a run trained here, a server process."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.bundle import Bundle, load_bundle, versions
from service.client import Client

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "deploy" / "models"
SAMPLES = ROOT / "deploy" / "samples"


@dataclass(frozen=True)
class ServerProcess:
    process: "subprocess.Popen[str]"
    address: str
    metrics_url: str

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


def start_server(repository: Path, *flags: str) -> ServerProcess:
    command = [sys.executable, "-m", "service", "--repository", str(repository), "--port", "0", "--metrics-port", "0"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    ready = re.match(r"ready: grpc (\S+), metrics (\S+)", process.stdout.readline())
    if not ready:
        _, errors = process.communicate(timeout=30)
        raise AssertionError(f"the server did not start: {errors}")
    return ServerProcess(process, ready[1], ready[2])


def stop_server(server: ServerProcess) -> int:
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.communicate(timeout=60)
    finally:
        server.process.kill()
    return server.process.returncode


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A server process with the committed bundle, shared by the tests that leave it as it was."""
    running = start_server(MODELS)
    yield running
    assert stop_server(running) == 0


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """The committed Fashion-MNIST bundle."""
    folder = MODELS / "fashion_mnist"
    return load_bundle(folder / str(versions(folder)[-1]))


@pytest.fixture(scope="session")
def samples() -> dict[str, list[bytes]]:
    """The committed PNG files, by label."""
    return {
        folder.name: [path.read_bytes() for path in sorted(folder.glob("*.png"))]
        for folder in sorted(SAMPLES.iterdir())
        if folder.is_dir()
    }


@pytest.fixture(scope="session")
def sample_pixels(samples: dict[str, list[bytes]]) -> NDArray[np.uint8]:
    """uint8 (100, 28, 28, 1)."""
    files = [path for folder in sorted(SAMPLES.iterdir()) if folder.is_dir() for path in sorted(folder.glob("*.png"))]
    return np.stack([np.asarray(Image.open(path))[:, :, None] for path in files])


def run_module(*arguments: str, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
    """python -m ..., from the root, its output captured."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=os.environ
    )


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder trained here and now with the preset `smoke`."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = run_module("training", "all", "--preset", "smoke", "--out", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
