"""Step `controls`: models that a sceptic would train instead, each an ordinary run in <run>/controls/<name>.

All have the data, the seed and the total number of epochs of the run; those with gates start from its ungated model. A
model with a dial is compared with plain models along the dial and with simpler dials; a model without one is compared
with models that spend as much as its profiles.
"""

import math
from dataclasses import dataclass
from typing import Any

from training.checkpoint import Run
from training.config import DENSE, Settings, VitSettings
from training.data.splits import Data
from training.model.macs import count
from training.profiles.fit import fit_profiles
from training.sae.fit import fit_sae
from training.vit.fit import build, fit_vit

LAST_BLOCK = "last-block"
"""The paper's setting. This control has its own autoencoders and profiles."""
PLAIN = {"plain-100": 1.0, "plain-75": 0.75, "plain-55": 0.55, "plain-40": 0.4}
"""Plain ViTs to compare a dial with: their compute, as a share of that of the full width."""


@dataclass(frozen=True)
class Control:
    """A model to compare with, and the settings that it is trained with."""

    what: str
    """A sentence for the report."""
    run: Run
    settings: Settings


def controls(settings: Settings, data: Data, run: Run) -> dict[str, Control]:
    """The controls for the model of `run`, by name."""
    changes = _of_dial(settings, data, run) if settings.vit.dial else _of_gates(settings, data, run)
    models = {}
    for name, (what, changed) in changes.items():
        own = Run(run.folder / "controls" / name)
        vit = VitSettings(**{**settings.vit.model_dump(), **changed})
        update: dict[str, Any] = {"out": own.folder, "vit": vit}
        if name == LAST_BLOCK:  # steps cost a hundredth (last_block.py); one block can close more heads
            search = settings.profiles
            scaled = {"steps": 4 * search.steps, "usage_target": 0.75 * search.usage_target}
            update["profiles"] = search.model_copy(update=scaled)
        models[name] = Control(what, own, settings.model_copy(update=update))
    return models


def _ungated(vit: VitSettings) -> dict[str, Any]:
    epochs = vit.backbone_epochs + vit.gate_epochs + vit.joint_epochs
    plain = {"dial": False, "mlp_groups": 0, "teacher": None}
    return {**plain, "backbone_epochs": epochs, "gate_epochs": 0, "joint_epochs": 0}


def _of_gates(settings: Settings, data: Data, run: Run) -> dict[str, tuple[str, dict[str, Any]]]:
    """For a model trained to one usage: by name, the description and the changed settings."""
    vit, usage = settings.vit, settings.profiles.usage_target
    gated = {"backbone": run.folder}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "dense": ("a plain ViT of the same shape, every head on, trained as long", _ungated(vit)),
        "direct": (
            f"the same ungated model, its gates trained to head usage {usage}, no steering",
            {**gated, "usage_target": usage},
        ),
        LAST_BLOCK: ("the same ungated model, only the last block gated", {**gated, "gated_blocks": "last"}),
    }
    if vit.model == "conv_stem":
        dim = narrower(vit, data, usage)
        changes["small"] = (
            f"a plain ViT of width {dim} instead of {vit.dim}, which computes as much as the gated one at head usage "
            f"{usage}, trained as long",
            {**_ungated(vit), "dim": dim},
        )
    return changes


def _of_dial(settings: Settings, data: Data, run: Run) -> dict[str, tuple[str, dict[str, Any]]]:
    """For a model with a dial: models of equal compute without gates or with simpler gates, as in _of_gates."""
    vit, dense = settings.vit, run.folder / "controls" / DENSE
    gated = {"backbone": run.folder, "teacher": dense if vit.teacher == DENSE else vit.teacher}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "dense": ("a plain ViT of the same shape, trained as long", _ungated(vit)),
    }
    for name, share in PLAIN.items() if vit.model == "conv_stem" else ():
        dim = width_of(vit, data, share)
        changes[name] = (
            f"a plain ViT of width {dim}, {share} of the compute, trained as long and distilled from the plain ViT of "
            "the same shape",
            {**_ungated(vit), "dim": dim, "teacher": dense},
        )
    changes["static"] = (
        "the same ungated model, with a dial whose gates do not look at the image: one order of the units for all",
        {**gated, "gate": "static"},
    )
    if vit.mlp_groups:
        changes["heads"] = ("the same ungated model, with a dial of heads alone", {**gated, "mlp_groups": 0})
    return changes


def fit_controls(settings: Settings, data: Data, run: Run) -> None:
    """Train the controls in `settings.only` (all, if it is empty) that are not finished."""
    models = controls(settings, data, run)
    for unknown in settings.only:
        if unknown not in models:
            print(f"controls: {unknown}: this model has none; it has: {', '.join(models)}", flush=True)
    for name, control in models.items():
        if settings.only and name not in settings.only:
            continue
        print(f"controls: {name}: {control.what}", flush=True)
        trained = fit_vit(control.settings, data, control.run)
        if name == LAST_BLOCK:
            sae = fit_sae(control.settings, data, control.run, trained)
            fit_profiles(control.settings, data, control.run, trained, sae)


def narrower(vit: VitSettings, data: Data, usage: float) -> int:
    """The width of the ungated model whose compute equals that of the gated one of full width at this head usage."""
    gated = build(vit, data.spec, len(data.labels)).eval()
    macs = count(gated)
    return width_of(vit, data, 1 - (1 - usage) * gated.heads * sum(macs.per_head) / macs.dense)


def width_of(vit: VitSettings, data: Data, share: float) -> int:
    """The width at which the ungated model's compute is nearest to this share of the compute at full width."""

    def dense(dim: int) -> int:
        plain = vit.model_copy(update={"dim": dim, "dial": False, "mlp_groups": 0})
        return count(build(plain, data.spec, len(data.labels)).eval()).dense

    target = share * dense(vit.dim)
    step = math.lcm(4, vit.heads)  # four numbers per sin-cos position, and the same width for every head
    return min(range(step, vit.dim + 1, step), key=lambda dim: abs(dense(dim) - target))
