"""python -m tests.perf.brownout: a real server beyond its capacity, with brownout and without.

Calls of one image arrive at even times, at multiples of what the server answers at budget 1. A call is in time when it
is answered within the target, counted from when it was due. Every load is run on a server of its own with brownout
(`--target-latency-ms`, all calls allow the lowest budget) and on one without, in turn. Client and server share the
cores.
Prints a table; writes brownout.json and brownout.png into build/bench.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from export.bundle import Knot, Macs, load_bundle
from export.write import ExportSettings, Source, write_source
from service.client.load import Load, Report
from service.client.tables import table
from tests.perf.heads import OUT, deit_s
from tests.perf.serving import load, server
from training.data.pixels import Split
from training.dial import Dial
from training.evaluation.dial import at_positions, curve

LOADS = (0.5, 1.0, 1.5, 2.0, 2.5)
POSITIONS = np.linspace(0.3, 1.0, 15)


def dialled_bundle() -> Path:
    """DeiT-S with random weights, 4 MLP groups a block and a dial that opens its units in a random order; a repository,
    written when it is not there yet."""
    repository = OUT / "dialled"
    if (repository / "deit_s_units" / "1").is_dir():
        return repository
    model = deit_s(mlp_groups=4)
    network, draw = model.steered.model, np.random.default_rng(0)
    pixels = torch.from_numpy(draw.integers(0, 256, (8, *model.spec.shape), np.uint8))
    split = Split(pixels, torch.arange(8))
    start = draw.permutation(np.linspace(0.3, 0.95, model.sites * model.units)).reshape(model.sites, model.units)
    rising = np.clip(400 * (POSITIONS[:, None, None] - start) - 8, -8, 8).astype(np.float32)
    rising[-1] = 8
    dial = Dial(POSITIONS, rising)
    outcomes = at_positions(dial, network, split, None, POSITIONS)
    points = curve(POSITIONS, outcomes, split.classes, model.macs)
    knots = tuple(Knot(k["budget"], tuple(map(tuple, k["gate_bias"]))) for k in dial.to_json())
    macs = Macs(model.macs.dense, model.macs.per_head, model.macs.per_mlp_group)
    labels = tuple(f"c{index}" for index in range(1000))
    source = Source(model.spec, labels, macs, model.steered, (), {}, split, None, knots, {"": tuple(points)})
    settings = ExportSettings(model.name, attentions=("dispatch",), verify_images=4, accuracy_images=4)
    write_source(source, repository, settings)
    return repository


def measured(repository: Path, images: list[bytes], asked: Load, *flags: str) -> tuple[Report, float]:
    """What a load sees of a new server, and the mean compute fraction of its answers."""
    with server(repository, *flags) as running:
        report = load(running.address, images, asked)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(running.metrics, timeout=10) as page:
            lines = page.read().decode().splitlines()
    spent, dense = (
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"steervit_macs_{kind}_total{{"))
        for kind in ("spent", "dense")
    )
    return report, spent / dense


def plot(rows: list[dict[str, Any]], target: float, file: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    fields = ("in_time", "refused", "compute")
    titles = (f"answered within {target:g} s", "refused or failed", "mean compute of an answer")
    for axis, field, title in zip(axes, fields, titles, strict=True):
        for name, colour, marker in (("brownout", "#0072b2", "o"), ("without", "#d55e00", "s")):
            own = [row for row in rows if row["server"] == name]
            axis.plot(
                [row["load"] for row in own], [row[field] for row in own], color=colour, marker=marker, label=name
            )
        axis.set(xlabel="load / capacity at budget 1", title=title, ylim=(-0.03, 1.03))
        axis.grid(color="#e6e6e6")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m tests.perf.brownout", description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--repository", type=Path, help="models with a dial (default: DeiT-S with random weights)")
    parser.add_argument("--target", type=float, default=1.0, help="seconds (default: %(default)g)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load (default: %(default)g)")
    options = parser.parse_args(arguments)
    repository: Path = options.repository or dialled_bundle()
    (name,) = (folder.name for folder in repository.iterdir() if not folder.name.startswith("."))
    manifest = load_bundle(max((repository / name).glob("[0-9]*"), key=lambda path: int(path.name))).manifest
    images: list[bytes] = [_pixels(index, manifest.image.shape).tobytes() for index in range(32)]
    lowest = manifest.dial[0].budget
    capacity = 0.0
    for _ in range(2):  # the first one warms the machine
        report, _ = measured(repository, images, Load(16, options.seconds / 2, budget=1.0))
        capacity = report.images_per_second
    print(f"capacity at budget 1: {capacity:.1f} images/s, 16 calls at a time\n", flush=True)
    rows: list[dict[str, Any]] = []
    for load_rate in LOADS:
        for server_name, flags in (
            ("brownout", ("--target-latency-ms", f"{1000 * options.target:g}")),
            ("without", ()),
        ):
            asked = Load(
                seconds=options.seconds, rate=load_rate * capacity, timeout=30.0, budget=1.0,
                min_budget=lowest if flags else None, within=options.target,
            )  # fmt: skip
            report, compute = measured(repository, images, asked, *flags)
            failed = sum(report.errors.values())
            rows.append({
                "load": load_rate, "server": server_name, "in_time": report.in_time, "compute": compute,
                "refused": failed / (failed + report.calls), "p99_ms": report.p99_ms, "errors": report.errors,
            })  # fmt: skip
            print(f"{load_rate:g} x, {server_name}: {report}; compute {compute:.3f}", file=sys.stderr, flush=True)
    head = ["load", "server", "in time", "refused", "mean compute", "p99 ms"]
    shown = [
        [f"{row['load']:g}", row["server"], f"{row['in_time']:.3f}", f"{row['refused']:.3f}", f"{row['compute']:.3f}",
         f"{row['p99_ms']:.0f}"]
        for row in rows
    ]  # fmt: skip
    print(table(head, shown))
    OUT.mkdir(parents=True, exist_ok=True)
    found = {"model": name, "capacity": capacity, "target": options.target, "lowest_budget": lowest, "rows": rows}
    (OUT / "brownout.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(rows, options.target, OUT / "brownout.png")
    print(f"\n{OUT / 'brownout.json'}, {OUT / 'brownout.png'}")
    return 0


def _pixels(seed: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


if __name__ == "__main__":
    sys.exit(main())
