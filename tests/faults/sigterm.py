"""python -m tests.faults.sigterm --rounds 50: stops a server under full load, which must lose nothing.

More calls at a time than it can take, in both protocols, and at a random moment SIGTERM. A call is accepted when the
server says so (it counts those whose handler was entered); each of them must have come back to its client with the
right answer, every other one must have been refused, and the server must have exited with 0 within the drain time.
"""

import argparse
import asyncio
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc
import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from service.engine import Engine
from tests.committed import BUNDLE, newest, pixels
from tests.faults.protocols import PROTOCOLS, Alone, alone
from tests.processes import MODELS, ServerProcess, start_server

CALLERS = 64
REFUSALS = {"UNAVAILABLE", "CANCELLED"}
"""Of calls that were not accepted. CANCELLED is what gRPC itself makes of one that it has read but not handed over yet
when the server stops."""
DRAIN_SECONDS = 20.0


@dataclass
class Round:
    """What came of one server."""

    waiting: int = 0
    """Images in its queue at SIGTERM."""
    accepted: int = 0
    """Calls, as the server says."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Of calls, as the clients saw them."""
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """From SIGTERM to the end of the process."""
    exit_code: int | None = None

    def failures(self) -> list[str]:
        found = list(self.problems)
        if self.statuses["OK"] != self.accepted:
            found.append(f"{self.accepted} calls were accepted, {self.statuses['OK']} answered")
        if others := set(self.statuses) - {"OK", *REFUSALS}:
            found.append(f"statuses {sorted(others)}; allowed: OK, {', '.join(sorted(REFUSALS))}")
        if self.exit_code != 0 or self.seconds > DRAIN_SECONDS:
            found.append(f"exit code {self.exit_code} after {self.seconds:.1f} s")
        if not self.waiting:
            found.append("the queue was empty: this was no full load")
        return found


def one_round(bundle: Bundle, images: NDArray[np.uint8], expected: Mapping[str, Alone], seed: int) -> Round:
    done = Round()
    with tempfile.TemporaryFile("w+") as log:
        flags = ("--threads=1", "--max-queue=8192", "--drain-delay-seconds=0.5", f"--drain-seconds={DRAIN_SECONDS}")
        server = start_server(MODELS, *flags, stderr=log)
        try:
            asyncio.run(_load(server, bundle, images, expected, seed, done))
        finally:
            server.process.kill()
            server.process.communicate()
        log.seek(0)
        said = re.search(r"stopped: (\d+) calls accepted", log.read())
    done.accepted = int(said[1]) if said else -1
    return done


async def _load(
    server: ServerProcess,
    bundle: Bundle,
    images: NDArray[np.uint8],
    expected: Mapping[str, Alone],
    seed: int,
    done: Round,
) -> None:
    stopped = asyncio.Event()

    async def caller(channel: grpc.aio.Channel, number: int) -> None:
        choose = random.Random(1000 * seed + number)
        while not stopped.is_set():
            protocol, profile = choose.choice(PROTOCOLS), choose.choice(list(expected))
            rows = choose.sample(range(len(images)), choose.choice((1, 2, 8, 40)))
            request = protocol.request(images[rows], profile)
            call = channel.unary_unary(protocol.path, type(request).SerializeToString, protocol.response.FromString)
            try:
                answer = await call(request, timeout=60)
            except grpc.aio.AioRpcError as error:
                done.statuses[error.code().name] += 1
                await asyncio.sleep(0.05)
                continue
            done.statuses["OK"] += 1
            done.problems += expected[profile].wrong(protocol.read(answer, bundle), rows)

    async def stop() -> None:
        await asyncio.sleep(random.Random(seed).uniform(0.3, 1.0))
        done.waiting = int(await asyncio.to_thread(server.count, "steervit_queue_images"))
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        done.exit_code = await asyncio.to_thread(server.process.wait, 60)
        done.seconds = time.monotonic() - start
        stopped.set()

    async with grpc.aio.insecure_channel(server.address) as channel:
        await asyncio.gather(stop(), *(caller(channel, number) for number in range(CALLERS)))


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.faults.sigterm", description=__doc__.split("\n\n")[1])
    parser.add_argument("--rounds", type=int, default=50, help="(default: %(default)s)")
    rounds = parser.parse_args().rounds
    bundle, images = newest(BUNDLE), pixels()
    engine = Engine(bundle, "cpu", 1)
    expected = {name: alone(engine, images, bundle.profiles[name].terms if name else {}) for name in ("", "Shirt")}
    failed, answered, slowest = 0, 0, 0.0
    for seed in range(rounds):
        done = one_round(bundle, images, expected, seed)
        failed, answered = failed + bool(done.failures()), answered + done.statuses["OK"]
        slowest = max(slowest, done.seconds)
        seen = f"{done.accepted} calls accepted, {dict(done.statuses)}, ended after {done.seconds:.2f} s"
        print(f"SIGTERM {seed + 1} of {rounds}: " + "; ".join([seen, *done.failures()]), flush=True)
    print(f"{rounds} rounds, {answered} calls answered, {failed} rounds failed, the slowest end took {slowest:.2f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
