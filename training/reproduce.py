"""python -m training.reproduce --preset fashion-mnist --out runs/fm --seeds 3

Everything from data to report: the run of each seed in <out>/seed-<n>, with all its controls and a report that has the
other seeds beside it. Every step is taken up where it was interrupted; a finished one costs seconds.

The jobs are independent processes of one or more threads, as many at a time as `--jobs` says: on a CPU, two trainings
of one thread each get further than one after the other with two threads (NOTES.md).
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from training.checkpoint import Run
from training.evaluation.seeds import table

ORDER: dict[str, tuple[str, ...]] = {
    "vit": (),
    "dense": (),
    "sae": ("vit",),
    "profiles": ("sae",),
    "direct": ("vit",),
    "last-block": ("vit",),
    "small": (),
    "evaluate": ("profiles", "dense", "direct", "last-block", "small"),
    "report": ("evaluate",),
}
"""The jobs of one seed, and those that must be over before each. The longest chain comes first."""
CONTROLS = ("dense", "direct", "last-block", "small")


@dataclass
class Job:
    """One step or control of one seed, run as a process."""

    seed: int
    name: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float | None = None
    """None: not over yet."""

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.name}"


def main(arguments: list[str]) -> int:
    """Run all jobs, then write and print the table of the seeds; returns the exit status: 0, or 1 when a job fails.

    arguments: those after the program's name; unknown flags are passed on to the jobs. A failed job ends the others.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.reproduce", description=__doc__.split("\n\n")[1], allow_abbrev=False
    )
    parser.add_argument("--preset", default="fashion-mnist", help="as of python -m training (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on (default: %(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="processes at a time (default: %(default)s, the cores)")
    options, flags = parser.parse_known_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"--seeds is {options.seeds}, --jobs {options.jobs}; allowed: 1 or more")
    if any(flag.partition("=")[0] == "--seed" for flag in flags):
        parser.error("--seed is not a flag here; allowed: --seeds, how many from 0 on")
    jobs = [Job(seed, name) for seed in range(options.seeds) for name in ORDER]
    threads = max(1, cores // options.jobs)
    begun = time.monotonic()
    try:
        while any(job.seconds is None for job in jobs):
            running = [job for job in jobs if job.process and job.seconds is None]
            for job in jobs:
                if job.process is None and len(running) < options.jobs and _ready(job, jobs):
                    _start(job, options, flags, threads)
                    running.append(job)
            time.sleep(0.5)
            for job in running:
                assert job.process is not None
                code = job.process.poll()
                if code is None:
                    continue
                job.seconds = time.monotonic() - job.started
                if code != 0:
                    print(f"{job}: exit {code}. Its last lines ({_log(job, options)}):", file=sys.stderr)
                    print(
                        "\n".join(_log(job, options).read_text().replace("\r", "\n").split("\n")[-12:]), file=sys.stderr
                    )
                    return 1
                done = sum(other.seconds is not None for other in jobs)
                print(
                    f"[{_clock(time.monotonic() - begun)}] {done}/{len(jobs)} {job}: {_clock(job.seconds)}", flush=True
                )
    finally:
        for job in jobs:
            if job.process and job.process.poll() is None:
                job.process.terminate()
                job.process.wait()
    found = table([Run(options.out / f"seed-{seed}") for seed in range(options.seeds)])
    Run(options.out).write_json("table.json", found)
    shown = ("usage", "recall_change", "precision_change", "overall_change")
    for row in [*found["seeds"], {"seed": "mean", **found["mean"]}]:
        print(f"seed {row['seed']}: " + ", ".join(f"{key.replace('_', ' ')} {row[key]:+.4f}" for key in shown))
    return 0


def _ready(job: Job, jobs: list[Job]) -> bool:
    """A report shows all seeds, so it waits for the evaluation of each."""
    return all(
        other.seconds is not None
        for other in jobs
        if other.name in ORDER[job.name] and (other.seed == job.seed or job.name == "report")
    )


def _start(job: Job, options: argparse.Namespace, flags: list[str], threads: int) -> None:
    step = ["controls", "--only", job.name] if job.name in CONTROLS else [job.name]
    out = options.out / f"seed-{job.seed}"
    if job.name == "report":
        others = [str(options.out / f"seed-{seed}") for seed in range(options.seeds) if seed != job.seed]
        step += [f for other in others for f in ("--others", other)]
    command = [sys.executable, "-m", "training", *step, "--preset", options.preset, "--out", str(out)]
    command += ["--seed", str(job.seed), "--threads", str(threads), *flags]
    log = _log(job, options)
    log.parent.mkdir(parents=True, exist_ok=True)
    job.started = time.monotonic()
    with log.open("wb") as file:
        job.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    print(f"{job}: started, progress in {log}", flush=True)


def _log(job: Job, options: argparse.Namespace) -> Path:
    folder: Path = options.out / "logs"
    return folder / f"seed-{job.seed}-{job.name}.log"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
