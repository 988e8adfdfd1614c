"""GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m tests.perf.serving: what the server adds to inference.

Each figure of the server stands beside onnxruntime alone, in this process, at the same batch size, in turn, round after
round: ratios of one run. Writes build/bench/serving.json.
"""

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.bundle import Macs, load_bundle
from export.write import ExportSettings, Source, write_source
from service.client.load import Load, Report, run
from service.config import Settings
from service.engine import Engine
from service.tuning import Surroundings, start
from tests.committed import BUNDLE, newest, pixels
from tests.perf.heads import FORCE, OUT, PLAIN, Cell, Model, Runner, deit_s, patterns
from tests.processes import MODELS, ServerProcess, serving, start_server
from training.data.pixels import Split
from training.steering import SteeringArrays, SteeringProfile, SteeringTerm, profiles_to_json, to_arrays


def deit_bundle() -> Path:
    """DeiT-S with random weights as a repository: profiles `third0` ... open two heads of six in every block."""
    model, repository = deit_s(), OUT / "models"
    write_bench(thirds(model), repository, model.name, ("dispatch", "masked"))
    return repository


def units_bundle() -> Path:
    """As deit_bundle, with 4 MLP groups a block, in fp32 and int8: profiles `open0` ... open two heads of six and one
    group of four in every block."""
    model, repository = deit_s(mlp_groups=4), OUT / "units"
    profiles = [SteeringProfile(f"open{o}", ("c0",), "forced", forced(model, o, 2, 1)) for o in range(6)]
    write_bench(source_of(model, profiles), repository, model.name, ("dispatch",), ("fp32", "int8"))
    return repository


def thirds(model: Model) -> Source:
    """Profile `all` opens every head, `third0` ... `third5` a third of them in every block."""
    third = model.heads // 3
    profiles = [SteeringProfile("all", ("c0",), "forced", forced(model, 0, model.heads))]
    profiles += [SteeringProfile(f"third{o}", ("c0",), "forced", forced(model, o, third)) for o in range(6)]
    return source_of(model, profiles)


def source_of(model: Model, profiles: Sequence[SteeringProfile]) -> Source:
    """The source of a bundle of the model, with eight images of random pixels as the selection slice."""
    drawn = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, *model.spec.shape), np.uint8))
    labels = tuple(f"c{index}" for index in range(model.steered.model.vit.num_classes))
    macs = Macs(model.macs.dense, model.macs.per_head, model.macs.per_mlp_group)
    return Source(model.spec, labels, macs, model.steered, profiles, {}, Split(drawn, torch.arange(8)))


def write_bench(
    source: Source, repository: Path, name: str, attentions: tuple[str, ...], precisions: tuple[str, ...] = ("fp32",)
) -> None:
    """Write the bundle into the repository when it is not there yet."""
    if not (repository / name / "1").is_dir():
        settings = ExportSettings(name, 1, attentions, precisions, verify_images=4, accuracy_images=4)
        write_source(source, repository, settings)


def forced(model: Model, offset: int, heads: int, groups: int = 0) -> dict[int, tuple[SteeringTerm, ...]]:
    """Terms that hold this many heads and MLP groups of each block open, different ones in each block and at each
    offset."""
    units = [(head, model.heads, heads) for head in range(model.heads)]
    units += [(group, model.groups, groups) for group in range(model.heads, model.units)]
    return {
        site: tuple(
            SteeringTerm(unit, 1.0, FORCE if (unit + site + offset) % of < kept else -FORCE) for unit, of, kept in units
        )
        for site in range(model.sites)
    }


def many_profiles(count: int) -> tuple[Path, tuple[str, ...]]:
    """A folder with this many copies of the committed bundle's profile Shirt, and their names."""
    bundle = newest(BUNDLE)
    profiles = [replace(bundle.profiles["Shirt"], name=f"p{index:05d}") for index in range(count)]
    content = {**profiles_to_json(profiles), "gates_sae_digest": bundle.manifest.gates_sae_digest}
    folder = OUT / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "many.json").write_text(json.dumps(content))
    return folder, tuple(profile.name for profile in profiles)


def server(repository: Path, *flags: str, stderr: int | None = None) -> AbstractContextManager[ServerProcess]:
    return serving(repository, "--log-level", "error", *flags, stderr=stderr)


def noise(shape: tuple[int, ...], count: int) -> list[bytes]:
    """Images of random pixels."""
    return [np.random.default_rng(i).integers(0, 256, shape, np.uint8).tobytes() for i in range(count)]


def load(address: str, images: list[bytes], asked: Load) -> Report:
    return asyncio.run(run(address, images, asked, raw=True))


def alone(
    repository: Path, graph: str, images: list[bytes], batch: int, profiles: tuple[str, ...], seconds: float
) -> float:
    """Images a second of onnxruntime at a batch size, with as many instances and threads as the server chooses."""
    bundle = newest(repository)
    engines = start(bundle, Settings(repository=repository, graph=graph), Surroundings(False, True)).engines
    given = np.stack([np.frombuffer(images[i % len(images)], np.uint8) for i in range(batch)])
    terms = [bundle.profiles[profiles[i % len(profiles)]].terms if profiles[0] else {} for i in range(batch)]
    rows = to_arrays(terms, len(bundle.manifest.sites))
    return rate(engines, given.reshape(batch, *bundle.manifest.image.shape), rows, seconds)


def rate(engines: Sequence[Engine], images: NDArray[np.uint8], rows: SteeringArrays, seconds: float) -> float:
    """Images a second of the engines, each in a thread of its own with the same batch again and again."""
    counts = [0] * len(engines)
    begun = time.perf_counter()

    def run(index: int) -> None:
        while time.perf_counter() - begun < seconds:
            engines[index].run(images, rows)
            counts[index] += len(images)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)


def own_cpu_ms(images: list[bytes], concurrency: int, seconds: float) -> float:
    """Milliseconds of CPU that the server takes for a one-image call beside inference: those of a long load minus those
    of a short one, so that the start does not count."""
    totals = []
    for duration in (0.2, seconds):
        program = ("-m", "tests.perf.counted_server")
        running = start_server(MODELS, "--log-level", "error", program=program, stderr=None)
        calls = load(running.address, images, Load(concurrency, duration, 1, ("Shirt",))).calls
        running.process.terminate()
        counted = json.loads(running.process.communicate()[0])
        totals.append((calls, 1000 * (counted["cpu_seconds"] - counted["inference_cpu_seconds"])))
    (few, before), (many, after) = totals
    return (after - before) / (many - few)


def deit(rounds: int, seconds: float) -> dict[str, object]:
    """Images a second through gRPC / of onnxruntime alone, one image a call, 16 calls at a time."""
    repository = deit_bundle()
    spec = load_bundle(repository / "deit_s" / "1").manifest.image
    images = noise(spec.shape, 32)
    thirds = tuple(f"third{offset}" for offset in range(6))
    kinds = {"dense": ("masked.fp32", ("",)), "third": ("dispatch.fp32", thirds)}
    seen: dict[str, list[tuple[float, Report]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, (graph, profiles) in kinds.items():
            rate = alone(repository / "deit_s", graph, images, 8, profiles, seconds)
            with server(repository, "--graph", graph) as running:
                seen[kind].append((rate, load(running.address, images, Load(16, seconds, 1, profiles))))
    found: dict[str, object] = {}
    for kind, pairs in seen.items():
        ratios = [report.images_per_second / rate for rate, report in pairs]
        found[kind] = {
            "onnxruntime_images_per_second": float(np.median([rate for rate, _ in pairs])),
            "grpc_images_per_second": float(np.median([report.images_per_second for _, report in pairs])),
            "ratio": float(np.median(ratios)), "ratios": ratios,
            "p99_over_p50": float(np.median([report.p99_ms / report.p50_ms for _, report in pairs])),
            "p50_ms": float(np.median([report.p50_ms for _, report in pairs])),
        }  # fmt: skip
    gains = [b[1].images_per_second / a[1].images_per_second for a, b in zip(*seen.values(), strict=True)]
    return {**found, "third_over_dense": float(np.median(gains)), "gains": gains}


def units(rounds: int, seconds: float) -> dict[str, object]:
    """Images a second through gRPC with two heads of six and one MLP group of four open in every block, others in each
    image: one image a call, 16 calls at a time, over the plain fp32 graph in one session of two threads, batch 8, in
    turn."""
    repository, model = units_bundle(), deit_s(mlp_groups=4)
    images = noise(model.spec.shape, 32)
    profiles = tuple(f"open{offset}" for offset in range(6))
    seen: dict[str, list[float]] = {"plain": [], "fp32": [], "int8": []}
    for _ in range(rounds):
        seen["plain"].append(_plain(model, seconds))
        for precision in ("fp32", "int8"):
            with server(repository, "--graph", f"dispatch.{precision}") as running:
                report = load(running.address, images, Load(16, seconds, 1, profiles))
            seen[precision].append(report.images_per_second)
    gains = {p: list(np.divide(seen[p], seen["plain"])) for p in ("fp32", "int8")}
    return {
        "images_per_second": {kind: float(np.median(rates)) for kind, rates in seen.items()},
        "over_plain": {precision: float(np.median(of)) for precision, of in gains.items()},
        "gains": gains,
    }


def _plain(model: Model, seconds: float) -> float:
    """Images a second of the fastest plain fp32 graph, batch 8, one session of two threads that spin."""
    rates = []
    for variant in PLAIN:
        cell = Cell(model.name, variant, "fp32", 8, 2, 1.0, "random")
        runner = Runner(model, cell)
        rates.append(8000 / runner.time(patterns(model, 8, 1.0, "random"), seconds / len(PLAIN)))
        del runner
    return max(rates)


def committed(rounds: int, seconds: float) -> dict[str, object]:
    """The committed bundle: CPU of a one-image call, 16 images a call, 10,000 profiles, start to ready."""
    images = [image.tobytes() for image in pixels()]
    starts, ratios = [], []
    own: dict[int, list[float]] = {1: [], 8: []}
    p50: dict[int, list[float]] = {10: [], 10_000: []}
    for _ in range(rounds):
        alone_16 = alone(BUNDLE, "auto", images, 16, ("Shirt",), seconds)
        with server(MODELS) as running:
            starts.append(running.start_seconds)
            report = load(running.address, images, Load(2, seconds, 16, ("Shirt",)))
            ratios.append(report.images_per_second / alone_16)
        for concurrency in own:
            own[concurrency].append(own_cpu_ms(images, concurrency, seconds))
        for count in p50:
            folder, names = many_profiles(count)
            with server(MODELS, "--profiles-dir", str(folder)) as running:
                p50[count].append(load(running.address, images, Load(1, seconds, 1, names)).p50_ms)
    return {
        "start_to_ready_seconds": float(np.median(starts)),
        "own_cpu_ms_by_calls_at_a_time": {str(count): float(np.median(found)) for count, found in own.items()},
        "ratio_at_16_images_a_call": float(np.median(ratios)),
        "p50_ms_by_profiles": {str(count): float(np.median(times)) for count, times in p50.items()},
        "p50_of_10000_over_10": float(np.median(np.array(p50[10_000]) / np.array(p50[10]))),
    }


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.perf.serving", description=__doc__.split("\n\n")[1])
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load (default: %(default)s)")
    parser.add_argument("--only", choices=("deit", "units", "committed"), help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(2)
    parts = {"deit": deit, "units": units, "committed": committed}
    found = {
        name: part(options.rounds, options.seconds) for name, part in parts.items() if options.only in (None, name)
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "serving.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
