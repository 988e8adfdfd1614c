"""The image and compose.yaml: read by their own tools, and rehearsed without a container engine."""

import os
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
import rehearsal
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import ROOT, SAMPLES

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
SERVED_ON = {
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "python_version": "3.11",
    "python_full_version": "3.11.14",
}
COMPILERS = {"cc", "gcc", "g++", "c++", "clang", "tcc", "as", "ld", "make", "cmake", "nvcc", "ptxas", "rustc", "cargo"}


def tool(*command: str) -> str:
    """A command line tool of the development environment, or of the system; it must end with 0."""
    path = os.environ["PATH"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def locked(name: str) -> dict[str, str]:
    """What a lock installs on the machines that we serve on: version by package."""
    found = {}
    for line in (DEPLOY / f"requirements-{name}.lock").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate(SERVED_ON):
                found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    tool("hadolint", "--failure-threshold", "style", "deploy/Dockerfile")


@pytest.mark.parametrize("target", ["cpu", "cuda", "demo"])
def test_each_target_runs_without_a_shell_as_a_numeric_user_that_is_not_root(target: str) -> None:
    steps = rehearsal.stages()[target]
    assert rehearsal.last(steps, "USER") == "65532:65532"
    assert rehearsal.last(steps, "ENTRYPOINT").startswith("[")
    assert rehearsal.last(steps, "HEALTHCHECK").partition("CMD ")[2].startswith("[")


def test_bases_are_pinned_and_all_that_is_copied_is_in_the_context(tmp_path: Path) -> None:
    stages = rehearsal.stages()
    steps = [step for steps in stages.values() for step in steps]
    assert {value.split()[0] for name, value in steps if name == "FROM"} - set(stages) == {"${PYTHON_IMAGE}"}
    assert re.search(
        r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm$", rehearsal.DOCKERFILE.read_text(), re.MULTILINE
    )
    source = rehearsal.context(tmp_path)
    for stage, names, _ in rehearsal.copies(steps):
        for name in names:
            assert stage in stages if stage else any(source.glob(name)), f"COPY {name}: not there, or ignored"


@pytest.mark.parametrize(("name", "runtime"), [("cpu", "onnxruntime"), ("cuda", "onnxruntime-gpu")])
def test_a_lock_meets_pyproject_and_brings_no_torch(name: str, runtime: str) -> None:
    found = locked(name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        wanted = runtime if requirement.name.startswith("onnxruntime") else canonicalize_name(requirement.name)
        assert requirement.specifier.contains(found[wanted]), f"{requirement}, locked {found[wanted]}: make lock"
    assert not {"torch", "triton", "onnx", *{"onnxruntime", "onnxruntime-gpu"} - {runtime}} & set(found)
    assert any(package.startswith("nvidia-") for package in found) == (name == "cuda")


def test_compose_is_valid_and_the_scanner_finds_nothing_serious() -> None:
    """What it reports below `high`: images pinned by tags (digests are the user's to choose) and no limit of CPUs."""
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    tool("compose-lint", "check", "--fail-on", "high", str(COMPOSE))


def test_compose_mounts_what_exists_and_each_service_is_hardened() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {"server", "prometheus", "grafana"} <= set(services)
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service["image"].endswith(":latest"), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} listens on the network: {port}"
        for source in (volume.split(":")[0] for volume in service.get("volumes", [])):
            assert not source.startswith(".") or (DEPLOY / source).exists(), f"{name} mounts {source}"
    for sample in (word for word in services["traffic"]["command"] if word.startswith("/samples/")):
        assert (SAMPLES / sample.removeprefix("/samples/")).is_file()
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "dashboards" / Path(home).name).is_file()


def test_prometheus_and_grafana_find_each_other_the_server_and_the_rules() -> None:
    assert "rules found" in tool("promtool", "check", "config", "deploy/prometheus/prometheus.yml")
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    ((target,),) = (group["targets"] for group in job["static_configs"])
    host, port = target.split(":")
    assert host in services
    assert port == rehearsal.environment(rehearsal.stages()["demo"])["STEERVIT_METRICS_PORT"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "steervit.yaml").read_text())["providers"]
    assert f"./dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_every_library_of_the_cuda_provider_is_where_the_cuda_image_looks() -> None:
    """With the CUDA that torch brought into the development environment: the same packages, at the same paths."""
    site = Path(sysconfig.get_path("purelib"))
    if not (site / "nvidia").is_dir():
        pytest.skip("this environment has no CUDA packages")
    assert unresolved(site, f"{rehearsal.PREFIX}/venv/lib/python3.11/site-packages") == {"libcuda.so.1"}  # the driver's


def unresolved(site: Path, inside: str) -> set[str]:
    """Libraries that the CUDA provider of this site-packages folder, `inside` in the image, would not find."""
    paths = rehearsal.environment(rehearsal.stages()["cuda"])["LD_LIBRARY_PATH"].replace(inside, str(site))
    provider = site / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    done = subprocess.run(["ldd", str(provider)], capture_output=True, text=True, env={"LD_LIBRARY_PATH": paths})
    assert done.returncode == 0, done.stderr
    return {line.split()[0] for line in done.stdout.splitlines() if "not found" in line}


@pytest.fixture(scope="module", params=os.environ.get("CONTAINER_IMAGES", "cpu").split(","))
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folders that the image's own install steps made. CONTAINER_IMAGES=cpu,cuda: of CUDA too, a large download."""
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


@pytest.mark.slow
def test_the_image_holds_what_its_lock_names_and_no_compiler(image: SimpleNamespace) -> None:
    site = next(image.root.glob("venv/lib/python3*/site-packages"))
    found = {canonicalize_name(d.name): d.version for d in distributions(path=[str(site), str(image.root / "app")])}
    assert found.pop("steervit")
    assert found == locked(image.target)
    names = {path.name for path in image.root.rglob("*")}
    assert not names & COMPILERS
    assert not names & {"torch", "triton", "pip"}
    if image.target == "cuda":
        assert unresolved(site, f"{rehearsal.PREFIX}/venv/lib/python3.11/site-packages") == {"libcuda.so.1"}


@pytest.mark.slow
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


@pytest.mark.slow
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
