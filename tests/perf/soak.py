"""python -m tests.perf.soak [--minutes 60]: are answers under load the answers of single requests?

Every image under every steering is first answered alone, by onnxruntime in this process. Then a server gets calls of
one to four images with changing profiles and strengths, many at a time, and every answer is compared: the same heads,
and probabilities within TOLERANCE, unless a gate lies so near its threshold that rounding may decide it; those are
counted. With --minutes, others disturb the server meanwhile (disturbances.py): clients that cancel, die or send
garbage, changing profiles and models; and its memory, descriptors and threads are watched.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from export.bundle import Bundle, load_bundle, versions
from service.engine import Engine
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from tests.perf.disturbances import Disturbances, put_version
from tests.perf.heads import BUNDLE, OUT, ROOT, SAMPLES
from tests.perf.serving import Running, server
from training.steering import NEUTRAL, at_strength, to_arrays

TOLERANCE = 1e-4
"""|difference| of a probability."""
NEAR = 1e-3
"""|gate logit| of a gate that rounding may decide."""
FLIPS = 0.1
"""Share of the images with such a gate that may be answered otherwise."""
STRENGTHS = (0.5, 1.0)


@dataclass(frozen=True)
class Expected:
    probabilities: NDArray[np.float64]
    """(images, classes)"""
    mask: NDArray[np.bool_]
    """(images, gated blocks, heads)"""
    near: NDArray[np.bool_]
    """(images,): some gate is near its threshold."""


@dataclass
class Seen:
    sent: int = 0
    calls: int = 0
    """That were answered."""
    images: int = 0
    near_threshold: int = 0
    """Images with a gate near its threshold."""
    flipped: int = 0
    """Those of them that were answered otherwise."""
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def alone(bundle: Bundle, images: NDArray[np.uint8]) -> dict[tuple[str, float], Expected]:
    """By profile and strength; one row at a time."""
    engine = Engine(bundle, "cpu", 0)
    found = {}
    for profile in tqdm(["", *bundle.profiles], desc="soak: alone", unit="profile"):
        for strength in STRENGTHS:
            terms = at_strength(bundle.profiles[profile].terms, strength) if profile else NEUTRAL
            rows = to_arrays([terms], len(bundle.manifest.sites))
            outputs = [engine.run(images[i : i + 1], rows) for i in range(len(images))]
            logits = np.concatenate([o.logits for o in outputs]).astype(np.float64)
            shifted = np.exp(logits - logits.max(1, keepdims=True))
            gates = np.concatenate([o.gate_logit for o in outputs])
            near = (np.abs(gates) < NEAR).any((1, 2))
            found[profile, strength] = Expected(shifted / shifted.sum(1, keepdims=True), gates > 0, near)
    return found


def until(seconds: float) -> Iterator[int]:
    """Numbers until so many seconds have passed."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())


async def ask(
    address: str, images: NDArray[np.uint8], expected: dict[tuple[str, float], Expected], left: Iterator[int],
    total: int | None, at_a_time: int,
) -> Seen:  # fmt: skip
    """left: a number for each call to come."""
    seen = Seen()
    kinds = list(expected)
    progress = tqdm(total=total, desc="soak: calls", unit="call", mininterval=5)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = SteeringServiceStub(channel)  # type: ignore[no-untyped-call]

        async def caller(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for _ in left:
                kind = kinds[int(generator.integers(len(kinds)))]
                picked = generator.integers(len(images), size=int(generator.integers(1, 5))).tolist()
                request = pb.PredictRequest(top_k=len(expected[kind].probabilities[0]))
                for index in picked:
                    request.images.add(pixels=images[index].tobytes())
                request.steering.profile, request.steering.strength = kind
                seen.sent += 1
                try:
                    answer = await stub.Predict(request, timeout=60)
                except grpc.aio.AioRpcError as error:
                    seen.errors[error.code().name] += 1
                    continue
                finally:
                    progress.update()
                compare(answer, expected[kind], picked, kind, seen)

        await asyncio.gather(*(caller(seed) for seed in range(at_a_time)))
    progress.close()
    return seen


def compare(
    answer: pb.PredictResponse, expected: Expected, picked: list[int], kind: tuple[str, float], seen: Seen
) -> None:
    seen.calls += 1
    if len(answer.predictions) != len(picked):
        seen.wrong.append(f"{kind}: {len(answer.predictions)} answers for {len(picked)} images")
        return
    for index, prediction in zip(picked, answer.predictions, strict=True):
        seen.images += 1
        mask = np.array([list(block.kept) for block in prediction.head_mask])
        given = np.zeros(expected.probabilities.shape[1])
        for found in prediction.classes:
            given[found.index] = found.probability
        same = np.array_equal(mask, expected.mask[index])
        same = same and np.abs(given - expected.probabilities[index]).max() < TOLERANCE
        seen.near_threshold += bool(expected.near[index])
        if not same and expected.near[index]:
            seen.flipped += 1
        elif not same:
            seen.wrong.append(f"{kind}: image {index} is answered otherwise than alone")


async def disturbed(
    running: Running, disturbances: Disturbances, images: NDArray[np.uint8],
    expected: dict[tuple[str, float], Expected], minutes: float, at_a_time: int,
) -> Seen:  # fmt: skip
    others = asyncio.create_task(disturbances.all())
    honest = asyncio.create_task(ask(running.address, images, expected, until(60 * minutes), None, at_a_time))
    await asyncio.wait((others, honest), return_when=asyncio.FIRST_COMPLETED)
    if others.done():
        others.result()  # it goes on until it is cancelled, or fails
    others.cancel()
    return await honest


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.perf.soak", description=__doc__.split("\n\n")[1])
    parser.add_argument("--requests", type=int, default=50_000, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="instead of --requests, with disturbances")
    parser.add_argument("--concurrency", type=int, default=32, help="calls at a time (default: %(default)s)")
    options = parser.parse_args()
    bundle = load_bundle(BUNDLE / str(versions(BUNDLE)[-1]))
    images = np.stack([np.asarray(Image.open(file))[:, :, None] for file in sorted(SAMPLES.glob("*/*.png"))])
    expected = alone(bundle, images)
    begun = time.perf_counter()
    held: dict[str, Any] = {}
    problems: list[str] = []
    if options.minutes:
        folder = OUT / "soak"
        shutil.rmtree(folder, ignore_errors=True)
        repository, profiles = folder / "models", folder / "profiles"
        repository.mkdir(parents=True)
        profiles.mkdir()
        put_version(bundle, repository, 1)
        flags = ("--model-control", "poll", "--poll-seconds", "1", "--profiles-dir", str(profiles))
        with server(repository, *flags, stderr=subprocess.DEVNULL) as running:  # its log tells of the disturbances
            disturbances = Disturbances(running.address, running.pid, bundle, repository, profiles)
            seen = asyncio.run(disturbed(running, disturbances, images, expected, options.minutes, options.concurrency))
        held = {**disturbances.held(), "disturbances": dict(disturbances.counts)}
        problems = disturbances.problems
        if options.minutes >= 20 and held["memory_percent_an_hour"] > 5:
            problems.append(f"memory grows by {held['memory_percent_an_hour']}% an hour; allowed: 5")
        first, last = held["last_two_quarters"]
        for name, allowed in (("resident_mb", 40.0), ("descriptors", 8), ("threads", 4)):
            if last[name] > first[name] + allowed:
                problems.append(f"{name} grew from {first[name]} to {last[name]}; allowed: {allowed} more")
        shutil.rmtree(folder)
    else:
        with server(ROOT / "deploy" / "models") as running:
            left = iter(range(options.requests))
            seen = asyncio.run(ask(running.address, images, expected, left, options.requests, options.concurrency))
    if seen.flipped > max(1, FLIPS * seen.near_threshold):
        problems.append(
            f"{seen.flipped} of {seen.near_threshold} images near a threshold flipped; allowed: {FLIPS:.0%}"
        )
    found = {
        "calls": seen.calls, "images": seen.images, "near_threshold": seen.near_threshold, "flipped": seen.flipped,
        "wrong": len(seen.wrong), "examples": seen.wrong[:5], "errors": dict(seen.errors),
        "lost": seen.sent - seen.calls - sum(seen.errors.values()), "problems": problems, **held,
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if not (seen.wrong or seen.errors or found["lost"] or problems) else 1


if __name__ == "__main__":
    sys.exit(main())
