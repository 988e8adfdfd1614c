"""Selective profiles: for all traffic; they close units on images of a context and leave other images alone.

    x' = x + sum_k (scale_k - 1) z_k W_dec[k]

A scale term adds exactly nothing where its latent is inactive (z = 0), so an image on which no steered latent is active
has the same answer as without steering, to the bit. Where a latent is active, z exceeds its threshold and the gate's
layer norm bounds the effect of a large scale, so such a term comes close to adding a fixed direction whenever the
latent is active. A constant on the gate logits cannot do this: it is the same for every image.

The search uses a few images of the context and a background of others. It closes units on the context's images, at a
price for changed answers. It keeps the change of compute on the background below an allowance, by a price that rises
until this holds.

Letters: B images, S sites, L latents, K candidates, D width, G gated blocks, U units, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.data.splits import Split
from training.model.gated_vit import GatedNetwork, straight_through
from training.model.inference import Outcome
from training.model.macs import Macs
from training.model.sae import Sae
from training.steering import SteeringTerm, Terms

PerImage = Callable[[int, Tensor], Tensor]
"""(site, residual (B, D) or gate logits (B, U)) -> the same, changed."""


@dataclass(frozen=True)
class SelectiveSettings:
    """Settings of the search."""

    terms: int = 32
    """Largest number of terms per site."""
    leak: float = 0.05
    """A latent is a candidate if it is active on at most this share of the background."""
    allowance: float = 0.004
    """Largest mean change of the compute fraction on background images in the search."""
    closing: float = 1.0
    """Weight of the unit usage of the context's images; the KL divergence of their answers, in nats, has weight 1."""
    steps: int = 120
    rows: int = 16
    """Images of the context per step, and as many of the background."""
    learning_rate: float = 0.1
    """Learning rate of Adam; falls to 0 over the last third of the steps."""
    min_change: float = 0.05
    """Terms with a smaller |scale - 1| are dropped."""


@dataclass(frozen=True)
class Examples:
    """Some images, with the model's answers and residuals on them without steering."""

    split: Split
    unsteered: Outcome
    residuals: Tensor
    """float32 (S, B, D)"""

    def __len__(self) -> int:
        return len(self.split)

    def take(self, index: Tensor) -> "Examples":
        """The examples at `index`, int64 rows."""
        return Examples(self.split.take(index), self.unsteered.take(index), self.residuals[:, index])


@dataclass(frozen=True)
class Task:
    """The input of a search: images of the context, and a background of images outside it."""

    network: GatedNetwork
    macs: Macs
    own: Examples
    others: Examples
    settings: SelectiveSettings
    seed: int
    bf16: bool


def selective(task: Task, sae: Sae, what: str = "selective") -> Terms:
    """The terms that a search finds: scales only, on latents that are exclusive to the context's images."""
    settings, sites = task.settings, sae.sites
    latent, allowed = candidates(task, sae)  # (S, K)
    change = torch.zeros(latent.shape, requires_grad=True)  # scale - 1
    none = torch.zeros(latent.shape[1])

    def steer(site: int, residual: Tensor) -> Tensor:
        rows = latent[site].expand(len(residual), -1)
        return sae.steer(site, residual, rows, 1 + change[site] * allowed[site], none)

    every = {site: tuple(map(SteeringTerm, latent[site, allowed[site] > 0].tolist())) for site in range(sites)}
    optimise(task, [change], what, touched(sae, task.others.residuals, every), steer=steer)
    found = (change.detach() * allowed).tolist()
    terms = {
        site: tuple(
            SteeringTerm(int(k), round(1 + c, 4))
            for k, c in zip(latent[site], found[site], strict=True)
            if abs(c) > settings.min_change
        )
        for site in range(sites)
    }
    return {site: of_site for site, of_site in terms.items() if of_site}


def candidates(task: Task, sae: Sae) -> tuple[Tensor, Tensor]:
    """Latents (S, K), and whether each may be steered (float32, 0 or 1): it is active on at most `settings.leak` of the
    background. Latents with the largest effect on the context's images come first."""
    latents, allowed = [], []
    for site in range(sae.sites):
        own, others = (sae.encode(site, some.residuals[site]) for some in (task.own, task.others))
        reach = own.mean(0) * ((others > 0).float().mean(0) <= task.settings.leak)  # (L,)
        best = reach.topk(min(task.settings.terms, sae.latents))
        latents.append(best.indices)
        allowed.append((best.values > 0).float())
    return torch.stack(latents), torch.stack(allowed)


def optimise(
    task: Task,
    parameters: list[Tensor],
    what: str,
    within: Tensor,
    steer: PerImage | None = None,
    shift_logit: PerImage | None = None,
) -> None:
    """Optimise `parameters` in place. steer changes the input of a gate, shift_logit its logits; steer is called first.

    within (B,): the background images that can change at all. Only these are run; the others count as unchanged.
    """
    settings, network = task.settings, task.network
    others = task.others.take(torch.nonzero(within).flatten())
    share = len(others) / len(task.others)
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    soft = straight_through(2.0)
    size = min(settings.rows, len(task.own))
    cost = _costs(task)
    price, generator = 20.0, torch.Generator().manual_seed(task.seed)
    progress = tqdm(
        range(settings.steps), desc=f"selective: {what}", unit="step", mininterval=5, dynamic_ncols=True, leave=False
    )
    for step in progress:
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, 3 * (1 - step / settings.steps))
        drawn = [
            torch.randperm(len(task.own), generator=generator)[:size],
            torch.randint(max(len(others), 1), (min(settings.rows, len(others)),), generator=generator),
        ]
        images, before, gates = (
            torch.cat(parts)
            for parts in zip(*(
                (some.split.images[index], some.unsteered.logits[index], some.unsteered.gate_logit[index] > 0)
                for some, index in zip((task.own, others), drawn, strict=True)
            ), strict=True)
        )  # fmt: skip
        with torch.autocast(network.device.type, torch.bfloat16, enabled=task.bf16):
            logits, out = network(
                images,
                steer,
                soft if shift_logit is None else lambda site, logit: soft(site, shift_logit(site, logit)),
            )
        answer = logits.float().log_softmax(-1)
        changed = F.kl_div(answer, before.log_softmax(-1), reduction="none", log_target=True).sum(-1)  # (B,)
        units = torch.cat([out["head_gate"], out["mlp_gate"]], 2)  # (B, G, U)
        usage = (units[:size] * cost).sum((1, 2)).mean() / cost.sum()
        moved = share * ((units[size:] - gates[size:].float()).abs() * cost).sum() / max(len(drawn[1]), 1)
        kept = changed[:size].mean() + share * changed[size:].sum() / max(len(drawn[1]), 1)
        loss = settings.closing * usage + kept + price * moved
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        price = min(max(price * (1 + 0.05 * float(moved.detach() / settings.allowance - 1)), 1.0), 500.0)
        if step % 10 == 0:
            progress.set_postfix({"usage": f"{usage.item():.3f}", "moved": f"{moved.item():.4f}"}, refresh=False)


def _costs(task: Task) -> Tensor:
    """(G, U): the share of each unit in the compute of the whole model."""
    network, macs = task.network, task.macs
    heads = torch.tensor(macs.per_head).float()[:, None].expand(-1, network.heads)
    groups = torch.tensor(macs.per_mlp_group or [0] * len(heads)).float()[:, None].expand(-1, network.mlp_groups)
    return torch.cat([heads, groups], 1) / macs.dense


def touched(sae: Sae, residuals: Tensor, terms: Terms) -> Tensor:
    """Whether any steered latent is active on the unsteered residuals (S, B, D) of each image: bool (B,).

    If none is, the first gate reads the same as without steering, and so does every later one: the answer is the
    unsteered one.
    """
    found = torch.zeros(residuals.shape[1], dtype=torch.bool)
    for site, of_site in terms.items():
        latents = [term.latent for term in of_site]
        raw = residuals[site] - sae.decoder_bias[site]
        active = raw @ sae.encoder[site, latents].T + sae.encoder_bias[site, latents] > sae.threshold[site, latents]
        found |= active.any(1)
    return found


def composed(profiles: Sequence[Terms]) -> Terms:
    """One profile with the effect of several: changes of a latent that several profiles name are added.

    Raises ValueError for a term with a shift, which acts on every image.
    """
    changes: dict[int, dict[int, float]] = {}
    for terms in profiles:
        for site, of_site in terms.items():
            for term in of_site:
                if term.shift:
                    raise ValueError(f"latent {term.latent} at site {site} has the shift {term.shift}; allowed: 0")
                of_latent = changes.setdefault(site, {})
                of_latent[term.latent] = of_latent.get(term.latent, 0.0) + term.scale - 1
    return {
        site: tuple(SteeringTerm(latent, 1 + change) for latent, change in sorted(of_site.items()))
        for site, of_site in sorted(changes.items())
    }
