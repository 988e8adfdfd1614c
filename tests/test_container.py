"""The image and compose.yaml, checked by existing tools. deploy/test_image.py rehearses the image."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import rehearsal
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import ROOT, SAMPLES

from deploy.sbom import TARGETS

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"


def tool(*command: str) -> str:
    """Run a command line tool of the development environment or the system, which must exit with 0."""
    path = os.environ["PATH"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    tool("hadolint", "--failure-threshold", "style", "deploy/Dockerfile")


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_runs_without_a_shell_as_a_numeric_user_other_than_root(target: str) -> None:
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


@pytest.mark.parametrize("name", TARGETS)
def test_a_lock_meets_pyproject_and_brings_no_torch(name: str) -> None:
    found = rehearsal.locked(name)
    runtime = "onnxruntime-gpu" if name == "cuda" else "onnxruntime"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        wanted = runtime if requirement.name.startswith("onnxruntime") else canonicalize_name(requirement.name)
        assert requirement.specifier.contains(found[wanted]), f"{requirement}, locked {found[wanted]}: make lock"
    assert not {"torch", "triton", "onnx", *{"onnxruntime", "onnxruntime-gpu"} - {runtime}} & set(found)
    assert any(package.startswith("nvidia-") for package in found) == (name == "cuda")


@pytest.mark.parametrize(("name", "extra"), [("demo", "playground"), ("delivery", "delivery")])
def test_an_image_is_the_cpu_image_with_what_an_extra_needs(name: str, extra: str) -> None:
    cpu, more = rehearsal.locked("cpu"), rehearsal.locked(name)
    assert cpu.items() <= more.items()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in map(Requirement, extras[extra]):
        package = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(more[package]), f"{requirement}: make lock"
        assert package not in cpu


def test_compose_is_valid_and_the_scanner_finds_nothing_serious() -> None:
    """Below `high` it reports images pinned by tags (users choose digests) and no limit of CPUs."""
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
    playground = services["playground"]
    flags = dict(flag.split("=") for flag in playground["command"])
    assert flags["--server"].split(":")[0] in services
    assert playground["ports"] == [f"127.0.0.1:{flags['--port']}:{flags['--port']}"]
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
    assert rehearsal.unresolved(site, f"{rehearsal.PREFIX}/venv/lib/python3.11/site-packages") == {
        "libcuda.so.1"
    }  # the driver's
