"""The phases of training a gated ViT: what each optimises, its training step, and the loop."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from training import processes
from training.checkpoint import Run, RunError, Stored, optimizer_tensors, part, restore_optimizer
from training.config import DENSE, Settings, VitSettings
from training.data.splits import Data, steps
from training.data.streams import Batch, training_batches
from training.model.gated_vit import Gate, GatedVit, keep_all, lowered, straight_through
from training.model.macs import count
from training.vit.dial import dial_step

Schedule = Callable[[float], float]
"""The completed share of a phase -> a value."""


@dataclass(frozen=True)
class Phase:
    """A phase of stage `vit`. A learning rate of 0 freezes that part of the model."""

    index: int
    name: str
    epochs: float
    backbone_rate: float
    """Learning rate."""
    gate_rate: float
    """Learning rate."""
    gate_noise: Schedule = lambda done: 0.0
    """Share of Gumbel noise in the gates' decisions."""
    usage_target: Schedule = lambda done: 1.0
    """Head usage towards which the loss trains the gates."""
    offset: float = 0.0
    """Largest offset by which the gate logits of an image are lowered; 0: no offsets."""


def phases_of(vit: VitSettings) -> tuple[Phase, Phase, Phase]:
    """The phases `backbone` (every head open), `gates` (only the gates are trained) and `joint`."""

    def noise(schedule: Schedule) -> Schedule:
        return schedule if vit.gate == "gumbel" else lambda done: 0.0

    return (
        Phase(0, "backbone", vit.backbone_epochs, vit.learning_rate, 0.0),
        Phase(
            1, "gates", vit.gate_epochs, 0.0, vit.gate_learning_rate,
            gate_noise=noise(lambda done: 1.0), usage_target=lambda done: 0.9,
        ),
        Phase(
            2, "joint", vit.joint_epochs, vit.joint_learning_rate, vit.gate_learning_rate,
            gate_noise=noise(fading), usage_target=partial(annealed, vit.usage_target), offset=vit.offset,
        ),
    )  # fmt: skip


def run_phase(
    settings: Settings,
    data: Data,
    run: Run,
    model: GatedVit,
    teacher: GatedVit | None,
    phase: Phase,
    state: Stored | None,
    curves: list[dict[str, Any]],
) -> None:
    """Train `model` through one phase. It ends with the averaged weights.

    teacher: the model for distillation. state: the state that `model` was loaded from, if a run is resumed. Raises
    RunError when the loss is not a finite number.
    """
    vit, rank = settings.vit, processes.state().process_index
    optimizer = _optimizer(model, vit, phase)
    model.train(phase.backbone_rate > 0)
    # the others may hold gradients of the previous phase
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    network = processes.parallel(model)
    average = ModelEmaV3(model, decay=vit.ema_decay, use_warmup=True)
    macs = count(average.module)
    start = state.meta["step"] if state else 0
    if state:
        _restore(state.tensors, average.module, optimizer)
    total = steps(data.train, vit.batch_size, phase.epochs)
    schedule = _schedule(optimizer, vit.schedule, total)
    saved = time.monotonic()
    progress = tqdm(
        total=total, initial=start, desc=f"vit: {phase.name}", unit="step", mininterval=5, dynamic_ncols=True,
        disable=not processes.is_main(),
    )  # fmt: skip
    stream = training_batches(
        data, settings.data, vit.batch_size, phase.epochs, settings.seed + phase.index, start, vit.label_smoothing,
        rank, processes.state().num_processes,
    )  # fmt: skip
    for step, batch in stream:
        if time.monotonic() - saved > settings.save_every:
            tensors = {**average.module.state_dict(prefix="average."), **optimizer_tensors(optimizer)}
            save(settings, data, run, model, phase.index, step, curves, tensors)
            saved = time.monotonic()
        # a resumed step draws the same numbers; each process has its own gate noise
        torch.manual_seed((settings.seed * 3 + phase.index) * 10_000_000 + step + rank * 1_000_000_007)
        schedule.step_update(step + 1)
        if vit.dial and phase.gate_rate:
            noise = phase.gate_noise(step / total)
            loss, measured = dial_step(network, average.module, teacher, noise, settings, batch, macs)
        else:
            loss, measured = train_step(network, teacher, phase, settings, batch, step / total)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update(model, step)
        if step % 20 == 0 or step == total - 1:
            point = {name: value.item() for name, value in measured.items()}
            if not math.isfinite(point["loss"]):
                raise RunError(
                    f"the loss is {point['loss']} at step {step} of phase {phase.name!r}; allowed: a finite number. "
                    "Lower the learning rates (--vit.learning-rate, --vit.gate-learning-rate, "
                    "--vit.joint-learning-rate)"
                )
            curves.append({"phase": phase.name, "step": step, **{k: round(v, 4) for k, v in point.items()}})
            progress.set_postfix({k: f"{v:.3f}" for k, v in point.items()}, refresh=False)
        progress.update()
    progress.close()
    model.load_state_dict(average.module.state_dict())
    model.eval()


def train_step(
    network: nn.Module, teacher: GatedVit | None, phase: Phase, settings: Settings, batch: Batch, done: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its record: loss, accuracy and head usage. Draws from torch's generator.

    network: the GatedVit in training, or its wrapper. done: the completed share of the phase.
    """
    vit, device = settings.vit, processes.device()
    target, images = batch.target.to(device), len(batch.target)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.bf16)
    offset = torch.zeros(images, 1, device=device)
    if phase.offset:
        offset = offsets(images, phase.offset, vit.offset_share, device)
    decide = straight_through(vit.gumbel_temperature, phase.gate_noise(done)) if phase.gate_rate else keep_all
    with autocast():
        logits, out = network(batch.images, decide=lowered(decide, offset))
    logits, plain = logits.float(), out["head_gate"][offset[:, 0] == 0]
    loss = F.cross_entropy(logits, target, label_smoothing=vit.label_smoothing if target.ndim == 1 else 0.0)
    if teacher is not None:
        with torch.no_grad(), autocast():
            ungated = teacher(batch.images, decide=keep_all)[0].float().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), ungated, reduction="batchmean", log_target=True)
        loss = loss + vit.distillation_weight * divergence
    if phase.gate_rate:
        usage = plain.mean() if vit.budget == "global" else plain.mean((0, 2))  # () or (G,)
        excess = (usage - phase.usage_target(done)).pow(2).mean()
        loss = loss + vit.usage_weight * excess
    correct = logits.argmax(-1) == (target if target.ndim == 1 else target.argmax(-1))
    return loss, {"loss": loss.detach(), "accuracy": correct.float().mean(), "usage": plain.detach().mean()}


def save(
    settings: Settings,
    data: Data,
    run: Run,
    model: GatedVit,
    phase: int,
    step: int,
    curves: list[dict[str, Any]],
    tensors: dict[str, Tensor],
) -> None:
    """Write the state for resuming before `step` of `phase`: the model and the additional `tensors`."""
    meta = {
        "phase": phase,
        "step": step,
        "curves": curves,
        "data": dict(data.digests),
        "origin": origin(settings, run),
    }
    run.write_state("vit", settings.fingerprint("vit"), {**model.state_dict(prefix="model."), **tensors}, meta)


def origin(settings: Settings, run: Run) -> dict[str, Any]:
    """What the model of a run depends on beside its fingerprint and its images: whether it is trained in bfloat16, and
    the weights of its teacher, by their digest."""
    found: dict[str, Any] = {"bf16": settings.bf16}
    teacher = teacher_run(settings.vit.teacher, run)
    if teacher is not None and (teacher.folder / "vit.safetensors").is_file():
        found["teacher"] = teacher.digest("vit.safetensors")
    return found


def teacher_run(folder: Path | None, run: Run) -> Run | None:
    """The run of the teacher. folder: vit.teacher."""
    if folder is None:
        return None
    return Run(run.folder / "controls" / DENSE if folder == DENSE else folder)


def _optimizer(model: GatedVit, vit: VitSettings, phase: Phase) -> torch.optim.Optimizer:
    """AdamW over the parameters that the phase trains; all others are frozen."""
    model.vit.requires_grad_(phase.backbone_rate > 0)
    model.gates.requires_grad_(phase.gate_rate > 0)
    dial = [] if model.dial is None else list(model.dial.requires_grad_(phase.gate_rate > 0).parameters())
    if vit.gate == "static":  # only the biases decide
        for gate in cast(Iterable[Gate], model.gates):
            gate.linear.weight.requires_grad_(False)
    if vit.model == "conv_stem":
        assert model.vit.pos_embed is not None
        model.vit.pos_embed.requires_grad_(False)
    of_backbone = param_groups_weight_decay(model.vit, vit.weight_decay)
    groups = [
        *({**group, "lr": phase.backbone_rate} for group in of_backbone),
        {
            "params": [p for p in (*model.gates.parameters(), *dial) if p.requires_grad],
            "weight_decay": 0.0,
            "lr": phase.gate_rate,
        },
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def _schedule(optimizer: torch.optim.Optimizer, name: str, total: int) -> Scheduler:
    """timm's schedule of that name over `total` steps, the first tenth of them warm-up from zero."""
    schedule: Scheduler | None
    schedule, _ = create_scheduler_v2(
        optimizer,
        name,
        num_epochs=max(total, 1),
        decay_epochs=max(1, round(0.3 * total)),
        warmup_epochs=round(0.1 * total),
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    return schedule


def offsets(images: int, largest: float, share: float, device: torch.device) -> Tensor:
    """Offsets (B, 1): uniform between 0 and `largest` for a random `share` of the images, zero for the others."""
    chosen = torch.rand(images, 1, device=device) < share
    chosen[0] = False  # at least one image counts towards the usage
    return chosen * torch.rand(images, 1, device=device) * largest


def fading(done: float) -> float:
    """Gate noise of the joint phase: 1 in the first half, falling to 0 for the last fifth."""
    return min(1.0, max(0.0, (0.8 - done) / 0.3))


def annealed(target: float, done: float) -> float:
    """Usage target of the joint phase: 1 -> target over the first 60%."""
    return 1 - (1 - target) * min(1.0, done / 0.6)


def _restore(tensors: dict[str, Tensor], average: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if weights := part(tensors, "average"):
        average.load_state_dict(weights)
        restore_optimizer(optimizer, tensors)
    else:  # saved between two phases
        average.load_state_dict(part(tensors, "model"))
