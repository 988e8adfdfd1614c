"""python -m tests.perf.soak --requests 50000: are answers under load the answers of single requests?

Every image under every steering is first answered alone, by onnxruntime in this process. Then a server gets calls of
one to four images with changing profiles and strengths, many at a time, and every answer is compared: the same heads,
and probabilities within TOLERANCE, unless a gate lies so near its threshold that rounding may decide it; those are
counted.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from export.bundle import Bundle, load_bundle, versions
from service.engine import Engine
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from tests.perf.heads import BUNDLE, OUT, ROOT, SAMPLES
from tests.perf.serving import server
from training.steering import NEUTRAL, at_strength, to_arrays

TOLERANCE = 1e-4
"""|difference| of a probability."""
NEAR = 1e-3
"""|gate logit| of a gate that rounding may decide."""
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
    calls: int = 0
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


async def ask(
    address: str, images: NDArray[np.uint8], expected: dict[tuple[str, float], Expected], count: int, at_a_time: int
) -> Seen:
    seen, left = Seen(), iter(range(count))
    kinds = list(expected)
    progress = tqdm(total=count, desc="soak: calls", unit="call")
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


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.perf.soak", description=__doc__.split("\n\n")[1])
    parser.add_argument("--requests", type=int, default=50_000, help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="calls at a time (default: %(default)s)")
    options = parser.parse_args()
    bundle = load_bundle(BUNDLE / str(versions(BUNDLE)[-1]))
    images = np.stack([np.asarray(Image.open(file))[:, :, None] for file in sorted(SAMPLES.glob("*/*.png"))])
    expected = alone(bundle, images)
    begun = time.perf_counter()
    with server(ROOT / "deploy" / "models") as (address, *_):
        seen = asyncio.run(ask(address, images, expected, options.requests, options.concurrency))
    found = {
        "calls": seen.calls, "images": seen.images, "near_threshold": seen.near_threshold, "flipped": seen.flipped,
        "wrong": len(seen.wrong), "examples": seen.wrong[:5], "errors": dict(seen.errors),
        "lost": options.requests - seen.calls - sum(seen.errors.values()),
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if not seen.wrong and not seen.errors and not found["lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
