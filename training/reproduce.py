"""python -m training.reproduce --preset fashion-mnist --out runs/fm --seeds 3

Runs everything from data to report: each seed in <out>/seed-<n>, with all its controls and a report that compares it
with the other seeds. Interrupted steps resume; finished ones take seconds.

The jobs are independent processes of one or more threads; `--jobs` sets how many run at a time. On a CPU, two trainings
of one thread each are faster than one after the other with two threads (NOTES.md).
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

from pydantic import ValidationError

from training.__main__ import parse, show
from training.config import DENSE
from training.terminal import HelpFormatter

CONTROLS: dict[bool, dict[str, tuple[str, ...]]] = {
    False: {"dense": (), "direct": ("vit",), "last-block": ("vit",), "small": ()},
    True: {
        "dense": (), "plain-100": ("dense",), "plain-75": ("dense",), "plain-55": ("dense",), "plain-40": ("dense",),
        "static": ("vit",), "heads": ("vit",),
    },
}  # fmt: skip
"""Controls of a model without and with a dial (evaluation/controls.py), with the jobs that must finish before each."""


def order_of(dial: bool, taught: bool = False) -> dict[str, tuple[str, ...]]:
    """The jobs of one seed, with those that must finish before each. The longest chain comes first.

    taught: the model is distilled from the control `dense`.
    """
    controls = CONTROLS[dial]
    return {
        "vit": ("dense",) if taught else (),
        "dense": (),
        "sae": ("vit",),
        "profiles": ("sae",),
        **controls,
        "evaluate": ("profiles", *controls),
        "report": ("evaluate",),
    }


@dataclass(frozen=True)
class Job:
    """One step or control of one seed."""

    seed: int
    name: str

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.name}"


class JobFailed(Exception):
    """A job ended with an exit status other than 0. The message names the jobs that depend on it."""

    def __init__(self, job: Job, code: int, blocked: Collection[Job]):
        super().__init__(f"{job}: exit {code}" + (f". Blocked: {'; '.join(map(str, blocked))}" if blocked else ""))
        self.job, self.code, self.blocked = job, code, blocked


def jobs_of(seeds: int, dial: bool = False, taught: bool = False) -> dict[Job, list[Job]]:
    """All jobs, with those that must finish before each. A report shows all seeds, so it waits for all of them."""
    order = order_of(dial, taught)
    return {
        Job(seed, name): [
            Job(other, before) for before in order[name] for other in range(seeds) if other == seed or name == "report"
        ]
        for seed in range(seeds)
        for name in order
    }


async def run_jobs(jobs: Mapping[Job, Collection[Job]], run: Callable[[Job], Awaitable[int]], limit: int) -> None:
    """Run each job after its dependencies, `limit` at a time, in the order of `jobs`.

    run: returns the exit status of a job. If it is not 0, cancels the running jobs and raises JobFailed.
    """
    order, sorter = list(jobs), TopologicalSorter(jobs)
    sorter.prepare()
    ready: list[Job] = []
    running: dict[asyncio.Future[int], Job] = {}
    try:
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=order.index)
            while ready and len(running) < limit:
                job = ready.pop(0)
                running[asyncio.ensure_future(run(job))] = job
            ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                job = running.pop(task)
                if code := task.result():
                    raise JobFailed(job, code, _after(job, jobs))
                sorter.done(job)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _after(job: Job, jobs: Mapping[Job, Collection[Job]]) -> list[Job]:
    """The jobs that depend on this one, directly or indirectly."""
    blocked = {job}
    for other in TopologicalSorter(jobs).static_order():
        if not blocked.isdisjoint(jobs[other]):
            blocked.add(other)
    return [other for other in jobs if other in blocked and other != job]


@dataclass
class Processes:
    """Runs jobs as processes, each with its own log, and prints their progress."""

    options: argparse.Namespace
    flags: list[str]
    """Flags of python -m training, for every job."""
    threads: int
    """Threads of a job."""
    total: int
    ended: int = 0
    begun: float = field(default_factory=time.monotonic)

    async def run(self, job: Job) -> int:
        """Run a job and return its exit status. If cancelled, terminate the process."""
        log, started = self.log(job), time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            command = [sys.executable, "-m", "training", *self.arguments(job)]
            process = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=asyncio.subprocess.STDOUT)
        print(f"{job}: started, progress in {log}", flush=True)
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        if code == 0:
            self.ended += 1
            now = time.monotonic()
            print(f"[{_clock(now - self.begun)}] {self.ended}/{self.total} {job}: {_clock(now - started)}", flush=True)
        return code

    def arguments(self, job: Job) -> list[str]:
        """The arguments of python -m training for a job."""
        options, out = self.options, self.options.out
        step = ["controls", "--only", job.name] if job.name in {**CONTROLS[False], **CONTROLS[True]} else [job.name]
        if job.name == "report":
            others = (seed for seed in range(options.seeds) if seed != job.seed)
            step += [argument for seed in others for argument in ("--others", f"{out / f'seed-{seed}'}")]
        step += ["--preset", options.preset, "--out", f"{out / f'seed-{job.seed}'}"]
        return [*step, "--seed", f"{job.seed}", "--threads", f"{self.threads}", *self.flags]

    def log(self, job: Job) -> Path:
        """The file with the output of a job."""
        folder: Path = self.options.out / "logs"
        return folder / f"seed-{job.seed}-{job.name}.log"


def parser(prog: str = "python -m training.reproduce") -> argparse.ArgumentParser:
    """The parser of the flags that are not passed on to the jobs. prog: the command that a user types."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --out FOLDER [OPTION ...] [--GROUP.SETTING VALUE ...]",
        description=__doc__.split("\n\n")[1],
        epilog="Other flags are settings of every job: `steervit train --help` lists them.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FOLDER", required=True, help="folder of the runs")
    add("--seeds", type=int, metavar="N", default=1, help="number of seeds, from 0 on (default: %(default)s)")
    add("--preset", metavar="NAME", default="fashion-mnist", help="as for `steervit train` (default: %(default)s)")
    add("--jobs", type=int, metavar="N", help="processes at a time (default: one for each core)")
    return parser


def main(arguments: list[str], prog: str = "python -m training.reproduce") -> int:
    """Run all jobs, then write and print the table of the seeds. Returns the exit status: 0, 1 when a job fails, or 2
    when a setting is invalid.

    arguments: without the program's name, which is prog; flags of settings are passed on to the jobs. A failed job ends
    the others.
    """
    flags_of_all = parser(prog)
    options, flags = flags_of_all.parse_known_args(arguments)
    cores = len(os.sched_getaffinity(0))
    options.jobs = cores if options.jobs is None else options.jobs
    if options.seeds < 1 or options.jobs < 1:
        flags_of_all.error(f"--seeds is {options.seeds}, --jobs {options.jobs}; allowed: 1 or more")
    if any(flag.partition("=")[0] == "--seed" for flag in flags):
        flags_of_all.error("--seed is not a flag here; allowed: --seeds, the number of seeds from 0 on")
    try:
        vit = parse(["--preset", options.preset, "--out", f"{options.out}", *flags], prog).vit
    except ValidationError as error:
        show(error)
        return 2
    jobs = jobs_of(options.seeds, vit.dial, vit.teacher == DENSE)
    processes = Processes(options, flags, max(1, cores // options.jobs), len(jobs))
    try:
        asyncio.run(run_jobs(jobs, processes.run, options.jobs))
    except JobFailed as failure:
        log = processes.log(failure.job)
        lines = log.read_text().replace("\r", "\n").split("\n")[-12:]
        print(f"{failure}. Its last lines ({log}):", *lines, sep="\n", file=sys.stderr)
        return 1
    _report(options.out, options.seeds)
    return 0


def _report(out: Path, seeds: int) -> None:
    """Write the table of the seeds, and print its main columns."""
    from training.checkpoint import Run  # imports torch: only when needed
    from training.evaluation.seeds import table

    of_seeds = table([Run(out / f"seed-{seed}") for seed in range(seeds)])
    Run(out).write_json("table.json", of_seeds)
    shown = ("usage", "recall_change", "precision_change", "overall_change")
    for row in [*of_seeds["seeds"], {"seed": "mean", **of_seeds["mean"]}]:
        print(f"seed {row['seed']}: " + ", ".join(f"{key.replace('_', ' ')} {row[key]:+.4f}" for key in shown))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
