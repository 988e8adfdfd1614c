"""Disturbances of a server during a soak, beside valid calls, and the resources that it holds meanwhile."""

import asyncio
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from export.bundle import Bundle, versions
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from tests.altered import put, write
from tests.processes import ROOT
from training.steering import profiles_to_json

PATHS = ("/steering.v1.SteeringService/Predict", "/inference.GRPCInferenceService/ModelInfer")
REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
"""Of garbage; a few bytes may be a valid message that asks for a budget, which the model lacks."""


HELD = ("resident_mb", "descriptors", "threads")


@dataclass
class Sample:
    seconds: float
    resident_mb: float
    descriptors: int
    threads: int


@dataclass
class Disturbances:
    """Each of its coroutines runs until it is cancelled."""

    address: str
    pid: int
    bundle: Bundle
    repository: Path
    profiles: Path
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    async def all(self) -> None:
        everything: tuple[tuple[Callable[[], Awaitable[None]], float], ...] = (
            (self.cancel, 0.1), (self.garbage, 0.05), (self.crash, 10), (self.swap_profiles, 2), (self.swap_model, 15),
            (self.sample, 1),
        )  # fmt: skip
        await asyncio.gather(*(self._again(what, seconds) for what, seconds in everything))

    async def _again(self, what: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await what()

    async def cancel(self) -> None:
        """A client that gives up, with its call queued or in flight."""
        request = pb.PredictRequest(images=[pb.Image(pixels=bytes(784))] * 40)
        async with grpc.aio.insecure_channel(self.address) as channel:
            call = SteeringServiceStub(channel).Predict(request)  # type: ignore[no-untyped-call]
            await asyncio.sleep(random.uniform(0, 0.03))
            call.cancel()
        self.counts["calls cancelled"] += 1

    async def garbage(self) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            for path in PATHS:
                try:
                    await channel.unary_unary(path)(random.randbytes(random.randint(1, 2000)), timeout=60)
                    self.problems.append(f"{path} answered garbage")
                except grpc.aio.AioRpcError as error:
                    if error.code().name not in REFUSALS:
                        self.problems.append(f"{path} said {error.code().name} to garbage: {error.details()}")
                self.counts["messages of garbage"] += 1

    async def crash(self) -> None:
        """A client that dies with calls in flight."""
        command = (sys.executable, str(ROOT / "tests" / "clients" / "holding.py"), self.address, "4", "64")
        client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert client.stdout is not None
        await client.stdout.readline()
        client.kill()
        await client.wait()
        self.counts["clients killed"] += 1

    async def swap_profiles(self) -> None:
        """Replace the profiles in the folder; every third time, with an invalid file."""
        turn = self.counts["profile folders changed"]
        some = [replace(p, name=f"extra {turn % 3} {name}") for name, p in self.bundle.profiles.items()]
        content = {**profiles_to_json(some), "gates_sae_digest": self.bundle.manifest.gates_sae_digest}
        write(self.profiles / "extra.json", "{" if turn % 3 == 2 else json.dumps(content))
        self.counts["profile folders changed"] += 1

    async def swap_model(self) -> None:
        """Add the next version, and remove the previous one."""
        model = self.repository / self.bundle.manifest.name
        last = versions(model)[-1]
        put(self.bundle, self.repository, last + 1)
        await asyncio.sleep(5)
        shutil.rmtree(model / str(last))
        self.counts["models swapped"] += 1

    async def sample(self) -> None:
        status = Path(f"/proc/{self.pid}/status").read_text()
        resident, threads = (int(status.partition(name)[2].split()[0]) for name in ("VmRSS:", "Threads:"))
        loop = asyncio.get_running_loop()
        descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))
        self.samples.append(Sample(loop.time(), resident / 1024, descriptors, threads))

    def held(self) -> dict[str, Any]:
        """Over the second half: the slope of the memory by least squares, and what is held in each quarter between two
        swaps of a model, that is at least: during a swap two versions are loaded."""
        half = self.samples[len(self.samples) // 2 :]
        seconds, memory = np.array([s.seconds for s in half]), np.array([s.resident_mb for s in half])
        slope = float(np.polyfit(seconds - seconds[0], memory, 1)[0])
        middle = len(half) // 2
        quarters = [
            {name: round(float(np.min([getattr(s, name) for s in quarter])), 1) for name in HELD}
            for quarter in (half[:middle], half[middle:])
        ]
        return {
            "minutes": round((self.samples[-1].seconds - self.samples[0].seconds) / 60, 1),
            "memory_percent_an_hour": round(100 * 3600 * slope / float(memory.mean()), 2),
            "last_two_quarters": quarters,
        }
