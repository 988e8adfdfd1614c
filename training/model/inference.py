"""Measuring a model under some steering: its answers on a split, and what they mean for a target.

A profile presumes that the class is known. So recall never stands alone: precision, the false-positive rate and the
accuracy of the other images under that profile stand beside it.

Letters: B images, C classes, G gated blocks, H heads, M MLP groups, U = H + M units.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from training.data.splits import Split
from training.model.gated_vit import Decide, GatedNetwork, Steer, keep_positive
from training.model.macs import Macs
from training.model.sae import Sae
from training.steering import Terms, to_arrays

NEAR = 0.1
"""|gate logit| below which a gate counts as near its threshold, in reports."""


@dataclass(frozen=True)
class Outcome:
    """What the model answered for B images."""

    logits: Tensor
    """float32 (B, C)"""
    gate: Tensor
    """bool (B, G, U): heads, then MLP groups."""
    gate_logit: Tensor
    """float32 (B, G, U)"""
    heads: int
    """Of a block."""

    @property
    def predicted(self) -> Tensor:
        """int64 (B,)"""
        return self.logits.argmax(-1)

    @property
    def head_gate(self) -> Tensor:
        """bool (B, G, H)"""
        return self.gate[:, :, : self.heads]

    @property
    def mlp_gate(self) -> Tensor:
        """bool (B, G, M)"""
        return self.gate[:, :, self.heads :]

    def compute_fraction(self, macs: Macs) -> Tensor:
        """float64 (B,)"""
        return macs.fraction(self.head_gate, self.mlp_gate)

    def usage(self, macs: Macs) -> float:
        """Unit usage (Macs.usage), mean over the images. Sums are exact, so equal usage compares equal."""
        costs = macs.costs(self.heads)
        return ((self.gate * costs).sum() / (len(self.gate) * costs.sum())).item()

    def take(self, index: Tensor) -> "Outcome":
        """The answers for some images. index: int64 rows, or a bool mask (B,)."""
        return Outcome(self.logits[index], self.gate[index], self.gate_logit[index], self.heads)


@dataclass(frozen=True)
class Effect:
    """Measured on one set of images, with some of the target and some not. All are shares, 0 to 1."""

    recall: float
    """Images of the target that get their own label."""
    precision: float
    """Images labelled as one of the target's classes that are correct."""
    f1: float
    """Harmonic mean of the two."""
    false_positive_rate: float
    """Other images that get a label of the target."""
    auroc: float
    """How well the target's probability tells its images from the others."""
    others_accuracy: float
    """Other images that get their own label under this steering."""
    overall_accuracy: float
    """All images under this steering."""
    head_usage: float
    """On the target's images."""
    compute_fraction: float
    """On the target's images."""
    mlp_usage: float | None = None
    """On the target's images; None where only heads are gated."""
    unit_usage: float | None = None
    """Likewise, of Macs.usage."""

    @property
    def usage(self) -> float:
        """Unit usage: where only heads are gated, head usage."""
        return self.head_usage if self.unit_usage is None else self.unit_usage

    def to_json(self) -> dict[str, float]:
        """The fields by name, rounded to five decimals; without those that are None."""
        return {key: round(value, 5) for key, value in asdict(self).items() if value is not None}


@torch.no_grad()
def answers(
    model: GatedNetwork,
    split: Split,
    steer: Steer | None = None,
    decide: Decide = keep_positive,
    gate_bias: Tensor | None = None,
    size: int = 500,
) -> Outcome:
    """The model's answers on a split, in float32, on the CPU. gate_bias: float32 (G, U), the same for every image."""
    logits, gates, gate_logits = [], [], []
    bias = None if gate_bias is None else gate_bias[None]
    for start in range(0, len(split), size):
        images = split.images[start : start + size]
        of_batch, out = model(images, steer, decide, bias)
        logits.append(of_batch.cpu())
        gates.append(torch.cat([out["head_gate"], out["mlp_gate"]], 2).cpu() > 0.5)
        gate_logits.append(out["gate_logit"].cpu())
    return Outcome(torch.cat(logits), torch.cat(gates), torch.cat(gate_logits), model.heads)


def gate_diagnostics(outcome: Outcome, classes: Tensor) -> dict[str, list[Any]]:
    """How the gates decide. classes (B,): the true ones.

    usage: class x gated block x unit, share of the class's images that keep the unit. near_threshold: gated block x
    unit, share of gates with a |logit| below NEAR.
    """
    usage = [outcome.gate[classes == index].double().mean(0) for index in range(int(classes.max()) + 1)]
    near = (outcome.gate_logit.abs() < NEAR).double().mean(0)
    return {"usage": rounded(torch.stack(usage)), "near_threshold": rounded(near)}


def rounded(values: Tensor, digits: int = 4) -> list[Any]:
    """A tensor as nested lists, for JSON."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [round(value, digits) for value in values.tolist()]


def steered_by(sae: Sae, terms: Terms) -> Steer | None:
    """Every image of a batch steered by the same terms; None where there are none."""
    if not terms:
        return None
    arrays = to_arrays([terms], sae.sites)
    tensors = (torch.from_numpy(a) for a in (arrays.latent, arrays.scale, arrays.shift))
    latent, scale, shift = (a.to(sae.encoder.device) for a in tensors)  # (1, S, T)
    return lambda site, residual: sae.steer(site, residual, latent[:, site], scale[:, site], shift[:, site])


def effect(outcome: Outcome, classes: Tensor, target: tuple[int, ...], macs: Macs) -> Effect:
    """classes (B,): the true ones of the outcome's images."""
    members = torch.tensor(target)
    own, claimed = torch.isin(classes, members), torch.isin(outcome.predicted, members)
    correct = outcome.predicted == classes
    recall, precision = _share(correct & own, own), _share(correct & claimed, claimed)
    of_target = outcome.take(own)
    return Effect(
        recall=recall,
        precision=precision,
        f1=2 * recall * precision / max(recall + precision, 1e-12),
        false_positive_rate=_share(claimed & ~own, ~own),
        auroc=auroc(outcome.logits.softmax(-1)[:, members].sum(1), own),
        others_accuracy=_share(correct & ~own, ~own),
        overall_accuracy=_share(correct, torch.ones_like(correct)),
        compute_fraction=of_target.compute_fraction(macs).mean().item(),
        **usages(of_target, macs),
    )


def usages(outcome: Outcome, macs: Macs) -> dict[str, float]:
    """head_usage, and where MLP groups are gated mlp_usage and unit_usage, mean over the images."""
    usage = {"head_usage": outcome.head_gate.double().mean().item()}
    if macs.mlp_groups:
        usage |= {"mlp_usage": outcome.mlp_gate.double().mean().item(), "unit_usage": outcome.usage(macs)}
    return usage


def usage_of(measured: Mapping[str, float]) -> float:
    """Unit usage, of an Effect or `usages` in JSON: where only heads are gated, head usage."""
    return measured["unit_usage" if "unit_usage" in measured else "head_usage"]


def auroc(score: Tensor, own: Tensor) -> float:
    """Share of (own, other) pairs in which the own image scores higher; ties count half."""
    n, m = int(own.sum()), int((~own).sum())
    ranks = rankdata(score.numpy())
    return float((ranks[own.numpy()].sum() - n * (n + 1) / 2) / max(n * m, 1))


def _share(part: Tensor, whole: Tensor) -> float:
    return part.sum().item() / max(whole.sum().item(), 1)
