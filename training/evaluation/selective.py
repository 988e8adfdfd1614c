"""Finds, chooses and measures selective profiles and their rivals.

Every method gets the same training images: a few of the context (nested draws) and a background of others. Its strength
is chosen on the selection slice under the bounds of selective_criteria.py. Only images that a method touches are run
under it: the others have their answers without steering (profiles/selective.py, `touched`).

Letters: B images, S sites, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.data.splits import Split
from training.evaluation import significance
from training.evaluation.baselines import Rival
from training.evaluation.selective_criteria import (
    BACKGROUND,
    CHOOSING_LOST,
    CHOOSING_MOVED,
    MOST_LOST,
    STRENGTHS,
    verdict,
)
from training.evaluation.selective_rivals import Probe
from training.model.gated_vit import GatedNetwork
from training.model.inference import Outcome, answers, steered_by
from training.model.macs import Macs
from training.model.sae import Sae
from training.profiles.selective import Examples, touched
from training.profiles.strategies import Target
from training.steering import Terms, at_strength


@dataclass(frozen=True)
class Method:
    """A method as found, for any strength."""

    at: Callable[[float], Rival]
    touches: Callable[[Tensor], Tensor]
    """Unsteered residuals (S, B, D) -> bool (B,): the images that it may change."""
    terms: int
    """Scale terms; for a probe, sites."""


def of_terms(sae: Sae, terms: Terms) -> Method:
    """Terms on the latents of a dictionary."""
    return Method(
        lambda strength: Rival(steered_by(sae, at_strength(terms, strength))),
        lambda values: touched(sae, values, terms),
        sum(map(len, terms.values())),
    )


def of_probe(probe: Probe) -> Method:
    """A bias that a linear probe switches."""
    return Method(probe.at, probe.touched, len(probe.offset))


@torch.no_grad()
def examples(network: GatedNetwork, split: Split) -> Examples:
    """The split with the model's answers and residuals without steering, in one pass."""
    read: list[Tensor] = []

    def keep(site: int, residual: Tensor) -> Tensor:
        read.append(residual.cpu())
        return residual

    sites, unsteered = len(network.gates), answers(network, split, keep)
    return Examples(split, unsteered, torch.stack([torch.cat(read[site::sites]) for site in range(sites)]))


def drawn(pool: Examples, target: Target, count: int, seed: int) -> tuple[Examples, Examples]:
    """`count` images of the target, and BACKGROUND others. With the same seed, a smaller draw is part of a larger
    one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool), generator=generator)
    own = torch.isin(pool.split.classes[order], torch.tensor(target))
    return pool.take(order[own][:count]), pool.take(order[~own][:BACKGROUND])


def under(network: GatedNetwork, images: Examples, method: Method, strength: float) -> Outcome:
    """The outcome of all images; only those that the method touches are run."""
    rows = torch.nonzero(method.touches(images.residuals)).flatten()
    before = images.unsteered
    if not len(rows):
        return before
    rival = method.at(strength)
    after = answers(network, images.split.take(rows), rival.steer, rival.decide)
    logits, gate, gate_logit = before.logits.clone(), before.gate.clone(), before.gate_logit.clone()
    logits[rows], gate[rows], gate_logit[rows] = after.logits, after.gate, after.gate_logit
    return Outcome(logits, gate, gate_logit, before.heads)


def chosen(
    network: GatedNetwork,
    macs: Macs,
    selection: Examples,
    target: Target,
    method: Method,
    known: Sequence[dict[str, Any]] = (),
) -> tuple[float, list[dict[str, Any]]]:
    """The largest strength within the bounds on the selection slice, or the one with the smallest change if none is;
    and the measurements of all strengths tried. known: earlier measurements."""
    tried: list[dict[str, Any]] = []
    for strength in STRENGTHS:
        values = next((values for values in known if values["strength"] == strength), None)
        if values is None:
            after = under(network, selection, method, strength)
            values = {"strength": strength, **measured(macs, selection, after, target)}
        tried.append(values)
        if values["moved"] <= CHOOSING_MOVED and -values["accuracy_change"] <= CHOOSING_LOST:
            return strength, tried
    return min(tried, key=lambda values: float(values["moved"]))["strength"], tried


def measured(macs: Macs, images: Examples, after: Outcome, target: Target) -> dict[str, Any]:
    """The effect of a method on a split: shares, 0 to 1; for compute, differences of compute fractions.

    saved: on the context's images, mean. moved: on the others, mean of the absolute difference; moved_signed: mean.
    untouched_others: share of the others whose logits are identical to the bit. *_change: changes of accuracy.
    """
    classes, before = images.split.classes, images.unsteered
    own = torch.isin(classes, torch.tensor(target))
    compute, compute_after = (outcome.compute_fraction(macs) for outcome in (before, after))  # (B,)
    change = compute_after - compute
    right = [(outcome.predicted == classes).double() for outcome in (before, after)]
    same = (before.logits == after.logits).all(1)

    def accuracy(mask: Tensor) -> float:
        return round((right[1] - right[0])[mask].mean().item(), 5)

    return {
        "compute_before": round(compute[own].mean().item(), 5),
        "saved": round(-change[own].mean().item(), 5),
        "moved": round(change[~own].abs().mean().item(), 5),
        "moved_signed": round(change[~own].mean().item(), 5),
        "untouched_others": round(same[~own].double().mean().item(), 5),
        "own_accuracy_change": accuracy(own),
        "others_accuracy_change": accuracy(~own),
        "accuracy_change": accuracy(torch.ones_like(own)),
    }


def judged(macs: Macs, images: Examples, after: Outcome, target: Target) -> dict[str, Any]:
    """`measured`, with the interval of the change of accuracy, the p of its non-inferiority, and the verdict."""
    values = measured(macs, images, after, target)
    right = [(outcome.predicted == images.split.classes).numpy() for outcome in (images.unsteered, after)]
    clusters = images.split.clusters
    return {
        **values,
        "accuracy_interval": [round(v, 5) for v in significance.change_interval(right[0], right[1], clusters)],
        "accuracy_p": round(significance.non_inferiority(right[0], right[1], MOST_LOST, clusters), 5),
        "verdict": verdict(values["saved"], values["moved"], -values["accuracy_change"]),
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as text, one line each, of at most 110 columns."""
    lines = [
        f"{'context':22}{'images':>7} {'method':18}{'strength':>9}{'saved':>8}{'moved':>8}{'untouched':>10}{'own':>8}"
        f"{'others':>8}{'all':>8}"
    ]
    for r in records:
        changes = "".join(f"{100 * r[f'{of}accuracy_change']:8.2f}" for of in ("own_", "others_", ""))
        lines.append(
            f"{r['context'][:21]:22}{r['images']:7} {r['method'][:17]:18}{r['strength']:9.2f}{r['saved']:8.4f}"
            f"{r['moved']:8.4f}{r['untouched_others']:10.4f}{changes}"
        )
    return "\n".join(lines)
