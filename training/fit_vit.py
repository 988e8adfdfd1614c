"""Stage `vit`: a ViT is trained with every head on, then learns which heads it can do without.

Three phases: `backbone` (ungated), `gates` (gates alone, from fully open), `joint` (both; cross-entropy + KL to the
ungated model + usage_weight * (usage - target)^2, the target annealed from 1 over the first 60% of the phase).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.checkpoint import Run
from training.config import Settings, VitSettings
from training.data import Data, Split, augment, batches, steps
from training.gated_vit import (
    Decide,
    GatedVit,
    create_vit,
    keep_all,
    keep_positive,
    parse_gated_blocks,
    straight_through,
)
from training.image_spec import ImageSpec
from training.macs import count

SAVE_EVERY = 60.0  # seconds
UNDECAYED = ("cls_token", "pos_embed")


@dataclass(frozen=True)
class Phase:
    name: str
    epochs: float
    backbone_rate: float
    gate_rate: float


def fit_vit(settings: Settings, data: Data, run: Run) -> GatedVit:
    """Train, or go on training, the gated ViT; the finished model is in the run folder and is returned."""
    vit = settings.vit
    if run.finished("vit", settings.fingerprint("vit")):
        return load_vit(run)
    phases = (
        Phase("backbone", vit.backbone_epochs, vit.learning_rate, 0.0),
        Phase("gates", vit.gate_epochs, 0.0, vit.gate_learning_rate),
        Phase("joint", vit.joint_epochs, vit.joint_learning_rate, vit.gate_learning_rate),
    )
    torch.manual_seed(settings.seed)
    model = build(vit, data.spec, len(data.labels))
    state = run.read_state("vit", settings.fingerprint("vit"))
    first = state[1]["phase"] if state else 0
    curves: list[dict[str, Any]] = state[1]["curves"] if state else []
    for index in range(first, len(phases)):
        teacher = None
        if index > 0:
            teacher = _frozen_copy(run, vit, data)
        _run_phase(settings, data, run, model, teacher, index, phases[index], state, curves)
        state = None
        if index == 0:
            run.write_tensors("backbone", model.state_dict())
        _save(run, settings, {f"model.{k}": v for k, v in model.state_dict().items()}, index + 1, 0, curves)
    ungated, _ = accuracy_and_usage(_frozen_copy(run, vit, data), data.selection, keep_all)
    accuracy, usage = accuracy_and_usage(model, data.selection, keep_positive)
    print(f"vit: selection accuracy {ungated:.4f} ungated, {accuracy:.4f} gated at head usage {usage:.3f}", flush=True)
    run.write_tensors("vit", model.state_dict())
    result = {
        "labels": list(data.labels),
        "image": data.spec.to_json(),
        "gated_blocks": list(model.gated_blocks),
        "heads": model.heads,
        "dim": model.dim,
        "macs": count(model).to_json(),
        "selection": {"ungated_accuracy": ungated, "accuracy": accuracy, "head_usage": usage},
        "curves": curves,
    }
    run.finish("vit", settings.fingerprint("vit"), result)
    return model.eval().requires_grad_(False)


def build(settings: VitSettings, spec: ImageSpec, classes: int) -> GatedVit:
    backbone = create_vit(settings, spec, classes)
    return GatedVit(backbone, parse_gated_blocks(settings.gated_blocks, len(backbone.blocks)), spec)


def load_vit(run: Run) -> GatedVit:
    """The finished model of a run, frozen, in evaluation mode. Raises RunError when the stage is not finished."""
    info = run.info("vit")
    vit = VitSettings(**info["settings"]["vit"]).model_copy(update={"pretrained": False})
    model = build(vit, ImageSpec.from_json(info["result"]["image"]), len(info["result"]["labels"]))
    tensors = run.read_tensors("vit")
    assert tensors is not None
    model.load_state_dict(tensors[0])
    return model.eval().requires_grad_(False)


def _run_phase(
    settings: Settings,
    data: Data,
    run: Run,
    model: GatedVit,
    teacher: GatedVit | None,
    index: int,
    phase: Phase,
    state: tuple[dict[str, Tensor], dict[str, Any]] | None,
    curves: list[dict[str, Any]],
) -> None:
    """Train `model` through one phase, from `state` if given; it ends with the averaged weights."""
    vit = settings.vit
    model.vit.requires_grad_(phase.backbone_rate > 0)
    model.gates.requires_grad_(phase.gate_rate > 0)
    if vit.gate == "static":  # the biases alone decide
        for gate in model.gates:
            gate.linear.weight.requires_grad_(False)
    if vit.model == "conv_stem":
        model.vit.pos_embed.requires_grad_(False)
    model.train(phase.backbone_rate > 0)
    groups = [
        *(
            {**g, "rate": phase.backbone_rate}
            for g in param_groups_weight_decay(model.vit, vit.weight_decay, UNDECAYED)
        ),
        {
            "params": [p for p in model.gates.parameters() if p.requires_grad],
            "weight_decay": 0.0,
            "rate": phase.gate_rate,
        },
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    average = ModelEmaV3(model, decay=vit.ema_decay, use_warmup=True)
    start = state[1]["step"] if state else 0
    if state:
        _restore(state[0], model, average.module, optimizer)
    total = steps(data.train, vit.batch_size, phase.epochs)
    schedule = warmup_cosine(total)
    saved = time.monotonic()
    progress = tqdm(
        total=total, initial=start, desc=f"vit: {phase.name}", unit="step", mininterval=5, dynamic_ncols=True
    )
    for step, batch in batches(data.train, vit.batch_size, phase.epochs, settings.seed + index, start):
        if time.monotonic() - saved > SAVE_EVERY:
            _save(run, settings, _state(model, average.module, optimizer), index, step, curves)
            saved = time.monotonic()
        torch.manual_seed(
            (settings.seed * 3 + index) * 10_000_000 + step
        )  # a resumed step draws what it would have drawn
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(step)
        images = augment(batch.images, settings.data.flip, settings.data.shift)
        done = step / total
        decide = keep_all
        if teacher is not None:
            noise = gate_noise(done) if phase.name == "joint" else 1.0
            decide = straight_through(vit.gumbel_temperature, noise if vit.gate == "gumbel" else 0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            logits, out = model(images, decide=decide)
        logits, usage = logits.float(), out["head_gate"].mean()
        loss = F.cross_entropy(logits, batch.classes, label_smoothing=vit.label_smoothing)
        if teacher is not None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                wanted = teacher(images, decide=keep_all)[0].float().log_softmax(-1)
            divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            target = annealed(vit.usage_target, done) if phase.name == "joint" else 0.9
            used = usage if vit.budget == "global" else out["head_gate"].mean((0, 2))  # () or (G,)
            loss = loss + vit.distillation_weight * divergence + vit.usage_weight * (used - target).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        if step % 20 == 0 or step == total - 1:
            accuracy = (logits.argmax(-1) == batch.classes).float().mean().item()
            point = {"loss": loss.item(), "accuracy": accuracy, "usage": usage.item()}
            curves.append({"phase": phase.name, "step": step, **{k: round(v, 4) for k, v in point.items()}})
            progress.set_postfix({k: f"{v:.3f}" for k, v in point.items()}, refresh=False)
        progress.update()
    progress.close()
    model.load_state_dict(average.module.state_dict())
    model.eval()


def gate_noise(done: float) -> float:
    """Share of Gumbel noise when a share `done` of the joint phase is over: 1 for half of it, 0 in the last fifth."""
    return min(1.0, max(0.0, (0.8 - done) / 0.3))


def annealed(target: float, done: float) -> float:
    """The usage asked for when a share `done` of the joint phase is over: 1 -> target over the first 60%."""
    return 1 - (1 - target) * min(1.0, done / 0.6)


def warmup_cosine(total: int, warmup: float = 0.1) -> Callable[[int], float]:
    """Step -> share of the learning rate."""

    def share(step: int) -> float:
        done = (step + 1) / max(total, 1)
        return done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))

    return share


@torch.no_grad()
def accuracy_and_usage(model: GatedVit, split: Split, decide: Decide, size: int = 500) -> tuple[float, float]:
    """Top-1 accuracy and mean head usage on a split, in float32."""
    training = model.training
    model.eval()
    correct, usage = 0, 0.0
    for start in range(0, len(split), size):
        logits, out = model(split.images[start : start + size], decide=decide)
        correct += int((logits.argmax(-1) == split.classes[start : start + size]).sum())
        usage += out["head_gate"].mean().item() * len(logits)
    model.train(training)
    return correct / len(split), usage / len(split)


def _frozen_copy(run: Run, settings: VitSettings, data: Data) -> GatedVit:
    """The ungated model that the first phase ended with."""
    ungated = run.read_tensors("backbone")
    assert ungated is not None
    model = build(settings.model_copy(update={"pretrained": False}), data.spec, len(data.labels))
    model.load_state_dict(ungated[0])
    return model.eval().requires_grad_(False)


def _state(model: GatedVit, average: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    return tensors


def _save(
    run: Run, settings: Settings, tensors: dict[str, Tensor], phase: int, step: int, curves: list[dict[str, Any]]
) -> None:
    run.write_state("vit", settings.fingerprint("vit"), tensors, {"phase": phase, "step": step, "curves": curves})


def _restore(
    tensors: dict[str, Tensor], model: GatedVit, average: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

    model.load_state_dict(part("model"))
    if "average" not in {key.partition(".")[0] for key in tensors}:  # saved between two phases
        average.load_state_dict(part("model"))
        return
    average.load_state_dict(part("average"))
    values: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer").items():
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
