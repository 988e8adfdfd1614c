"""Real parts for the tests: the committed bundle, a run trained here, a server process."""

import asyncio
import inspect
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import strace
from committed import BUNDLE, newest, pixels
from numpy.typing import NDArray
from processes import MODELS, SAMPLES, ServerProcess, run_module, serving
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from export.bundle import Bundle
from service.client import Client

urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({})))  # local pages need no proxy
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin, and two tests run side by side
os.environ.setdefault("STEERVIT_DRAIN_DELAY_SECONDS", "0")  # few clients here watch the health
os.environ.setdefault("STEERVIT_TUNE", "off")  # measuring takes 2 s a start, and other tests disturb it
SMOKE_RUN = ("tests/test_export.py", "tests/test_journeys.py", "tests/test_telemetry.py")
"""The files whose tests need the fixture `smoke_run`."""
SMALL_MODELS = ("tests/test_fused.py", "tests/test_graphs.py", "tests/test_mlp_groups.py")
"""The files whose tests write graphs of the same small models."""
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):  # the same examples each time; a developer's run draws new ones
    hypothesis.settings.load_profile("ci")


class ByServers(LoadScopeScheduling):
    """Gives a worker of pytest-xdist whole files, because the tests of a file share servers; files that share a run or
    models go to the same worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((together[0] for together in (SMOKE_RUN, SMALL_MODELS) if file in together), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByServers:
    return ByServers(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine, on an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what starts processes, which `make test-fast` leaves out."""
    module = vars(getattr(item, "module", item))
    starts = {"start_server", "serving", "run_module", "Live"} & module.keys()
    if starts or {"server", "smoke_run", "smoke_models", "expected"} & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.processes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.nodeid.partition("::")[0] not in SMOKE_RUN, item.path not in slow))


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A server process with the committed bundle, shared by tests that do not change it."""
    with serving(MODELS) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """The committed Fashion-MNIST bundle."""
    return newest(BUNDLE)


@pytest.fixture(scope="session")
def samples() -> dict[str, list[bytes]]:
    """The committed PNG files, by label."""
    return {
        folder.name: [path.read_bytes() for path in sorted(folder.glob("*.png"))]
        for folder in sorted(SAMPLES.iterdir())
        if folder.is_dir()
    }


@pytest.fixture(scope="session")
def sample_pixels() -> NDArray[np.uint8]:
    """uint8 (100, 28, 28, 1), in the order of the samples."""
    return pixels()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder trained here and now with the preset `smoke`; beside it `trace`, where strace is installed."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    prefix = strace.prefix(folder.parent / "trace")
    done = run_module("training", "all", "--preset", "smoke", "--out", str(folder), prefix=prefix, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def smoke_models(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with that run as smoke/1: every kind of graph, and graphs of two profiles' own; beside it `trace`,
    likewise."""
    folder = tmp_path_factory.mktemp("exported") / "models"
    every = ("--attention", "dispatch,masked,fused", "--precision", "fp32,int8,fp16", "--verify-images", "12")
    every += ("--specialise", "Shirt", "--specialise", "Bag", "--compact-threshold", "0.2")
    prefix = strace.prefix(folder.parent / "trace")
    done = run_module("export", str(smoke_run), str(folder), "--name", "smoke", *every, prefix=prefix)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning" not in done.stderr
    return folder
