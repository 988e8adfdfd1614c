"""Puts a server under load: a number of concurrent calls, or a rate. python -m service.client load"""

import asyncio
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import grpc
import numpy as np

from service.client import metadata, opened, put
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub


@dataclass(frozen=True)
class Load:
    """What to send, how fast and for how long."""

    concurrency: int = 16
    """Concurrent calls."""
    seconds: float = 10.0
    images_per_call: int = 1
    profiles: tuple[str, ...] = ("",)
    """Calls take them in turn; "": no steering."""
    model: str = ""
    version: str = ""
    rate: float = 0.0
    """Calls a second, started evenly whether or not earlier ones are answered; 0: by `concurrency`."""
    timeout: float = 60.0
    """Seconds allowed for a call."""
    budget: float | None = None
    """Budget of every call; None: no budget, the gates decide."""
    min_budget: float | None = None
    """The lowest budget that a busy server may apply; None: the server's setting."""
    within: float = 0.0
    """Seconds that an answer may take to count as in time; 0: nobody counts."""
    client_name: str = ""
    """Of every call."""


@dataclass(frozen=True)
class Report:
    """Throughput, latencies and errors, as the client sees them."""

    calls: int
    """Answered calls."""
    images: int
    seconds: float
    images_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    """Latency of the answered calls; with a rate, measured from when a call was due."""
    errors: dict[str, int]
    """Failed calls, by status."""
    error_p99_ms: float
    """Latency of the failed calls."""
    in_time: float | None
    """Share of all calls, failed ones included, that were answered within `Load.within`; None: not counted."""
    compute_fraction: float
    """Mean of the images of answered calls, 0 to 1."""
    lowered: float
    """Share of the answered calls whose budget the server lowered."""

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {code}" for code, count in sorted(self.errors.items())) or "none"
        lowered = f"; budget lowered in {100 * self.lowered:.1f}% of the answered calls" if self.lowered else ""
        in_time = "" if self.in_time is None else f"; in time: {100 * self.in_time:.1f}% of all calls"
        return (
            f"{self.calls} calls with {self.images} images in {self.seconds:.1f} s: "
            f"{self.images_per_second:.1f} images/s\n"
            f"latency p50 {self.p50_ms:.1f} ms, p90 {self.p90_ms:.1f} ms, p99 {self.p99_ms:.1f} ms; "
            f"errors: {failed}{in_time}\n"
            f"compute fraction {self.compute_fraction:.3f}{lowered}"
        )

    def to_json(self) -> str:
        """The report as one line of JSON, with the names of the fields."""
        return json.dumps(asdict(self))


async def run(
    address: str,
    images: Sequence[bytes],
    load: Load,
    raw: bool = False,
    credentials: grpc.ChannelCredentials | None = None,
) -> Report:
    """images: encoded files, or, when raw, uint8 pixels of the model's own size; calls take them in turn."""
    requests = []
    turn = itertools.cycle(images)
    for profile in load.profiles * math.ceil(len(images) / len(load.profiles)):
        request = put(pb.PredictRequest(top_k=1), model=load.model, version=load.version)
        for _ in range(load.images_per_call):
            image = next(turn)
            request.images.add(pixels=image) if raw else request.images.add(encoded=image)
        put(request, budget=load.budget, min_budget=load.min_budget)
        put(request.steering, profile=profile)
        requests.append(request)
    following, named = itertools.cycle(requests), metadata({}, load.client_name)
    latencies: list[float] = []
    compute: list[float] = []
    lowered: list[bool] = []
    failed: list[float] = []
    errors: Counter[str] = Counter()
    async with opened(grpc.aio, address, credentials, attempts=1) as channel:
        stub = SteeringServiceStub(channel)  # type: ignore[no-untyped-call]
        for request in requests[: len(load.profiles)]:  # connected, and the right kind of image and profiles
            await stub.Predict(request, timeout=load.timeout, metadata=named)
        begun = time.perf_counter()

        async def call(due: float) -> None:
            try:
                receipt = (await stub.Predict(next(following), timeout=load.timeout, metadata=named)).receipt
                latencies.append(time.perf_counter() - due)
                compute.append(receipt.compute_fraction)
                lowered.append(receipt.brownout)
            except grpc.aio.AioRpcError as error:
                failed.append(time.perf_counter() - due)
                errors[error.code().name] += 1

        async def caller() -> None:
            while time.perf_counter() - begun < load.seconds:
                await call(time.perf_counter())

        async def at_rate() -> None:
            calls = set()
            for index in range(round(load.rate * load.seconds)):
                due = begun + index / load.rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                task = asyncio.create_task(call(due))
                calls.add(task)
                task.add_done_callback(calls.discard)
            await asyncio.gather(*calls)

        shown = asyncio.create_task(_progress(begun, load.seconds, latencies)) if sys.stderr.isatty() else None
        await (at_rate() if load.rate else asyncio.gather(*(caller() for _ in range(load.concurrency))))
        taken = time.perf_counter() - begun
        if shown:
            shown.cancel()
            print("\r\033[K", end="", file=sys.stderr)
    p50, p90, p99 = (1000 * float(np.percentile(latencies or [0.0], p)) for p in (50, 90, 99))
    count = len(latencies) * load.images_per_call
    error_p99 = 1000 * float(np.percentile(failed or [0.0], 99))
    quick = sum(latency <= load.within for latency in latencies)
    in_time = quick / max(1, len(latencies) + len(failed)) if load.within else None
    answered = max(1, len(latencies))
    return Report(
        len(latencies), count, taken, count / taken, p50, p90, p99, dict(errors), error_p99, in_time,
        sum(compute) / answered, sum(lowered) / answered,
    )  # fmt: skip


async def _progress(begun: float, seconds: float, latencies: list[float]) -> None:
    while True:
        await asyncio.sleep(1)
        gone = time.perf_counter() - begun
        print(f"\r{gone:.0f} of {seconds:.0f} s, {len(latencies) / gone:.0f} calls/s ", end="", file=sys.stderr)
