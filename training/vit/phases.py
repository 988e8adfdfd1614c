"""One phase of the training of a gated ViT: its loop, what it optimises, and the state it goes on from."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training import processes
from training.checkpoint import Run
from training.config import Settings, VitSettings
from training.data.splits import Data, steps
from training.data.streams import training_batches
from training.model.gated_vit import Decide, Gate, GatedVit, keep_all, lowered, straight_through

UNDECAYED = ("cls_token", "pos_embed")
State = tuple[dict[str, Tensor], dict[str, Any]]
"""What Run.read_state gives."""


@dataclass(frozen=True)
class Phase:
    """A phase of stage `vit`. A rate is a learning rate; where it is 0, that part of the model is frozen."""

    index: int
    name: str
    epochs: float
    backbone_rate: float
    gate_rate: float


def run_phase(
    settings: Settings,
    data: Data,
    run: Run,
    model: GatedVit,
    teacher: GatedVit | None,
    phase: Phase,
    state: State | None,
    curves: list[dict[str, Any]],
) -> None:
    """Train `model` through one phase; it ends with the averaged weights.

    state: what `model` was loaded from, if it goes on from one.
    """
    vit, rank = settings.vit, processes.state().process_index
    optimizer = _optimizer(model, vit, phase)
    model.train(phase.backbone_rate > 0)
    # the others may hold gradients of the phase before
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wrapped = processes.parallel(model)
    average = ModelEmaV3(model, decay=vit.ema_decay, use_warmup=True)
    start = state[1]["step"] if state else 0
    if state:
        _restore(state[0], average.module, optimizer)
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
            meta = {"phase": phase.index, "step": step, "curves": curves, "data": dict(data.found)}
            run.write_state("vit", settings.fingerprint("vit"), _state(model, average.module, optimizer), meta)
            saved = time.monotonic()
        # a resumed step draws what it would have drawn; each process its own gate noise
        torch.manual_seed((settings.seed * 3 + phase.index) * 10_000_000 + step + rank * 1_000_000_007)
        schedule.step_update(step + 1)
        done, target = step / total, batch.target.to(model.mean.device)
        offset = torch.zeros(len(target), 1, device=target.device)
        decide: Decide = keep_all
        if teacher is not None:
            noise = gate_noise(done) if phase.name == "joint" else 1.0
            decide = straight_through(vit.gumbel_temperature, noise if vit.gate == "gumbel" else 0.0)
            if phase.name == "joint" and vit.offset:
                offset = offsets(len(target), vit, target.device)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=settings.bf16):
            logits, out = wrapped(batch.images, decide=lowered(decide, offset))
        logits, plain = logits.float(), out["head_gate"][offset[:, 0] == 0]
        loss = F.cross_entropy(logits, target, label_smoothing=vit.label_smoothing if target.ndim == 1 else 0.0)
        if teacher is not None:
            with torch.no_grad(), torch.autocast(target.device.type, torch.bfloat16, enabled=settings.bf16):
                wanted = teacher(batch.images, decide=keep_all)[0].float().log_softmax(-1)
            divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            goal = annealed(vit.usage_target, done) if phase.name == "joint" else 0.9
            used = plain.mean() if vit.budget == "global" else plain.mean((0, 2))  # () or (G,)
            loss = loss + vit.distillation_weight * divergence + vit.usage_weight * (used - goal).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update(model, step)
        if step % 20 == 0 or step == total - 1:
            right = logits.argmax(-1) == (target if target.ndim == 1 else target.argmax(-1))
            point = {"loss": loss.item(), "accuracy": right.float().mean().item(), "usage": plain.mean().item()}
            curves.append({"phase": phase.name, "step": step, **{k: round(v, 4) for k, v in point.items()}})
            progress.set_postfix({k: f"{v:.3f}" for k, v in point.items()}, refresh=False)
        progress.update()
    progress.close()
    model.load_state_dict(average.module.state_dict())
    model.eval()


def _optimizer(model: GatedVit, vit: VitSettings, phase: Phase) -> torch.optim.Optimizer:
    """AdamW over what the phase trains; everything else is frozen."""
    model.vit.requires_grad_(phase.backbone_rate > 0)
    model.gates.requires_grad_(phase.gate_rate > 0)
    if vit.gate == "static":  # the biases alone decide
        for gate in cast(Iterable[Gate], model.gates):
            gate.linear.weight.requires_grad_(False)
    if vit.model == "conv_stem":
        assert model.vit.pos_embed is not None
        model.vit.pos_embed.requires_grad_(False)
    of_backbone = param_groups_weight_decay(model.vit, vit.weight_decay, UNDECAYED)  # type: ignore[arg-type]
    groups = [
        *({**group, "lr": phase.backbone_rate} for group in of_backbone),
        {
            "params": [p for p in model.gates.parameters() if p.requires_grad],
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


def offsets(images: int, vit: VitSettings, device: torch.device) -> Tensor:
    """(B, 1): zero for most images, for a random share of `offset_share` uniform between 0 and `offset`."""
    chosen = torch.rand(images, 1, device=device) < vit.offset_share
    chosen[0] = False  # at least one image tells the usage
    return chosen * torch.rand(images, 1, device=device) * vit.offset


def gate_noise(done: float) -> float:
    """Share of Gumbel noise when a share `done` of the joint phase is over: 1 for half of it, 0 in the last fifth."""
    return min(1.0, max(0.0, (0.8 - done) / 0.3))


def annealed(target: float, done: float) -> float:
    """The usage asked for when a share `done` of the joint phase is over: 1 -> target over the first 60%."""
    return 1 - (1 - target) * min(1.0, done / 0.6)


def _state(model: GatedVit, average: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    return tensors


def _restore(tensors: dict[str, Tensor], average: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

    if "average" not in {key.partition(".")[0] for key in tensors}:  # saved between two phases
        average.load_state_dict(part("model"))
        return
    average.load_state_dict(part("average"))
    values: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer").items():
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
