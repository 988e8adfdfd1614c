"""python -m tests.perf.brownout_sim: what brownout is worth for many servers, simulated.

Servers with the policy of service/brownout.py answer calls. Time is simulated, so 64 servers need one core. The
policies share the same arrivals: brownout; one level, which is brownout that lowers all calls alike, whatever their
size; reject-only, which keeps every budget at 1; and static, which always spends the same smaller budget. All of them
refuse what they expect to answer too late. Loads are multiples of what the servers can do at budget 1. Prints a table
for each number of servers and draws a plot.

Traces:
  poisson  calls at random, at each of the loads
  bursts   0.6, and 3 for 3 of every 20 seconds
  day      rises from 0.4 to 5 times that and falls again, once over the whole time
  flood    calls of one image at 0.5 (the row `small`), and of --flood images at 3 for 10 of every 20 seconds (`large`)
"""

import argparse
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.brownout import (
    Cost,
    CostModel,
    Engines,
    Levels,
    Waiting,
    Waits,
    largest_batch,
    lowered,
    needed,
    size_of,
)
from service.client.tables import table

Times = NDArray[np.float64]
LOADS = (0.5, 1.0, 1.5, 2.0, 2.5)
ALIKE = 20
"""One size for all calls, where size makes no difference: larger than any call."""


@dataclass(frozen=True)
class Machine:
    """One server, with the true durations of its batches, which the policy has to learn."""

    engines: int = 2
    max_batch: int = 8
    overhead: float = 0.005
    per_image: float = 0.055
    """Seconds at budget 1 on one engine."""
    noise: float = 0.1
    """Standard deviation of the logarithm of a batch's duration."""

    @property
    def cost(self) -> Cost:
        """The true cost of a batch, without the noise."""
        return Cost(self.overhead, self.per_image)

    @property
    def capacity(self) -> float:
        """Images a second at budget 1, in full batches."""
        return self.engines * self.max_batch / self.cost.seconds(self.max_batch)


@dataclass(frozen=True)
class Policy:
    """The policy of a server under load. target: seconds; budget, floor: of every call."""

    name: str
    target: float
    budget: float = 1.0
    floor: float = 1.0
    by_size: bool = True
    """Whether calls of each size have a level of their own."""


@dataclass(frozen=True)
class Outcome:
    """The results of the calls, in the order of their arrival."""

    seconds: Times
    """From arrival to the answer of the last image; NaN: refused."""
    budgets: Times
    levels: list[tuple[float, float]]
    """When a batch started, and the level of the calls that are lowered most."""

    @property
    def refused(self) -> int:
        """Number of refused calls."""
        return int(np.isnan(self.seconds).sum())


class Server:
    """One server, call after call. `now` is the time of what happens."""

    def __init__(self, machine: Machine, policy: Policy, outcome: Outcome, arrivals: Times, rng: np.random.Generator):
        runs = [(work, machine.cost.seconds(work)) for work in (1.0, float(machine.max_batch))]
        self.machine, self.policy, self.outcome, self.arrivals, self.rng = machine, policy, outcome, arrivals, rng
        self.model, self.levels, self.waits = CostModel(runs), Levels(policy.target), Waits()
        self.queue: deque[tuple[int, Waiting]] = deque()
        """The number of each waiting call, and what is left of it."""
        self.left: dict[int, int] = {}
        """Images of a call that have not started."""
        self.ends = [-math.inf] * machine.engines
        self.running = [0] * machine.engines
        self.now = 0.0

    def arrive(self, number: int, call: Waiting) -> None:
        """A call, which may be refused."""
        self.work_until(call.arrived)
        self.now = call.arrived
        if self.queue and self.waits.full(call, self._level, self.model.cost, self._engines(), self.policy.target):
            return
        self.left[number] = call.images
        self._wait(number, call)
        self.work_until(call.arrived)

    def work_until(self, time: float) -> None:
        while self.queue and min(self.ends) <= time:
            engine = self.ends.index(min(self.ends))
            self.now = max(self.now, self.ends[engine])
            self._start(engine)

    def _engines(self) -> Engines:
        most = largest_batch(self.model.cost, self.policy.target, self.machine.max_batch)
        return Engines(self.machine.engines, most, sum(max(0.0, end - self.now) for end in self.ends))

    def _level(self, size: int) -> float:
        return self.levels.at(size, self.now)

    def _wait(self, number: int, call: Waiting) -> None:
        self.waits.count(call.size, 1, call.images, call.own, call.floor)
        self.queue.append((number, call))

    def _take(self, most: int) -> Iterator[tuple[int, int]]:
        """The calls of a batch, and how many images of each are in it. As service/calls.py does."""
        room, budgets = most, self.outcome.budgets
        while self.queue and (part := min(self.queue[0][1].images, most)) <= room:
            number, call = self.queue.popleft()
            self.waits.count(call.size, -1, -call.images, call.own, call.floor)
            if not call.turns:
                budgets[number] = lowered(call.own, call.floor, self._level(call.size))
            room -= part
            if call.images > part:
                own = float(budgets[number])
                self._wait(number, call._replace(images=call.images - part, own=own, floor=own, turns=call.turns + 1))
            yield number, part

    def _start(self, engine: int) -> None:
        """Start a batch."""
        waiting, now = [call for _, call in self.queue], self.now
        in_play = sum(call.images for call in waiting)
        in_play += sum(size for size, end in zip(self.running, self.ends, strict=True) if end > now)
        engines = self._engines()
        own = self.levels.lowered(now)
        self.levels.raised(needed(waiting, self.model.cost, engines, now, self.policy.target, own), now)
        self.outcome.levels.append((now, self.levels.highest(now)))
        batch = list(self._take(min(engines.max_batch, math.ceil(in_play / self.machine.engines))))
        work = sum(part * float(self.outcome.budgets[number]) for number, part in batch)
        seconds = self.machine.cost.seconds(work) * math.exp(self.rng.normal(0, self.machine.noise))
        self.model.ran(work, seconds)
        self.ends[engine], self.running[engine] = now + seconds, sum(part for _, part in batch)
        for number, part in batch:
            self.left[number] -= part
            if not self.left[number]:
                self.outcome.seconds[number] = now + seconds - self.arrivals[number]


def serve(
    arrivals: Times,
    machine: Machine,
    policy: Policy,
    seed: int,
    permitted: float = 1.0,
    images: NDArray[np.int64] | None = None,
) -> Outcome:
    """One server. arrivals: rising; permitted: the share of the calls that may be lowered; images: of each call (1)."""
    rng = np.random.default_rng(seed)
    floors = np.where(rng.random(len(arrivals)) < permitted, policy.floor, policy.budget).tolist()
    counts = [1] * len(arrivals) if images is None else images.tolist()
    outcome = Outcome(np.full(len(arrivals), math.nan), np.full(len(arrivals), policy.budget), [])
    server = Server(machine, policy, outcome, arrivals, rng)
    for number, (arrived, floor, count) in enumerate(zip(arrivals.tolist(), floors, counts, strict=True)):
        size = size_of(count) if policy.by_size else ALIKE
        server.arrive(number, Waiting(count, arrived, policy.budget, floor, size=size))
    server.work_until(math.inf)
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


def flood(capacity: float, seconds: float, large: int, seed: int) -> tuple[Times, NDArray[np.int64]]:
    """The arrivals of the trace `flood`, and the images of each call."""
    rng = np.random.default_rng(seed)
    small = poisson(lambda t: np.full_like(t, 0.5), 0.5, capacity, seconds, seed)
    many = poisson(lambda t: np.where(t % 20 < 10, 3.0, 0.0), 3.0, capacity / large, seconds, seed + 1)
    arrivals = np.concatenate([small, many])
    images = np.repeat(np.array([1, large]), [len(small), len(many)])
    order = rng.permutation(len(arrivals))  # so that each server gets some of both
    order = order[arrivals[order].argsort(kind="stable")]
    return arrivals[order], images[order]


@dataclass(frozen=True)
class Row:
    """One policy on one trace, or on some of its calls. Shares are of all those calls."""

    trace: str
    policy: str
    in_time: float
    refused: float
    budget: float
    """Mean budget of the answered calls."""
    p99: float

    @classmethod
    def of(cls, trace: str, policy: Policy, seconds: Times, budgets: Times, turns: int = 1) -> "Row":
        """seconds, budgets: as in Outcome; turns: of each call, which has the target for each."""
        answered = seconds[~np.isnan(seconds)]
        return cls(
            trace, policy.name, float((answered <= turns * policy.target).sum() / len(seconds)),
            1 - len(answered) / len(seconds), float(budgets[~np.isnan(seconds)].mean()),
            float(np.quantile(answered, 0.99)),
        )  # fmt: skip


def compare(servers: int, machine: Machine, options: argparse.Namespace, policies: tuple[Policy, ...]) -> list[Row]:
    """Every policy on every trace. Clients take turns between the servers."""
    rows = []
    capacity = servers * machine.capacity
    every = [
        (name, arrivals, np.ones(len(arrivals), np.int64))
        for name, arrivals in traces(capacity, options.seconds, tuple(options.loads), options.seed)
    ]
    every.append(("flood", *flood(capacity, options.seconds, options.flood, options.seed)))
    for name, arrivals, images in every:
        for policy in policies:
            if policy.name == "one level" and name != "flood":
                continue  # the same as brownout
            seconds, budgets = np.empty(len(arrivals)), np.empty(len(arrivals))
            for first in range(servers):
                own = slice(first, None, servers)
                outcome = serve(arrivals[own], machine, policy, options.seed + first, options.permitted, images[own])
                seconds[own], budgets[own] = outcome.seconds, outcome.budgets
            if name != "flood":
                rows.append(Row.of(name, policy, seconds, budgets))
                continue
            turns = math.ceil(options.flood / largest_batch(machine.cost, policy.target, machine.max_batch))
            for which, of, of_each in (("small", images == 1, 1), ("large", images > 1, turns)):
                rows.append(Row.of(f"{name} {which}", policy, seconds[of], budgets[of], of_each))
    return rows


def plot(rows: dict[int, list[Row]], file: Path) -> None:
    """One column per number of servers: calls in time above, mean budget below."""
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
            x = x[[names.index(row.trace) for row in chosen]]
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
    parser.add_argument("--flood", type=int, default=8, help="images of a large call (default: %(default)d)")
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
        Policy("one level", options.target, 1.0, options.floor, by_size=False),
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
