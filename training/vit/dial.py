"""A model with a dial: its training step, and the knots that are measured after training.

Each image of a batch gets a requested usage: the share of the units' MACs that it may spend. The loss is the
cross-entropy for images with every unit open, the divergence from the averaged model with every unit open for the
others (in-place distillation, arXiv:1903.05134), and a term that trains the mean usage of images towards their
requested usage, at every level; a single image may spend more or less. With vit.teacher, all images are distilled from
a plain ViT instead.

Letters as in gated_vit.py.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from scipy.interpolate import interp1d
from torch import Tensor, nn
from torch.nn import functional as F

from training import processes
from training.checkpoint import RunError
from training.config import Settings
from training.data.splits import Split
from training.data.streams import Batch
from training.dial import ALL_OPEN, MIN_KNOTS, Dial
from training.model.dial import LOWEST
from training.model.gated_vit import Decide, GatedVit, keep_all, straight_through
from training.model.inference import Outcome, answers
from training.model.macs import Macs

OPEN_SHARE, LOWEST_SHARE = 0.15, 0.1
"""Shares of the images of a training batch with every unit open, and at the lowest usage. The others are spread evenly.
Always training the smallest network hurts the others (arXiv:2412.04786)."""
OTHERS = 0.3
"""Weight of the cross-entropy of images without every unit open; the others have weight 1."""
NEIGHBOURS = 0.1
"""`excess` compares images whose requested usages differ by less than this."""
PARTS = 2
"""Points from one learned knot to the next at which compute is measured."""
IMAGES = 2000
"""Largest number of images that compute is measured on."""
STEP = 0.004
"""Smallest distance of two budgets above the learned knots."""
KNOTS = 17
"""Knots of the finished dial, if the learned ones reach up to 1."""
MOST = 0.98
"""Largest compute fraction that a dial may spend at its lowest usage."""


def dial_step(
    network: nn.Module,
    average: nn.Module,
    teacher: nn.Module | None,
    noise: float,
    settings: Settings,
    batch: Batch,
    macs: Macs,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its record: loss, accuracy, usage, and mean distance from the requested usage. Draws
    from torch's generator.

    network: the GatedVit in training, or its wrapper. average: its average, the teacher of images with closed units.
    teacher: of all images, in place of the average. noise: share of Gumbel noise in the gates' decisions.
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
            taught = (teacher or average)(batch.images, decide=keep_all)[0].float().log_softmax(-1)
    logits = logits.float()
    smoothing = vit.label_smoothing if target.ndim == 1 else 0.0
    own = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    divergence = F.kl_div(logits.log_softmax(-1), taught, reduction="none", log_target=True).sum(1)
    spent = macs.usage(torch.cat([out["head_gate"], out["mlp_gate"]], 2))
    taught_whole = vit.distillation_weight if teacher is not None else 0.0
    loss = torch.where(
        whole, own + taught_whole * divergence, OTHERS * own + vit.distillation_weight * divergence
    ).mean()
    loss = loss + vit.usage_weight * excess(spent[~whole], asked[~whole])
    correct = logits.argmax(-1) == (target if target.ndim == 1 else target.argmax(-1))
    error = (spent - asked).detach()[~whole].mean().nan_to_num()  # 0 of no images
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
    """The dial of a trained model: budgets, and the gate biases that spend them on the images of `split`.

    Below the last knot with learned biases: budgets evenly spread, at places between the learned knots that are
    interpolated from the mean compute measured there, and once more at the places found. Above it: `opened`. Raises
    RunError when the model has hardly learned to spend less.
    """
    assert model.dial is not None
    images = split.take(torch.arange(0, len(split), math.ceil(len(split) / IMAGES)))
    learned = model.dial.knots().cpu().numpy()[:-1]

    def at(places: np.ndarray) -> np.ndarray:
        biases: np.ndarray = interp1d(np.arange(len(learned)), learned, axis=0)(places).astype(np.float32)
        return biases

    places = np.arange((len(learned) - 1) * PARTS + 1) / PARTS
    outcomes = _outcomes(model, images, at(places))
    spent = _spent(outcomes, macs)
    if spent[0] > MOST:
        raise RunError(
            f"at its lowest usage the dial spends {spent[0]:.4f} of the compute; allowed: {MOST} or less. "
            "Train longer (--vit.joint-epochs), or weigh the usage more (--vit.usage-weight)"
        )
    spread = np.linspace(math.ceil(spent[0] * 1000) / 1000, 1, KNOTS).round(4)
    budgets = spread[spread < spent[-1] - STEP]
    found = np.setdiff1d(_place_of(budgets, places, spent), places)
    places, order = np.unique(np.concatenate([places, found]), return_index=True)
    spent = np.concatenate([spent, _spent(_outcomes(model, images, at(found)), macs)])[order]
    below = np.maximum.accumulate(at(_place_of(budgets, places, spent)))
    above, biases = opened(outcomes[-1], learned[-1], macs)
    return _enough(np.concatenate([budgets, above]), np.concatenate([below, biases]))


def opened(outcome: Outcome, bias: np.ndarray, macs: Macs) -> tuple[np.ndarray, np.ndarray]:
    """Budgets (N,) and gate biases (N, G, U) from `bias` (G, U), under which the images have `outcome`, to all units
    open: unit by unit, those of the last block first, in steps of at least STEP.

    An open unit changes the input of the gates of later blocks, which may close others. Those are open by then, so
    each step adds what the unit costs the images that close it.
    """
    open_share = outcome.gate.double().mean(0)  # (G, U)

    def spent() -> float:
        return float(macs.fraction(open_share[None, :, : outcome.heads], open_share[None, :, outcome.heads :]))

    budgets, biases, now = [spent()], [bias], bias.copy()
    for block in reversed(range(len(bias))):
        for unit in open_share[block].argsort(descending=True, stable=True).tolist():
            now[block, unit] = max(now[block, unit], ALL_OPEN)
            open_share[block, unit] = 1
            if budgets[-1] + STEP <= spent() <= 1 - STEP:
                budgets.append(spent())
                biases.append(now.copy())
    first = 0 if budgets[0] <= 1 - STEP else 1
    return np.array([*budgets[first:], 1.0]).round(6), np.stack([*biases[first:], now])


def _enough(budgets: np.ndarray, biases: np.ndarray) -> Dial:
    """The dial through these knots. If they are too few, more are interpolated, which changes no bias of the dial."""
    if len(budgets) < MIN_KNOTS:
        places = np.union1d(budgets, np.linspace(budgets[0], 1, MIN_KNOTS).round(6))
        budgets, biases = places, interp1d(budgets, biases, axis=0)(places).astype(np.float32)
    return Dial(budgets, biases)


def _outcomes(model: GatedVit, split: Split, biases: np.ndarray) -> list[Outcome]:
    """The outcomes under gate biases (N, G, U)."""
    return [answers(model, split, gate_bias=bias) for bias in torch.from_numpy(biases).to(model.device)]


def _spent(outcomes: Sequence[Outcome], macs: Macs) -> np.ndarray:
    """Mean compute fractions (N,)."""
    return np.array([float(outcome.compute_fraction(macs).mean()) for outcome in outcomes])


def _place_of(budget: np.ndarray, places: np.ndarray, spent: np.ndarray) -> np.ndarray:
    """The places at which these budgets are spent, interpolated from the compute `spent` at rising `places`."""
    spent = np.maximum.accumulate(spent)
    last = len(spent) - 1 - np.unique(spent[::-1], return_index=True)[1]  # among places that spend the same
    found: np.ndarray = np.interp(budget, spent[last], places[last])
    return found
