"""python tests/crash_writers.py: writers for tests/test_crash_safety.py to kill.

For each line on its input, {state|stage|bundle} <folder>, it forks, prints the child's process id, and the child writes
one item after the other, the n-th filled with n, until it is killed. (Forked, because importing torch takes seconds.)
"""

import itertools
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from processes import COMMITTED

from export.bundle import load_bundle, write_bundle
from training.checkpoint import Run

SETTINGS = {"steps": 100}
BUNDLE = load_bundle(COMMITTED)
FILES = {name: (BUNDLE.folder / name).read_bytes() for name in BUNDLE.manifest.files}


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {f"layer{index}": torch.full((300, 300), float(number)) for index in range(4)}


def state(folder: Path) -> None:
    """Write the checkpoint of an interrupted stage, again and again."""
    run = Run(folder)
    before = run.read_state("vit", SETTINGS)
    for number in itertools.count(before[1]["number"] + 1 if before else 0):
        run.write_state("vit", SETTINGS, tensors(number), {"number": number})


def stage(folder: Path) -> None:
    """Write complete stages, one run folder after the other: states, then the result, then the mark of completion."""
    for number in itertools.count():
        run = Run(folder / str(number))
        if run.finished("vit", SETTINGS):
            continue
        for _ in range(2):
            run.write_state("vit", SETTINGS, tensors(number), {"number": number})
        run.write_tensors("vit", tensors(number))
        run.finish("vit", SETTINGS, {"number": number})


def bundle(folder: Path) -> None:
    """Write one version of a model after the other."""
    there = [int(path.name) for path in (folder / "fashion_mnist").glob("[0-9]*")]
    for number in itertools.count(max(there, default=0) + 1):
        write_bundle(folder, replace(BUNDLE.manifest, version=number), FILES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, _, folder = line.strip().partition(" ")
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            {"state": state, "stage": stage, "bundle": bundle}[name](Path(folder))
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)
