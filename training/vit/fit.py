"""Stage `vit`: trains a ViT with every head open, then teaches it which heads it can do without.

Three phases: `backbone` (ungated), `gates` (gates alone, from fully open), `joint` (both; cross-entropy + KL to the
ungated model + usage_weight * (usage - target)^2, the target annealed from 1 over the first 60% of the phase).
In the joint phase, some images run with all their gate logits lowered by a random offset. The network thereby learns to
work with fewer heads than its gates would open, as steering will require. A model with a dial (vit.dial) is trained at
every usage instead: see dial.py.

Under `accelerate launch`, every process trains on its share of each batch.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import processes, soundness
from training.checkpoint import Run, RunError, changed, check_same, part
from training.config import Settings, VitSettings
from training.data.splits import Data
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.gated_vit import (
    GatedVit,
    UnsupportedModel,
    keep_all,
    parse_gated_blocks,
)
from training.model.inference import Outcome, answers, gate_diagnostics, usages
from training.model.macs import count
from training.vit.dial import calibrate
from training.vit.phases import origin, phases_of, run_phase, save, teacher_run

OF_BACKBONE = (
    "model", "weights", "pretrained", "dim", "depth", "heads", "patch", "unpadded", "mlp_ratio",
    "backbone_epochs", "batch_size", "learning_rate", "schedule", "weight_decay", "label_smoothing", "ema_decay",
    "teacher",
)  # fmt: skip
"""The settings of VitSettings that the ungated model depends on."""


def fit_vit(settings: Settings, data: Data, run: Run) -> GatedVit:
    """Train, or resume training, the gated ViT; the finished model is in the run folder and is returned."""
    vit, fingerprint = settings.vit, settings.fingerprint("vit")
    if run.finished("vit", fingerprint):
        check_images(run, data)
        return load_vit(run)
    torch.manual_seed(settings.seed)
    model = build(vit, data.spec, len(data.labels)).to(processes.device())
    state = run.read_state("vit", fingerprint)
    first: int = 0
    curves: list[dict[str, Any]] = []
    if state:
        path, now, then = run.folder / "vit.state.safetensors", origin(settings, run), state.meta.get("origin", {})
        _check_images(path, state.meta, data)
        check_same(path, {name: then.get(name, value) for name, value in now.items()}, now)
        first, curves = state.meta["phase"], state.meta["curves"]
        model.load_state_dict(part(state.tensors, "model"))  # the state may have been saved after the last phase
    elif vit.backbone is not None:
        first = 1
        model.load_state_dict(_shared_backbone(vit.backbone, settings, data), strict=False)
        run.write_tensors("backbone", model.state_dict(), _backbone_settings(settings))
        processes.wait()
    for phase in phases_of(vit)[first:]:
        if phase.index == 0 or vit.dial:
            teacher = _teacher(vit.teacher, run)
        else:
            teacher = _stored(run, "backbone", vit, data.spec, len(data.labels))
        run_phase(settings, data, run, model, teacher, phase, state, curves)
        if phase.index == 0:
            run.write_tensors("backbone", model.state_dict(), _backbone_settings(settings))
        save(settings, data, run, model, phase.index + 1, 0, curves, {})
        processes.wait()
        state = run.read_state("vit", fingerprint)  # every process continues with what process 0 has written
        assert state is not None
        model.load_state_dict(part(state.tensors, "model"))
    model.eval().requires_grad_(False)
    if processes.is_main():
        _finish(settings, data, run, model, curves)
    processes.wait()
    return model


def build(settings: VitSettings, spec: ImageSpec, classes: int) -> GatedVit:
    """A new model on the CPU, with pretrained weights if the settings ask for them. Raises UnsupportedModel."""
    if settings.mlp_groups and not settings.dial:
        raise UnsupportedModel(f"vit.mlp_groups is {settings.mlp_groups}; allowed: 0, or more with --vit.dial")
    backbone = create_vit(settings, spec, classes)
    gated_blocks = parse_gated_blocks(settings.gated_blocks, len(backbone.blocks))
    return GatedVit(backbone, gated_blocks, spec, settings.mlp_groups, settings.usage_target if settings.dial else None)


def load_vit(run: Run) -> GatedVit:
    """The finished model of a run, frozen, in evaluation mode. Raises RunError when the stage is not finished."""
    info = run.info("vit")
    spec, classes = ImageSpec(**info["result"]["image"]), len(info["result"]["labels"])
    return _stored(run, "vit", VitSettings(**info["settings"]["vit"]), spec, classes)


def _stored(run: Run, name: str, settings: VitSettings, spec: ImageSpec, classes: int) -> GatedVit:
    without_weights = settings.model_copy(update={"pretrained": False, "weights": None})
    model = build(without_weights, spec, classes)
    model.load_state_dict(run.tensors(name))
    return model.to(processes.device()).eval().requires_grad_(False)


def _teacher(folder: Path | None, run: Run) -> GatedVit | None:
    other = teacher_run(folder, run)
    if other is None:
        return None
    if not other.has("vit"):
        raise RunError(f"vit.teacher is {other.folder}, which has no finished model: train it there first")
    return load_vit(other)


def check_images(run: Run, data: Data) -> None:
    """Raise RunError when the model of the run was trained on other images or labels: its training images could be in
    the test split. A run without a model, or from before images were recorded, passes."""
    if run.has("vit"):
        _check_images(run.folder / "vit.json", run.info("vit")["result"], data)


def _check_images(path: Path, made: dict[str, Any], data: Data) -> None:
    """made: has `data` and `labels` if they were recorded."""
    there, now = made.get("data", data.digests), data.digests
    different = [name for name in sorted(there | now) if there.get(name) != now.get(name)]
    changed = [f"{name}: {there.get(name)} before, {now.get(name)} now" for name in different]
    labels = made.get("labels", list(data.labels))
    if labels != list(data.labels):
        apart = ", ".join(map(repr, sorted(set(labels) ^ set(data.labels))[:5])) or "their order"
        changed.append(f"labels: {len(labels)} before, {len(data.labels)} now; different: {apart}")
    if changed:
        raise RunError(
            f"{path} was made with other images ({'; '.join(changed)}). "
            "Give the same images and labels, another --out, or remove that stage and those after it"
        )


def _shared_backbone(folder: Path, settings: Settings, data: Data) -> dict[str, Tensor]:
    """The ungated model of another run. Raises RunError unless it was trained with the settings of this run."""
    run = Run(folder)
    stored = run.read_tensors("backbone")
    if stored is None:
        raise RunError(f"vit.backbone is {folder}, which has no backbone.safetensors: run the step 'vit' there first")
    ours = _backbone_settings(settings)
    different = [name for name, *_ in changed({name: stored.meta.get(name) for name in ours}, ours)]
    if different:
        raise RunError(f"vit.backbone is {folder}, trained with another {', '.join(different)}")
    check_images(run, data)
    # the gates belong to the run: it may gate other blocks
    return {key: value for key, value in stored.tensors.items() if key.startswith("vit.")}


def _backbone_settings(settings: Settings) -> dict[str, Any]:
    vit = settings.vit.model_dump(mode="json", include=set(OF_BACKBONE))
    return {"seed": settings.seed, "data": settings.data.model_dump(mode="json"), **vit}


def _finish(settings: Settings, data: Data, run: Run, model: GatedVit, curves: list[dict[str, Any]]) -> None:
    """Measure the trained model on the selection slice and close the stage."""
    selection = data.selection

    def accuracy(outcome: Outcome) -> float:
        return (outcome.predicted == selection.classes).double().mean().item()

    ungated_model = _stored(run, "backbone", settings.vit, data.spec, len(data.labels))
    ungated, gated = answers(ungated_model, selection, decide=keep_all), answers(model, selection)
    macs = count(model)
    measured = {
        "ungated_accuracy": accuracy(ungated),
        "accuracy": accuracy(gated),
        **usages(gated, macs),
        "most_common_label": soundness.most_common(selection.classes),
    }
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())
    print(f"vit: on the selection slice: {shown}", flush=True)
    run.write_tensors("vit", model.state_dict())
    dial = {} if model.dial is None else {"dial": calibrate(model, selection, macs).to_json()}
    result = {
        "labels": list(data.labels),
        "data": dict(data.digests),
        "image": data.spec.to_json(),
        "gated_blocks": list(model.gated_blocks),
        "heads": model.heads,
        "dim": model.dim,
        **({"mlp_groups": model.mlp_groups} if model.mlp_groups else {}),
        **dial,
        "macs": macs.to_json(),
        "origin": origin(settings, run),
        "selection": {**measured, "images": len(selection)},
        "diagnostics": gate_diagnostics(gated, selection.classes),
        "curves": curves,
    }
    run.finish("vit", settings.fingerprint("vit"), result)
    soundness.show("vit", soundness.of_vit(run.info("vit")))
