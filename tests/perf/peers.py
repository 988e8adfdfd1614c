"""python -m tests.perf.peers: steervit and Triton on the same graphs and cores, under perf_analyzer.

steervit runs as it starts, without flags; Triton's Python backend runs the same graph on the same onnxruntime, with one
or two threads a session and one or two instances, dynamic batching without delay. All servers are up together, one is
measured at a time; each cell is measured on every server in turn, round after round, in another order each time. A row
of the table compares medians over the rounds, with Triton at its best setting for that row. Prints the table; writes
build/bench/peers.json, peers.md and peers.png.
"""

import argparse
import asyncio
import base64
import contextlib
import csv
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tqdm import tqdm

from export.bundle import Bundle, Manifest
from service.client.load import Load, run
from service.client.tables import table
from service.pb import open_inference_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.committed import newest, pixels
from tests.perf.peer_tools import Unavailable, perf_analyzer, tritonserver
from tests.processes import MODELS, ROOT, serving, until

OUT = ROOT / "build" / "bench"
MAX_BATCH = 32
"""Largest batch of Triton; steervit's default."""
WINDOWS = 3
"""perf_analyzer measures at least this many windows in a row, and reports them together."""


@dataclass(frozen=True)
class Subject:
    """A model in the bench."""

    name: str
    title: str
    repository: Path
    graph: str
    pixels: Callable[[Manifest], list[bytes]]
    calls: tuple[int, ...]
    rate: float
    """Rough images a second, which determine the duration of a measurement."""
    flags: tuple[str, ...] = ()
    """Flags that choose a graph other than the default."""

    @cached_property
    def bundle(self) -> Bundle:
        return newest(self.repository / self.name)


@dataclass(frozen=True)
class Cell:
    model: str
    images: int
    """Images per call."""
    calls: int
    """Concurrent calls."""


@dataclass(frozen=True)
class Result:
    images_per_second: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Row(Cell):
    peer: str
    """A server and its settings."""
    triton: bool
    round: int
    images_per_second: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Peer:
    name: str
    triton: bool
    measure: Callable[[Cell, float], Result]


def committed() -> Subject:
    def images(_: Manifest) -> list[bytes]:
        return [image.tobytes() for image in pixels()]

    return Subject("fashion_mnist", "Committed bundle", MODELS, "dispatch.fp32.onnx", images, (1, 8, 32), 500)


def deit() -> Subject:
    from tests.perf.serving import deit_bundle, noise  # here: torch takes seconds to import

    def images(manifest: Manifest) -> list[bytes]:
        return noise(manifest.image.shape, 32)

    flags = ("--graph", "masked.fp32")
    return Subject("deit_s", "DeiT-S, all heads", deit_bundle(), "masked.fp32.onnx", images, (1, 8, 16), 12, flags)


SUBJECTS = {"committed": committed, "deit": deit}


class PerfAnalyzer:
    """Calls with raw pixels as input, the same for every server."""

    def __init__(self, folder: Path):
        self.command, self.folder = perf_analyzer(), folder

    def __call__(self, address: str, subject: Subject, cell: Cell, seconds: float) -> Result:
        report = self.folder / "report.csv"
        command = [
            *self.command, "-m", subject.name, "-u", address, "-i", "grpc", "--input-data", str(self._data(subject)),
            "-b", str(cell.images), "--concurrency-range", str(cell.calls), "-f", str(report),
            "--warmup-request-count", str(2 * cell.calls), "-p", str(round(1000 * seconds / WINDOWS)),
            "-s", "999",  # per cent: noise does not prolong a measurement, rounds average it
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        with report.open() as file:
            (line,) = csv.DictReader(file)
        ms = (float(line[f"p{percentile} latency"]) / 1000 for percentile in (50, 99))
        return Result(float(line["Inferences/Second"]), *ms)

    def _data(self, subject: Subject) -> Path:
        path = self.folder / f"{subject.name}.json"
        if not path.exists():
            shape = list(subject.bundle.manifest.image.shape)
            images = [base64.b64encode(image).decode() for image in subject.pixels(subject.bundle.manifest)]
            path.write_text(json.dumps({"data": [{"image": {"b64": image, "shape": shape}} for image in images]}))
        return path


def own_load(address: str, subject: Subject, cell: Cell, seconds: float) -> Result:
    """Measured by `python -m service.client load`, over the typed API."""
    images = subject.pixels(subject.bundle.manifest)
    report = asyncio.run(run(address, images, Load(cell.calls, seconds, cell.images), raw=True))
    return Result(report.images_per_second, report.p50_ms, report.p99_ms)


@contextlib.contextmanager
def steervit(subject: Subject, checkout: Path, flags: Sequence[str], log: Path) -> Iterator[str]:
    """Its address."""
    with (
        log.open("w") as file,
        serving(subject.repository, *subject.flags, *flags, cwd=checkout, stderr=file) as server,
    ):
        yield server.address


@contextlib.contextmanager
def triton(subject: Subject, threads: int, instances: int, folder: Path) -> Iterator[str]:
    """Its address."""
    version = folder / "repository" / subject.name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(Path(__file__).with_name("triton_model.py").read_text())
    (version.parent / "config.pbtxt").write_text(triton_config(subject, threads, instances))
    command, environment = tritonserver()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command += ["--model-repository", str(folder / "repository"), "--grpc-address", "127.0.0.1"]
    command += ["--grpc-port", address.rpartition(":")[2], "--allow-http", "false", "--allow-metrics", "false"]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            with grpc.insecure_channel(address) as channel:
                stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
                until(lambda: process.poll() is not None or _ready(stub))
            if process.poll() is not None:
                raise Unavailable(f"Triton did not start: {(folder / 'log.txt').read_text()[-2000:]}")
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def _ready(stub: GRPCInferenceServiceStub) -> bool:
    try:
        return bool(stub.ServerReady(pb.ServerReadyRequest(), timeout=5).ready)
    except grpc.RpcError:
        return False


def triton_config(subject: Subject, threads: int, instances: int) -> str:
    manifest = subject.bundle.manifest
    blocks, heads, groups = len(manifest.gated_blocks), manifest.heads, manifest.mlp_groups
    outputs = [
        ("logits", "FP32", [len(manifest.labels)]),
        ("head_gate", "BOOL", [blocks, heads]),
        ("gate_logit", "FP32", [blocks, heads + groups]),
        *[("mlp_gate", "BOOL", [blocks, groups])] * bool(groups),
    ]
    told = ", ".join(f'{{ name: "{name}" data_type: TYPE_{kind} dims: {shape} }}' for name, kind, shape in outputs)
    return f"""
        name: "{subject.name}"
        backend: "python"
        max_batch_size: {MAX_BATCH}
        input [{{ name: "image" data_type: TYPE_UINT8 dims: {list(manifest.image.shape)} }}]
        output [{told}]
        instance_group [{{ kind: KIND_CPU count: {instances} }}]
        dynamic_batching {{ max_queue_delay_microseconds: 0 }}
        parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}
        parameters {{ key: "graph" value {{ string_value: "{subject.bundle.folder / subject.graph}" }} }}
    """


@contextlib.contextmanager
def peers(subject: Subject, options: argparse.Namespace, folder: Path) -> Iterator[list[Peer]]:
    """All servers of a model, running."""
    analyzer = PerfAnalyzer(folder)

    def peer(name: str, address: str, is_triton: bool = False, generator: Callable[..., Result] = analyzer) -> Peer:
        return Peer(name, is_triton, lambda cell, seconds: generator(address, subject, cell, seconds))

    with contextlib.ExitStack() as stack:
        found: list[Peer] = []
        for checkout in options.ours if options.only != "triton" else []:
            for flags in options.flags:
                name = " ".join(["steervit", *[checkout.name] * (len(options.ours) > 1), *shlex.split(flags)])
                log = folder / f"{len(found)}.log"
                address = stack.enter_context(steervit(subject, checkout, shlex.split(flags), log))
                found.append(peer(name, address))
                if options.load:
                    found.append(peer(f"{name} (own load)", address, generator=own_load))
        for threads, instances in ((1, 1), (2, 1), (1, 2), (2, 2)) if options.only != "steervit" else ():
            name = f"{threads} thread{'s' * (threads > 1)}, {instances} instance{'s' * (instances > 1)}"
            address = stack.enter_context(triton(subject, threads, instances, folder / f"{threads}-{instances}"))
            found.append(peer(f"Triton: {name}", address, is_triton=True))
        yield found


def measure(subject: Subject, options: argparse.Namespace) -> list[Row]:
    cells = [Cell(subject.name, images, calls) for images in options.images for calls in options.calls or subject.calls]
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="peers-") as folder,
        peers(subject, options, Path(folder)) as servers,
        tqdm(total=options.rounds * len(cells) * len(servers), desc=subject.title, disable=None) as progress,
    ):
        for number in range(options.rounds):
            for cell in cells:
                # twice as long as a server takes for all calls in progress
                seconds = max(options.seconds, 2 * cell.calls * cell.images / subject.rate)
                first = number % len(servers)
                for server in servers[first:] + servers[:first]:
                    result = asdict(server.measure(cell, seconds))
                    rows.append(Row(**asdict(cell), peer=server.name, triton=server.triton, round=number, **result))
                    progress.update()
    return rows


@dataclass(frozen=True)
class Summary(Cell):
    """The result of one server in one cell: medians over the rounds, and the slowest and the fastest round."""

    peer: str
    triton: bool
    images_per_second: float
    low: float
    high: float
    p50_ms: float
    p99_ms: float
    rates: tuple[float, ...]
    """Images a second, by round."""


def summaries(rows: Sequence[Row]) -> list[Summary]:
    found = []
    for model, images, calls, peer in dict.fromkeys((row.model, row.images, row.calls, row.peer) for row in rows):
        of = [r for r in rows if (r.model, r.images, r.calls, r.peer) == (model, images, calls, peer)]
        rates = [row.images_per_second for row in of]
        p50, p99 = (float(np.median([getattr(row, name) for row in of])) for name in ("p50_ms", "p99_ms"))
        median = float(np.median(rates))
        found.append(
            Summary(model, images, calls, peer, of[0].triton, median, min(rates), max(rates), p50, p99, tuple(rates))
        )
    return found


def best_triton(found: Sequence[Summary], like: Summary) -> Summary | None:
    """The setting with the highest median in that cell."""
    cell = (like.model, like.images, like.calls)
    rivals = [s for s in found if s.triton and (s.model, s.images, s.calls) == cell]
    return max(rivals, key=lambda summary: summary.images_per_second, default=None)


HEAD = (
    "model", "images a call", "calls at a time", "server", "images/s", "p50 ms", "p99 ms", "Triton images/s", "p50 ms",
    "p99 ms", "its best setting", "ratio",
)  # fmt: skip


def lines(found: Sequence[Summary], titles: dict[str, str]) -> list[list[str]]:
    """The table: every server of ours beside the best Triton. ratio: the median over the rounds."""
    said = []
    ours = [s for s in found if not s.triton] or [s for s in found if best_triton(found, s) is s]
    for own in ours:
        line = [titles[own.model], str(own.images), str(own.calls), own.peer, *_figures(own)]
        rival = best_triton(found, own)
        if rival and rival is not own:
            ratio = np.median(np.array(own.rates) / np.array(rival.rates))
            line += [*_figures(rival), rival.peer.removeprefix("Triton: "), f"{ratio:.2f}"]
        said.append(line + [""] * (len(HEAD) - len(line)))
    return said


def _figures(of: Summary) -> list[str]:
    rate = f"{of.images_per_second:,.0f}" if of.images_per_second >= 100 else f"{of.images_per_second:.1f}"
    return [rate, *(f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" for ms in (of.p50_ms, of.p99_ms))]


def markdown(said: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEAD, ["---"] * len(HEAD), *said]) + "\n"


OURS, THEIRS = ("#1f5fa8", "#7fb2e5", "#0b2e59", "#5a86b8"), "#c2571a"


def plot(found: Sequence[Summary], titles: dict[str, str], path: Path) -> None:
    """Images a second by calls at a time; bars: medians, whiskers: slowest and fastest round, marks: other settings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, images = (list(dict.fromkeys(getattr(s, name) for s in found)) for name in ("model", "images"))
    own = list(dict.fromkeys(s.peer for s in found if not s.triton))
    width = 0.8 / (len(own) + any(s.triton for s in found))
    size = (4.6 * len(images), 3.3 * len(models) + 0.5)
    figure, axes = plt.subplots(len(models), len(images), figsize=size, squeeze=False, sharey="row")
    for row, model in enumerate(models):
        for column, count in enumerate(images):
            axis, shown = axes[row][column], [s for s in found if (s.model, s.images) == (model, count)]
            calls = sorted({s.calls for s in shown})
            for place, at_a_time in enumerate(calls):
                cell = [s for s in shown if s.calls == at_a_time]
                bars = [next(s for s in cell if s.peer == name) for name in own]
                best = best_triton(found, cell[0])
                for index, bar in enumerate([*bars, *[best] * (best is not None)]):
                    assert bar
                    x = place + (index - 0.5 * (0.8 / width - 1)) * width
                    rate, colour = bar.images_per_second, THEIRS if bar.triton else OURS[index % len(OURS)]
                    label = ("Triton 2.51, its best setting" if bar.triton else bar.peer) if place == 0 else None
                    axis.bar(x, rate, 0.92 * width, color=colour, label=label)
                    spread = [[rate - bar.low], [bar.high - rate]]
                    axis.errorbar(x, rate, spread, color="#222", lw=0.9, capsize=2.5, capthick=0.9)
                    above = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5}
                    axis.annotate(_figures(bar)[0], (x, bar.high), (0, 3), **above)
                    others = [s.images_per_second for s in cell if bar.triton and s.triton and s is not bar]
                    label = "Triton, other settings" if others and place == 0 else None
                    axis.plot([x + 0.28 * width] * len(others), others, "o", color="#3d1a07", ms=3.2, label=label)
            axis.set_xticks(range(len(calls)), [str(n) for n in calls])
            axis.set_title(f"{titles[model]}: {count} image{'s' * (count > 1)} a call", fontsize=10)
            axis.grid(axis="y", alpha=0.25)
            axis.set_axisbelow(True)
            axis.margins(y=0.14)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("calls at a time")
    for line in axes:
        line[0].set_ylabel("images a second")
    entries = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    names = sorted(entries, key=lambda name: (name.startswith("Triton"), name.endswith("other settings")))
    columns = min(len(names), 2 * len(images))  # as many as the figure is wide
    style = {"frameon": False, "fontsize": 9, "loc": "upper center", "ncols": columns}
    figure.legend([entries[name] for name in names], names, **style)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.1 + 0.22 * -(-len(names) // columns)) / size[1]))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.perf.peers", description=__doc__.split("\n\n")[1])
    add: Any = parser.add_argument
    add("--model", choices=sorted(SUBJECTS), help="default: both")
    add("--only", choices=("steervit", "triton"), help="default: both")
    add("--calls", type=_numbers, help="at a time, such as 1,8 (default: 1,8,32; DeiT-S: 1,8,16)")
    add("--images", type=_numbers, default=(1, 16), help="a call (default: 1,16)")
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--seconds", type=float, default=3.0, help="of each measurement at least (default: %(default)s)")
    add("--ours", type=Path, action="append", metavar="DIR", help="a checkout of steervit; repeated: compare several")
    add("--flags", action="append", metavar="'--FLAG ...'", help="of steervit; repeated: compare several ('': none)")
    add("--load", action="store_true", help="measure steervit by its own client's load as well")
    add("--cores", type=int, default=2, help="for client and server together (default: %(default)s)")
    options = parser.parse_args()
    options.ours = [path.resolve() for path in options.ours or [ROOT]]
    options.flags = options.flags or [""]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    try:
        perf_analyzer()
        tritonserver() if options.only != "steervit" else None
    except Unavailable as reason:
        print(f"skipped: {reason}")
        return 0
    subjects = [make() for name, make in SUBJECTS.items() if options.model in (None, name)]
    rows = [row for subject in subjects for row in measure(subject, options)]
    found, titles = summaries(rows), {subject.name: subject.title for subject in subjects}
    said = lines(found, titles)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "peers.json").write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    (OUT / "peers.md").write_text(markdown(said))
    plot(found, titles, OUT / "peers.png")
    print(table(HEAD, said))
    print(f"written: {OUT / 'peers.json'}, peers.md, peers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
