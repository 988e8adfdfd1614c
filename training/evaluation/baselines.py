"""What a sceptic would try instead of a steering profile, at the same unit usage (head usage if only heads are gated).

Baselines that run the network return a `Rival`: its steering and the decisions of its gates. The others are computed
from existing answers.

Letters: B images, G gated blocks, U units (heads, then MLP groups), S sites, D width.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.splits import Split
from training.model.gated_vit import Decide, GatedNetwork, Steer, keep_positive
from training.model.inference import Outcome, answers
from training.model.macs import Macs


@dataclass(frozen=True)
class Rival:
    """A way to run the network: the inputs of its gates, and their decisions. The default is no steering."""

    steer: Steer | None = None
    decide: Decide = keep_positive


def threshold_shift(model: GatedNetwork, macs: Macs, own: Split, usage: float) -> Rival:
    """One threshold t for all gates: a unit is open when its logit is above t. Bisection finds t for `usage` on
    `own`."""

    def above(t: float) -> Decide:
        return lambda _, logit: (logit > t).to(logit.dtype)

    t = bisect(lambda t: answers(model, own, decide=above(t)).usage(macs), usage, -4.0, 4.0)
    return Rival(decide=above(t))


def residual_direction(model: GatedNetwork, macs: Macs, own: Split, usage: float, difference: Tensor) -> Rival:
    """Adds a multiple of the difference of means (S, D), own minus all, to the input of each gate. Bisection finds the
    factor for `usage`.

    The factor may be negative: the direction that comes nearer to `usage` is used.
    """

    def added(factor: float) -> Steer:
        return lambda site, residual: residual + factor * difference[site].to(residual.device)

    def used(factor: float) -> float:
        return answers(model, own, added(factor)).usage(macs)

    factors = [bisect(used, usage, 0.0, end) for end in (8.0, -8.0)]
    return Rival(steer=added(min(factors, key=lambda factor: abs(used(factor) - usage))))


def matched(
    model: GatedNetwork, macs: Macs, own: Split, usage: float, at: Callable[[float], Rival], rounds: int = 8
) -> Rival:
    """A learned rival, scaled by the factor (0 to 2, by bisection) at which it has `usage` on `own`."""

    def used(factor: float) -> float:
        rival = at(factor)
        return answers(model, own, rival.steer, rival.decide).usage(macs)

    return at(bisect(used, usage, 0.0, 2.0, rounds))


def logit_bias(bias: Tensor) -> Rival:
    """A constant (G, U) added to the gate logits (learned.gate_bias)."""
    return Rival(decide=lambda site, logit: keep_positive(site, logit + bias[site].to(logit.device)))


def fixed_units(kept: Tensor) -> Rival:
    """The same open units (G, U) for every image."""
    return Rival(decide=lambda site, logit: kept[site].to(logit).expand_as(logit))


def first_units(macs: Macs, heads: int, order: NDArray[np.int64], usage: float) -> Rival:
    """The first units of an order (G * U,), for every image; their number is the one that comes nearest to the
    usage."""
    costs = macs.costs(heads).numpy()  # (G, U)
    reached = np.concatenate([[0.0], costs.flat[order].cumsum()])  # usage of the first 0, 1, 2, ... units
    count = round(float(np.interp(usage * reached[-1], reached, np.arange(len(reached)))))
    kept = torch.zeros(costs.size)
    kept[torch.from_numpy(order[:count])] = 1
    return fixed_units(kept.view(costs.shape))


def random_units(macs: Macs, heads: int, usage: float, seed: Sequence[int]) -> Rival:
    """A random set of units. seed: different for every draw."""
    order = np.random.default_rng(seed).permutation(macs.costs(heads).numel())
    return first_units(macs, heads, order, usage)


def static_units(macs: Macs, model: GatedNetwork, own: Split, usage: float) -> Rival:
    """Class-aware pruning: the units that `own` uses most without steering; their number is the one nearest to the
    usage."""
    used = answers(model, own).gate.double().mean(0).flatten()  # (G * U,)
    return first_units(macs, model.heads, used.argsort(descending=True, stable=True).numpy(), usage)


def greedy_units(macs: Macs, model: GatedNetwork, split: Split, usage: float, loss: Callable[[Tensor], float]) -> Rival:
    """Class-aware pruning by effect: starting with all units open, units are closed one by one for every image of the
    split, until the usage is nearest. loss: of the logits (B, C)."""
    costs = macs.costs(model.heads)

    def without(kept: NDArray[np.bool_]) -> float:
        rival = fixed_units(torch.from_numpy(kept).view(costs.shape).float())
        return loss(answers(model, split, decide=rival.decide).logits)

    order = greedy_order(costs.flatten().numpy(), without, usage)
    return first_units(macs, model.heads, order, usage)


def greedy_order(
    costs: NDArray[np.float64], loss: Callable[[NDArray[np.bool_]], float], usage: float
) -> NDArray[np.int64]:
    """Backward elimination: repeatedly removes the unit that adds the least loss relative to its cost, until the others
    cost at most the share `usage`. Returns the kept units, then the removed ones, the first removed last.

    costs (units,) above 0; loss: of the mask of kept units. A unit is measured again only if its last measurement makes
    it the best (lazy greedy, Minoux 1978, https://doi.org/10.1007/BFb0006528). This is exact if the loss that a unit
    adds does not fall as others are removed.
    """
    kept = np.ones(len(costs), bool)
    now = loss(kept)
    gone: list[int] = []
    queue = [(-np.inf, unit, -1, now) for unit in range(len(costs))]  # (loss added / cost, unit, when, loss)
    while queue and costs[kept].sum() > usage * costs.sum():
        _, unit, when, lost = heapq.heappop(queue)
        kept[unit] = False
        if when == len(gone):
            now = lost
            gone.append(unit)
            continue
        lost = loss(kept)
        kept[unit] = True
        heapq.heappush(queue, ((lost - now) / costs[unit], unit, len(gone), lost))
    return np.array([*np.flatnonzero(kept), *reversed(gone)])


def prior_bias(neutral: Outcome, classes: Tensor, target: Sequence[int], precision: float) -> tuple[float, float]:
    """The highest recall with a constant added to the target's class logits, at a precision of at least `precision`.

    This is the fair comparison for the recall under steering: the same precision without steering. Constants from -4 to
    4 in steps of 0.05. Returns (recall, its precision); (0, 0) when no constant reaches the precision.
    """
    members = torch.tensor(list(target))
    own = torch.isin(classes, members)
    best = (0.0, 0.0)
    for bias in torch.arange(-4, 4.01, 0.05):
        logits = neutral.logits.clone()
        logits[:, members] += bias
        predicted = logits.argmax(-1)
        right = (predicted == classes) & own
        recall = right.sum().item() / own.sum().item()
        reached = right.sum().item() / max(torch.isin(predicted, members).sum().item(), 1)
        if reached >= precision and recall > best[0]:
            best = recall, reached
    return best


def each_under(chosen: Tensor, under: Sequence[Outcome]) -> Outcome:
    """The outcome of each image under the profile chosen for it.

    chosen (B,): classes. under[c]: all images under the profile of class c.
    """
    rows = torch.arange(len(chosen))
    logits, gate, gate_logit = (
        torch.stack([getattr(outcome, name) for outcome in under])[chosen, rows]
        for name in ("logits", "gate", "gate_logit")
    )
    return Outcome(logits, gate, gate_logit, under[0].heads)


def bisect(value: Callable[[float], float], target: float, low: float, high: float, rounds: int = 12) -> float:
    """Where a falling function on [low, high] equals `target`; the nearer end if it never does.

    low may be larger than high: the function then falls in the other direction.
    """
    for _ in range(rounds):
        middle = (low + high) / 2
        if value(middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
