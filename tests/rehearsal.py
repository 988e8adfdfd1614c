"""Does with bubblewrap what a container engine would do with deploy/Dockerfile, without an image or a daemon.

This machine's /usr and Python stand in for the base image. RUN lines run as an unprivileged user with the build context
read-only; the ENTRYPOINT runs as process 1 and the Dockerfile's user, without capabilities, on a read-only root with a
network of its own. COPY from another stage must keep the path.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PREFIX = "/opt/steervit"
BUILDER = "65534:65534"
"""Another user than that of the image, who must not own its files."""
Instructions = list[tuple[str, str]]
SERVED_ON = {
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "python_version": "3.11",
    "python_full_version": "3.11.14",
}
"""The machines of the image."""


def stages() -> dict[str, Instructions]:
    """The stages by name, each with the instructions of the stages that it builds on. `FROM` keeps its own value."""
    parser = DockerfileParser(fileobj=BytesIO(DOCKERFILE.read_bytes()))
    found: dict[str, Instructions] = {}
    current: Instructions = []
    for step in parser.structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "FROM":
            base, _, name = value.split()
            current = found[name] = [*found.get(base, []), (instruction, value)]
        elif instruction != "COMMENT":
            current.append((instruction, value))
    return found


def last(instructions: Instructions, name: str) -> str:
    return [value for instruction, value in instructions if instruction == name][-1]


def copies(instructions: Instructions) -> list[tuple[str, list[str], str]]:
    """Stage ("": the context), sources and destination of each COPY."""
    found = []
    for words in (value.split() for name, value in instructions if name == "COPY"):
        stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
        found.append((stage, words[:-1], words[-1]))
    return found


def environment(instructions: Instructions) -> dict[str, str]:
    """The environment, with this machine's Python in place of the base image's."""
    pairs = [pair for name, value in instructions if name == "ENV" for pair in shlex.split(value)]
    found = {"PATH": "/usr/local/bin:/usr/bin:/bin", **dict(pair.split("=", 1) for pair in pairs)}
    return found | {"PATH": found["PATH"].replace("/usr/local/bin", f"{sys.base_prefix}/bin")}


def context(folder: Path) -> Path:
    """The build context: what .dockerignore lets through."""
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        for path in ROOT.glob(line[1:]) if line.startswith("!") else []:
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(path, target)
    return folder


def build(target: str, source: Path, folder: Path, **given: str) -> None:
    """Run the RUN lines that the target's COPY lines depend on; what they put below PREFIX goes into the folder.
    given: build arguments. Those that a stage does not declare with ARG do not reach its RUN lines."""
    folder.mkdir()
    os.chown(folder, *map(int, BUILDER.split(":")))
    for stage, sources, destination in copies(stages()[target]):
        if not stage:
            continue
        assert sources == [destination], "a rehearsal moves nothing"
        steps = stages()[stage]
        mounts = ["--ro-bind", "/etc", "/etc", "--tmpfs", "/tmp", "--chmod", "1777", "/tmp"]
        mounts += ["--ro-bind", str(source), last(steps, "WORKDIR"), "--bind", str(folder), PREFIX]
        declared = {value.partition("=")[0] for name, value in steps if name == "ARG"}
        variables = {name: value for name, value in given.items() if name in declared}
        for command in (value for name, value in steps if name == "RUN"):
            arguments = _sandbox(steps, mounts, BUILDER, variables, ["sh", "-c", command])
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=1500)
            assert done.returncode == 0, done.stderr[-3000:]


@dataclass(frozen=True)
class Container:
    """The target's ENTRYPOINT, running."""

    process: "subprocess.Popen[str]"
    pid: int
    """ID of its process 1, as seen from outside."""
    instructions: Instructions
    variables: dict[str, str]

    def execute(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command like `docker exec`."""
        user = _as_user(last(self.instructions, "USER"))
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        inside = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--ipc", "--uts"]
        command = (*inside, "env", "-i", *variables, *user, *command)
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def from_outside(self, *arguments: str) -> "subprocess.Popen[str]":
        """Run this test's own Python on the container's network."""
        command = ["nsenter", f"--target={self.pid}", "--net", sys.executable, *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def healthy(self) -> bool:
        check = last(self.instructions, "HEALTHCHECK").partition("CMD ")[2]
        return self.execute(*json.loads(check)).returncode == 0

    def signal(self) -> None:
        os.kill(self.pid, getattr(signal, last(self.instructions, "STOPSIGNAL")))

    def wait(self) -> int:
        """The exit status. Kills the container if it does not end."""
        try:
            return self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> str:
        """Kill process 1, and so the whole container; killing bubblewrap would leave it running. Returns the last log
        lines."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.process.communicate()[1]


def run(target: str, folder: Path, models: Path, *flags: str, **variables: str) -> Container:
    """Like `docker run --read-only --cap-drop ALL --security-opt no-new-privileges -v models:/models:ro`."""
    steps = stages()[target]
    read, write = os.pipe()
    mounts = ["--unshare-pid", "--as-pid-1", "--unshare-net", "--info-fd", str(write)]
    mounts += ["--ro-bind", str(folder), PREFIX, "--ro-bind", str(models), "/models", "--remount-ro", "/"]
    command = [*json.loads(last(steps, "ENTRYPOINT")), *flags]
    arguments = _sandbox(steps, mounts, last(steps, "USER"), variables, command)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=[write])
    os.close(write)
    with open(read) as info:
        started = info.read()
    assert started, process.communicate()[1]
    pid = json.loads(started)["child-pid"]
    container = Container(process, pid, steps, {**environment(steps), **variables})
    assert process.stdout is not None
    if not process.stdout.readline().startswith("ready: "):
        raise AssertionError(f"the server did not start: {container.kill()}")
    return container


def _sandbox(
    steps: Instructions, mounts: list[str], user: str, variables: dict[str, str], command: list[str]
) -> list[str]:
    base = ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev", "--dir", str(Path(PREFIX).parent)]
    for name in ("bin", "lib", "lib64", "sbin"):
        base += ["--symlink", f"usr/{name}", f"/{name}"]
    python = Path(sys.base_prefix)  # at its own path: its libraries are looked for there
    if not python.is_relative_to("/usr"):
        for parent in reversed(python.parents[:-1]):
            base += ["--dir", str(parent)]
        base += ["--ro-bind", str(python), str(python)]
    base += ["--clearenv", "--die-with-parent"]
    for name, value in {**environment(steps), **variables}.items():
        base += ["--setenv", name, value]
    return ["bwrap", *base, *mounts, "--chdir", last(steps, "WORKDIR"), "--", *_as_user(user), *command]


def _as_user(user: str) -> list[str]:
    number, _, group = user.partition(":")
    without = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    return ["setpriv", f"--reuid={number}", f"--regid={group}", *without, "--"]


def locked(name: str) -> dict[str, str]:
    """What a lock installs on the machines that we serve on: version by package."""
    found = {}
    for line in (ROOT / "deploy" / f"requirements-{name}.lock").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate(SERVED_ON):
                found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


def unresolved(site: Path, inside: str) -> set[str]:
    """Libraries that the CUDA provider of this site-packages folder, `inside` in the image, would not find."""
    paths = environment(stages()["cuda"])["LD_LIBRARY_PATH"].replace(inside, str(site))
    provider = site / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    done = subprocess.run(["ldd", str(provider)], capture_output=True, text=True, env={"LD_LIBRARY_PATH": paths})
    assert done.returncode == 0, done.stderr
    return {line.split()[0] for line in done.stdout.splitlines() if "not found" in line}
