"""python -m tests.perf.counted_server <flags>: `python -m service` that tells at its end, as JSON, what CPU inference
took: the seconds of the batcher's thread within onnxruntime, and of its worker threads."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from service import __main__ as service
from service.loaded import Loaded

TASKS = Path("/proc/self/task")
workers: set[str] = set()
within = 0.0


def counted_open(*arguments: Any, inner: Any = Loaded._open) -> Any:
    before = set(os.listdir(TASKS))
    session = inner(*arguments)
    workers.update(set(os.listdir(TASKS)) - before)
    return session


def counted_run(*arguments: Any, inner: Any = Loaded.run) -> Any:
    global within
    start = time.thread_time()
    found = inner(*arguments)
    within += time.thread_time() - start
    return found


def of_workers() -> float:
    return sum(int((TASKS / worker / "schedstat").read_text().split()[0]) for worker in workers) / 1e9


async def counted_stop(server: Any, inner: Any = service.Server.stop) -> None:
    print(json.dumps({"inference_cpu_seconds": within + of_workers(), "cpu_seconds": time.process_time()}), flush=True)
    await inner(server)


if __name__ == "__main__":
    Loaded._open, Loaded.run = counted_open, counted_run  # type: ignore[method-assign]
    service.Server.stop = counted_stop  # type: ignore[method-assign]
    sys.exit(service.main(sys.argv[1:]))
