"""Installs other people's programs, which tests and benches run, into build/peers: python -m tests.perf.peer_tools

- perf_analyzer, from PyPI. If the C library is too old for it, that of the next Debian is installed beside it.
- Triton with its Python backend, from PyPI. It runs the Python and the onnxruntime of this environment,
  with a numpy of its own.

Nothing outside build/ changes, and root is not needed. Where one cannot run, `Unavailable` says why.
"""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "peers"
PERF_ANALYZER = "perf-analyzer==2.60.0"
TRITON = "nvidia-pytriton==0.7.0"
"""Triton 2.51."""
TRITON_NUMPY = "numpy==1.26.4"
"""Its Python backend answers with empty tensors under numpy 2."""
RUNTIME = ("libc6", "libstdc++6", "libgcc-s1", "libssl3t64", "zlib1g", "libzstd1")
"""The libraries that perf_analyzer is linked with."""
RUNTIME_SUITE = "trixie"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Unavailable(Exception):
    """A program cannot run here; the message says why."""


def perf_analyzer() -> list[str]:
    """The command, installed if it is missing. Raises Unavailable."""
    _check_platform()
    folder = FOLDER / "perf_analyzer"
    libraries = folder / "runtime" / "usr" / "lib" / "x86_64-linux-gnu"
    binary = folder / "perf_analyzer" / "bin" / "perf_analyzer"
    beside = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(binary)]
    with _installing(folder) as missing:
        if missing:
            _pip("--platform", "manylinux_2_38_x86_64", "--only-binary", ":all:", PERF_ANALYZER, target=folder)
            binary.chmod(0o755)
            if not _runs([str(binary), "--version"]):
                _unpack(RUNTIME, folder / "runtime", RUNTIME_SUITE)
                if not _runs([*beside, "--version"]):
                    raise Unavailable(f"perf_analyzer does not run with the C library of {RUNTIME_SUITE}")
    return beside if libraries.is_dir() else [str(binary)]


def tritonserver() -> tuple[list[str], dict[str, str]]:
    """The command and its environment, installed if it is missing. Raises Unavailable."""
    _check_platform()
    folder = FOLDER / "triton"
    python = folder / "python"
    backends = folder / "pytriton" / "tritonserver" / "backends"
    binary = folder / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    with _installing(folder) as missing:
        if missing:
            _pip(TRITON, target=folder)
            # What Triton embeds looks for packages beside the `python3` on its PATH, and nowhere else.
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(python)], check=True)
            packages = Path(sysconfig.get_path("purelib", vars={"base": str(python)}))
            _pip("--only-binary", ":all:", TRITON_NUMPY, target=packages)
            (packages / "onnxruntime.pth").write_text(sysconfig.get_path("platlib") + "\n")
            binary.chmod(0o755)
            release = f"{sys.version_info.major}.{sys.version_info.minor}"
            stub = backends.parent / "python_backend_stubs" / release / "triton_python_backend_stub"
            if not stub.exists():
                raise Unavailable(f"Triton's Python backend is not built for Python {release}")
            Path(shutil.copy(stub, backends / "python")).chmod(0o755)
    python_library = _python_library(folder)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{python_library}:{folder / 'nvidia_pytriton.libs'}",
        "PATH": f"{python / 'bin'}:{os.environ['PATH']}",
    }
    return [str(binary), "--backend-directory", str(backends)], environment


def _check_platform() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Unavailable(f"the platform is {sys.platform} {platform.machine()}; required: linux x86_64")


@contextmanager
def _installing(folder: Path) -> Iterator[bool]:
    """Whether the folder must be installed. It is marked complete afterwards; one process at a time installs."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = folder / "installed"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = not done.exists()
        if missing:
            shutil.rmtree(folder, ignore_errors=True)
        yield missing
        done.touch()


def _pip(*arguments: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    done = subprocess.run([*command, "--target", str(target), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"pip cannot install {arguments[-1]}: {done.stderr.strip()[-500:]}")


def _runs(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _python_library(folder: Path) -> Path:
    """The folder of this Python's shared library, which Debian packages separately."""
    name = sysconfig.get_config_var("INSTSONAME")
    library, architecture = Path(sysconfig.get_config_var("LIBDIR")), sysconfig.get_config_var("MULTIARCH")
    fetched = folder / "library"
    for place in (library, library / architecture, fetched / "usr" / "lib" / architecture):
        if (place / name).exists():
            return place
    if not name.startswith("libpython"):
        raise Unavailable("this Python is built without the shared library that Triton's Python backend needs")
    _unpack([name.partition(".so")[0]], fetched, "")
    return fetched / "usr" / "lib" / architecture


def _unpack(packages: Sequence[str], folder: Path, suite: str) -> None:
    """Unpack Debian packages into a folder, with apt's lists in that folder. suite: "" for this system's."""
    if not shutil.which("apt-get"):
        raise Unavailable(f"{', '.join(packages)} of Debian are needed, and apt-get is missing")
    state = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial", "debs"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = {
        "Dir::State::lists": state / "lists", "Dir::State::status": state / "status", "Dir::Cache": state / "cache",
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "", "Acquire::Languages": "none",
    }  # fmt: skip
    if suite:
        (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} {suite} main\n")
        options |= {"Dir::Etc::sourcelist": state / "sources.list", "Dir::Etc::sourceparts": "/dev/null"}
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items() if value)]
    for command in ([*apt, "update"], [*apt, "download", *packages]):
        done = subprocess.run(command, cwd=state / "debs", capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"apt-get cannot fetch {', '.join(packages)}: {done.stderr.strip()[-500:]}")
    for package in (state / "debs").iterdir():
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
    shutil.rmtree(state)


def _mirror() -> str:
    """The archive of this system's packages."""
    system = platform.freedesktop_os_release()
    release = f"Release: {system.get('VERSION_CODENAME')}"
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", release, "Component: main"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    if system["ID"] != "debian" or not found:
        raise Unavailable(f"the C library is too old, and the packages of {RUNTIME_SUITE} are for Debian only")
    return found[0]


def main() -> int:
    for name, install in (("perf_analyzer", perf_analyzer), ("Triton", tritonserver)):
        try:
            install()
        except Unavailable as reason:
            print(f"{name} is not available: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
