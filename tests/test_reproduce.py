"""Long runs: killed at any moment, split between two processes, and from data to report by one command."""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, run_main, until
from safetensors.torch import load_file

from training import reproduce
from training.__main__ import main, parse
from training.reproduce import Job, JobFailed, Processes, jobs_of, order_of, run_jobs

TINY = [
    "--preset=smoke", "--threads=1", "--data.max-train=600", "--data.max-test=200", "--vit.dim=24", "--vit.depth=2",
    "--vit.batch-size=32", "--vit.learning-rate=4e-3", "--vit.joint-learning-rate=2e-3",
    "--vit.gate-learning-rate=2e-2", "--vit.usage-weight=10", "--vit.ema-decay=0.9", "--vit.backbone-epochs=4",
    "--vit.joint-epochs=3", "--sae.latents=48", "--sae.epochs=10", "--profiles.steps=10", "--profiles.contexts",
    '{"footwear": ["Sandal", "Sneaker", "Ankle boot"]}',
]  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("limit", [1, 3])
def test_jobs_run_after_their_dependencies_within_the_limit_of_processes(limit: int) -> None:
    jobs, most = jobs_of(2), 0
    started: list[Job] = []
    ended: list[Job] = []

    async def run(job: Job) -> int:
        nonlocal most
        assert set(jobs[job]) <= set(ended)
        started.append(job)
        most = max(most, len(started) - len(ended))
        for _ in range(1 + len(started) % 3):
            await asyncio.sleep(0)
        ended.append(job)
        return 0

    asyncio.run(run_jobs(jobs, run, limit))
    assert sorted(map(str, ended)) == sorted(map(str, jobs))
    assert most == limit
    if limit == 1:  # the first seed is ready first; reports wait for both
        steps = [Job(seed, name) for seed in (0, 1) for name in order_of(False) if name != "report"]
        assert started == [*steps, Job(0, "report"), Job(1, "report")]


def test_a_model_is_trained_after_its_teacher() -> None:
    vit, dense = Job(0, "vit"), Job(0, "dense")
    assert jobs_of(1, dial=True)[vit] == []
    taught = jobs_of(1, dial=True, taught=True)
    assert (taught[vit], taught[dense]) == ([dense], [])
    assert taught[Job(0, "plain-100")] == [dense]


def test_a_failed_job_ends_the_others_and_names_the_waiting_ones() -> None:
    started: list[Job] = []
    cancelled: list[Job] = []

    async def run(job: Job) -> int:
        started.append(job)
        if job == Job(0, "sae"):
            return 3
        try:
            await asyncio.sleep(0 if job == Job(0, "vit") else 600)
        except asyncio.CancelledError:
            cancelled.append(job)
            raise
        return 0

    with pytest.raises(JobFailed) as caught:
        asyncio.run(run_jobs(jobs_of(2), run, 2))
    blocked = "seed 0, profiles; seed 0, evaluate; seed 0, report; seed 1, report"
    assert str(caught.value) == f"seed 0, sae: exit 3. Blocked: {blocked}"
    assert started == [Job(0, "vit"), Job(0, "dense"), Job(0, "sae")]
    assert cancelled == [Job(0, "dense")]


def test_each_job_is_a_step_of_its_seed_with_the_flags_given(tmp_path: Path) -> None:
    options = argparse.Namespace(preset="smoke", out=tmp_path, seeds=3)
    processes = Processes(options, ["--sae.latents=48"], threads=2, total=27)
    for job in jobs_of(3):
        settings = parse(processes.arguments(job))
        control = job.name in ("dense", "direct", "last-block", "small")
        assert (settings.step, settings.only) == (("controls", (job.name,)) if control else (job.name, ()))
        assert (settings.preset, settings.seed, settings.threads) == ("smoke", job.seed, 2)
        assert (settings.out, settings.sae.latents) == (tmp_path / f"seed-{job.seed}", 48)
        others = [tmp_path / f"seed-{seed}" for seed in range(3) if seed != job.seed]
        assert list(settings.others) == (others if job.name == "report" else [])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], jobs_of(1, dial=True, taught=True)),
        (["--vit.teacher=none"], jobs_of(1, dial=True)),
        (["--no-vit.dial", "--vit.teacher", "none", "--vit.mlp-groups", "0"], jobs_of(1)),
        (["--preset", "smoke"], jobs_of(1)),
        (["--preset", "smoke", "--vit.dial"], jobs_of(1, dial=True)),
    ],
)
def test_the_controls_are_those_of_the_settings(
    flags: list[str], expected: dict[Job, list[Job]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(jobs: dict[Job, list[Job]], *_: Any) -> None:
        assert jobs == expected
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "seed-0-vit.log").touch()
        raise JobFailed(Job(0, "vit"), 1, ())

    monkeypatch.setattr(reproduce, "run_jobs", fail)
    assert reproduce.main(["--out", str(tmp_path), *flags]) == 1


def test_invalid_settings_are_named_before_any_job(tmp_path: Path) -> None:
    for flag, message in (
        ("--vit.depth=1", "--vit.depth is '1': Input should be greater than or equal to 2"),
        ("--vit.nonsense", "error: unrecognized arguments: --vit.nonsense"),
    ):
        done = run_main(reproduce.main, "--out", str(tmp_path / "runs"), flag)
        assert (done.returncode, message in done.stderr) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Restore the number of threads, which steps in this process set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_here(out: Path, *names: str) -> None:
    """Run the jobs of one seed, or the named ones, in this process: importing torch for each would take longer."""
    processes = Processes(argparse.Namespace(preset="smoke", out=out, seeds=1), TINY, threads=1, total=9)

    async def run(job: Job) -> int:
        return main(processes.arguments(job))

    chosen = {job: before for job, before in jobs_of(1).items() if job.name in (names or order_of(False))}
    asyncio.run(run_jobs(chosen, run, 1))


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one seed, with all its controls."""
    out = tmp_path_factory.mktemp("reproduced")
    run_here(out)
    return out / "seed-0"


@pytest.mark.slow
def test_the_jobs_of_a_seed_go_from_data_to_the_report(reproduced: Path) -> None:
    results = read(reproduced / "results.json")
    assert results["seed"] == 0
    assert set(results["controls"]) == {"dense", "direct", "small"}
    assert results["controls"]["dense"]["head_usage"] == 1.0
    assert len(results["last_block"]["profiles"]) == len(results["profiles"]) == 11
    assert len(results["last_block"]["oracle"]["Shirt"]) == 4  # 0 to 3 heads
    assert "footwear" in [profile["name"] for profile in results["profiles"]]
    assert (reproduced / "report.html").is_file()


STAND_IN = """
import json
import pathlib
import shutil
import sys

print("started")
with open("started.txt", "a") as file:
    file.write("|".join(sys.argv[1:]) + chr(10))
if sys.argv[1] == "evaluate":
    out, seed = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--out", "--seed"))
    shutil.copytree("reproduced", out, dirs_exist_ok=True)
    results = pathlib.Path(out, "results.json")
    results.write_text(json.dumps({**json.loads(results.read_text()), "seed": int(seed)}))
"""


@pytest.mark.slow
def test_one_command_runs_every_job_in_a_process_and_writes_the_table(
    reproduced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes find another `training` in the working directory, which records how it was started."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__main__.py").write_text(STAND_IN)
    (tmp_path / "reproduced").symlink_to(reproduced)
    monkeypatch.chdir(tmp_path)
    done = run_main(reproduce.main, "--seeds=2", "--jobs=2", "--out", "run", *TINY)
    assert done.returncode == 0, done.stderr
    assert "] 18/18 seed " in done.stdout
    assert "seed mean: " in done.stdout
    options = argparse.Namespace(preset="smoke", out=Path("run"), seeds=2)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    processes = Processes(options, TINY[1:], threads, total=18)  # without --preset, which is in the options
    expected = {"|".join(processes.arguments(job)): job for job in jobs_of(2)}
    started = [expected[line] for line in (tmp_path / "started.txt").read_text().splitlines()]
    assert sorted(map(str, started)) == sorted(map(str, jobs_of(2)))
    assert all(started.index(before) < started.index(job) for job, of in jobs_of(2).items() for before in of)
    assert all(processes.log(job).read_text() == "started\n" for job in started)
    assert len(read(tmp_path / "run" / "table.json")["seeds"]) == 2


@pytest.mark.slow
def test_what_is_finished_is_not_made_again(reproduced: Path) -> None:
    def stages() -> dict[Path, int]:
        paths = [path for path in reproduced.rglob("*") if path.suffix in (".safetensors", ".json")]
        evaluated = ("results.json", "changes.safetensors", "differences.safetensors")  # of the last step
        return {path: path.stat().st_mtime_ns for path in paths if path.name not in evaluated}

    before = stages()
    assert {path.name for path in before} >= {"vit.safetensors", "sae.json", "profiles.stage.json"}
    assert max(before.values()) < (reproduced / "results.json").stat().st_mtime_ns, "evaluate leaves them alone"
    run_here(reproduced.parent, *(name for name in order_of(False) if name not in ("evaluate", "report")))
    assert stages() == before


@pytest.mark.slow
def test_a_failed_command_shows_the_last_lines_of_the_job(tmp_path: Path) -> None:
    done = run_main(reproduce.main, "--jobs=1", "--out", str(tmp_path), "--preset=smoke", "--vit.dim=50")
    assert done.returncode == 1
    assert "seed 0, vit: exit 1. Blocked: seed 0, sae; " in done.stderr
    assert f"Its last lines ({tmp_path / 'logs' / 'seed-0-vit.log'}):" in done.stderr
    assert "vit.dim is 50 with 3 heads; allowed: a multiple of 12" in done.stderr


EACH_IN_A_FORK = """
import os
import sys
import training.steps  # once, before the forks: it imports torch
from training.__main__ import main

for _ in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        os._exit(main(sys.argv[1:]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_killed_training_ends_as_one_left_alone(reproduced: Path, tmp_path: Path) -> None:
    """Killed twice, each time at a random moment after it saved a state, and restarted."""
    flags = ["vit", *TINY, "--save-every=0.1", "--out", str(tmp_path)]
    draw, saved = random.Random(5), tmp_path / "vit.state.safetensors"
    before = 0
    with subprocess.Popen(
        [sys.executable, "-c", EACH_IN_A_FORK, *flags],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as program:  # fmt: skip
        assert program.stdin
        assert program.stdout
        for _ in range(2):
            print("train", file=program.stdin, flush=True)
            child = int(program.stdout.readline())
            until(lambda before=before: saved.exists() and saved.stat().st_mtime_ns > before)
            time.sleep(draw.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            assert program.stdout.readline() == f"{-signal.SIGKILL}\n", "it ended before it was killed"
            before = saved.stat().st_mtime_ns
        program.stdin.close()
    assert main(flags) == 0
    one, two = (load_file(folder / "vit.safetensors") for folder in (reproduced, tmp_path))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list(tmp_path.glob("*.state.*"))


IN_EACH_PROCESS = """
import copy
import sys
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training import processes
from training.__main__ import main, parse
from training.data.splits import load
from training.data.streams import Batch
from training.vit.fit import build
from training.vit.phases import phases_of, train_step


def work():
    settings = parse(["vit", *sys.argv[1:], "--no-bf16"])
    data, rank = load(settings.data, settings.seed), processes.state().process_index
    assert processes.state().num_processes == 2
    torch.manual_seed(0)
    model = build(settings.vit, data.spec, len(data.labels)).eval()
    model.gates.requires_grad_(False)
    gradients = []
    for network, share in ((copy.deepcopy(model), slice(None)), (processes.parallel(model), slice(rank, None, 2))):
        batch = Batch(data.train.images[:40][share], data.train.classes[:40][share])
        loss, _ = train_step(network, None, phases_of(settings.vit)[0], settings, batch, 0.0)
        loss.backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    for whole, shared in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-5)
    for step in ("vit", "sae", "profiles", "evaluate"):
        assert main([step, *sys.argv[1:]]) == 0


if __name__ == "__main__":
    launch = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "two", "start_method": "fork"}
    elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **launch), work)()
"""


def same_profiles(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same terms, but for rounding: some CPUs sum the products of matrices of other shapes in another order."""
    assert len(one["profiles"]) == len(other["profiles"]) > 0
    for profile, same in zip(one["profiles"], other["profiles"], strict=True):
        assert {**profile, "terms": {}} == {**same, "terms": {}}
        assert profile["terms"].keys() == same["terms"].keys()
        for site, terms in profile["terms"].items():
            for term, again in zip(terms, same["terms"][site], strict=True):
                assert term == pytest.approx(again, abs=2e-3), profile["name"]


@pytest.mark.slow
def test_two_processes_measure_as_one(reproduced: Path, tmp_path: Path) -> None:
    """On the CPU (gloo): gradients of a batch, and profiles of the same network, are those of one process. Started as
    by torchrun, except that they share one import of torch.

    The network itself is another draw of the same training: its stem has the batch statistics of half a batch, and gate
    noise differs.
    """
    program, out, alone = tmp_path / "program.py", tmp_path / "two", tmp_path / "one"
    program.write_text(IN_EACH_PROCESS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), *TINY, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    alone.mkdir()
    for name in ("vit.json", "vit.safetensors", "sae.json", "sae.safetensors"):
        shutil.copy(out / name, alone)
    for step in ("profiles", "evaluate"):
        assert main([step, *TINY, "--out", str(alone)]) == 0
    same_profiles(read(out / "profiles.json"), read(alone / "profiles.json"))
    one, two = read(reproduced / "results.json"), read(out / "results.json")
    for entry, other in zip(two["profiles"], read(alone / "results.json")["profiles"], strict=True):
        assert entry["before"] == other["before"]
        assert entry["after"] == pytest.approx(other["after"], abs=0.06), entry["name"]
    assert two["ungated"]["accuracy"] == pytest.approx(one["ungated"]["accuracy"], abs=0.1)
    assert two["neutral"]["head_usage"] == pytest.approx(one["neutral"]["head_usage"], abs=0.25)
    assert two["mean_after"]["head_usage"] < two["neutral"]["head_usage"]
