"""python -m tests.perf.brownout: a real server beyond its capacity, with brownout and without.

Calls of one image arrive at even times, at multiples of what the server answers at budget 1. A call is in time when it
is answered within the target, counted from when it was due. Every load is run on a server of its own with brownout
(`--target-latency-ms`, all calls allow the lowest budget) and on one without, in turn. Client and server share the
cores. At last the load falls from the highest to the lowest on one server: how long until its level is 0 for good.
Prints a table; writes brownout.json and brownout.png into build/bench.
"""

import argparse
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from export.bundle import Knot
from service.client.load import Load, Report
from service.client.tables import table
from tests.committed import newest, pixels
from tests.perf.heads import OUT, deit_s
from tests.perf.serving import load, noise, server, source_of, write_bench
from tests.processes import MODELS
from training.dial import Dial
from training.evaluation.dial import at_positions, curve
from training.steering import SteeringProfile, SteeringTerm

LOADS = (0.5, 1.0, 1.5, 2.0, 2.5)
POSITIONS = np.linspace(0.3, 1.0, 15)


def dialled_bundle() -> Path:
    """DeiT-S with random weights, 4 MLP groups a block, a dial that opens its units in a random order and the profile
    `odd`, which opens odd units and closes even ones; a repository, written when it is not there yet."""
    repository = OUT / "dialled"
    if repository.is_dir():
        return repository
    model, draw = deit_s(mlp_groups=4), np.random.default_rng(0)
    shifts = tuple(SteeringTerm(unit, 1.0, 1.0 if unit % 2 else -1.0) for unit in range(model.units))
    source = source_of(model, [SteeringProfile("odd", ("c0",), "by hand", dict.fromkeys(range(model.sites), shifts))])
    start = draw.permutation(np.linspace(0.3, 0.95, model.sites * model.units)).reshape(model.sites, model.units)
    rising = np.clip(400 * (POSITIONS[:, None, None] - start) - 8, -8, 8).astype(np.float32)
    rising[-1] = 8
    dial = Dial(POSITIONS, rising)
    outcomes = at_positions(dial, model.steered.model, source.selection, None, POSITIONS)
    points = curve(POSITIONS, outcomes, source.selection.classes, model.macs)
    knots = tuple(Knot(k["budget"], tuple(map(tuple, k["gate_bias"]))) for k in dial.to_json())
    write_bench(replace(source, dial=knots, dials={"": tuple(points)}), repository, model.name, ("dispatch",))
    return repository


def measured(repository: Path, images: list[bytes], asked: Load, *flags: str) -> tuple[Report, float]:
    """The report of a load on a new server, and the mean compute fraction of its answers."""
    with server(repository, *flags) as running:
        report = load(running.address, images, asked)
        spent, dense = (running.count(f"steervit_macs_{kind}_total") for kind in ("spent", "dense"))
    return report, spent / dense


def recovery(repository: Path, images: list[bytes], before: Load, after: Load, *flags: str) -> tuple[float, float]:
    """The highest level, and the seconds from the fall of the load to the last time that the level was above 0. The
    second load begins when the first is answered; the load has fallen when the last call of the first was due."""
    levels: list[tuple[float, float]] = []
    done = threading.Event()
    with server(repository, *flags) as running:

        def watch() -> None:
            while not done.wait(0.1):
                levels.append((time.perf_counter(), running.count("steervit_brownout_level")))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            report = load(running.address, images, before)
            fell = time.perf_counter() - (report.seconds - before.seconds)
            load(running.address, images, after)
        finally:
            done.set()
            watcher.join()
    last = max((at for at, level in levels if level > 0), default=fell)
    return max(level for _, level in levels), max(0.0, last - fell)


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
    parser.add_argument(
        "--model", choices=("deit_s", "committed"), default="deit_s",
        help="DeiT-S with random weights, one image a call; or the committed bundle, 16 a call (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--repository", type=Path, help="with one model that has a dial, in place of --model")
    parser.add_argument("--target", type=float, default=1.0, help="seconds (default: %(default)g)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load (default: %(default)g)")
    options = parser.parse_args(arguments)
    committed = options.model == "committed" and not options.repository
    repository: Path = options.repository or (MODELS if committed else dialled_bundle())
    (name,) = (folder.name for folder in repository.iterdir() if not folder.name.startswith("."))
    manifest = newest(repository / name).manifest
    if not manifest.dial:
        print(
            f"{name} version {manifest.version} has no dial, so brownout has nothing to lower: nothing was measured. "
            "Train with a dial, export, and run this again."
        )
        return 0
    per_call = 16 if committed else 1
    images = [image.tobytes() for image in pixels()] if committed else noise(manifest.image.shape, 32)
    lowest = manifest.dial[0].budget
    capacity = 0.0
    for _ in range(2):  # the first one warms the machine
        report, _ = measured(repository, images, Load(16, options.seconds / 2, per_call, budget=1.0))
        capacity = report.images_per_second
    print(f"{name}: capacity at budget 1: {capacity:.1f} images/s, 16 calls of {per_call} at a time\n", flush=True)

    def asked(multiple: float, min_budget: float | None) -> Load:
        return Load(
            seconds=options.seconds, images_per_call=per_call, rate=multiple * capacity / per_call, timeout=30.0,
            budget=1.0, min_budget=min_budget, within=options.target,
        )  # fmt: skip

    with_brownout = ("--target-latency-ms", f"{1000 * options.target:g}")
    rows: list[dict[str, Any]] = []
    for load_rate in LOADS:
        for server_name, flags in (("brownout", with_brownout), ("without", ())):
            report, compute = measured(repository, images, asked(load_rate, lowest if flags else None), *flags)
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
    level, after = recovery(repository, images, asked(LOADS[-1], lowest), asked(LOADS[0], lowest), *with_brownout)
    print(
        f"\nlevel {level:.2f} at {LOADS[-1]:g} times the capacity, 0 for good {after:.1f} s after the load fell to "
        f"{LOADS[0]:g} of it; target: within 5 s{'' if after <= 5 else ', NOT MET'}"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    found = {"model": name, "capacity": capacity, "target": options.target, "lowest_budget": lowest, "rows": rows}
    found |= {"highest_level": level, "recovery_seconds": after}
    (OUT / "brownout.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(rows, options.target, OUT / "brownout.png")
    print(f"\n{OUT / 'brownout.json'}, {OUT / 'brownout.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
