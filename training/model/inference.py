"""Measures a model under steering: its answers on a split, and the effect on a target.

A profile presumes that the class is known. So recall is never reported alone, but with precision, the false-positive
rate and the accuracy of the other images under that profile.

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

BATCH = 200
"""Images in a forward pass."""
NEAR = 0.1
"""A gate counts as near its threshold, in reports, if its |logit| is below this."""


@dataclass(frozen=True)
class Outcome:
    """The model's answers for B images."""

    logits: Tensor
    """float32 (B, C)"""
    gate: Tensor
    """bool (B, G, U): heads, then MLP groups."""
    gate_logit: Tensor
    """float32 (B, G, U)"""
    heads: int
    """Heads per block."""

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
        """Mean unit usage (Macs.usage) over the images. Sums are exact, so equal usages compare as equal."""
        costs = macs.costs(self.heads)
        return ((self.gate * costs).sum() / (len(self.gate) * costs.sum())).item()

    def take(self, index: Tensor) -> "Outcome":
        """The answers for some images. index: int64 rows, or a bool mask (B,)."""
        return Outcome(self.logits[index], self.gate[index], self.gate_logit[index], self.heads)

    def joined(self, other: "Outcome") -> "Outcome":
        """These images, then the other's."""
        return Outcome(
            torch.cat([self.logits, other.logits]),
            torch.cat([self.gate, other.gate]),
            torch.cat([self.gate_logit, other.gate_logit]),
            self.heads,
        )


@dataclass(frozen=True)
class Effect:
    """Metrics on a set of images, some of the target and some not. All are shares, 0 to 1."""

    recall: float
    """Share of the target's images that get their own label."""
    precision: float
    """Share of images labelled as one of the target's classes that are correct."""
    f1: float
    """Harmonic mean of recall and precision."""
    false_positive_rate: float
    """Share of other images that get a label of the target."""
    auroc: float
    """Area under the ROC curve of the target's probability, for its images against the others."""
    others_accuracy: float
    """Share of other images that get their own label under this steering."""
    overall_accuracy: float
    """Accuracy of all images under this steering."""
    head_usage: float
    """On the target's images."""
    compute_fraction: float
    """On the target's images."""
    mlp_usage: float | None = None
    """On the target's images; None if only heads are gated."""
    unit_usage: float | None = None
    """Macs.usage on the target's images; None if only heads are gated."""

    @property
    def usage(self) -> float:
        """Unit usage; head usage if only heads are gated."""
        return self.head_usage if self.unit_usage is None else self.unit_usage

    def to_json(self) -> dict[str, float]:
        """The fields by name, rounded to five decimals, without those that are None."""
        return {key: round(value, 5) for key, value in asdict(self).items() if value is not None}


@torch.no_grad()
def answers(
    model: GatedNetwork,
    split: Split,
    steer: Steer | None = None,
    decide: Decide = keep_positive,
    gate_bias: Tensor | None = None,
) -> Outcome:
    """The model's answers on a split, in float32, on the CPU. gate_bias: float32 (G, U), the same for every image.

    Images of a class come in the same batches: they close the same units (GatedVit.skipping).
    """
    logits, gates, gate_logits = [], [], []
    bias = None if gate_bias is None else gate_bias[None]
    order = split.classes.argsort(stable=True)
    for rows in order.split(BATCH):
        of_batch, out = model(split.images[rows], steer, decide, bias)
        logits.append(of_batch.cpu())
        gates.append(torch.cat([out["head_gate"], out["mlp_gate"]], 2).cpu() > 0.5)
        gate_logits.append(out["gate_logit"].cpu())
    by_class = Outcome(torch.cat(logits), torch.cat(gates), torch.cat(gate_logits), model.heads)
    return by_class.take(order.argsort())


def gate_diagnostics(outcome: Outcome, classes: Tensor) -> dict[str, list[Any]]:
    """Statistics of the gates' decisions. classes (B,): the true ones.

    usage: class x gated block x unit, share of the class's images for which the unit is open. near_threshold: gated
    block x unit, share of images with a |gate logit| below NEAR.
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
    """Steers every image of a batch by the same terms; None without terms."""
    if not terms:
        return None
    arrays = to_arrays([terms], sae.sites)
    tensors = (torch.from_numpy(a) for a in (arrays.latent, arrays.scale, arrays.shift))
    latent, scale, shift = (a.to(sae.encoder.device) for a in tensors)  # (1, S, T)
    return lambda site, residual: sae.steer(site, residual, latent[:, site], scale[:, site], shift[:, site])


def effect(outcome: Outcome, classes: Tensor, target: tuple[int, ...], macs: Macs) -> Effect:
    """The effect on a target. classes (B,): the true classes of the outcome's images."""
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
    """Means over the images: head_usage and, if MLP groups are gated, mlp_usage and unit_usage."""
    usage = {"head_usage": outcome.head_gate.double().mean().item()}
    if macs.mlp_groups:
        usage |= {"mlp_usage": outcome.mlp_gate.double().mean().item(), "unit_usage": outcome.usage(macs)}
    return usage


def usage_of(measured: Mapping[str, float]) -> float:
    """Unit usage from the JSON of an Effect or of `usages`; head usage if only heads are gated."""
    return measured["unit_usage" if "unit_usage" in measured else "head_usage"]


def auroc(score: Tensor, own: Tensor) -> float:
    """Share of (own, other) pairs in which the own image scores higher; ties count half."""
    n, m = int(own.sum()), int((~own).sum())
    ranks = rankdata(score.numpy())
    return float((ranks[own.numpy()].sum() - n * (n + 1) / 2) / max(n * m, 1))


def _share(part: Tensor, whole: Tensor) -> float:
    return part.sum().item() / max(whole.sum().item(), 1)
