"""The Python packages of an image as a CycloneDX bill of materials: python -m deploy.sbom cpu|cuda|delivery|demo > FILE

Made of the image's lock, so without building it: versions, hashes of the wheels, and which package needs which. Syft,
Grype, Trivy and Dependency-Track read it. Debian's packages and Python itself, which the base image brings, are in the
bill that `make push` attaches to the image.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TARGETS = ("cpu", "cuda", "delivery", "demo")
IMAGE = {"python_version": "3.11", "python_full_version": "3.11.14", "sys_platform": "linux"}
"""What markers see in the image."""


def entries(target: str) -> dict[str, str]:
    """The lock's lines about each package that the image installs, by name."""
    lock = (ROOT / "deploy" / f"requirements-{target}.lock").read_text()
    found = {}
    for entry in re.split(r"^(?=\w)", lock, flags=re.MULTILINE)[1:]:
        requirement = Requirement(entry.partition("\\")[0])
        if requirement.marker is None or requirement.marker.evaluate(IMAGE):
            found[canonicalize_name(requirement.name)] = entry
    return found


def needed_by(entry: str) -> list[str]:
    """Names of packages; `steervit` for the project itself."""
    comments = re.findall(r"^ +# +(?:via )?([a-z0-9][\w.-]*)", entry, re.MULTILINE)
    return [canonicalize_name(name) for name in comments if name != "via"]


def bill(target: str) -> dict[str, Any]:
    packages = entries(target)
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "-", "--output-reproducible"]
    command += ["--pyproject", str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, input="".join(packages.values()), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    root = found["metadata"]["component"]
    refs = {root["name"]: root["bom-ref"]}
    for component in found["components"]:
        del component["description"]  # the lock's lines again
        refs[canonicalize_name(component["name"])] = component["bom-ref"] = component["purl"]
    needs: dict[str, list[str]] = {ref: [] for ref in refs.values()}
    for name, entry in packages.items():
        for owner in needed_by(entry):
            if owner in refs:
                needs[refs[owner]].append(refs[name])
    found["dependencies"] = [{"ref": ref, "dependsOn": sorted(on)} for ref, on in sorted(needs.items())]
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in TARGETS:
        raise SystemExit(f"python -m deploy.sbom: the target is {sys.argv[1:]}; allowed: {', '.join(TARGETS)}")
    print(json.dumps(bill(sys.argv[1]), indent=2))
