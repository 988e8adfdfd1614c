"""Finds terms by gradient descent through the frozen network, for all targets at once; and baselines in the same way.

One search serves all targets. Every step takes rows for every target: half from its classes, half from any. The loss is
the cross-entropy on true labels (which keeps other classes from being labelled as the target; own rows weigh less, to
protect precision), the KL divergence from the unsteered answers, a usage term per target, and a penalty. The weight of
the usage term integrates the distance from `usage_target`, above or below, so that methods are compared at equal usage.
Every target draws its own images, so its result does not depend on the targets that share the batch.

Usage is unit usage (Macs.usage); head usage if only heads are gated.

Letters: P profiles (targets), R rows a profile, S sites, G gated blocks, K candidates, U units, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training import processes
from training.config import ProfileSettings
from training.data.splits import Split
from training.model.gated_vit import GatedNetwork, straight_through
from training.model.macs import Macs
from training.model.sae import Sae
from training.profiles.statistics import SiteStatistics
from training.profiles.strategies import Strengths, Target
from training.steering import SteeringTerm, Terms

LEARNED: dict[str, tuple[bool, Strengths]] = {
    "learned": (False, (0.5, 0.75, 0.9, 1.0, 1.15)),
    "learned, random latents": (True, (0.75, 1.0, 1.25)),
}
"""By name of the strategy: `random_candidates` of learned(), and the strengths to try."""
BIAS_RATE, BIAS_DAMPING = 2.0, 30.0
"""A bias has to move further than terms do: with their learning rate and no damping, head usage swings between 0 and
0.47."""
PRIME = 2**63 - 25
"""Modulus of the seeds of targets, chosen so that powers of 2 do not soon repeat."""
PerRow = Callable[[int, Tensor, Tensor], Tensor]
"""(site, value of every row, profile index of every row (P*R,)) -> the values as changed by their profiles."""


@dataclass(frozen=True)
class Search:
    """The common input of all searches by gradient."""

    network: GatedNetwork
    macs: Macs
    train: Split
    unsteered: Tensor
    """Log-probabilities (B, C) of the training images without steering."""
    settings: ProfileSettings
    seed: int
    bf16: bool


def learned(
    search: Search, sae: Sae, stats: SiteStatistics, targets: Sequence[Target], random_candidates: bool = False
) -> list[Terms]:
    """Learned scale and shift of `settings.terms` candidates per site, for every target.

    random_candidates: a control that draws the candidates at random from all latents active on the target.
    """
    settings, device = search.settings, search.network.device
    if random_candidates:
        scores = [
            torch.rand(stats.mean[:, 0].shape, generator=drawing(search.seed, target)) * (stats.of(target, "mean") > 0)
            for target in targets
        ]
    else:
        scores = [gate_reach(stats, target) for target in targets]
    count = min(settings.terms, stats.mean.shape[-1])
    latent = torch.stack([score.topk(count, dim=1).indices for score in scores])  # (P, S, K)
    unit = torch.stack([  # the scale of each latent on the target, so that one step size fits all
        _activity(stats, target).gather(1, chosen) for target, chosen in zip(targets, latent, strict=True)
    ]).clamp_min(1e-3)  # fmt: skip
    latent, unit = latent.to(device), unit.to(device)
    scale_change = torch.zeros_like(unit, requires_grad=True)  # scale - 1
    shift_change = torch.zeros_like(unit, requires_grad=True)  # in units of `unit`

    def steer(site: int, residual: Tensor, profile: Tensor) -> Tensor:
        terms = latent[:, site], 1 + scale_change[:, site], (shift_change * unit)[:, site]
        return sae.steer(site, residual, *(of_site[profile] for of_site in terms))

    def penalty() -> Tensor:
        return settings.sparsity * (scale_change.abs() + shift_change.abs()).sum() / len(targets)

    what = "learned, random latents" if random_candidates else "learned"
    optimise(search, targets, [scale_change, shift_change], what, steer=steer, penalty=penalty)
    latent, scale, shift = latent.cpu(), (1 + scale_change).detach().cpu(), (shift_change * unit).detach().cpu()
    return [
        _pruned(stats, target, latent[i], scale[i], shift[i], settings.min_effect) for i, target in enumerate(targets)
    ]


def gate_bias(search: Search, targets: Sequence[Target]) -> list[Tensor]:
    """The baseline that steering must beat: a constant (G, U) for every target, added to the gate logits."""
    network = search.network
    shape = len(targets), len(network.gates), network.heads + network.mlp_groups
    raw = torch.zeros(shape, device=network.device, requires_grad=True)

    def bounded() -> Tensor:
        return 6 * torch.tanh(raw / 6)  # gate logits lie within +-4: beyond that there is no gradient

    def shifted(site: int, logit: Tensor, profile: Tensor) -> Tensor:
        return logit + bounded()[profile, site]

    faster = {"learning_rate": BIAS_RATE * search.settings.learning_rate}
    search = replace(search, settings=search.settings.model_copy(update=faster))
    optimise(search, targets, [raw], "gate-logit bias", shift_logit=shifted, damping=BIAS_DAMPING)
    return list(bounded().detach().cpu())


def optimise(
    search: Search,
    targets: Sequence[Target],
    parameters: list[Tensor],
    what: str,
    steer: PerRow | None = None,
    shift_logit: PerRow | None = None,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    damping: float = 0.0,
) -> None:
    """Optimise `parameters` in place. steer changes the input of a gate (P*R, D), shift_logit its logits (P*R, U).

    damping: of the weight of the usage term, for parameters that follow it slowly; without it, usage oscillates about
    the target.
    """
    settings, train, device = search.settings, search.train, search.network.device
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    own = settings.rows // 2
    profile = torch.arange(len(targets), device=device).repeat_interleave(settings.rows)  # (P*R,)
    is_own = (torch.arange(settings.rows) < own).repeat(len(targets)).to(device)
    usage_weight = torch.full((len(targets),), 2.0, device=device)
    soft = straight_through(2.0)
    progress = tqdm(
        range(settings.steps), desc=f"profiles: {what}", unit="step", mininterval=5, dynamic_ncols=True,
        disable=not processes.is_main(),
    )  # fmt: skip
    for step, index in zip(progress, rows(search, targets), strict=False):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, 3 * (1 - step / settings.steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=search.bf16):
            logits, out = search.network(
                train.images[index],
                None if steer is None else lambda site, residual: steer(site, residual, profile),
                soft if shift_logit is None else lambda site, logit: soft(site, shift_logit(site, logit, profile)),
            )
        answer = logits.float().log_softmax(-1)
        unsteered, classes = (of_images[index].to(device) for of_images in (search.unsteered, train.classes))
        loss = answer_loss(settings, answer, unsteered, classes, is_own)
        gate = torch.cat([out["head_gate"], out["mlp_gate"]], 2)  # (P*R, G, U)
        usage = search.macs.usage(gate)[is_own].view(len(targets), own).mean(1)  # (P,)
        damped = usage_weight + damping * (usage.detach() - settings.usage_target)
        loss = loss + (damped * usage).mean() + penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        usage_weight = (usage_weight + 0.2 * (usage.detach() - settings.usage_target)).clamp(-2, 20)
        if step % 10 == 0:
            progress.set_postfix({"loss": f"{loss.item():.3f}", "usage": f"{usage.mean().item():.3f}"}, refresh=False)


def answer_loss(settings: ProfileSettings, answer: Tensor, unsteered: Tensor, classes: Tensor, own: Tensor) -> Tensor:
    """The loss of a search without the usage term: the cross-entropy on true labels, in which own images have their own
    weight, and for the others also the KL divergence from the unsteered answers. answer, unsteered (B, C):
    log-probabilities; classes, own (B,)."""
    lost = F.nll_loss(answer, classes, reduction="none")
    if settings.keep_weight:
        moved = F.kl_div(answer, unsteered, reduction="none", log_target=True).sum(-1)
        lost = lost + settings.keep_weight * moved * ~own
    weight = torch.where(own, settings.own_weight, 1.0)
    return (weight * lost).sum() / weight.sum()


def rows(search: Search, targets: Sequence[Target]) -> Iterator[Tensor]:
    """For each step, endlessly, the row numbers (P*R,) of the training images of all targets. Half of a target's images
    have its classes, half any class."""
    own, rest = search.settings.rows // 2, search.settings.rows - search.settings.rows // 2
    draws = [drawing(search.seed, target) for target in targets]
    members = [torch.nonzero(torch.isin(search.train.classes, torch.tensor(target))).flatten() for target in targets]
    while True:
        yield torch.cat([
            torch.cat([
                of_target[torch.randint(len(of_target), (own,), generator=generator)],
                torch.randint(len(search.train), (rest,), generator=generator),
            ])
            for of_target, generator in zip(members, draws, strict=True)
        ])  # fmt: skip


def drawing(seed: int, target: Target) -> torch.Generator:
    """The random generator of a target, independent of the other targets in the search."""
    return torch.Generator().manual_seed((seed * 1_000_003 + sum(pow(2, index, PRIME) for index in target)) % 2**63)


def gate_reach(stats: SiteStatistics, target: Target) -> Tensor:
    """(S, L): the norm of each latent's effect on the gates x its activity on the target."""
    reach: Tensor = stats.of(target, "effect").norm(dim=-1) * _activity(stats, target)
    return reach


def _activity(stats: SiteStatistics, target: Target) -> Tensor:
    """(S, L): the mean + standard deviation of each latent's activation on the target."""
    return stats.of(target, "mean") + stats.of(target, "deviation")


def _pruned(
    stats: SiteStatistics, target: Target, latent: Tensor, scale: Tensor, shift: Tensor, min_effect: float
) -> Terms:
    """The terms (S, K) without those that change no gate logit of the target by more than `min_effect` on average."""
    terms: dict[int, tuple[SteeringTerm, ...]] = {}
    for site, chosen in enumerate(latent):
        change = ((scale[site] - 1) * _activity(stats, target)[site, chosen]).abs() + shift[site].abs()  # (K,)
        effect = stats.of(target, "effect")[site, chosen].abs().amax(-1) * change
        kept = torch.nonzero(effect > min_effect).flatten().tolist()
        if kept:
            terms[site] = tuple(
                SteeringTerm(int(chosen[k]), round(float(scale[site, k]), 4), round(float(shift[site, k]), 4))
                for k in kept
            )
    return terms
