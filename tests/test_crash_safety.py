"""Kills every writer at random moments: afterwards the old or the new content is there, complete, never a mixture.

CRASH_ROUNDS kills of each (8; `make crash`: 50). The writers run in processes of their own: tests/crash_writers.py.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from processes import ROOT

from export.bundle import load_bundle, versions
from service.catalogue import scan
from training.checkpoint import Run

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "8"))
SETTINGS = {"steps": 100}
SEEDS = {"state": 1, "stage": 2, "bundle": 3}
LONGEST = {"state": 0.2, "stage": 0.3, "bundle": 0.5}
"""Longest life of a writer, seconds: several times what it needs."""


Killer = Callable[[str, Path], Callable[[], None]]


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    """(writer, folder) -> a function that lets the writer write for a random while and kills it."""
    process = subprocess.Popen(
        [sys.executable, "tests/crash_writers.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with process:
        assert process.stdin
        assert process.stdout

        def of(writer: str, folder: Path) -> Callable[[], None]:
            draw = random.Random(SEEDS[writer])

            def kill() -> None:
                print(writer, folder, file=process.stdin, flush=True)
                child = int(process.stdout.readline())  # type: ignore[union-attr]
                time.sleep(draw.uniform(0.01, LONGEST[writer]))
                os.kill(child, signal.SIGKILL)
                assert process.stdout.readline() == "ended\n"  # type: ignore[union-attr]

            return kill

        yield of
        process.stdin.close()


def whole(tensors: dict[str, torch.Tensor], number: int) -> bool:
    """Whether all of it belongs to the n-th item."""
    return len(tensors) == 4 and all(bool((tensor == number).all()) for tensor in tensors.values())


def left_by_the_killed(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


def test_a_checkpoint_is_the_old_or_the_new_one(killer: Killer, tmp_path: Path) -> None:
    run, numbers = Run(tmp_path), [-1]
    kill = killer("state", tmp_path)
    for _ in range(ROUNDS):
        kill()
        found = run.read_state("vit", SETTINGS)
        if found:
            assert whole(found[0], found[1]["number"])
            numbers.append(found[1]["number"])
            assert numbers[-1] >= numbers[-2], "it never goes back"
    assert numbers[-1] > 0
    run.write_state("vit", SETTINGS, {}, {"number": 0})
    assert left_by_the_killed(tmp_path) == [], "what they left is removed by the first that lives"


def test_a_stage_that_is_finished_is_whole(killer: Killer, tmp_path: Path) -> None:
    finished = 0
    kill = killer("stage", tmp_path)
    for _ in range(ROUNDS):
        kill()
        for folder in tmp_path.iterdir():
            run, number = Run(folder), int(folder.name)
            if run.finished("vit", SETTINGS):
                result = run.read_tensors("vit")
                assert result
                assert whole(result[0], number)
                assert run.info("vit")["result"] == {"number": number}
            elif state := run.read_state("vit", SETTINGS):
                assert whole(state[0], number)
        done = [folder for folder in tmp_path.iterdir() if Run(folder).has("vit")]
        assert len(done) >= max(finished, len(list(tmp_path.iterdir())) - 1), "one at most is not finished"
        finished = len(done)
    assert finished > 0


def test_a_version_that_is_there_is_a_whole_bundle(killer: Killer, tmp_path: Path) -> None:
    model, seen = tmp_path / "fashion_mnist", 0
    kill = killer("bundle", tmp_path)
    for _ in range(ROUNDS):
        kill()
        there = versions(model)
        assert max(there, default=0) >= seen
        seen = max(there, default=0)
        for number in there:
            assert load_bundle(model / str(number)).manifest.version == number
        if there:
            assert set(scan(tmp_path)["fashion_mnist"].versions) == set(there), "a part is not served"
        assert len(left_by_the_killed(tmp_path)) <= 1, "what the last one left is removed by the next"
        for number in there[:-1]:
            shutil.rmtree(model / str(number))
    assert seen > 1
