"""How steering terms are chosen for a set of classes.

`class_mean` is the paper's likely form (arXiv:2603.26743): amplify the latents that are most active on the class.
`learned` chooses latents by their effect on the gates and finds scale and shift by gradient, for all targets at once.

Letters: C classes, P profiles (targets), R rows a profile, S sites, L latents, K candidates, T terms, H heads, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn import functional as F
from tqdm import tqdm

from training.config import ProfileSettings
from training.data import Split
from training.gated_vit import GatedVit, straight_through
from training.sae import Sae
from training.steering import SteeringTerm, Terms


@dataclass(frozen=True)
class SiteStatistics:
    """What the latents do on training images, and what they do to the gates."""

    mean: Tensor
    """(S, C, L): mean activation on the images of a class."""
    deviation: Tensor
    """(S, C, L): standard deviation of the activation."""
    effect: Tensor
    """(S, C, L, H): mean change of a gate logit per unit of the latent, on the images of a class."""


@torch.no_grad()
def statistics(model: GatedVit, sae: Sae, residuals: Tensor, classes: Tensor, sample: int = 64) -> SiteStatistics:
    """From residuals (S, B, D) and their classes (B,); the effect by the Jacobian at `sample` images a class."""
    means, deviations, effects = [], [], []
    for site in range(sae.sites):
        jacobian = vmap(jacrev(model.gates[site].forward))
        of_class = [residuals[site][classes == index] for index in range(int(classes.max()) + 1)]
        latents = [sae.encode(site, x) for x in of_class]
        means.append(torch.stack([z.mean(0) for z in latents]))
        deviations.append(torch.stack([z.std(0) for z in latents]))
        towards = torch.stack([jacobian(x[:sample]).mean(0) for x in of_class])  # (C, H, D)
        effects.append(torch.einsum("chd,ld->clh", towards, sae.decoder[site]))
    return SiteStatistics(torch.stack(means), torch.stack(deviations), torch.stack(effects))


def class_mean(stats: SiteStatistics, target: tuple[int, ...], count: int) -> Terms:
    """Double the `count` latents a site that are most active on the target on average. Strength does the rest."""
    mean = stats.mean[:, list(target)].mean(1)  # (S, L)
    return {
        site: tuple(SteeringTerm(int(k), 2.0) for k in of_site.topk(min(count, len(of_site))).indices if of_site[k] > 0)
        for site, of_site in enumerate(mean)
    }


def candidates(stats: SiteStatistics, target: tuple[int, ...], count: int) -> Tensor:
    """(S, K): latents by norm of their effect on the gates x (mean + deviation of their activation) on the target."""
    index = list(target)
    reach = (stats.mean + stats.deviation)[:, index].mean(1)  # (S, L)
    score = stats.effect[:, index].mean(1).norm(dim=-1) * reach
    return score.topk(min(count, score.shape[1]), dim=1).indices


def learned(
    model: GatedVit,
    sae: Sae,
    stats: SiteStatistics,
    targets: list[tuple[int, ...]],
    train: Split,
    settings: ProfileSettings,
    seed: int,
    bf16: bool,
) -> list[Terms]:
    """Terms for every target (a set of classes), found together through the frozen network.

    Half of a target's rows are of its classes, half are any images; the loss is the cross-entropy on true labels (so
    that other classes are not pulled in; own rows count less, or precision pays for recall) + a usage term per target
    + an L1 penalty. The weight of the usage term follows the target's distance from `usage_target`.
    """
    generator = torch.Generator().manual_seed(seed)
    latent = torch.stack([candidates(stats, target, settings.terms) for target in targets])  # (P, S, K)
    unit = torch.stack([  # each latent's own scale on the target, so that one step size fits all
        (stats.mean + stats.deviation)[:, list(target)].mean(1).gather(1, chosen)
        for target, chosen in zip(targets, latent, strict=True)
    ]).clamp_min(1e-3)  # fmt: skip
    scale_change = torch.zeros_like(unit, requires_grad=True)  # scale - 1
    shift_change = torch.zeros_like(unit, requires_grad=True)  # in units of `unit`
    optimizer = torch.optim.Adam([scale_change, shift_change], lr=settings.learning_rate)
    members = [torch.nonzero(torch.isin(train.classes, torch.tensor(target))).flatten() for target in targets]
    own = settings.rows // 2
    profile = torch.arange(len(targets)).repeat_interleave(settings.rows)  # (P*R,)
    is_own = (torch.arange(settings.rows) < own).repeat(len(targets))
    weight = torch.where(is_own, settings.own_weight, 1.0)
    usage_weight = torch.full((len(targets),), 2.0)
    decide = straight_through(2.0)
    progress = tqdm(range(settings.steps), desc="profiles: learned", unit="step", mininterval=5, dynamic_ncols=True)
    for step in progress:
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, 3 * (1 - step / settings.steps))
        index = torch.cat([
            torch.cat([
                rows[torch.randint(len(rows), (own,), generator=generator)],
                torch.randint(len(train), (settings.rows - own,), generator=generator),
            ])
            for rows in members
        ])  # fmt: skip

        def steer(site: int, residual: Tensor) -> Tensor:
            terms = latent[:, site], 1 + scale_change[:, site], (shift_change * unit)[:, site]
            return sae.steer(site, residual, *(of_site[profile] for of_site in terms))

        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, out = model(train.images[index], steer, decide)
        loss = (weight * F.cross_entropy(logits.float(), train.classes[index], reduction="none")).sum() / weight.sum()
        usage = out["head_gate"].mean((1, 2))[is_own].view(len(targets), own).mean(1)  # (P,)
        loss = loss + (usage_weight * usage).mean()
        loss = loss + settings.sparsity * (scale_change.abs() + shift_change.abs()).sum() / len(targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        usage_weight = (usage_weight + 0.2 * (usage.detach() - settings.usage_target)).clamp(0.05, 20)
        if step % 10 == 0:
            progress.set_postfix({"loss": f"{loss.item():.3f}", "usage": f"{usage.mean().item():.3f}"}, refresh=False)
    scale, shift = (1 + scale_change).detach(), (shift_change * unit).detach()
    return [
        _pruned(stats, target, latent[i], scale[i], shift[i], settings.min_effect) for i, target in enumerate(targets)
    ]


def _pruned(
    stats: SiteStatistics, target: tuple[int, ...], latent: Tensor, scale: Tensor, shift: Tensor, min_effect: float
) -> Terms:
    """Terms (S, K) without those that move no gate logit of the target by more than `min_effect` on average."""
    index = list(target)
    terms: dict[int, tuple[SteeringTerm, ...]] = {}
    for site in range(latent.shape[0]):
        mean = stats.mean[site, index].mean(0)[latent[site]] + stats.deviation[site, index].mean(0)[latent[site]]
        change = ((scale[site] - 1) * mean).abs() + shift[site].abs()  # (K,)
        effect = stats.effect[site, index].mean(0)[latent[site]].abs().amax(-1) * change
        kept = torch.nonzero(effect > min_effect).flatten().tolist()
        if kept:
            terms[site] = tuple(
                SteeringTerm(int(latent[site, k]), round(float(scale[site, k]), 4), round(float(shift[site, k]), 4))
                for k in kept
            )
    return terms
