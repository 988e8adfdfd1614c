"""The image, rehearsed without a container engine: installed as its Dockerfile says, started, asked, stopped."""

import contextlib
import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import rehearsal
from documented import commands
from packaging.utils import canonicalize_name
from processes import ROOT, SAMPLES

COMPILERS = {"cc", "gcc", "g++", "c++", "clang", "tcc", "as", "ld", "make", "cmake", "nvcc", "ptxas", "rustc", "cargo"}


@pytest.fixture(scope="module", params=os.environ.get("CONTAINER_IMAGES", "demo").split(","))
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folders that the image's own install steps made. CONTAINER_IMAGES=demo,cuda: of CUDA too, a large download.
    By default the demo, which is the CPU image with more."""
    if os.geteuid() != 0:
        pytest.skip("only root can rehearse the image's users")
    if subprocess.run([sys.base_prefix + "/bin/python3", "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip(f"the Python in {sys.base_prefix} has no pip")
    folder = tmp_path_factory.mktemp("image")
    source = rehearsal.context(folder / "source")
    rehearsal.build(request.param, source, folder / "root")
    return SimpleNamespace(target=request.param, root=folder / "root", models=source / "deploy" / "models")


@pytest.fixture
def container(image: SimpleNamespace) -> Iterator[rehearsal.Container]:
    started = rehearsal.run(image.target, image.root, image.models, STEERVIT_PROVIDER="cpu")
    yield started
    started.kill()


def test_the_image_holds_what_its_lock_names_and_no_compiler(image: SimpleNamespace) -> None:
    site = next(image.root.glob("venv/lib/python3*/site-packages"))
    found = {canonicalize_name(d.name): d.version for d in distributions(path=[str(site), str(image.root / "app")])}
    assert found.pop("steervit")
    assert found == rehearsal.locked(image.target)
    names = {path.name for path in image.root.rglob("*")}
    assert not names & COMPILERS
    assert not names & {"torch", "triton", "pip"}
    if image.target == "cuda":
        assert rehearsal.unresolved(site, f"{rehearsal.PREFIX}/venv/lib/python3.11/site-packages") == {"libcuda.so.1"}


def test_a_read_only_container_without_rights_answers_and_ends_with_0(container: rehearsal.Container) -> None:
    assert container.healthy()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
    assert status["Uid"].split() == ["65532"] * 4
    assert status["NSpid"].split()[-1] == "1"
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"].strip()) == (0, 0, "1")
    for folder in ("/", "/tmp", "/models", rehearsal.PREFIX, f"{rehearsal.PREFIX}/app"):
        assert container.execute("sh", "-c", f"echo > {folder}/new").returncode != 0, f"{folder} can be written"
    shoe = sorted((SAMPLES / "Sneaker").glob("*.png"))[0]
    client = container.from_outside("-m", "service.client", "predict", "--profile", "Sneaker", str(shoe))
    answer, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    assert re.search(r"\.png +Sneaker ", answer), answer
    container.signal()
    assert container.wait() == 0


class Mirror(http.server.BaseHTTPRequestHandler):
    """Of PyPI, without any package."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can rehearse the image's users")
def test_a_build_argument_makes_pip_ask_a_mirror(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as mirror:
        threading.Thread(target=mirror.serve_forever, args=(0.05,), daemon=True).start()
        index = f"http://127.0.0.1:{mirror.server_address[1]}/simple"
        with contextlib.suppress(AssertionError):  # the mirror has nothing
            rehearsal.build("cpu", rehearsal.context(tmp_path / "source"), tmp_path / "root", PIP_INDEX_URL=index)
        mirror.shutdown()
    assert Mirror.asked
    assert {canonicalize_name(path.split("/")[2]) for path in Mirror.asked} <= {*rehearsal.locked("cpu"), "setuptools"}


PLAYGROUND = """
import http.client, io, subprocess, sys
from PIL import Image
command = [sys.executable, "-m", "service.playground", "--server", "127.0.0.1:8001", "--port", "0"]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
    connection = http.client.HTTPConnection(page.stdout.readline().split()[1].removeprefix("http://"))
    picture = io.BytesIO()
    Image.new("L", (2000, 2000)).save(picture, "PNG")
    for method, path in (("GET", "/"), ("POST", "/result?profile=Shirt"), ("GET", "/static/playground.js")):
        connection.request(method, path, picture.getvalue())
        answer = connection.getresponse()
        print(path, answer.status, len(answer.read()) > 1000)
    page.terminate()
print(page.returncode)
"""


def test_the_demo_has_the_playground(image: SimpleNamespace, container: rehearsal.Container) -> None:
    if image.target != "demo":
        pytest.skip("the playground is in the demo alone")
    done = container.execute("python", "-c", PLAYGROUND)
    assert done.stdout.splitlines() == [
        "/ 200 True", "/result?profile=Shirt 200 True", "/static/playground.js 200 True", "0",
    ], done.stderr  # fmt: skip


HOLDING_A_CALL = """
import time, grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
def questions():
    yield ServerReflectionRequest(list_services="")
    time.sleep(60)
call = ServerReflectionStub(grpc.insecure_channel("127.0.0.1:8001")).ServerReflectionInfo(questions())
next(call)
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_signal_ends_a_container_that_drains_at_once(container: rehearsal.Container) -> None:
    """Process 1 gets no signal that it has no handler for, so this cannot be left to the kernel."""
    client = container.from_outside("-c", HOLDING_A_CALL)
    assert client.stdout is not None
    assert client.stdout.readline() == "open\n", client.communicate()
    container.signal()
    assert container.process.stderr is not None
    assert any("stopping" in line for line in container.process.stderr)
    start = time.monotonic()
    container.signal()
    try:
        assert container.wait() == 128 + 15
        assert time.monotonic() - start < 10, "it took its time to drain"
    finally:
        client.kill()
        client.communicate()


IN_A_POD = 'exec "$POD" -- '


def test_what_the_runbook_runs_in_a_pod_works_there(image: SimpleNamespace) -> None:
    """With a profile folder at another path, as nothing else can be mounted here."""
    profiles = f"{rehearsal.PREFIX}/profiles"
    shutil.copytree(ROOT / "deploy" / "profiles", image.root / "profiles", dirs_exist_ok=True)
    (version,) = filter(Path.is_dir, (image.models / "fashion_mnist").iterdir())
    lines = {c.text.partition(IN_A_POD)[2] for c in commands("deploy/RUNBOOK.md")} - {""}
    assert len(lines) == 7
    container = rehearsal.run(
        image.target, image.root, image.models, STEERVIT_PROVIDER="cpu", STEERVIT_PROFILES_DIR=profiles
    )
    try:
        for line in lines:
            names = {"/etc/steervit/profiles": profiles, "$MODEL": "fashion_mnist", "$VERSION": version.name}
            for name, value in names.items():
                line = line.replace(name, value)
            done = container.execute(*shlex.split(line))
            assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        assert container.healthy()
    finally:
        log = container.kill()
    assert re.search(r'^(Current thread|Thread) 0x.*\n  File "', log, re.MULTILINE), "the stacks of SIGUSR1"
