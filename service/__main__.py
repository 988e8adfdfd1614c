"""python -m service --repository deploy/models --port 8001 --metrics-port 8002"""

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence

import uvloop
from pydantic import ValidationError
from pydantic_settings import CliApp
from pythonjsonlogger.json import JsonFormatter

from export.bundle import BundleError
from service.config import PREFIX, Settings, problems, source, unknown_in_environment
from service.limits import LimitsError
from service.loaded import EngineError
from service.server import Server

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of mallopt(3)."""


def main(arguments: Sequence[str], prog: str = "python -m service") -> int:
    """Serve until stopped; returns the exit status: 0, 1 if the server cannot start, 2 if a setting is wrong.

    arguments: those after the program's name, prog. The reason for a failure goes to standard error.
    """
    _open_standard_streams()
    try:
        settings = CliApp.run(Settings, cli_args=list(arguments), cli_settings_source=source(prog))
    except ValidationError as error:
        print("\n".join(problems(error)), file=sys.stderr)
        return 2
    if unknown := unknown_in_environment(os.environ):
        names = ", ".join(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)
        print(f"{', '.join(unknown)} in the environment is not a setting; allowed: {names}", file=sys.stderr)
        return 2
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s")
        if settings.log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    _signals_reach_process_1()
    faulthandler.register(signal.SIGUSR1, file=2)  # the stacks of all threads, to standard error
    try:
        uvloop.run(serve(settings))
    except (BundleError, EngineError, LimitsError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _open_standard_streams() -> None:
    """Open closed standard streams: otherwise the next file or socket would get their numbers, and printed text."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _signals_reach_process_1() -> None:
    """Handle the signals in a container's first process: the kernel does not end that one by default."""
    if os.getpid() == 1:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os._exit(128 + number))


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer the accepted calls; a second signal ends at once. SIGHUP: reload."""
    _raise_file_limit()
    _set_malloc()
    server = Server(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reloads: set[asyncio.Task[None]] = set()  # the loop keeps no reference to them

    def reload() -> None:
        task = loop.create_task(server.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    await server.start()
    gc.collect()
    gc.freeze()  # what exists now is permanent: later collections skip it
    where = f"http://{settings.url_host}:{server.metrics_port}/metrics"
    try:
        state = "ready" if server.ready else "not ready"
        print(f"{state}: grpc {settings.url_host}:{server.port}, metrics {where}", flush=True)
    except OSError as error:  # a full disk, or a terminal that is gone: the server outlives both
        logging.getLogger("steervit").warning("standard output cannot be written: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    logging.getLogger("steervit").info(
        "grpc on port %d%s, pages on port %d, a queue of %d images, model control %s", server.port,
        " with TLS" if settings.tls_certificate else "", server.metrics_port, settings.max_queue,
        settings.model_control,
    )  # fmt: skip
    await stop.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    loop.remove_signal_handler(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _signals_reach_process_1()
    logging.getLogger("steervit").info("stopping: answering the accepted calls")
    await server.stop()


def _set_malloc() -> None:
    """Let all threads share two heaps, because unloaded models leave fragments in a thread's own heap. Let the heaps
    retain freed memory: for a large message, returning it to the system costs more than everything else together."""
    with contextlib.suppress(AttributeError):  # of C libraries other than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 2)
        mallopt(M_MMAP_THRESHOLD, 4 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 32 * 2**20)


def _raise_file_limit() -> None:
    """Raise the limit of open files, and so of connections, to what the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
