"""python -m service.demo: a real server on free ports, the sample images through it with and without steering."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from service.client import Client
from service.client.tables import table
from service.client.unit_map import has_colour, legend, unit_map
from service.pb import steering_pb2 as pb
from training.terminal import print_anything

MODELS = Path("deploy/models")
SAMPLES = Path("deploy/samples")
NEXT = """
Next: make playground     # this server behind a web page, http://127.0.0.1:8003
      make serve          # a server on port 8001; then, in another terminal:
      .venv/bin/steervit predict --profile Shirt deploy/samples/Shirt/*.png
      .venv/bin/steervit compare --profile Shirt deploy/samples/Shirt/*.png"""
READY = re.compile(r"ready: grpc (?P<grpc>\S+), metrics ")


@contextmanager
def running_server(*flags: str) -> Iterator[str]:
    """The gRPC address of a server process on free ports; ended by SIGTERM.

    Raises RuntimeError when it does not become ready or does not end cleanly.
    """
    command = [sys.executable, "-m", "service", "--port", "0", "--metrics-port", "0", "--log-level", "warning", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = READY.match(process.stdout.readline())
            if not ready:
                raise RuntimeError("the server did not start; its reason is above")
            yield ready["grpc"]
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise RuntimeError(f"the server ended with {process.returncode}")


def main() -> int:
    """Serve the demo bundle, classify the samples without and with steering, print what changes; returns 0."""
    print_anything()
    start = time.monotonic()
    with running_server("--repository", str(MODELS)) as address, Client(address) as client:
        print(f"A server is up on {address} after {time.monotonic() - start:.1f} s, with the bundle of {MODELS}.\n")
        samples = {
            folder.name: [path.read_bytes() for path in sorted(folder.glob("*.png"))]
            for folder in sorted(path for path in SAMPLES.iterdir() if path.is_dir())
        }
        if client.model().dial:
            print(dialled(client, samples) + "\n")
        effects = {profile.name: profile for profile in client.profiles()}
        rows, shown, counts = [], None, set()
        for name, images in samples.items():
            plain, steered = client.predict(images), client.predict(images, profile=name)
            if name == "Shirt":
                shown = plain, steered
            rows.append(_row(name, plain, steered, effects[name]))
            counts.add(effects[name].images)
        columns = ["class", "right", "head usage", "compute", "recall", "precision", "head usage", "compute"]
        print("No steering -> the profile of the image's class")
        measured = " to ".join(f"{n:,}" for n in sorted(counts))
        print(
            f"Left: the samples, through this server. Right: the profile's record, on {measured} test images a class.\n"
        )
        print(table(columns, rows))
        print("\nA class profile presumes that the class is known: precision shows what other images pay for it.\n")
        if shown:
            print(_units("Shirt", *shown))
    print(f"\nThe server has stopped. {time.monotonic() - start:.1f} s in all.")
    print(NEXT)
    return 0


def dialled(client: Client, samples: Mapping[str, Sequence[bytes]]) -> str:
    """What budgets do to the samples, by label, of a model with a dial: compute, right answers, time."""
    labels = [label for label, images in samples.items() for _ in images]
    pixels = [image for images in samples.values() for image in images]
    lowest, rows = client.model().lowest_budget, []
    for budget in (*(budget for budget in (1.0, 0.7, 0.5) if budget > lowest), lowest):
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            answer = client.predict(pixels, budget=budget)
            seconds.append(time.perf_counter() - begun)
        found = answer.predictions
        right = sum(p.classes[0].label == label for p, label in zip(found, labels, strict=True))
        spent = float(np.mean([p.compute_fraction for p in found]))
        cells = [f"{budget:.2f}", f"{spent:.2f}", f"{right} of {len(found)}", f"{1000 * min(seconds):.0f} ms"]
        rows.append(cells)
    header = ["budget", "compute spent", "right", "time of the call"]
    return f"The dial: all {len(pixels)} samples in one call, at several budgets\n\n{table(header, rows)}"


def _row(name: str, plain: pb.PredictResponse, steered: pb.PredictResponse, profile: pb.Profile) -> list[str]:
    def right(answer: pb.PredictResponse) -> str:
        return str(sum(prediction.classes[0].label == name for prediction in answer.predictions))

    def mean(answer: pb.PredictResponse, field: str) -> float:
        return float(np.mean([getattr(prediction, field) for prediction in answer.predictions]))

    cells = [name, f"{right(plain)} -> {right(steered)} of {len(plain.predictions)}"]
    cells += [f"{mean(plain, f):.2f} -> {mean(steered, f):.2f}" for f in ("head_usage", "compute_fraction")]
    before, after = profile.before, profile.after
    cells += [f"{before.recall:.3f} -> {after.recall:.3f}", f"{before.precision:.3f} -> {after.precision:.3f}"]
    cells += [f"{before.head_usage:.2f} -> {after.head_usage:.2f}"]
    return [*cells, f"{before.compute_fraction:.2f} -> {after.compute_fraction:.2f}"]


def _units(name: str, plain: pb.PredictResponse, steered: pb.PredictResponse) -> str:
    """Which units ran, without steering and with it."""
    columns = [("no steering", plain.predictions), (f"profile {name}", steered.predictions)]
    return f"{legend(len(plain.predictions), f'samples of {name}')}\n\n{unit_map(columns, has_colour())}"


if __name__ == "__main__":
    sys.exit(main())
