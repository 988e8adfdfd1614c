"""What a command connects to and writes, seen by strace: threads, child processes and libraries in C included."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WRITES = re.compile(
    r"(?:open(?:at)?|creat|mkdir(?:at)?|mknod(?:at)?)\((?:(?:AT_FDCWD|\d+)<(?P<folder>[^>]*)>, )?\"(?P<path>[^\"]*)\""
)
READS = re.compile(r" = -1 |\bopen(at)?\((?!.*O_(WRONLY|RDWR|CREAT))")
ADDRESS = re.compile(r'inet_addr\("([^"]*)"\)|inet_pton\(AF_INET6, "([^"]*)"')
LOOPBACK = re.compile(r"(::ffff:)?127\.[\d.]+|::1?")
"""`::` too: connecting to it reaches the machine itself."""


@dataclass(frozen=True)
class Traced:
    remote: frozenset[str]
    """Addresses outside this machine, and name servers anywhere, as `address:port`."""
    written: frozenset[Path]
    """Files opened for writing, and created folders."""

    def written_outside(self, *folders: Path) -> list[str]:
        """Lasting files outside of the folders: no devices, no temporary files, no compiled modules."""
        own = (*folders, Path("/dev"), Path("/proc"), Path(tempfile.gettempdir()))
        lasting = {path for path in self.written if path.parent.name != "__pycache__" and path.name != "__pycache__"}
        return sorted(str(path) for path in lasting if not any(path.is_relative_to(folder) for folder in own))


def prefix(log: Path) -> Sequence[str]:
    """A prefix for a command; empty without strace. It filters in the kernel, so that other system calls cost
    nothing."""
    calls = "trace=connect,sendto,open,openat,creat,mkdir,mkdirat,mknod,mknodat"
    found = shutil.which("strace")
    if not found:
        return ()
    # As in a user's shell: CI and variables of this process might turn telemetry off.
    return ("env", "-u", "CI", "-u", "ORT_DISABLE_TELEMETRY", "-u", "HF_HUB_DISABLE_TELEMETRY",
            found, "-f", "-y", "--seccomp-bpf", "-qq", "-s", "4096", "-e", calls, "-o", str(log))  # fmt: skip


def read(log: Path) -> Traced:
    remote, written = set(), set()
    for line in log.read_text(errors="replace").splitlines():
        if "systemd/resolve" in line:
            remote.add("the resolver of systemd")
        if re.search(r"\b(connect|sendto)\(", line):
            address, port = ADDRESS.search(line), re.search(r"sin6?_port=htons\((\d+)\)", line)
            if address and port:
                host = address[1] or address[2]
                if port[1] == "53" or not LOOPBACK.fullmatch(host):
                    remote.add(f"{host}:{port[1]}")
        elif (call := WRITES.search(line)) and not READS.search(line):
            written.add(Path(call["folder"] or "/") / call["path"])
    return Traced(frozenset(remote), frozenset(written))
