"""Triton's load generator perf_analyzer, set up in build/perf_analyzer: a program that knows nothing of this project.

It is a wheel on PyPI that needs a newer C library than Debian 12 has. There the libraries of Debian 13 are unpacked
beside it, from the mirror that the machine's own apt uses, and its loader starts the program. Nothing is installed.
"""

import platform
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from processes import ROOT

FOLDER = ROOT / "build" / "perf_analyzer"
WHEEL = "perf-analyzer==2.60.0"
LIBRARIES = ("libc6", "libgcc-s1", "libstdc++6", "libssl3t64", "libzstd1", "zlib1g")
RELEASE = "trixie"


class CannotRun(Exception):
    """Why there is no perf_analyzer here."""


def perf_analyzer() -> list[str]:
    """The command, without arguments. Raises CannotRun."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise CannotRun(f"there is no wheel for {platform.system()} on {platform.machine()}")
    try:
        program = _program()
        if tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 38):
            return [str(program)]
        libraries = _libraries()
    except subprocess.CalledProcessError as error:
        raise CannotRun(f"{' '.join(map(str, error.cmd[:3]))} failed: {error.stderr[-500:]}") from error
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(program)]


def _program() -> Path:
    program = FOLDER / "wheel" / "perf_analyzer" / "bin" / "perf_analyzer"
    if not program.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        _run([*pip, "--platform", "manylinux_2_38_x86_64", "--dest", str(FOLDER), WHEEL])
        with zipfile.ZipFile(next(FOLDER.glob("perf_analyzer-*.whl"))) as wheel:
            wheel.extractall(FOLDER / "wheel")
        program.chmod(0o755)
    return program


def _libraries() -> Path:
    root = FOLDER / RELEASE
    libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
    if not (libraries / "libssl.so.3").exists():
        state = FOLDER / "apt"
        for folder in ("lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (state / "sources.list").write_text("".join(f"deb {site} {RELEASE} main\n" for site in _sites()))
        options = {
            "Dir::State": state, "Dir::State::status": state / "status", "Dir::Cache": state / "cache",
            "Dir::Etc::sourcelist": state / "sources.list", "Dir::Etc::sourceparts": "-",
        }  # fmt: skip
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
        _run([*apt, "update"])
        _run([*apt, "download", *LIBRARIES], cwd=state)
        for package in state.glob("*.deb"):
            _run(["dpkg-deb", "-x", str(package), str(root)])
    return libraries


def _sites() -> list[str]:
    """The archives of Debian that this machine's apt reads."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    targets = _run(["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Created-By: Packages"])
    found = {site for site, of in (line.split() for line in targets.splitlines()) if of == release}
    if not found:
        raise CannotRun(f"apt knows no archive of {release or 'this system'}; run apt-get update first")
    return sorted(found)


def _run(command: Sequence[str], cwd: Path = ROOT) -> str:
    FOLDER.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=300).stdout
