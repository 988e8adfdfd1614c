"""python -m tests.perf.gpu [--quick]: what a GPU gives (make gpu-check). Without one, the part that a CPU can check.

Right: the committed bundle's golden rows; gates and logits of every kind of graph against `masked` in fp32 on the CPU,
on images and steerings whose gate logits lie on both sides of 0. Fast: milliseconds a batch, of the device alone and
with the copies to it and back, for DeiT-S and ViT-B with random weights, with and without CUDA graphs; the same through
gRPC; and timm's plain model compiled by PyTorch, if torch sees the GPU. Writes build/bench/gpu.json; the exit code is 0
if everything is right.

`specialised` has a third of the heads and one MLP group of four of every gated block, and fixed terms: what is left of
a model for one profile at about 0.36 of the compute.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from export.bundle import load_bundle
from export.graph import SteeredVit, build
from export.precision import Float
from export.session import Arrays, inputs_of, open_session, session_options
from export.verify import verify
from service import cuda
from service.buckets import Buckets
from service.client.load import Load
from service.config import Settings
from service.cuda import Gpu
from service.engine import resolve_provider
from service.tuning import Surroundings, start
from tests.committed import BUNDLE, newest
from tests.perf.heads import OUT, Model, deit_s, median_ms, patterns, vit_b
from tests.perf.serving import load, noise, rate, server, thirds, write_bench
from training.model.gated_vit import GatedVit
from training.model.sae import Sae
from training.steering import SteeringTerm, to_arrays

KINDS = (("masked", "fp32"), ("fused", "fp32"), ("fused", "fp16"), ("specialised", "fp16"))
BATCHES = (1, 8, 32, 128)
PROFILES = ("", "third0", "third1", "all")
MARGIN = 0.05
"""|gate logit| from which on every decision must equal the CPU's."""
LOGITS = {"fp32": 2e-3, "fp16": 0.1}
"""Limit of a logit's difference, in rows whose gates decide alike."""
begun = time.perf_counter()


def say(text: str) -> None:
    print(f"{time.perf_counter() - begun:6.1f} s  {text}", flush=True)


@dataclass(frozen=True)
class Agreement:
    """A graph compared with `masked` in fp32 on the CPU."""

    model: str
    graph: str
    where: str
    rows: int
    gates: int
    flipped: int
    furthest_flip: float
    """Largest |gate logit| on the CPU of a gate that decided differently, in the first such block of its row."""
    logit: float
    """Largest difference of a logit, in rows whose gates decide alike."""

    @property
    def right(self) -> bool:
        return self.furthest_flip <= MARGIN and self.logit <= LOGITS[self.graph.split(".")[1]]

    def __str__(self) -> str:
        return (
            f"{self.model} {self.graph} on the {self.where}: {self.flipped} of {self.gates} gates decide otherwise, at "
            f"most {self.furthest_flip:.3g} from the threshold; logits within {self.logit:.2g}"
            + ("" if self.right else "  WRONG")
        )


@dataclass(frozen=True)
class Timing:
    model: str
    graph: str
    cuda_graphs: bool
    batch: int
    device_ms: float
    """A run on inputs that are already on the device."""
    ms: float
    """A run including the copies of images and terms to the device and of the answers back."""

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.ms


def deciding(model: Model) -> SteeredVit:
    """The model's ViT with gates and autoencoders that depend on the image, and logits on both sides of 0."""
    torch.manual_seed(1)
    vit, dim = model.steered.model.vit, model.steered.model.dim
    gated = GatedVit(vit, model.steered.model.gated_blocks, model.spec)
    sae = Sae(model.sites, 8 * dim // 3, dim)
    for gate in gated.gates:
        nn.init.normal_(gate.linear.weight, std=2.0 / dim**0.5)
        nn.init.zeros_(gate.linear.bias)
    nn.init.normal_(sae.encoder, std=1.0 / dim**0.5)
    nn.init.normal_(sae.decoder, std=1.0 / dim**0.5)
    nn.init.normal_(sae.encoder_bias, std=0.5)
    nn.init.uniform_(sae.threshold, 0.0, 1.0)
    return SteeredVit(gated, sae).eval().requires_grad_(False)


def steered_rows(steered: SteeredVit, spec_shape: tuple[int, ...], count: int) -> Arrays:
    """Images of coarse random fields, every other one with eight random terms a site."""
    generator = np.random.default_rng(3)
    high, wide, channels = spec_shape
    coarse = generator.integers(0, 256, (count, 1 + high // 32, 1 + wide // 32, channels)).astype(np.uint8)
    images = coarse.repeat(32, 1).repeat(32, 2)[:, :high, :wide]
    noise = generator.integers(-40, 41, images.shape)
    sites, latents = steered.sae.sites, steered.sae.latents

    def terms() -> tuple[SteeringTerm, ...]:
        named = generator.choice(latents, 8, replace=False)
        return tuple(SteeringTerm(int(n), *map(float, generator.normal(1, 2, 2))) for n in named)

    rows = [{site: terms() for site in range(sites)} if row % 2 else {} for row in range(count)]
    return inputs_of(np.clip(images + noise, 0, 255).astype(np.uint8), rows, sites)


NAMES = ("logits", "head_gate", "gate_logit")


def agreement(model: str, graph: str, where: str, found: Sequence[NDArray[np.generic]], cpu: Arrays) -> Agreement:
    logits, head_gate, _ = found
    flips = head_gate != cpu["head_gate"]
    of_block = flips.any(2)
    first = flips & (np.cumsum(of_block, 1) - of_block == 0)[:, :, None]
    alike = ~flips.any((1, 2))
    apart = np.abs(logits.astype(np.float64) - cpu["logits"])[alike]
    furthest = float(np.abs(cpu["gate_logit"])[first].max(initial=0))
    return Agreement(
        model, graph, where, len(flips), flips.size, int(flips.sum()), furthest, float(apart.max(initial=0))
    )


def on_cpu(graph: bytes, inputs: Arrays) -> Arrays:
    session = open_session(graph)
    parts = [
        session.run(NAMES, {k: v[i : i + 16] for k, v in inputs.items()}) for i in range(0, len(inputs["image"]), 16)
    ]
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(NAMES)}


def compare(model: Model, count: int, gpu: Gpu | None) -> list[Agreement]:
    """Every kind of graph on this machine's fastest provider, through the same buckets as in the server."""
    steered = deciding(model)
    inputs = steered_rows(steered, model.spec.shape, count)
    graphs = {
        f"{attention}.{precision}": build(
            steered, model.spec, attention, {}, Float(np.float16 if precision == "fp16" else np.float32)
        ).SerializeToString()
        for attention, precision in KINDS
        if attention != "specialised"
    }
    cpu = on_cpu(graphs["masked.fp32"], inputs)
    near = float((np.abs(cpu["gate_logit"]) < 1).mean())
    usage = cpu["head_gate"].mean()
    say(f"{model.name}: {count} rows on the CPU; {usage:.2f} of the gates open, {near:.2f} of the logits within 1 of 0")
    found = []
    for name, graph in graphs.items():
        buckets = opened(graph, 32, gpu)
        parts = [buckets.run(NAMES, {k: v[i : i + 32] for k, v in inputs.items()}) for i in range(0, count, 32)]
        whole = [np.concatenate(part) for part in zip(*parts, strict=True)]
        found.append(agreement(model.name, name, "GPU" if gpu else "CPU", whole, cpu))
        say(str(found[-1]))
    return found


def opened(graph: bytes | Path, largest: int, gpu: Gpu | None) -> Buckets:
    """A session and its shapes, as in the engine."""
    options = session_options("fused", 0)
    providers: list[object] = ["CPUExecutionProvider"]
    if gpu:
        providers.insert(0, (cuda.PROVIDER, cuda.provider_options(gpu, gpu.graphs)))
    source = graph if isinstance(graph, bytes) else str(graph)
    session = onnxruntime.InferenceSession(source, options, providers)
    assert not gpu or session.get_providers()[0] == cuda.PROVIDER
    buckets = Buckets(session, largest, 32, gpu)
    buckets.first_runs()
    return buckets


def timings(model: Model, batches: Sequence[int], seconds: float, device: int) -> list[Timing]:
    found = []
    for attention, precision in KINDS:
        path = model.graph(attention, precision)
        for graphs in (False, True):
            buckets = opened(path, max(batches), Gpu(device, graphs=graphs))
            for batch in batches:
                inputs = model.inputs(patterns(model, batch, 2 / 3, "random"))
                alone = median_ms(partial(buckets.again, batch), seconds, 5)
                whole = median_ms(partial(buckets.run, NAMES, inputs), seconds, 5)
                found.append(Timing(model.name, f"{attention}.{precision}", graphs, batch, alone, whole))
            says = " ".join(f"{t.batch}: {t.device_ms:.2f}" for t in found[-len(batches) :])
            say(f"{model.name} {attention}.{precision}{' CUDA graphs' if graphs else ''}, ms by batch: {says}")
    return found


def compiled(model: Model, batches: Sequence[int], seconds: float) -> dict[int, float]:
    """Milliseconds of timm's plain model in float16 with fused attention, compiled by PyTorch with CUDA graphs."""
    vit = torch.compile(model.steered.model.vit.cuda().half().eval(), mode="reduce-overhead", dynamic=False)
    found = {}
    with torch.inference_mode():
        for batch in batches:
            pixels = torch.randn(batch, 3, *model.spec.shape[:2], device="cuda", dtype=torch.float16)

            def run(pixels: torch.Tensor = pixels) -> None:
                torch.compiler.cudagraph_mark_step_begin()
                vit(pixels)
                torch.cuda.synchronize()

            for _ in range(3):
                run()
            found[batch] = median_ms(run, seconds, 5)
            say(f"{model.name} plain in PyTorch, batch {batch}: {found[batch]:.2f} ms")
    model.steered.model.vit.cpu().float()
    return found


def through_grpc(model: Model, batches: Sequence[int], seconds: float, clients: int) -> dict[str, dict[str, float]]:
    """Images a second through calls with this many images, from several client processes, and of the engines alone."""
    repository = OUT / "gpu"
    write_bench(thirds(model), repository, model.name, ("fused",), ("fp16",))
    say(f"{model.name}: bundle written")
    bundle = load_bundle(repository / model.name / "1")
    images = noise(model.spec.shape, 128)
    found = {}
    for batch in batches:
        settings = Settings(repository=repository, provider="cuda", max_batch=batch)
        engines = start(bundle, settings, Surroundings(False, False)).engines
        pixels = np.stack([np.frombuffer(images[i], np.uint8).reshape(model.spec.shape) for i in range(batch)])
        terms = [bundle.profiles[PROFILES[i % 4]].terms if PROFILES[i % 4] else {} for i in range(batch)]
        alone = rate(engines, pixels, to_arrays(terms, len(bundle.manifest.sites)), seconds)
        del engines
        flags = {"provider": "cuda", "max-batch": batch, "max-queue": 4096, "max-message-mb": 256}
        with (
            server(repository, *(f"--{name}={value}" for name, value in flags.items())) as running,
            ProcessPoolExecutor(clients, get_context("spawn")) as pool,
        ):
            list(pool.map(time.sleep, [1.0] * clients))  # each has started
            asked = Load(3, seconds, batch, PROFILES)
            reports = list(pool.map(load, [running.address] * clients, [images] * clients, [asked] * clients))
        images_per_second = sum(report.images_per_second for report in reports)
        assert not any(report.errors for report in reports), reports
        found[str(batch)] = {
            "engine_images_per_second": alone, "grpc_images_per_second": images_per_second,
            "ratio": images_per_second / alone,
            "p50_ms": float(np.median([report.p50_ms for report in reports])), "ready_s": running.start_seconds,
        }  # fmt: skip
        say(f"{model.name} through gRPC, {batch} images a call: {found[str(batch)]}")
    return found


def table(found: Sequence[Timing], plain: dict[str, dict[int, float]]) -> str:
    lines = [f"{'model':8}{'graph':18}{'CUDA graphs':13}" + "".join(f"{f'batch {b}':>22}" for b in BATCHES)]
    lines.append(f"{'':39}" + f"{'ms (ms), images/s':>22}" * len(BATCHES))
    for key in dict.fromkeys((t.model, t.graph, t.cuda_graphs) for t in found):
        cells = {t.batch: t for t in found if (t.model, t.graph, t.cuda_graphs) == key}
        row = f"{key[0]:8}{key[1]:18}{'yes' if key[2] else 'no':13}"
        for batch in BATCHES:
            t = cells.get(batch)
            row += f"{f'{t.device_ms:.2f} ({t.ms:.2f}) {t.images_per_second:,.0f}':>22}" if t else f"{'':22}"
        lines.append(row)
    for model, times in plain.items():
        row = f"{model:8}{'PyTorch, plain':18}{'yes':13}"
        lines.append(row + "".join(f"{f'{times[b]:.2f}':>22}" if b in times else f"{'':22}" for b in BATCHES))
    lines.append("\nms: on the device; (ms) and images/s: with the copies to it and back.")
    return "\n".join(lines)


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.perf.gpu", description=__doc__.split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="DeiT-S alone")
    parser.add_argument("--no-pytorch", action="store_true", help="do not compile the plain model")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each timing (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=128, help="images to compare on (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="processes that load the server (default: %(default)s)")
    parser.add_argument("--device", type=int, default=0, help="index of the GPU (default: %(default)s)")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    bundle = verify(newest(BUNDLE).folder)
    say(f"{bundle.manifest.name}: golden rows are right on the CPU")
    gpu, name = None, ""
    if resolve_provider("auto") == "cuda":
        if missing := cuda.problem(options.device):
            say(f"there is a GPU, but {missing}")
            return 1
        gpu = Gpu(options.device)
        name = torch.cuda.get_device_name(options.device) if torch.cuda.is_available() else "a GPU"
        say(f"{name}; onnxruntime {onnxruntime.__version__}")
    else:
        say("no GPU here: the rest is compared on the CPU, and nothing is timed")
    models = [deit_s()] if options.quick or not gpu else [deit_s(), vit_b()]
    agreements = [found for model in models for found in compare(model, options.rows if gpu else 16, gpu)]
    right = all(entry.right for entry in agreements)
    result: dict[str, object] = {"gpu": name, "agreement": [asdict(entry) for entry in agreements]}

    def keep(part: str, value: object) -> None:
        result[part] = value
        (OUT / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")

    keep("right", right)
    if gpu:
        timed = [entry for model in models for entry in timings(model, BATCHES, options.seconds, options.device)]
        keep("timings", [asdict(entry) for entry in timed])
        seconds = max(3.0, 10 * options.seconds)
        served = {model.name: through_grpc(model, (8, 32), seconds, options.clients) for model in models}
        keep("grpc", served)
        print("\n" + table(timed, {}), flush=True)
        if torch.cuda.is_available() and not options.no_pytorch:
            plain = {model.name: compiled(model, (8, 32), options.seconds) for model in models}
            keep("pytorch_plain_ms", plain)
            print("\n" + table(timed, plain), flush=True)
    say(f"{'everything is right' if right else 'WRONG, see above'}; written: {OUT / 'gpu.json'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
