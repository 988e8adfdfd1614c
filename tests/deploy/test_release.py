"""What a release publishes, as far as no registry is needed: bills of materials, platforms, the workflow."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rehearsal
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name
from processes import ROOT

from deploy.sbom import TARGETS

OF_ARM64 = [target for target in TARGETS if target != "cuda"]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def run(*command: str) -> str:
    """A command of the development environment, or of the system; it must end with 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def project_version() -> str:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return version


@pytest.mark.parametrize("target", TARGETS)
def test_a_bill_of_materials_has_what_the_image_installs_with_hashes_and_who_needs_it(target: str) -> None:
    text = run(sys.executable, "-m", "deploy.sbom", target)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found: dict[str, Any] = yaml.safe_load(text)
    assert found["bomFormat"] == "CycloneDX"
    project = found["metadata"]["component"]
    assert (project["name"], project["version"]) == ("steervit", project_version())
    packages = {canonicalize_name(one["name"]): one for one in found["components"]}
    assert {name: one["version"] for name, one in packages.items()} == rehearsal.locked(target)
    for name, one in packages.items():
        assert one["purl"] == f"pkg:pypi/{name}@{one['version']}"
        (distribution,) = one["externalReferences"]
        assert {entry["alg"] for entry in distribution["hashes"]} == {"SHA-256"}
    needs = {entry["ref"]: set(entry["dependsOn"]) for entry in found["dependencies"]}
    reached, new = set(), {project["bom-ref"]}
    while new:
        reached |= new
        new = set().union(*(needs[ref] for ref in new)) - reached
    assert reached == {project["bom-ref"], *(one["purl"] for one in packages.values())}, "packages that nobody needs"
    runtime = packages["onnxruntime-gpu" if target == "cuda" else "onnxruntime"]["purl"]
    assert packages["numpy"]["purl"] in needs[runtime]


@pytest.mark.parametrize("target", OF_ARM64)
def test_every_package_of_an_image_for_arm64_has_a_wheel_for_it(target: str, tmp_path: Path) -> None:
    """Resolved, not downloaded; Debian 12 has glibc 2.36."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--no-deps", "--target", str(tmp_path)]
    command += ["--python-version", "3.11", "--python-platform", "aarch64-manylinux_2_36", "--only-binary", ":all:"]
    run(*command, "--require-hashes", "--requirement", f"deploy/requirements-{target}.lock")


def test_make_pushes_the_platforms_that_a_target_can_run_on() -> None:
    platforms = {
        target: re.findall(r"--platform (\S+)", run("make", "-n", "push", "REGISTRY=r.example.com", f"TARGET={target}"))
        for target in TARGETS
    }
    assert platforms == {target: ["linux/amd64,linux/arm64"] for target in OF_ARM64} | {"cuda": ["linux/amd64"]}


def test_the_release_workflow_is_valid_pins_its_actions_and_has_no_weakness_that_the_scanner_knows() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW))
    run("zizmor", "--offline", "--no-progress", str(WORKFLOW))
    text = WORKFLOW.read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert len(uses) > 5
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in uses), uses
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    scripts = [step["run"] for step in steps if "run" in step]
    for script in scripts:
        assert "${{" not in script, "expressions go through the environment"
        run("bash", "-n", "-c", script)
    assert tuple(jobs["image"]["strategy"]["matrix"]["target"]) == TARGETS
    named = {target for script in scripts for line in re.findall(r"^make (.*)", script, re.MULTILINE)
             for target in line.split() if "=" not in target}  # fmt: skip
    assert named == {"push", "sbom", "chart"}
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    may_write = {name for name, job in jobs.items() if "write" in job["permissions"].values()}
    assert may_write == {"image", "publish"}
