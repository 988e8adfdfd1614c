"""GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m tests.perf.heads [--quick | --only MODEL]: what closed heads and MLP
groups save, as wall time.

Every variant of a model in interleaved rounds, one session alive at a time. Memory in huge pages (the variable, read
when a process starts) makes times steadier: without, a session's place in memory decides about 10% (NOTES.md). Prints a
table of medians over the rounds; writes build/bench/heads.json and heads.png.

`ideal` is the share of the plain model's multiply-accumulates that are left at that head usage; efficiency is ideal /
(ms / ms of the fastest plain model of that precision). Gates are forced through the steering inputs of ordinary graphs,
with random weights: time depends on shapes and gates alone.

Models: deit_s, timm's deit_small_patch16_224 with gates on all blocks but the first; deit_s_units, the same with gates
on 4 groups of each MLP too; fashion_mnist, the shape of the committed bundle, with the gates that the committed graph
itself decides for sample images at budgets.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from timm.models import create_model
from torch import nn
from tqdm import tqdm

from export.builder import Builder
from export.calibration import calibrate
from export.fused import build_fused
from export.graph import SteeredVit, build
from export.precision import Float, Int8
from export.session import Arrays, inputs_of, session_options
from service.client.tables import table
from service.engine import Engine
from service.steering import resolve, stack
from tests.committed import BUNDLE, newest, pixels
from tests.processes import ROOT
from training.config import VitSettings
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.gated_vit import GatedVit
from training.model.macs import count
from training.model.sae import Sae
from training.presets import PRESETS
from training.steering import NEUTRAL, SteeringTerm, Terms

OUT = ROOT / "build" / "bench"
PLAIN = ("timm", "dense", "by_head")
"""Graphs without gates: timm's model through PyTorch's exporter; ours in the layouts of `masked` and `dispatch`. The
others are compared with the fastest of them."""
FORCE = 100.0
"""Shift of a steering term: so large that a gate reads nothing but the terms."""


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    model: str
    variant: str
    precision: str
    batch: int
    threads: int
    usage: float
    """Head usage."""
    gates: str
    groups: float = field(default=1.0, kw_only=True)
    """Share of MLP groups that are open."""


@dataclass(frozen=True)
class Row(Cell):
    ms: float
    """Median over the rounds; low and high: the fastest and the slowest round."""
    low: float
    high: float
    ratio_to_dense: float
    """Ratio to the fastest plain fp32 model in the same round; median over the rounds."""
    ideal: float
    efficiency: float
    """ideal / ratio to the fastest plain model of the same precision in the same round; median over the rounds."""
    efficiency_low: float
    """Quartiles over the rounds."""
    efficiency_high: float


class Model:
    """A model with gates that obey the steering terms of a row: latent u opens or closes unit u of its site."""

    def __init__(self, name: str, vit: Any, spec: ImageSpec, mlp_groups: int = 0):
        torch.manual_seed(0)
        self.name, self.spec = name, spec
        depth, heads, dim = len(vit.blocks), vit.blocks[0].attn.num_heads, vit.embed_dim
        model, units = GatedVit(vit, tuple(range(1, depth)), spec, mlp_groups), heads + mlp_groups
        directions = torch.linalg.qr(torch.cat([torch.ones(dim, 1), torch.randn(dim, units)], 1))[0].T[1:]  # mean 0
        for gate in model.gates:
            gate.linear.weight.data = directions.clone()
            nn.init.zeros_(gate.linear.bias)
        sae = Sae(depth - 1, 32, dim)
        sae.threshold.data.fill_(1e9)  # terms shift and do nothing else
        sae.decoder.data[:, :units] = directions
        self.steered = SteeredVit(model, sae).eval().requires_grad_(False)
        self.macs = count(model)
        self.sites, self.heads, self.groups, self.units = depth - 1, heads, mlp_groups, units

    def inputs(self, gates: NDArray[np.bool_]) -> Arrays:
        """The inputs for gates (B, sites, units), with 32 terms per site, like a profile."""
        images = np.random.default_rng(1).integers(0, 256, (len(gates), *self.spec.shape), np.uint8)
        neutral = [SteeringTerm(latent, 1.0, 0.0) for latent in range(self.units, 32)]
        rows: list[Terms] = [
            {
                site: (*(SteeringTerm(u, 1.0, FORCE if on else -FORCE) for u, on in enumerate(of_site)), *neutral)
                for site, of_site in enumerate(row)
            }
            for row in gates
        ]
        return inputs_of(images, rows, self.sites)

    def ideal(self, gates: NDArray[np.bool_]) -> float:
        of_units = torch.tensor(gates, dtype=torch.float32)
        return float(self.macs.fraction(of_units[:, :, : self.heads], of_units[:, :, self.heads :]).mean())

    def graph(self, variant: str, precision: str) -> Path:
        """The file of a variant, written when it is not there yet. compact-h-m: h heads and m MLP groups a
        block are left."""
        path = OUT / "graphs" / f"{self.name}.{variant}.{precision}.onnx"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            content = self._write(variant, precision)
            path.with_suffix(".part").write_bytes(content)
            path.with_suffix(".part").rename(path)
            print(f"{path.name}: {len(content) / 1e6:.0f} MB in {time.perf_counter() - start:.0f} s", flush=True)
        return path

    def _write(self, variant: str, precision: str) -> bytes:
        model, sae = self.steered.model, self.steered.sae
        if variant == "specialised":
            return self._specialised()
        if variant == "timm":
            example = torch.zeros(2, *self.spec.shape, dtype=torch.uint8)
            g = Builder()
            g.output(g.call(_Plain(model), "image", example, "timm"), "logits", ["batch", model.vit.num_classes])
            return g.finish({"image": (TensorProto.UINT8, ["batch", *self.spec.shape])}, {}).SerializeToString()
        plain, arithmetic = variant in PLAIN, Float()
        steered = SteeredVit(GatedVit(model.vit, (), self.spec), sae) if plain else self.steered
        if precision == "int8":
            arithmetic = Int8(self.ranges)
        if precision == "fp16":
            arithmetic = Float(np.float16)
        if variant.startswith("compact"):
            heads, groups = map(int, variant.split("-")[1:])
            left = (*range(heads), *range(self.heads, self.heads + groups))
            return build(steered, self.spec, "compact", {}, arithmetic, [left] * self.sites).SerializeToString()
        attention = {"dense": "masked", "by_head": "dispatch"}.get(variant, variant)
        return build(steered, self.spec, attention, {}, arithmetic).SerializeToString()

    def _specialised(self) -> bytes:
        """A graph for one profile, which holds a third of the heads and one MLP group of four open in every block."""
        model = Model(self.name, self.steered.model.vit, self.spec, mlp_groups=4)
        left = (*range(self.heads // 3), self.heads)
        terms = tuple(SteeringTerm(unit, 1.0, FORCE if unit in left else -FORCE) for unit in range(model.units))
        of_sites: Terms = dict.fromkeys(range(model.sites), terms)
        network, sae, kept = model.steered.model, model.steered.sae, [left] * model.sites
        return build_fused(network, sae, self.spec, {}, np.float16, kept, of_sites).SerializeToString()

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        return calibrate(self.steered, self.spec, [self.inputs(np.ones((8, self.sites, self.units), bool))])


class _Plain(nn.Module):
    """timm's own model, all tokens through the last block, with pixels as input."""

    def __init__(self, model: GatedVit):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.model.embed(image)
        for block in self.model.vit.blocks:
            x = block(x)
        logits: torch.Tensor = self.model.vit.forward_head(self.model.vit.norm(x))
        return logits


def deit_s(mlp_groups: int = 0) -> Model:
    torch.manual_seed(0)
    vit = create_model("deit_small_patch16_224", pretrained=False).eval()
    spec = ImageSpec(224, 224, 3, 256, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Model("deit_s_units" if mlp_groups else "deit_s", vit, spec, mlp_groups)


def vit_b() -> Model:
    torch.manual_seed(0)
    vit = create_model("vit_base_patch16_224", pretrained=False).eval()
    return Model("vit_b", vit, ImageSpec(224, 224, 3, 256, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


def fashion_mnist() -> Model:
    torch.manual_seed(0)
    spec = ImageSpec(28, 28, 1, 28, "bicubic", (0.286,), (0.353,))
    vit = create_vit(VitSettings(**PRESETS["fashion-mnist"]["vit"]), spec, 10).eval()
    return Model("fashion_mnist", vit, spec, mlp_groups=4)


def patterns(model: Model, batch: int, usage: float, gates: str, groups: float = 1.0) -> NDArray[np.bool_]:
    """(B, sites, units), equally many in every block. `random`: others in every row; `uniform`: the same."""
    generator = np.random.default_rng(2)
    open_ = []
    for share, of in ((usage, model.heads), (groups, model.groups)):
        ranks = generator.random((1 if gates == "uniform" else batch, model.sites, of)).argsort(-1)
        open_.append(ranks < round(share * of))
    return np.broadcast_to(np.concatenate(open_, 2), (batch, model.sites, model.units))


def budget_gates(batch: int, budget: float) -> NDArray[np.bool_]:
    """Gates of the committed graph for sample images at a budget: (B, sites, units)."""
    bundle = newest(BUNDLE)
    arrays = stack([resolve(bundle, "", NEUTRAL, 1.0, budget=budget)], [batch])
    return Engine(bundle, "cpu", 1).run(pixels()[:: max(1, 100 // batch)][:batch], arrays).gate_logit > 0


def plan(quick: bool) -> Iterator[tuple[Model, list[Cell]]]:
    """The cells to measure, by model. The bundle's decisions give the `usage` of fashion_mnist/profiles."""
    model = deit_s()
    if quick:
        cells = [Cell(model.name, v, p, 8, 2, 1.0, "random") for p in ("fp32", "int8") for v in ("dense", "by_head")]
        yield (
            model,
            cells
            + [Cell(model.name, "dispatch", p, 8, 2, u, "random") for p in ("fp32", "int8") for u in (1.0, 1 / 3)],
        )
        return
    cells = []
    for threads, batch in ((2, 1), (2, 8), (2, 32), (1, 1), (1, 8)):
        cells.append(Cell(model.name, "timm", "fp32", batch, threads, 1.0, "random"))
        cells += [Cell(model.name, "openvino", p, batch, threads, 1.0, "random") for p in ("fp32", "bf16")]
        every = (1.0, 2 / 3, 1 / 3, 1 / 6) if (threads, batch) in ((2, 1), (2, 8)) else (1.0, 1 / 3)
        for precision in ("fp32", "int8"):
            at = (precision, batch, threads)
            cells += [Cell(model.name, variant, *at, 1.0, "random") for variant in ("dense", "by_head", "masked")]
            for usage in every:
                cells.append(Cell(model.name, "dispatch", *at, usage, "random"))
                if usage < 1:
                    cells.append(Cell(model.name, "dispatch", *at, usage, "uniform"))
                    cells.append(Cell(model.name, "compact", *at, usage, "uniform"))
    yield model, cells
    model, cells = deit_s(mlp_groups=4), []
    for threads, batch in ((2, 1), (2, 8), (2, 32), (1, 8)):
        for precision in ("fp32", "int8"):
            at = (precision, batch, threads)
            cells += [Cell(model.name, variant, *at, 1.0, "random") for variant in ("dense", "by_head")]
            for usage, groups in ((1.0, 1.0), (1 / 2, 1 / 2), (1 / 3, 1 / 4)):
                cells.append(Cell(model.name, "dispatch", *at, usage, "random", groups=groups))
            cells.append(Cell(model.name, "compact", *at, 1 / 3, "uniform", groups=1 / 4))
    yield model, cells
    model = fashion_mnist()
    lowest, cells = newest(BUNDLE).manifest.dial[0].budget, []
    for batch in (1, 8, 32):
        for precision in ("fp32", "int8"):
            at = (precision, batch, 2)
            cells += [Cell(model.name, variant, *at, 1.0, "budget 1") for variant in ("dense", "by_head")]
            for budget in (1.0, 0.7, lowest):
                usage, groups = (
                    float(of.mean()) for of in np.split(budget_gates(batch, budget), [model.heads], axis=2)
                )
                cells.append(Cell(model.name, "dispatch", *at, usage, f"budget {budget:g}", groups=groups))
    yield model, cells


class Runner:
    """Keeps one session alive: of one variant, in one precision, with some threads."""

    def __init__(self, model: Model, cell: Cell):
        self.model, self.cell = model, cell
        left = f"-{round(cell.usage * model.heads)}-{round(cell.groups * model.groups)}"
        name = cell.variant + left * (cell.variant == "compact")
        precision = "fp32" if cell.variant == "openvino" else cell.precision
        path = model.graph("timm" if cell.variant == "openvino" else name, precision)
        if cell.variant == "openvino":
            import openvino

            kind = {"fp32": "f32", "bf16": "bf16"}[cell.precision]
            compiled = openvino.compile_model(
                str(path), "CPU", {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": cell.threads}
            )
            self.run = lambda inputs: compiled(inputs)
            self.names = ["image"]
            return
        options = session_options(cell.variant, cell.threads, spinning=True)  # alone on the machine: at its best
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self.names = [entry.name for entry in session.get_inputs()]
        self.run = lambda inputs: session.run(["logits"], inputs)

    def time(self, gates: NDArray[np.bool_], seconds: float) -> float:
        """Median milliseconds of one batch."""
        inputs = self.model.inputs(gates)
        feed = {name: inputs[name] for name in self.names}
        return median_ms(lambda: self.run(feed), seconds)


def median_ms(run: Callable[[], object], seconds: float, least: int = 2) -> float:
    """Median milliseconds of a run. least: of the runs, after half as many that do not count."""
    for _ in range(least // 2):
        run()
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1000 * float(np.median(taken))


def measure(model: Model, cells: list[Cell], rounds: int, seconds: float) -> list[Row]:
    """The cells of a session are measured one after the other; sessions follow each other, round after round."""
    sessions: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        left = (cell.usage, cell.groups) if cell.variant == "compact" else None
        sessions.setdefault((cell.variant, cell.precision, cell.threads, left), []).append(cell)
    gates = {
        cell: budget_gates(cell.batch, float(cell.gates.removeprefix("budget ")))
        if cell.gates.startswith("budget") and cell.variant not in PLAIN
        else patterns(model, cell.batch, cell.usage, cell.gates, cell.groups)
        for cell in cells
    }
    for cell in cells:
        if cell.variant == "compact":  # those that are left are open
            kept = round(cell.usage * model.heads), round(cell.groups * model.groups)
            left = np.concatenate([np.arange(of) < k for of, k in zip((model.heads, model.groups), kept, strict=True)])
            gates[cell] = np.broadcast_to(left, gates[cell].shape)
    for of_session in sessions.values():
        Runner(model, of_session[0])  # writes the graph
    found: dict[Cell, list[float]] = {cell: [] for cell in cells}
    with tqdm(total=rounds * len(cells), desc=f"bench: {model.name}", unit="cell", dynamic_ncols=True) as progress:
        for _ in range(rounds):
            for of_session in sessions.values():
                runner = Runner(model, of_session[0])
                for cell in of_session:
                    found[cell].append(runner.time(gates[cell], seconds))
                    progress.update()
                del runner
    rows = []
    for cell, times in found.items():
        plain = _fastest(found, cell, "int8" if cell.precision == "int8" else "fp32")
        ideal = model.ideal(gates[cell]) if cell.variant in ("dispatch", "compact") else 1.0
        to_dense = np.array(times) / np.array(_fastest(found, cell, "fp32"))
        efficiency = ideal / (np.array(times) / np.array(plain))
        rows.append(
            Row(
                **asdict(cell),
                ms=float(np.median(times)),
                low=min(times),
                high=max(times),
                ratio_to_dense=float(np.median(to_dense)),
                ideal=ideal,
                efficiency=float(np.median(efficiency)),
                efficiency_low=float(np.quantile(efficiency, 0.25)),
                efficiency_high=float(np.quantile(efficiency, 0.75)),
            )
        )
    return rows


def _fastest(found: dict[Cell, list[float]], cell: Cell, precision: str) -> list[float]:
    """The times, by round, of the plain model that is the fastest by its median."""
    at = (cell.batch, cell.threads, precision)
    plain = [
        t
        for other, t in found.items()
        if other.variant in PLAIN and at == (other.batch, other.threads, other.precision)
    ]
    return min(plain, key=lambda times: float(np.median(times)))


HEAD = (
    "model", "variant", "precision", "batch", "threads", "heads", "groups", "gates", "ms", "(rounds)", "ratio", "ideal",
    "eff.", "(quartiles)",
)  # fmt: skip


def show(rows: list[Row]) -> None:
    def place(r: Row) -> tuple[object, ...]:
        return r.model, r.threads, r.batch, r.precision, r.variant, -r.usage, -r.groups, r.gates

    shown = [
        [r.model, r.variant, r.precision, str(r.batch), str(r.threads), f"{r.usage:.2f}", f"{r.groups:.2f}", r.gates,
         f"{r.ms:.2f}", f"({r.low:.2f}-{r.high:.2f})", f"{r.ratio_to_dense:.2f}", f"{r.ideal:.2f}",
         f"{r.efficiency:.2f}", f"({r.efficiency_low:.2f}-{r.efficiency_high:.2f})"]
        for r in sorted(rows, key=place)
    ]  # fmt: skip
    print(f"\n{table(HEAD, shown)}")
    print("\nratio: to the fastest plain fp32 model. ideal: share of the multiply-accumulates that are left.")
    print("eff.: ideal / ratio to the fastest plain model of the same precision.")


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in rows if r.model == "deit_s" and r.threads == 2 and r.gates == "random"]
    batches = sorted({row.batch for row in shown})
    figure, axes = plt.subplots(1, len(batches), figsize=(4.2 * len(batches), 3.6), squeeze=False, sharey=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        for precision, colour in (("fp32", "#1f5fa8"), ("int8", "#c2571a")):
            points = [r for r in shown if (r.batch, r.precision, r.variant) == (batch, precision, "dispatch")]
            points.sort(key=lambda r: r.usage)
            usage, base = [r.usage for r in points], [r for r in shown if r.batch == batch and r.precision == precision]
            dense = min((r.ratio_to_dense for r in base if r.variant in PLAIN), default=None)
            axis.plot(usage, [r.ratio_to_dense for r in points], "o-", color=colour, label=f"dispatch {precision}")
            if dense is not None:
                axis.plot(
                    usage, [r.ideal * dense for r in points], ":", color=colour, label=f"{precision}, ideal by MACs"
                )
        axis.set(title=f"batch {batch}", xlabel="head usage", xlim=(0, 1.05), ylim=(0, 1.15))
        axis.axhline(1, color="#888", lw=0.8)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("time / fastest plain fp32 model")
    axes[0][0].legend(frameon=False, fontsize=7, loc="lower left", ncols=2, columnspacing=1.0)
    figure.suptitle("DeiT-S, 224 px, 11 of 12 blocks gated,\nrandom gates, 2 threads", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.perf.heads", description=__doc__.split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="DeiT-S, batch 8, 2 threads, usage 1 and 1/3 alone")
    parser.add_argument("--only", choices=("deit_s", "deit_s_units", "fashion_mnist"), help="this model alone")
    parser.add_argument("--rounds", type=int, help="of every cell (default: 5, with --quick 4)")
    parser.add_argument("--seconds", type=float, default=0.2, help="a cell and round at least (default: %(default)s)")
    options = parser.parse_args()
    rows: list[Row] = []
    for model, cells in plan(options.quick):
        if options.only not in (None, model.name):
            continue
        rows += measure(model, cells, options.rounds or (4 if options.quick else 5), options.seconds)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "heads.json").write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if options.only in (None, "deit_s"):
        plot(rows, OUT / "heads.png")
    show(rows)
    print(f"written: {OUT / 'heads.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
