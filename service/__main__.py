"""python -m service --repository deploy/models --port 8001 --metrics-port 8002"""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence

import uvloop
from pydantic import ValidationError
from pydantic_settings import CliApp

from export.bundle import BundleError
from service.config import Settings
from service.engine import EngineError
from service.server import Server


def main(arguments: Sequence[str]) -> int:
    try:
        settings = CliApp.run(Settings, cli_args=list(arguments))
    except ValidationError as error:
        for problem in error.errors():
            name = "-".join(map(str, problem["loc"])).replace("_", "-")
            shown = f"--{name} is {problem['input']!r}: {problem['msg']}" if name else problem["msg"]
            print(shown.removeprefix("Value error, "), file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    _signals_reach_process_1()
    try:
        uvloop.run(serve(settings))
    except (BundleError, EngineError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _signals_reach_process_1() -> None:
    """A signal without a handler ends any process but a container's first: the kernel keeps it from that one."""
    if os.getpid() == 1:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os._exit(128 + number))


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once."""
    server = Server(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    gc.collect()
    gc.freeze()  # what is there now stays: later collections need not look at it
    print(
        f"ready: grpc {settings.host}:{server.port}, metrics http://{settings.host}:{server.metrics_port}/metrics",
        flush=True,
    )
    await stop.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    _signals_reach_process_1()
    logging.getLogger("steervit").info("stopping: answering what was accepted")
    await server.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
