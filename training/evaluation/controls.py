"""Step `controls`: the models that a sceptic would train instead, each an ordinary run in <run>/controls/<name>.

All have the data, the seed and the total number of epochs of the run; those with gates start from its ungated model.
"""

import math
from dataclasses import dataclass
from typing import Any

from training.checkpoint import Run
from training.config import Settings, VitSettings
from training.data.splits import Data
from training.model.gated_vit import GatedVit
from training.model.macs import count
from training.profiles.fit import fit_profiles
from training.sae.fit import fit_sae
from training.vit.fit import build, fit_vit

LAST_BLOCK = "last-block"
"""The paper's setting. It has autoencoders and profiles of its own."""


@dataclass(frozen=True)
class Control:
    """A model to compare with, and the settings that it is trained with."""

    what: str
    """A sentence for the report."""
    run: Run
    settings: Settings


def controls(settings: Settings, data: Data, run: Run) -> dict[str, Control]:
    """What there is to compare the model of `run` with, by name."""
    vit, usage = settings.vit, settings.profiles.usage_target
    units = "unit usage" if vit.mlp_groups else "head usage"
    ungated = {
        "mlp_groups": 0,
        "backbone_epochs": vit.backbone_epochs + vit.gate_epochs + vit.joint_epochs,
        "gate_epochs": 0,
        "joint_epochs": 0,
    }
    gated = {"backbone": run.folder}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "dense": ("a plain ViT of the same shape, every head on, trained as long", ungated),
        "direct": (
            f"the same ungated model, its gates trained to {units} {usage}, no steering",
            {**gated, "usage_target": usage},
        ),
        LAST_BLOCK: ("the same ungated model, only the last block gated", {**gated, "gated_blocks": "last"}),
    }
    if vit.model == "conv_stem":
        dim = narrower(vit, data, usage)
        changes["small"] = (
            f"a plain ViT of width {dim} instead of {vit.dim}, which computes as much as the gated one at {units} "
            f"{usage}, trained as long",
            {**ungated, "dim": dim},
        )
    models = {}
    for name, (what, changed) in changes.items():
        own = Run(run.folder / "controls" / name)
        update: dict[str, Any] = {"out": own.folder, "vit": VitSettings(**{**vit.model_dump(), **changed})}
        if name == LAST_BLOCK:  # a step costs a hundredth there (last_block.py), and of one block more heads can go
            search = settings.profiles
            scaled = {"steps": 4 * search.steps, "usage_target": 0.75 * search.usage_target}
            update["profiles"] = search.model_copy(update=scaled)
        models[name] = Control(what, own, settings.model_copy(update=update))
    return models


def fit_controls(settings: Settings, data: Data, run: Run) -> None:
    """Train those of `settings.only` (all, if none is named) that are not there yet."""
    for name, control in controls(settings, data, run).items():
        if settings.only and name not in settings.only:
            continue
        print(f"controls: {name}: {control.what}", flush=True)
        trained = fit_vit(control.settings, data, control.run)
        if name == LAST_BLOCK:
            sae = fit_sae(control.settings, data, control.run, trained)
            fit_profiles(control.settings, data, control.run, trained, sae)


def narrower(vit: VitSettings, data: Data, usage: float) -> int:
    """The width of the ungated model that computes as much as the gated one of full width at that unit usage."""

    def model(dim: int, mlp_groups: int = 0) -> GatedVit:
        return build(vit.model_copy(update={"dim": dim, "mlp_groups": mlp_groups}), data.spec, len(data.labels)).eval()

    gated = model(vit.dim, vit.mlp_groups)
    macs = count(gated)
    units = gated.heads * sum(macs.per_head) + gated.mlp_groups * sum(macs.per_mlp_group)
    target = macs.dense - (1 - usage) * units
    step = math.lcm(4, vit.heads)  # four numbers a sin-cos position, as many a head for every head
    return min(range(step, vit.dim + 1, step), key=lambda dim: abs(count(model(dim)).dense - target))
