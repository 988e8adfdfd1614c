"""python -m service --repository deploy/models --port 8001 --metrics-port 8002"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import CliApp

from export.bundle import BundleError
from service.config import Settings
from service.engine import EngineError
from service.server import Server

STOP = (signal.SIGTERM, signal.SIGINT)


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
    try:
        asyncio.run(serve(settings))
    except (BundleError, EngineError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once."""
    _end_at_once_on_signals()
    server = Server(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOP:
        loop.add_signal_handler(number, stop.set)
    await server.start()
    print(
        f"ready: grpc {settings.host}:{server.port}, metrics http://{settings.host}:{server.metrics_port}/metrics",
        flush=True,
    )
    await stop.wait()
    for number in STOP:
        loop.remove_signal_handler(number)
    _end_at_once_on_signals()
    logging.getLogger("steervit").info("stopping: answering what was accepted")
    await server.stop()


def _end_at_once_on_signals() -> None:
    """What the kernel does by default, except for a container's process 1: that one must do it itself."""
    if os.getpid() == 1:
        for number in STOP:
            signal.signal(number, lambda number, _: os._exit(128 + number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
