"""Statistics of the latents on images, and their effect on the gates and the answer; strategies choose by them.

Letters: B images, C classes, S sites, L latents, U units (heads, then MLP groups), D width.
"""

from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.func import jacrev, vmap

from training.data.splits import Split
from training.model.gated_vit import GatedNetwork, straight_through
from training.model.macs import Macs
from training.model.sae import Sae


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics measured on training images."""

    mean: Tensor
    """(S, C, L): mean activation on the images of a class."""
    deviation: Tensor
    """(S, C, L): standard deviation of the activation."""
    frequency: Tensor
    """(S, C, L): share of the images on which the latent is active."""
    rest: Tensor
    """(S, C, L): mean activation on the images of all other classes."""
    auroc: Tensor
    """(S, C, L): how well the activation separates the class from the rest; 0.5: not at all."""
    effect: Tensor
    """(S, C, L, U): mean change of a gate logit per unit of the latent, on the images of a class."""
    attribution: Tensor
    """(S, C, L): mean activation x gradient of (class logit - usage_weight x unit usage): above 0, amplifying helps."""

    def of(self, target: tuple[int, ...], field: str) -> Tensor:
        """A field averaged over the target's classes: (S, L), or (S, L, U) for the effect."""
        value: Tensor = getattr(self, field)[:, list(target)].mean(1)
        return value


def measure(
    model: GatedNetwork,
    sae: Sae,
    macs: Macs,
    residuals: Tensor,
    split: Split,
    sample: int = 64,
    usage_weight: float = 10.0,
) -> SiteStatistics:
    """The statistics of a split. residuals: (S, B, D) of its images. Effect and attribution use `sample` images per
    class."""
    classes, device = int(split.classes.max()) + 1, model.device
    members = [torch.nonzero(split.classes == index).flatten() for index in range(classes)]
    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("mean", "deviation", "frequency", "rest", "auroc", "effect")
    }
    with torch.no_grad():
        for site in range(sae.sites):
            z = sae.encode(site, residuals[site].to(device)).cpu()  # (B, L)
            of_class = [z[rows] for rows in members]
            mean = torch.stack([v.mean(0) for v in of_class])  # (C, L)
            counts = torch.tensor([len(rows) for rows in members])[:, None]
            columns["mean"].append(mean)
            columns["deviation"].append(torch.stack([v.std(0, correction=int(len(v) > 1)) for v in of_class]))
            columns["frequency"].append(torch.stack([(v > 0).float().mean(0) for v in of_class]))
            columns["rest"].append(((mean * counts).sum(0) - mean * counts) / (len(z) - counts))
            columns["auroc"].append(auroc(z, members))
            jacobian = vmap(jacrev(model.gates[site].forward))
            picked = [residuals[site][rows[:sample]].to(device) for rows in members]
            towards = torch.stack([jacobian(of_class).mean(0) for of_class in picked])  # (C, U, D)
            columns["effect"].append(torch.einsum("cud,ld->clu", towards, sae.decoder[site]).cpu())
    stacked = {name: torch.stack(values) for name, values in columns.items()}
    per_class = [
        attribution(model, sae, macs, split.take(rows[:sample]), index, usage_weight)
        for index, rows in enumerate(members)
    ]
    return SiteStatistics(**stacked, attribution=torch.stack(per_class, 1))


def auroc(z: Tensor, members: list[Tensor]) -> Tensor:
    """AUROC (C, L) of activations (B, L) for each class, given the images of each. Ties count half (Mann-Whitney U / (n
    m))."""
    ranks = torch.from_numpy(rankdata(z.numpy(), axis=0)).float()  # (B, L), from 1
    rows = []
    for own in members:
        n, m = len(own), len(z) - len(own)
        rows.append((ranks[own].double().sum(0) - n * (n + 1) / 2) / (n * m))
    return torch.stack(rows).float()


def attribution(model: GatedNetwork, sae: Sae, macs: Macs, split: Split, label: int, usage_weight: float) -> Tensor:
    """(S, L): mean over the split of z_k * d(logit of `label` - usage_weight * unit usage)/dz_k, through soft gates."""
    changes: list[Tensor] = []
    latents: list[Tensor] = []

    def steer(site: int, residual: Tensor) -> Tensor:
        change = torch.zeros_like(residual, requires_grad=True)
        changes.append(change)
        latents.append(sae.encode(site, residual.detach()))
        return residual + change

    with torch.enable_grad():
        logits, out = model(split.images[:], steer, straight_through(2.0))
        usage = macs.usage(torch.cat([out["head_gate"], out["mlp_gate"]], 2))  # (B,)
        objective = logits[:, label].sum() - usage_weight * usage.sum()
        gradients = torch.autograd.grad(objective, changes)
    return torch.stack([
        (z * (gradient @ sae.decoder[site].T)).mean(0).cpu()
        for site, (z, gradient) in enumerate(zip(latents, gradients, strict=True))
    ])  # fmt: skip
