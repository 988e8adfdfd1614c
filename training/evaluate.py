"""Measuring a profile: what it does to its own classes, and what it does to all the others.

A class profile presumes that the class is known. So recall never stands alone: precision, the false-positive rate
and the accuracy over all images under that profile stand beside it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import Run
from training.data import Data, Split
from training.gated_vit import Decide, GatedVit, Steer, keep_all, keep_positive
from training.macs import Macs, count
from training.sae import Sae
from training.steering import NEUTRAL, SteeringProfile, Terms, to_arrays


@dataclass(frozen=True)
class Outcome:
    """What the model answered for B images."""

    predicted: Tensor
    """int64 (B,)"""
    head_gate: Tensor
    """bool (B, G, H)"""

    def take(self, index: Tensor) -> "Outcome":
        return Outcome(self.predicted[index], self.head_gate[index])


@dataclass(frozen=True)
class Effect:
    """Measured on one split under one profile (or none), for its target classes. All are shares, 0 to 1."""

    recall: float
    """Images of the target that get their label."""
    precision: float
    """Images labelled as one of the target's classes that are correct."""
    false_positive_rate: float
    """Other images that get a label of the target."""
    overall_accuracy: float
    """All images under this profile."""
    head_usage: float
    """On the target's images."""
    compute_fraction: float
    """On the target's images."""

    def to_json(self) -> dict[str, float]:
        return {key: round(value, 5) for key, value in asdict(self).items()}


@torch.no_grad()
def answers(
    model: GatedVit, sae: Sae, split: Split, terms: Terms = NEUTRAL, decide: Decide = keep_positive, size: int = 500
) -> Outcome:
    """The model's answers on a split with every image steered by `terms`, in float32."""
    predicted, gates = [], []
    for start in range(0, len(split), size):
        images = split.images[start : start + size]
        logits, out = model(images, steering(sae, [terms] * len(images)), decide)
        predicted.append(logits.argmax(-1))
        gates.append(out["head_gate"] > 0.5)
    return Outcome(torch.cat(predicted), torch.cat(gates))


def steering(sae: Sae, rows: Sequence[Terms]) -> Steer | None:
    """How a batch with these terms per row is steered; None when all are neutral."""
    if not any(rows):
        return None
    arrays = to_arrays(rows, sae.sites)
    latent, scale, shift = (torch.from_numpy(a) for a in (arrays.latent, arrays.scale, arrays.shift))
    return lambda site, residual: sae.steer(site, residual, latent[:, site], scale[:, site], shift[:, site])


def effect(outcome: Outcome, classes: Tensor, target: tuple[int, ...], macs: Macs) -> Effect:
    """classes (B,): the true ones of the outcome's images, with some of the target and some not."""
    wanted = torch.tensor(target)
    own, claimed = torch.isin(classes, wanted), torch.isin(outcome.predicted, wanted)
    correct = outcome.predicted == classes
    gates = outcome.head_gate[own]
    return Effect(
        recall=_share(correct & own, own),
        precision=_share(correct & claimed, claimed),
        false_positive_rate=_share(claimed & ~own, ~own),
        overall_accuracy=correct.double().mean().item(),
        head_usage=gates.double().mean().item(),
        compute_fraction=macs.fraction(gates).mean().item(),
    )


def _share(part: Tensor, whole: Tensor) -> float:
    return part.sum().item() / max(whole.sum().item(), 1)


def evaluate(data: Data, run: Run, model: GatedVit, sae: Sae, profiles: Sequence[SteeringProfile]) -> dict[str, Any]:
    """Step `evaluate`: read the test split, once, under no steering and under every profile; write results.json."""
    macs, split = count(model), data.test
    ungated = answers(model, sae, split, decide=keep_all)
    neutral = answers(model, sae, split)
    measured = []
    for profile in tqdm(profiles, desc="evaluate: test images", unit="profile", dynamic_ncols=True):
        target = tuple(data.labels.index(label) for label in profile.classes)
        outcome = answers(model, sae, split, profile.terms)
        own = torch.isin(split.classes, torch.tensor(target))
        measured.append({
            "name": profile.name,
            "classes": list(profile.classes),
            "strategy": profile.strategy,
            "terms": sum(map(len, profile.terms.values())),
            "images": int(own.sum()),
            "before": effect(neutral, split.classes, target, macs).to_json(),
            "after": effect(outcome, split.classes, target, macs).to_json(),
            "head_usage_before": _per_head(neutral.take(own)),
            "head_usage_after": _per_head(outcome.take(own)),
        })  # fmt: skip
    changes = [{k: p["after"][k] - p["before"][k] for k in p["before"]} for p in measured]
    results = {
        "split": "test",
        "images": len(split),
        "labels": list(data.labels),
        "gated_blocks": list(model.gated_blocks),
        "macs": macs.to_json(),
        "ungated": _whole(ungated, split, macs),
        "neutral": _whole(neutral, split, macs),
        "head_usage": _per_head(neutral),
        "profiles": measured,
        "mean_change": {k: round(sum(c[k] for c in changes) / len(changes), 5) for k in changes[0]} if changes else {},
    }
    run.write_json("results.json", results)
    return results


def _whole(outcome: Outcome, split: Split, macs: Macs) -> dict[str, float]:
    return {
        "accuracy": (outcome.predicted == split.classes).double().mean().item(),
        "head_usage": round(outcome.head_gate.double().mean().item(), 5),
        "compute_fraction": round(macs.fraction(outcome.head_gate).mean().item(), 5),
    }


def _per_head(outcome: Outcome) -> list[list[float]]:
    """Share of images that keep each head: gated blocks x heads."""
    return [[round(v, 4) for v in row] for row in outcome.head_gate.double().mean(0).tolist()]
