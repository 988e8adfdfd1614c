"""How a model uses the CPUs: how many batches run at a time, with how many threads each, and how large they are.

As many threads as there are CPUs (*instances*) run one session of one thread each and share its weights. This saves the
hand-over of small operations between threads, but leaves CPUs idle while there are fewer images than instances. So a
*wide* session uses all CPUs for calls that meet no others, as long as that is faster. Whether the instances or the wide
session run batches faster, and the best batch size, are measured at the start and saved beside the bundle. On a GPU
there are two instances, each with a session of its own.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from export.bundle import INPUTS, Bundle, Golden, load_golden
from service.config import Settings
from service.cuda import Gpu
from service.engine import Engine, Outputs, choose_graph, resolve_provider, usable_cpus
from training.steering import SteeringArrays

log = logging.getLogger("steervit.tuning")
SIZES = (2, 8, 16, 32)
"""The batch sizes to choose from; the first for models too large to measure them: their tokens then stay in the second
cache, which saves a DeiT-S 13 to 20% an image (NOTES.md, "Units")."""
MAX_BATCH = SIZES[-1]
"""The batch size without a measurement."""
GPU_MAX_BATCH = 64
GPU_INSTANCES = 2
"""While the GPU runs a batch of one instance, the other assembles and copies its next one."""
TURNS = 2
"""Minimum number of turns for each contestant."""
WORTH = 1.05
"""How many times as fast an alternative must be to replace the default, so that noise decides nothing."""
COMPARE_EVERY = 32
"""One in this many calls that meet no others runs on the session that was slower recently."""


Count = Annotated[int, Field(ge=1, le=4096)]


@dataclass(frozen=True)
class Plan:
    """How a model uses the CPUs."""

    instances: Count
    """Number of concurrent batches."""
    threads: Count
    """Threads of each batch."""
    wide_threads: Annotated[int, Field(ge=0, le=4096)]
    """Threads of the wide session; 0: there is none."""
    spinning: bool
    """Whether the threads of a run spin while they wait for each other."""
    max_batch: Count
    """Limit of the images in a batch."""
    source: str = "default"
    """`flags`, `measured`, `cached`, or `default`: neither measured nor cached."""


@dataclass(frozen=True)
class _Saved:
    """The content of the file beside the bundle."""

    measured_for: dict[str, Any]
    plan: Plan
    milliseconds_per_image: dict[str, float]


class Quickest:
    """Runs each call on the engine that has been fastest recently. For similar calls, one at a time."""

    def __init__(self, *engines: Engine):
        self._engines = engines
        self._seconds = [0.0] * len(engines)
        """Recent mean duration of a run, by engine."""
        self._runs = 0

    def run(
        self, images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False, digest: str = ""
    ) -> Outputs:
        """As Engine.run, on the fastest engine; every COMPARE_EVERY-th run is on the second fastest."""
        self._runs += 1
        ranked = sorted(range(len(self._engines)), key=self._seconds.__getitem__)
        chosen = ranked[0 if self._runs % COMPARE_EVERY else 1]
        outputs = self._engines[chosen].run(images, steering, residual, digest)
        off = outputs.seconds - (before := self._seconds[chosen] or outputs.seconds)
        self._seconds[chosen] = before + off / (8 if off > 0 else 2)  # a slow run may have other causes
        return outputs


@dataclass(frozen=True)
class Instances:
    """The engines that run the batches of a model."""

    engines: Sequence[Engine]
    """One for each concurrent batch; the same one several times if it has one thread."""
    lone: Quickest | None
    """Runs calls of few images that meet no others."""
    plan: Plan


@dataclass(frozen=True)
class Surroundings:
    """What else uses the CPUs."""

    serving: bool
    """Whether the server answers calls: then nothing is measured."""
    spinning: bool
    """Whether threads may spin: not while other models use the same CPUs."""


def start(bundle: Bundle, settings: Settings, surroundings: Surroundings) -> Instances:
    """Load the bundle's graph and choose how to run it: by flags, or as measured now or before.

    Raises EngineError or BundleError.
    """
    plan = default(settings, surroundings.spinning)
    if plan.source == "flags":
        return _load(bundle, settings, plan)
    path = bundle.folder.with_name(f"{bundle.folder.name}.tuning.json")
    key = _key(bundle, settings, plan)
    if settings.tune != "off" and (known := _read(path, key)):
        return _load(bundle, settings, known)
    if settings.tune == "off" or surroundings.serving:
        return _load(bundle, settings, plan)
    instances, timings = _measured(bundle, settings, plan)
    _write(path, _Saved(key, instances.plan, timings))
    return instances


def default(settings: Settings, spinning: bool) -> Plan:
    """The plan without measurements. Its source is `flags` if the flags leave nothing to choose."""
    cpus = usable_cpus()
    if resolve_provider(settings.provider) == "cuda":
        threads, max_batch = settings.threads or cpus, settings.max_batch or GPU_MAX_BATCH
        return Plan(settings.instances or GPU_INSTANCES, threads, 0, False, max_batch, "flags")
    threads = settings.threads or (max(1, cpus // settings.instances) if settings.instances else 1)
    free = not (settings.threads or settings.instances)
    return Plan(
        instances=settings.instances or max(1, cpus // threads),
        threads=threads,
        wide_threads=cpus if free and cpus > 1 else 0,
        spinning=spinning and cpus == os.cpu_count(),
        max_batch=settings.max_batch or MAX_BATCH,
        source="default" if free or not settings.max_batch else "flags",
    )


def _load(bundle: Bundle, settings: Settings, plan: Plan) -> Instances:
    log.info(
        "%s version %d: %d instances of %d threads, %s, batches of at most %d (%s)",
        bundle.manifest.name, bundle.manifest.version, plan.instances, plan.threads,
        f"single calls on {plan.wide_threads} threads" if plan.wide_threads else "no wide session",
        plan.max_batch, plan.source,
    )  # fmt: skip
    engines, wide = _engines(bundle, settings, plan)
    return Instances(engines, Quickest(engines[0], wide) if wide else None, plan)


def _engines(bundle: Bundle, settings: Settings, plan: Plan) -> tuple[list[Engine], Engine | None]:
    """The instances, and the wide session or None. Instances share a session of one thread, or have one each. Sessions
    are loaded in parallel."""
    sessions = plan.instances if plan.threads > 1 or resolve_provider(settings.provider) == "cuda" else 1
    threads = [plan.threads] * sessions + ([plan.wide_threads] if plan.wide_threads else [])
    with ThreadPoolExecutor(len(threads)) as pool:
        loaded = list(pool.map(partial(_engine, bundle, settings, plan), threads))
    wide = loaded.pop() if plan.wide_threads else None
    return loaded * (plan.instances // sessions), wide


def _engine(bundle: Bundle, settings: Settings, plan: Plan, threads: int) -> Engine:
    return Engine(
        bundle, settings.provider, threads, settings.graph, plan.max_batch, spinning=plan.spinning and threads > 1,
        gpu=gpu_of(settings), specialised={"auto": None, "on": True, "off": False}[settings.specialised],
    )  # fmt: skip


def gpu_of(settings: Settings) -> Gpu:
    """The GPU that the settings name, and how to use it."""
    return Gpu(settings.device, settings.gpu_memory_mb, settings.cuda_graphs == "auto", settings.tf32)


def _measured(bundle: Bundle, settings: Settings, plan: Plan) -> tuple[Instances, dict[str, float]]:
    """The instances, and the measured milliseconds per image.

    Measurements that would take too long are left out: they matter less the larger the model is.
    """
    budget = 2.0 if settings.tune == "auto" else float(settings.tune)
    end = time.perf_counter() + budget
    engines, wide = _engines(bundle, settings, plan)
    race = partial(_raced, load_golden(bundle.folder, engines[0].graph.precision))
    timings = race({"one image": (engines[:1], 1)}, 0.1 * budget)
    image = timings["one image"] / 1000  # an upper bound for an image in a batch

    def left() -> float:
        return end - time.perf_counter()

    if wide and TURNS * 2 * SIZES[0] * image < left():
        timings |= race({"instances": (engines, SIZES[0]), "wide": ([wide], SIZES[0])}, 0.5 * left())
        if timings["instances"] > WORTH * timings["wide"]:
            engines, wide = [wide], None
    max_batch = plan.max_batch
    if not settings.max_batch:
        sizes = [size for size in SIZES if TURNS * 2 * size * image < left()]
        each = race({f"batches of {size}": (engines, size) for size in sizes}, left()) if len(sizes) > 1 else {}
        timings |= each
        enough = [size for size, took in zip(sizes, each.values(), strict=False) if took <= WORTH * min(each.values())]
        max_batch = enough[0] if enough else SIZES[0]
    wide_threads = wide.threads if wide else 0
    chosen = Plan(len(engines), engines[0].threads, wide_threads, plan.spinning, max_batch, "measured")
    log.info(
        "%s version %d: %s from milliseconds an image: %s", bundle.manifest.name, bundle.manifest.version, chosen,
        ", ".join(f"{name} {took:.2f}" for name, took in timings.items()),
    )  # fmt: skip
    return Instances(engines, Quickest(engines[0], wide) if wide else None, chosen), timings


def _raced(golden: Golden, contestants: Mapping[str, tuple[Sequence[Engine], int]], seconds: float) -> dict[str, float]:
    """Milliseconds per image, by contestant: engines that run at the same time, and the size of their batches. Each
    contestant has TURNS turns or more, of which the median counts."""
    turns: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns[min(turns)]) < TURNS:
        for name, (engines, batch) in contestants.items():
            rows = np.arange(batch) % len(golden.inputs["image"])
            turns[name].append(_timed(engines, *(golden.inputs[key][rows] for key in INPUTS)))
    return {name: 1000 * float(np.median(times)) for name, times in turns.items()}


def _timed(engines: Sequence[Engine], images: NDArray[np.uint8], *terms: NDArray[Any]) -> float:
    """Seconds per image while each engine runs the batch in its own thread, for 20 ms or once."""
    done = [0] * len(engines)
    ready = threading.Barrier(len(engines) + 1)

    def work(index: int, engine: Engine) -> None:
        ready.wait()
        start = time.perf_counter()
        while not done[index] or time.perf_counter() < start + 0.02:
            engine.run(images, SteeringArrays(*terms))
            done[index] += 1

    threads = [threading.Thread(target=work, args=item) for item in enumerate(engines)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - start) / (len(images) * sum(done))


def _key(bundle: Bundle, settings: Settings, plan: Plan) -> dict[str, Any]:
    """The conditions that a measured plan depends on."""
    graph = choose_graph(bundle, resolve_provider(settings.provider), settings.graph)
    return {
        "bundle_digest": bundle.digest,
        "graph": f"{graph.attention}.{graph.precision}",
        "onnxruntime": onnxruntime.__version__,
        "cpu": _cpu_name(),
        "cpus": usable_cpus(),
        "spinning": plan.spinning,
        "flags": [settings.instances, settings.threads, settings.max_batch],
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path, key: Mapping[str, Any]) -> Plan | None:
    """The saved plan, if it was measured under the same conditions."""
    with contextlib.suppress(OSError, ValidationError):
        saved = TypeAdapter(_Saved).validate_json(path.read_bytes(), strict=True)
        if saved.measured_for == key:
            return replace(saved.plan, source="cached")
    return None


def _write(path: Path, saved: _Saved) -> None:
    """Save the plan. If the folder cannot be written, each start measures."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(asdict(saved), indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        log.info("the measured tuning is not saved: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()
