"""python -m tests.perf.soak [--minutes 60]: are answers under load the answers of single requests?

A server gets calls of one to four images with changing profiles and strengths, many at a time, and every answer is
compared with that to each image alone, by onnxruntime in this process: the same units, and probabilities within
TOLERANCE, unless a gate lies so near its threshold that rounding may decide it; those are counted. With --minutes,
others disturb the server meanwhile (disturbances.py): clients that cancel, die or send garbage, changing profiles and
models; and its memory, descriptors and threads are watched.

The last third of the calls, or of the minutes, goes to a server in brownout: answers are those at the budget in the
receipt, between what a call asked for and what it allows. Refusals are counted.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, product, takewhile
from typing import Any, NamedTuple

import grpc
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.bundle import Bundle
from service.engine import Engine
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from service.steering import resolve
from tests.altered import put
from tests.committed import BUNDLE, newest, pixels
from tests.masks import unit_mask
from tests.perf.disturbances import Disturbances
from tests.perf.heads import OUT
from tests.perf.serving import server
from training.steering import NEUTRAL

TOLERANCE = 1e-4
"""|difference| of a probability."""
NEAR = 1e-3
"""|gate logit| of a gate that rounding may decide."""
FLIPS = 0.1
"""Share of the images with such a gate whose answer may differ."""
STRENGTHS = (0.5, 1.0)
BUDGETS = (None, 0.9, 0.7)
FLOORS = (None, 0.6, 0.45)
BROWNOUT = ("--target-latency-ms", "80", "--instances", "1", "--threads", "1", "--max-batch", "8")
"""Flags of a server that 64 concurrent calls overload."""


class Kind(NamedTuple):
    """The contents of a call."""

    profile: str
    strength: float
    budget: float | None = None
    min_budget: float | None = None


class Expected(NamedTuple):
    """The answer to an image by itself."""

    probabilities: NDArray[np.float64]
    """(classes,)"""
    mask: NDArray[np.bool_]
    """(gated blocks, units)"""
    near: bool
    """Whether a gate is near its threshold."""


class Alone:
    """The answers to images one at a time, computed when they are first needed."""

    def __init__(self, bundle: Bundle, images: NDArray[np.uint8]):
        self.bundle, self.images = bundle, images
        self._engine = Engine(bundle, "cpu", 0)
        self._of: dict[tuple[int, str, float, float | None], Expected] = {}

    def of(self, index: int, profile: str, strength: float, budget: float | None) -> Expected:
        key = index, profile, strength, budget
        if key not in self._of:
            arrays = resolve(self.bundle, profile, NEUTRAL, strength, budget=budget).arrays
            outputs = self._engine.run(self.images[index : index + 1], arrays)
            shifted = np.exp(outputs.logits[0].astype(np.float64) - outputs.logits.max())
            gates = outputs.gate_logit[0]
            self._of[key] = Expected(shifted / shifted.sum(), gates > 0, bool((np.abs(gates) < NEAR).any()))
        return self._of[key]


@dataclass
class Seen:
    sent: int = 0
    calls: int = 0
    """Answered calls."""
    images: int = 0
    lowered: int = 0
    """Calls, by brownout."""
    near_threshold: int = 0
    """Images with a gate near its threshold."""
    flipped: int = 0
    """Those of them that were answered otherwise."""
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def until(seconds: float) -> Iterator[int]:
    """Numbers until so many seconds have passed."""
    end = time.monotonic() + seconds
    return takewhile(lambda _: time.monotonic() < end, count())


async def ask(
    address: str, alone: Alone, kinds: Sequence[Kind], left: Iterator[int], total: int | None, at_a_time: int
) -> Seen:
    """left: a number for each call to come."""
    seen = Seen()
    images = alone.images
    progress = tqdm(total=total, desc="soak: calls", unit="call", mininterval=5)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = SteeringServiceStub(channel)  # type: ignore[no-untyped-call]

        async def caller(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for _ in left:
                kind = kinds[int(generator.integers(len(kinds)))]
                picked = generator.integers(len(images), size=int(generator.integers(1, 5))).tolist()
                request = pb.PredictRequest(
                    top_k=len(alone.bundle.manifest.labels), budget=kind.budget, min_budget=kind.min_budget
                )
                for index in picked:
                    request.images.add(pixels=images[index].tobytes())
                request.steering.profile, request.steering.strength = kind.profile, kind.strength
                seen.sent += 1
                try:
                    answer = await stub.Predict(request, timeout=60)
                except grpc.aio.AioRpcError as error:
                    seen.errors[error.code().name] += 1
                    await asyncio.sleep(0.01)
                    continue
                finally:
                    progress.update()
                compare(answer, alone, picked, kind, seen)

        await asyncio.gather(*(caller(seed) for seed in range(at_a_time)))
    progress.close()
    return seen


def compare(answer: pb.PredictResponse, alone: Alone, picked: list[int], kind: Kind, seen: Seen) -> None:
    seen.calls += 1
    if len(answer.predictions) != len(picked):
        seen.wrong.append(f"{kind}: {len(answer.predictions)} answers for {len(picked)} images")
        return
    receipt = answer.receipt
    budget = round(receipt.budget_applied, 6) if receipt.HasField("budget_applied") else None
    seen.lowered += receipt.brownout
    allowed = budget == kind.budget
    if receipt.brownout:
        floor = kind.min_budget
        allowed = floor is not None and budget is not None and floor <= budget < (kind.budget or 1)
    if not allowed:
        seen.wrong.append(f"{kind}: brownout {receipt.brownout}, budget applied {budget}")
        return
    for index, prediction in zip(picked, answer.predictions, strict=True):
        seen.images += 1
        expected = alone.of(index, kind.profile, kind.strength, budget)
        (mask,) = unit_mask([prediction])
        given = np.zeros(len(expected.probabilities))
        for found in prediction.classes:
            given[found.index] = found.probability
        same = np.array_equal(mask, expected.mask) and np.abs(given - expected.probabilities).max() < TOLERANCE
        seen.near_threshold += expected.near
        if not same and expected.near:
            seen.flipped += 1
        elif not same:
            seen.wrong.append(f"{kind}, budget {budget}: image {index} is answered otherwise than alone")


async def disturbed(
    address: str, disturbances: Disturbances, alone: Alone, kinds: Sequence[Kind], minutes: float, at_a_time: int
) -> Seen:
    others = asyncio.create_task(disturbances.all())
    honest = asyncio.create_task(ask(address, alone, kinds, until(60 * minutes), None, at_a_time))
    await asyncio.wait((others, honest), return_when=asyncio.FIRST_COMPLETED)
    if others.done():
        others.result()  # it runs until it is cancelled, or fails
    others.cancel()
    return await honest


def soak(
    alone: Alone, kinds: Sequence[Kind], minutes: float, requests: int, at_a_time: int, *flags: str
) -> dict[str, Any]:
    """What one server did with its calls. minutes: 0: `requests` calls, undisturbed. flags: with --target-latency-ms,
    calls may be refused."""
    bundle = alone.bundle
    brownout = "--target-latency-ms" in flags
    held: dict[str, Any] = {}
    problems: list[str] = []
    if minutes:
        folder = OUT / "soak"
        shutil.rmtree(folder, ignore_errors=True)
        repository, profiles = folder / "models", folder / "profiles"
        repository.mkdir(parents=True)
        profiles.mkdir()
        put(bundle, repository, 1)
        flags = (*flags, "--model-control", "poll", "--poll-seconds", "1", "--profiles-dir", str(profiles))
        with server(repository, *flags, stderr=subprocess.DEVNULL) as running:  # its log is full of the disturbances
            disturbances = Disturbances(running.address, running.process.pid, bundle, repository, profiles)
            seen = asyncio.run(disturbed(running.address, disturbances, alone, kinds, minutes, at_a_time))
        held = {**disturbances.held(), "disturbances": dict(disturbances.counts)}
        problems = disturbances.problems
        if minutes >= 20 and held["memory_percent_an_hour"] > 5:
            problems.append(f"memory grows by {held['memory_percent_an_hour']}% an hour; allowed: 5")
        first, last = held["last_two_quarters"]
        for name, allowed in (("resident_mb", 40.0), ("descriptors", 8), ("threads", 4)):
            if last[name] > first[name] + allowed:
                problems.append(f"{name} grew from {first[name]} to {last[name]}; allowed: {allowed} more")
        shutil.rmtree(folder)
    else:
        with server(bundle.folder.parents[1], *flags) as running:
            left = iter(range(requests))
            seen = asyncio.run(ask(running.address, alone, kinds, left, requests, at_a_time))
    refused = seen.errors.pop("RESOURCE_EXHAUSTED", 0) if brownout else 0
    if brownout and not seen.lowered:
        problems.append("no call was lowered: this was no brownout")
    if seen.flipped > max(1, FLIPS * seen.near_threshold):
        problems.append(
            f"{seen.flipped} of {seen.near_threshold} images near a threshold flipped; allowed: {FLIPS:.0%}"
        )
    lost = seen.sent - seen.calls - refused - sum(seen.errors.values())
    return {
        "calls": seen.calls, "images": seen.images, "near_threshold": seen.near_threshold, "flipped": seen.flipped,
        **({"lowered": seen.lowered, "refused": refused} if brownout else {}),
        "wrong": len(seen.wrong), "examples": seen.wrong[:5], "errors": dict(seen.errors), "lost": lost,
        "problems": problems, **held,
    }  # fmt: skip


def failures(part: dict[str, Any]) -> list[str]:
    """What a part of the result has that it must not have."""
    return [f"{name}: {part[name]}" for name in ("examples", "errors", "lost", "problems") if part[name]]


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.perf.soak", description=__doc__.split("\n\n")[1])
    parser.add_argument("--requests", type=int, default=50_000, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="instead of --requests, with disturbances")
    parser.add_argument(
        "--concurrency", type=int, default=32, help="calls at a time; in brownout twice as many (default: %(default)s)"
    )
    options = parser.parse_args()
    begun = time.perf_counter()
    bundle = newest(BUNDLE)
    alone, every = Alone(bundle, pixels()), ["", *bundle.profiles]
    parts: dict[str, tuple[float, Sequence[Kind], Sequence[str]]] = {
        "plain": (2 / 3, [Kind(*of) for of in product(every, STRENGTHS, BUDGETS)], ()),
        "brownout": (1 / 3, [Kind(*of) for of in product(every, STRENGTHS, BUDGETS, FLOORS)], BROWNOUT),
    }
    found = {}
    for name, (share, kinds, flags) in parts.items():
        minutes, requests = share * (options.minutes or 0), round(share * options.requests)
        found[name] = soak(alone, kinds, minutes, requests, options.concurrency * (2 if flags else 1), *flags)
    result = {**found, "seconds": round(time.perf_counter() - begun, 1)}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    failed = [f"{name}: {failure}" for name, part in found.items() for failure in failures(part)]
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
