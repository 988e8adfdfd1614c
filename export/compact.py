"""A model for one profile: units (heads and MLP groups) that its classes almost never use are always closed, so that
graphs omit them. The others remain gated. Inputs and outputs are unchanged, and closed units report 0.

The only variant that saves time where gates cannot be followed at run time, as on a GPU.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.data.splits import Split
from training.model.gated_vit import Gate, GatedVit
from training.model.inference import Effect, answers, effect, steered_by
from training.model.macs import count
from training.model.sae import Sae
from training.steering import SteeringProfile


@dataclass(frozen=True)
class Compact:
    """A model with units that are always closed, and the effect on its profile."""

    model: GatedVit
    kept: tuple[tuple[int, ...], ...]
    """The remaining units of each gated block: heads first, then MLP groups, numbered on from the heads."""
    threshold: float
    before: Effect
    """Effect of the profile on the selection images."""
    after: Effect

    def to_json(self) -> dict[str, Any]:
        """The value of Manifest.compact, without the profile's name."""
        effects = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {"threshold": self.threshold, "kept": self.kept, "split": "selection", **effects}


def compact(
    model: GatedVit, sae: Sae, profile: SteeringProfile, labels: tuple[str, ...], selection: Split, threshold: float
) -> Compact:
    """Close every unit that, under the profile, fewer than this share of its classes' selection images keep."""
    target = tuple(labels.index(label) for label in profile.classes)
    steer, macs = steered_by(sae, profile.terms), count(model)
    before = answers(model, selection, steer)
    own = torch.isin(selection.classes, torch.tensor(target))
    usage = before.gate[own].double().mean(0)  # (G, U)
    kept = tuple(tuple(torch.nonzero(row >= threshold).flatten().tolist()) for row in usage)
    closed = copy.deepcopy(model, {id(model.vit): model.vit})  # only the gates differ
    for gate, units in zip(closed.gates, kept, strict=True):
        _close(gate, units)
    after = answers(closed, selection, steer)
    measured = (effect(outcome, selection.classes, target, macs) for outcome in (before, after))
    return Compact(closed, kept, threshold, *measured)


@torch.no_grad()
def _close(gate: nn.Module, kept: tuple[int, ...]) -> None:
    """Give the other units the lowest logit, for any residual."""
    assert isinstance(gate, Gate)
    closed = torch.ones(len(gate.linear.bias), dtype=torch.bool)
    closed[list(kept)] = False
    gate.linear.weight[closed] = 0.0
    gate.linear.bias[closed] = -1000.0
