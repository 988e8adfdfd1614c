"""python -m tests.perf.brownout_sim: what brownout is worth for many servers, simulated.

Servers with the policy of service/brownout.py answer calls of one image. Time is simulated, so 64 servers need one
core. Three policies share the same arrivals: brownout; reject-only, which keeps every budget at 1; and static, which
always spends the same smaller budget. All of them refuse what they expect to answer too late. Loads are multiples of
what the servers can do at budget 1. Prints a table for each number of servers and draws a plot.

Traces:
  poisson  calls at random, at each of the loads
  bursts   0.6, and 3 for 3 of every 20 seconds
  day      rises from 0.4 to 5 times that and falls again, once over the whole time
"""

import argparse
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.brownout import CostModel, Engines, Level, Waiting, full, largest_batch, lowered, needed
from service.client.tables import table

Times = NDArray[np.float64]
LOADS = (0.5, 1.0, 1.5, 2.0, 2.5)


@dataclass(frozen=True)
class Machine:
    """One server, and how its batches really take. The policy has to learn it."""

    engines: int = 2
    max_batch: int = 8
    overhead: float = 0.005
    per_image: float = 0.055
    """Seconds at budget 1 on one engine."""
    noise: float = 0.1
    """Standard deviation of the logarithm of a batch's duration."""

    @property
    def capacity(self) -> float:
        """Images a second at budget 1, in full batches."""
        return self.engines * self.max_batch / (self.overhead + self.max_batch * self.per_image)


@dataclass(frozen=True)
class Policy:
    """What a server does under load. target: seconds; budget, floor: of every call."""

    name: str
    target: float
    budget: float = 1.0
    floor: float = 1.0


@dataclass
class Outcome:
    """What became of the calls."""

    refused: int = 0
    seconds: list[float] = field(default_factory=list)
    """From arrival to answer."""
    budgets: list[float] = field(default_factory=list)
    levels: list[tuple[float, float]] = field(default_factory=list)
    """When a batch started, and its level."""


def serve(arrivals: Times, machine: Machine, policy: Policy, seed: int, permitted: float = 1.0) -> Outcome:
    """One server. arrivals: rising; permitted: the share of the calls that may be lowered."""
    rng = np.random.default_rng(seed)
    floors = np.where(rng.random(len(arrivals)) < permitted, policy.floor, policy.budget).tolist()
    runs = [(work, machine.overhead + machine.per_image * work) for work in (1.0, float(machine.max_batch))]
    model, level, outcome = CostModel(runs), Level(policy.target), Outcome()
    queue: deque[Waiting] = deque()
    ends = [-math.inf] * machine.engines
    running = [0] * machine.engines
    least, now = 0.0, 0.0

    def engines() -> Engines:
        most = largest_batch(model.cost, policy.target, machine.max_batch)
        return Engines(machine.engines, most, sum(max(0.0, end - now) for end in ends))

    def start(engine: int) -> None:
        nonlocal least
        in_play = len(queue) + sum(count for count, end in zip(running, ends, strict=True) if end > now)
        found = engines()
        at = level.raised(needed(queue, model.cost, found, now, policy.target), now)
        outcome.levels.append((now, at))
        size = min(found.max_batch, math.ceil(in_play / machine.engines), len(queue))
        batch = [queue.popleft() for _ in range(size)]
        budgets = [lowered(call.own, call.floor, at) for call in batch]
        least -= sum(call.floor for call in batch)
        seconds = (machine.overhead + machine.per_image * sum(budgets)) * math.exp(rng.normal(0, machine.noise))
        model.ran(sum(budgets), seconds)
        ends[engine], running[engine] = now + seconds, len(batch)
        outcome.seconds += (now + seconds - call.arrived for call in batch)
        outcome.budgets += budgets

    def work_until(time: float) -> None:
        nonlocal now
        while queue and min(ends) <= time:
            engine = ends.index(min(ends))
            now = max(now, ends[engine])
            start(engine)

    for arrived, floor in zip(arrivals.tolist(), floors, strict=True):
        work_until(arrived)
        now = arrived
        if queue and full(len(queue) + 1, least + floor, model.cost, engines(), policy.target):
            outcome.refused += 1
            continue
        least += floor
        queue.append(Waiting(1, arrived, policy.budget, floor))
        work_until(arrived)
    work_until(math.inf)
    return outcome


def poisson(rate: Callable[[Times], Times], most: float, capacity: float, seconds: float, seed: int) -> Times:
    """Random arrivals (thinned, after Lewis and Shedler). rate: of capacity at each time, at most `most`."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, seconds, rng.poisson(most * capacity * seconds)))
    return times[rng.random(len(times)) * most < rate(times)]


def traces(capacity: float, seconds: float, loads: tuple[float, ...], seed: int) -> Iterator[tuple[str, Times]]:
    """Each trace's name and arrivals. capacity: of all servers, images a second."""
    rates: dict[str, tuple[float, Callable[[Times], Times]]] = {
        f"poisson {load:g}": (load, partial(np.full_like, fill_value=load)) for load in loads
    }
    rates["bursts"] = 3.0, lambda t: np.where(t % 20 < 3, 3, 0.6)
    rates["day"] = 2.0, lambda t: 0.4 + 1.6 * np.sin(np.pi * t / seconds) ** 2
    for name, (most, rate) in rates.items():
        yield name, poisson(rate, most, capacity, seconds, seed)


@dataclass(frozen=True)
class Row:
    """One policy on one trace. Shares are of all calls."""

    trace: str
    policy: str
    in_time: float
    refused: float
    budget: float
    """Mean of the answered calls."""
    p99: float

    @classmethod
    def of(cls, trace: str, policy: Policy, outcomes: list[Outcome], target: float) -> "Row":
        """Of all servers together."""
        seconds = np.array([value for outcome in outcomes for value in outcome.seconds])
        budgets = [value for outcome in outcomes for value in outcome.budgets]
        refused = sum(outcome.refused for outcome in outcomes)
        calls = len(seconds) + refused
        return cls(
            trace, policy.name, float((seconds <= target).sum() / calls), refused / calls, float(np.mean(budgets)),
            float(np.quantile(seconds, 0.99)),
        )  # fmt: skip


def compare(servers: int, machine: Machine, options: argparse.Namespace, policies: tuple[Policy, ...]) -> list[Row]:
    """Every policy on every trace. Clients take turns between the servers."""
    rows = []
    for name, arrivals in traces(servers * machine.capacity, options.seconds, tuple(options.loads), options.seed):
        for policy in policies:
            outcomes = [
                serve(arrivals[first::servers], machine, policy, options.seed + first, options.permitted)
                for first in range(servers)
            ]
            rows.append(Row.of(name, policy, outcomes, options.target))
    return rows


def plot(rows: dict[int, list[Row]], file: Path) -> None:
    """One column a number of servers: calls in time above, mean budget below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(rows), figsize=(1 + 4.5 * len(rows), 6), sharey="row", sharex=True, squeeze=False
    )
    for column, (servers, of_servers) in enumerate(rows.items()):
        names = list(dict.fromkeys(row.trace for row in of_servers))
        policies = list(dict.fromkeys(row.policy for row in of_servers))
        for place, policy in enumerate(policies):
            chosen = [row for row in of_servers if row.policy == policy]
            x = np.arange(len(names)) + 0.8 * (place + 0.5) / len(policies) - 0.4
            for axis, values in zip(axes[:, column], ("in_time", "budget"), strict=True):
                axis.bar(x, [getattr(row, values) for row in chosen], 0.8 / len(policies), label=policy)
        axes[0, column].set_title(f"{servers} server{'s' * (servers > 1)}")
        axes[1, column].set_xticks(range(len(names)), names, rotation=45, ha="right")
        for axis in axes[:, column]:
            axis.set_ylim(0, 1.02)
            axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("share of calls in time")
    axes[1, 0].set_ylabel("mean budget of answers")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m tests.perf.brownout_sim", description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 8, 64], help="default: 1 8 64")
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS), help="default: 0.5 1 1.5 2 2.5")
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated, of each trace (default: %(default)g)")
    parser.add_argument("--target", type=float, default=1.0, help="seconds to answer in (default: %(default)g)")
    parser.add_argument("--floor", type=float, default=0.4, help="min_budget of the calls (default: %(default)g)")
    parser.add_argument("--static", type=float, default=0.6, help="budget of the policy static (default: %(default)g)")
    parser.add_argument("--permitted", type=float, default=1.0, help="share of calls with it (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)d")
    parser.add_argument("--plot", type=Path, help="file to draw, such as build/bench/brownout.png")
    for name, of in Machine.__dataclass_fields__.items():
        flag, kind = "--" + name.replace("_", "-"), type(of.default)
        parser.add_argument(flag, type=kind, default=of.default, help="of each server (default: %(default)g)")
    options = parser.parse_args(arguments)
    machine = Machine(**{name: getattr(options, name) for name in Machine.__dataclass_fields__})
    policies = (
        Policy("brownout", options.target, 1.0, options.floor),
        Policy("reject-only", options.target),
        Policy(f"static {options.static:g}", options.target, options.static, options.static),
    )
    rows = {}
    for servers in options.servers:
        rows[servers] = compare(servers, machine, options, policies)
        head = ["trace", "policy", "in time", "refused", "mean budget", "p99 s"]
        shown = [
            [row.trace, row.policy, f"{row.in_time:.4f}", f"{row.refused:.4f}", f"{row.budget:.3f}", f"{row.p99:.2f}"]
            for row in rows[servers]
        ]
        print(
            f"\nservers: {servers}, each {machine.capacity:.1f} images/s at budget 1\n{table(head, shown)}", flush=True
        )
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(rows, options.plot)
        print(f"\n{options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
