"""A model with a dial: its training step, and the knots that are measured after training.

Each image of a batch gets a requested usage: the share of the units' MACs that it may spend. The loss is the
cross-entropy for images with every unit open, the divergence from the averaged model with every unit open for the
others (in-place distillation, arXiv:1903.05134), and a term that trains the mean usage of images towards their
requested usage, at every level; a single image may spend more or less.

Letters as in gated_vit.py.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import processes
from training.checkpoint import RunError
from training.config import Settings
from training.data.splits import Split
from training.data.streams import Batch
from training.dial import Dial
from training.model.dial import LOWEST
from training.model.gated_vit import Decide, GatedVit, keep_all, straight_through
from training.model.inference import answers
from training.model.macs import Macs

OPEN_SHARE, LOWEST_SHARE = 0.15, 0.1
"""Shares of the images of a training batch with every unit open, and at the lowest usage. The others are spread evenly.
Always training the smallest network hurts the others (arXiv:2412.04786)."""
OTHERS = 0.3
"""Weight of the cross-entropy of images without every unit open; the others have weight 1."""
NEIGHBOURS = 0.1
"""`excess` compares images whose requested usages differ by less than this."""
PARTS = 2
"""Points between two learned knots at which compute is measured."""
KNOTS = 17
"""Knots of the finished dial."""
MOST = 0.98
"""Largest compute fraction that a dial may spend at its lowest usage."""


def dial_step(
    network: nn.Module, teacher: nn.Module, noise: float, settings: Settings, batch: Batch, macs: Macs
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its record: loss, accuracy, usage, and mean distance from the requested usage. Draws
    from torch's generator.

    network: the GatedVit in training, or its wrapper. teacher: its average. noise: share of Gumbel noise in the gates'
    decisions.
    """
    vit, device = settings.vit, processes.device()
    target = batch.target.to(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.bf16)
    asked = draw(len(target), device)
    whole = asked == 1
    with autocast():
        logits, out = network(
            batch.images, decide=open_where(whole, straight_through(vit.gumbel_temperature, noise)), usage=asked
        )
        with torch.no_grad():
            taught = teacher(batch.images, decide=keep_all)[0].float().log_softmax(-1)
    logits = logits.float()
    smoothing = vit.label_smoothing if target.ndim == 1 else 0.0
    own = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    divergence = F.kl_div(logits.log_softmax(-1), taught, reduction="none", log_target=True).sum(1)
    spent = macs.usage(torch.cat([out["head_gate"], out["mlp_gate"]], 2))
    loss = torch.where(whole, own, OTHERS * own + vit.distillation_weight * divergence).mean()
    loss = loss + vit.usage_weight * excess(spent[~whole], asked[~whole])
    correct = logits.argmax(-1) == (target if target.ndim == 1 else target.argmax(-1))
    error = (spent - asked).detach()[~whole].mean()
    return loss, {
        "loss": loss.detach(), "accuracy": correct.float().mean(), "usage": spent.detach().mean(), "error": error,
    }  # fmt: skip


def draw(images: int, device: torch.device) -> Tensor:
    """The requested usages (B,) of a batch."""
    usage = LOWEST + (1 - LOWEST) * torch.rand(images, device=device)
    kind = torch.rand(images, device=device)
    usage = torch.where(kind < OPEN_SHARE + LOWEST_SHARE, LOWEST, usage)
    return torch.where(kind < OPEN_SHARE, 1.0, usage)


def excess(spent: Tensor, asked: Tensor) -> Tensor:
    """The squared distance of the mean of `spent` from `asked`, averaged over the requested usages; all (B,).

    The mean of (spent_i - asked_i)(spent_j - asked_j) over pairs of different images with about the same request. This
    estimate is unbiased: unlike the square of a batch's mean, it does not penalise the variance between images. (A
    kernel estimate of a conditional moment: Bierens, J. Econometrics 20, 1982.)
    """
    error = spent - asked
    near = (1 - (asked[:, None] - asked).abs() / NEIGHBOURS).clamp(min=0)
    near = near - torch.diag(near.diagonal())
    return (error @ near @ error) / near.sum().clamp(min=1e-6)


def open_where(whole: Tensor, decide: Decide) -> Decide:
    """`decide`, but with every unit of the images `whole` (B,) open, without noise."""
    return lambda site, logit: torch.where(whole[:, None], 1.0, decide(site, logit))


@torch.no_grad()
def calibrate(model: GatedVit, split: Split, macs: Macs) -> Dial:
    """The dial of a trained model: knots evenly spread over the budgets that it can spend, and their biases.

    The mean compute on `split` is measured along the learned knots, and again at the positions that this gives for the
    knots of the dial; between these it is interpolated. Raises RunError when the model has hardly learned to spend
    less.
    """
    assert model.dial is not None
    learned = model.dial.usage.double().cpu().numpy()
    places = np.interp(np.arange((len(learned) - 1) * PARTS + 1) / PARTS, np.arange(len(learned)), learned)
    spent = _spent(model, split, macs, places)
    assert spent[-1] == 1, "every unit is open at the last knot"
    if spent[0] > MOST:
        raise RunError(
            f"at its lowest usage the dial spends {spent[0]:.4f} of the compute; allowed: {MOST} or less. "
            "Train longer (--vit.joint-epochs), or weigh the usage more (--vit.usage-weight)"
        )
    budgets = np.unique(np.linspace(math.ceil(spent[0] * 1000) / 1000, 1, KNOTS).round(4))
    first = _place_of(budgets, places, spent)
    places, order = np.unique(np.concatenate([places, first]), return_index=True)
    spent = np.concatenate([spent, _spent(model, split, macs, first)])[order]
    knots = _biases(model, _place_of(budgets, places, spent)).cpu().numpy()
    return Dial(budgets, np.maximum.accumulate(knots))


def _biases(model: GatedVit, usage: np.ndarray) -> Tensor:
    """Gate biases (P, G, U) at P usages of the learned dial."""
    assert model.dial is not None
    biases: Tensor = model.dial(torch.tensor(usage, dtype=torch.float32, device=model.device))
    return biases


def _spent(model: GatedVit, split: Split, macs: Macs, usage: np.ndarray) -> np.ndarray:
    """Mean compute fraction (P,) at P usages of the learned dial."""
    outcomes = (answers(model, split, gate_bias=bias) for bias in _biases(model, usage))
    return np.array([float(outcome.compute_fraction(macs).mean()) for outcome in outcomes])


def _place_of(budget: np.ndarray, usage: np.ndarray, spent: np.ndarray) -> np.ndarray:
    """Usages of the learned dial that spend these budgets, interpolated from the compute `spent` at rising `usage`."""
    spent = np.maximum.accumulate(spent)
    last = len(spent) - 1 - np.unique(spent[::-1], return_index=True)[1]  # among usages that spend the same
    usages: np.ndarray = np.interp(budget, spent[last], usage[last])
    return usages
