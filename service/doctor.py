"""steervit doctor --repository deploy/models: what support would ask for, of this machine and these settings.

Takes the flags and the environment of the server, loads nothing and changes nothing. Also asks a server that runs with
the same settings for its state. Lines that begin with `!` are problems; they make the exit status 1. Also python -m
service.doctor, as in the image.
"""

import contextlib
import http.client
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime
from pydantic import ValidationError
from pydantic_settings import CliApp

from export.bundle import BundleError, load_bundle
from service import cuda, limits, profiles
from service.catalogue import scan
from service.config import DOCTOR, Settings, problems, source
from service.engine import usable_cpus
from service.tls import Certificates
from training.terminal import print_anything

PACKAGES = (
    "steervit", "onnxruntime", "onnxruntime-gpu", "grpcio", "protobuf", "numpy", "pillow", "prometheus-client",
    "pydantic-settings", "uvloop",
)  # fmt: skip
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
"""The flags that decide which kernels onnxruntime uses."""
LIMITS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/memory.max")
VARIABLES = ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "GRPC_VERBOSITY")
Lines = Iterator[str]


def main(arguments: Sequence[str], prog: str = "python -m service.doctor") -> int:
    """Print the report; returns the exit status: 0, 1 if it has a problem, 2 if a setting is wrong.

    arguments: those after the program's name, prog.
    """
    print_anything()
    try:
        settings = CliApp.run(Settings, cli_args=list(arguments), cli_settings_source=source(prog, DOCTOR))
    except ValidationError as error:
        print("\n".join(problems(error)), file=sys.stderr)
        return 2
    served: list[profiles.Served] = []
    sections = {
        "versions": _versions(settings), "machine": _machine(settings), "settings": _settings(settings),
        "models": _models(settings, served), "profiles": _profiles(settings, served),
        "limits by client": _limits(settings, served), "certificates": _certificates(settings),
        "server": _server(settings),
    }  # fmt: skip
    failed = 0
    for title, lines in sections.items():
        print(f"{title}")
        for line in lines:
            failed += line.startswith("!")
            print(f"  {line}")
    return 1 if failed else 0


def _versions(settings: Settings) -> Lines:
    yield f"python {platform.python_version()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}"
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"
    yield f"revision {settings.revision}"


def _machine(settings: Settings) -> Lines:
    yield platform.platform()
    cpus = _read("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpus)
    flags = set(cpus.partition("flags")[2].partition("\n")[0].split())
    known = ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "flags unknown"
    yield f"CPU {name[1] if name else platform.machine()}: {known}"
    yield f"{usable_cpus()} of {os.cpu_count()} CPUs may be used"
    for path in LIMITS:
        if text := _read(path).strip():
            yield f"{path} {text}"
    memory = dict(re.findall(r"(MemTotal|MemAvailable): +(\d+) kB", _read("/proc/meminfo")))
    yield ", ".join(f"{name} {int(kilobytes) / 2**20:.1f} GiB" for name, kilobytes in memory.items())
    yield f"descriptors: {resource.getrlimit(resource.RLIMIT_NOFILE)[1]} at most"
    yield f"providers {', '.join(onnxruntime.get_available_providers())}"
    if settings.provider == "cuda" or (settings.provider == "auto" and cuda.has_device()):
        problem = cuda.problem(settings.device)
        yield f"! {problem}" if problem else f"GPU {settings.device} can be used"
    for variable in VARIABLES:
        if variable in os.environ:
            yield f"{variable}={os.environ[variable]}"


def _settings(settings: Settings) -> Lines:
    for name, value in settings.model_dump(exclude_defaults=True).items():
        yield f"{name} {value}"


def _models(settings: Settings, served: list[profiles.Served]) -> Lines:
    """Adds the bundles."""
    try:
        catalogue = scan(settings.repository)
    except (BundleError, OSError) as error:
        yield f"! {error}"
        return
    for path, reason in catalogue.skipped.items():
        yield f"! {path}: {reason}"
    for name, shelf in catalogue.items():
        for number, folder in shelf.versions.items():
            try:
                bundle = load_bundle(folder.path, settings.repository)
            except BundleError as error:
                yield f"! {name} {number}: {error}"
                continue
            served.append((bundle, shelf.settings.get("default_profile", settings.default_profile)))
            graphs = ", ".join(graph.file for graph in bundle.manifest.graphs)
            yield f"{name} {number}: digest {bundle.digest}, {len(bundle.profiles)} profiles, {graphs}"
        if shelf.settings:
            yield f"{name} serving.json: {', '.join(f'{field} {value}' for field, value in shelf.settings.items())}"
        for problem in filter(None, (shelf.problem, shelf.settings_problem)):
            yield f"! {problem}"


def _profiles(settings: Settings, served: list[profiles.Served]) -> Lines:
    if settings.profiles_dir:
        lines, wrong = profiles.check(settings.profiles_dir, served)
        yield from lines
        yield from (f"! {problem}" for problem in wrong)


def _limits(settings: Settings, served: list[profiles.Served]) -> Lines:
    if not settings.client_limits:
        return
    try:
        of_clients = limits.read(settings.client_limits)
    except limits.LimitsError as error:
        yield f"! {error}"
        return
    names = {bundle.manifest.name for bundle, _ in served}
    for name, limit in {**of_clients.clients, "default": of_clients.default}.items():
        if unknown := set(limit.models or ()) - names:
            yield f"! {name} may call {', '.join(sorted(unknown))}, which the repository does not have"
    yield f"for {', '.join(of_clients.clients) or 'no client'}, and a default"
    if not settings.tls_client_ca:
        yield "clients name themselves, in x-client-name: --tls-client-ca is not set"


def _certificates(settings: Settings) -> Lines:
    if not settings.tls_certificate:
        return
    try:
        certificates = Certificates(settings)
        certificates.check()
    except OSError as error:
        yield f"! {error}"
        return
    for file, expires in certificates.expiry().items():
        days = (expires - time.time()) / 86400
        yield f"{'! ' if days < 2 else ''}{file} expires in {days:.1f} days"


def _server(settings: Settings) -> Lines:
    """The state of the server at the metrics port, and its counts of failures."""
    host = settings.host if settings.host.strip("0.:") else "localhost"  # 0.0.0.0 and :: mean all addresses
    try:
        for path in ("/livez", "/readyz"):
            status, text = _page(host, settings.metrics_port, path)
            yield f"{'' if status == 200 else '! '}{path} {status} {'; '.join(text.splitlines())}"
        _, text = _page(host, settings.metrics_port, "/metrics")
    except OSError as error:
        yield f"no answer from {host} port {settings.metrics_port}: {error}"
        return
    failing = (
        r'steervit_(requests_total\{.*code="(?!OK|CANCELLED)|images_dropped|model_load_fail|profile_reads.*failed)'
    )
    for line in text.splitlines():
        if re.match(failing, line) and float(line.rpartition(" ")[2]):
            yield line


def _page(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and text of an HTTP page, requested without the proxies of the environment."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _read(path: str) -> str:
    """The text of a file of the system; "" if there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
