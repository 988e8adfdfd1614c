"""Long runs: killed at any moment, dealt out to two processes, and from data to report by one command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, run_module
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
TINY = [
    "--preset=smoke", "--threads=1", "--data.max-train=800", "--data.max-test=200", "--vit.dim=24", "--vit.depth=2",
    "--vit.backbone-epochs=2", "--vit.gate-epochs=1", "--vit.joint-epochs=2", "--sae.latents=48", "--sae.epochs=10",
    "--profiles.steps=10", "--profiles.contexts", '{"footwear": ["Sandal", "Sneaker", "Ankle boot"]}',
]  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize(
    ("kills", "save_every", "delay"), [(5, 0.2, 0.6), (3, 600, 0)], ids=["at random", "after each phase"]
)
def test_a_killed_training_ends_as_one_left_alone(tmp_path: Path, kills: int, save_every: float, delay: float) -> None:
    """Killed up to `delay` seconds after it had saved a state of its own, and started again."""
    flags = [*TINY, "--data.max-train=4000", "--vit.backbone-epochs=3"]
    alone = run_module("training", "vit", *flags, "--out", str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr[-2000:]
    flags += [f"--save-every={save_every}", "--out", str(tmp_path / "killed")]
    draw, saved = random.Random(5), tmp_path / "killed" / "vit.state.safetensors"
    for _ in range(kills):
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        command = [sys.executable, "-m", "training", "vit", *flags]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (saved.exists() and saved.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, delay))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    finished = run_module("training", "vit", *flags)
    assert finished.returncode == 0, finished.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "vit.safetensors") for name in ("alone", "killed"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list((tmp_path / "killed").glob("*.state.*"))


def test_two_processes_measure_as_one(smoke_run: Path, tmp_path: Path) -> None:
    """The preset `smoke`, its batches and targets dealt out to two processes on the CPU (gloo).

    Tolerances: batch statistics of the stem are those of half a batch, and gate noise differs, so this is another draw
    of the same training.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv-backend=c10d"]
    command = [
        sys.executable,
        *launch,
        "-m",
        "training",
        "all",
        "--preset=smoke",
        "--threads=1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = results(smoke_run), results(tmp_path)
    assert two["ungated"]["accuracy"] == pytest.approx(one["ungated"]["accuracy"], abs=0.05)
    assert two["neutral"]["accuracy"] == pytest.approx(one["neutral"]["accuracy"], abs=0.05)
    assert two["neutral"]["head_usage"] == pytest.approx(one["neutral"]["head_usage"], abs=0.12)
    assert [p["name"] for p in two["profiles"]] == [p["name"] for p in one["profiles"]]
    for key in ("recall", "overall_accuracy"):
        assert two["mean_after"][key] == pytest.approx(one["mean_after"][key], abs=0.06)
    assert two["mean_after"]["head_usage"] < two["neutral"]["head_usage"]


def test_one_command_goes_from_data_to_the_report_of_all_seeds(tmp_path: Path) -> None:
    command = ["training.reproduce", "--seeds=2", "--jobs=2", "--out", str(tmp_path), *TINY]
    done = run_module(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "18/18" in done.stdout
    for seed in (0, 1):
        found = results(tmp_path / f"seed-{seed}")
        assert found["seed"] == seed
        assert set(found["controls"]) == {"dense", "direct", "small"}
        assert found["controls"]["dense"]["head_usage"] == 1.0
        assert len(found["last_block"]["profiles"]) == len(found["profiles"]) == 11
        assert len(found["last_block"]["oracle"]["Shirt"]) == 4  # 0 to 3 heads
        assert "footwear" in [profile["name"] for profile in found["profiles"]]
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["seed"] for row in table["seeds"]] == [0, 1]
    page = (tmp_path / "seed-0" / "report.html").read_text()
    assert "Seeds" in page
    again = run_module(*command)
    assert again.returncode == 0
