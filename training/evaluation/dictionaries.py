"""Compares autoencoders with simpler dictionaries: fidelity over k, stability, predictability of a latent's effect.

All fits here are small (SWEEP): they compare values of k and principal components with each other, not with the
autoencoders of a bundle, which are trained longer on more residuals.

Letters: B images, S sites, L latents, D residual width, A (image, latent) pairs, U units.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import SaeSettings
from training.model.gated_vit import GatedVit
from training.model.sae import Sae
from training.sae.fidelity import Reconstruct, fidelity, stability
from training.sae.fit import Fitting

KS = (2, 3, 4, 6, 8, 12, 16)
"""Active latents, or principal components, per image."""
SWEEP = SaeSettings(kind="topk", latents=256, epochs=12, batch_size=256, learning_rate=2e-3)
"""Settings of every fit except k. TopK, so that an image has exactly k active latents."""
STABLE_AT = 8
"""The k of the fits whose stability is measured."""
ACTIVE = 30
"""Fewest images, both in training and held-out, on which a latent must be active for its effect to be predicted."""


class RandomStart(Fitting):
    """Autoencoders whose rows start in random directions, so that two seeds do not share a starting point.

    Rows of `Fitting` start as residuals, so two fits to the same residuals start close to each other.
    """

    def __init__(self, train: Tensor, settings: SaeSettings):
        super().__init__(train, settings)
        with torch.no_grad():
            self.decoder.copy_(F.normalize(torch.randn_like(self.decoder), dim=-1))
            self.encoder.copy_(self.decoder)


def fitted(kind: type[Fitting], train: Tensor, k: int, seed: int, bf16: bool) -> Fitting:
    """A small fit to residuals (S, B, D)."""
    torch.manual_seed(seed)
    fitting = kind(train, SWEEP.model_copy(update={"k": k}))
    fitting.fit(seed, bf16)
    return fitting


def projection(train: Tensor, components: int) -> Reconstruct:
    """The projection onto the first principal components of residuals (S, B, D)."""
    means = train.mean(1)
    rows = [
        torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.T.flip(0)[:components]
        for x, mean in zip(train, means, strict=True)
    ]

    def reconstruct(site: int, residual: Tensor) -> tuple[Tensor, Tensor]:
        latents = (residual - means[site]) @ rows[site].T
        return latents, latents @ rows[site] + means[site]

    return reconstruct


def compared(model: GatedVit, train: Tensor, held_out: Tensor, fit: Fitting) -> dict[str, Any]:
    """FVU and gate agreement on held-out residuals, compared with as many principal components, mean over the sites.

    fit: measured before the conversion to JumpReLU.
    """
    k = fit.settings.k
    kinds = {"sae": fit.reconstruct, "pca": projection(train, k)}
    return {"k": k, **{
        name: _means(fidelity(rebuilt, model, held_out, f"dictionaries: {name}, k {k}"))
        for name, rebuilt in kinds.items()
    }}  # fmt: skip


def _means(sites: Sequence[dict[str, float]]) -> dict[str, Any]:
    kept = ("fvu", "gate_agreement", "gate_agreement_clear", "l0", "dead")
    means = {name: round(sum(site[name] for site in sites) / len(sites), 5) for name in kept}
    return {**means, "fvu_by_site": [round(site["fvu"], 5) for site in sites]}


def stabilities(train: Tensor, held_out: Tensor, seed: int, bf16: bool) -> dict[str, list[float]]:
    """For each site, how well the decoder rows of one seed reappear with another (mean of the highest cosines).

    residual start, random start: two fits each. untrained: two draws of residuals about their median, as in a residual
    start; random directions: two draws. Only stability beyond these two comes from the fit.
    """
    found = {}
    for name, kind in (("residual start", Fitting), ("random start", RandomStart)):
        fits = [fitted(kind, train, STABLE_AT, seed + 1000 * index, bf16) for index in (1, 2)]
        found[name] = stability(*(fit.folded(held_out) for fit in fits))
    for name, kind in (("untrained", Fitting), ("random directions", RandomStart)):
        pair = []
        for index in (1, 2):
            torch.manual_seed(seed + 1000 * index)
            pair.append(kind(train, SWEEP.model_copy(update={"k": STABLE_AT})).folded(held_out))
        found[name] = stability(*pair)
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


@torch.no_grad()
def effects(model: GatedVit, sae: Sae, train: Tensor, held_out: Tensor) -> list[dict[str, float]]:
    """For each site, the out-of-sample R2 of the effect of each latent on each gate logit.

    The effect on an image is the logit of the residual minus the logit of the residual without the latent's share, z
    W_dec. It is predicted as slope x z, with one slope per latent and gate, fitted through the origin on training
    images.
    r2_effect: 1 - squared error / squared effects, over all (image, active latent, gate); r2_variation: the same about
    each latent's own mean effect in training, so that only what differs between images counts. r2_median: of r2_effect
    over (latent, gate).
    """
    records = []
    for site in range(sae.sites):
        (rows, z, effect), (new_rows, new_z, new_effect) = (
            _removed(model, sae, site, some[site]) for some in (train, held_out)
        )
        summed = partial(_summed, sae.latents)
        counts = [torch.bincount(index, minlength=sae.latents) for index in (rows, new_rows)]
        kept = (counts[0] >= ACTIVE) & (counts[1] >= ACTIVE)
        square = summed(rows, z.square()[:, None]).clamp_min(1e-12)  # (L, 1)
        slope = summed(rows, effect * z[:, None]) / square  # (L, U)
        mean = summed(rows, effect) / counts[0].clamp_min(1)[:, None]
        actual = new_effect.double()
        error = summed(new_rows, (actual - slope[new_rows] * new_z[:, None]).square())[kept]  # (kept, U)
        whole = summed(new_rows, actual.square())[kept]
        varied = summed(new_rows, (actual - mean[new_rows]).square())[kept]
        records.append({
            "latents": int(kept.sum()),
            "r2_effect": round(float(1 - error.sum() / whole.sum()), 4),
            "r2_variation": round(float(1 - error.sum() / varied.sum()), 4),
            "r2_median": round(float((1 - error / whole.clamp_min(1e-12)).median()), 4),
        })  # fmt: skip
    return records


def _summed(latents: int, index: Tensor, values: Tensor) -> Tensor:
    """The sums of values (A, U) by latent, index (A,): float64 (L, U)."""
    total = torch.zeros(latents, values.shape[1], dtype=torch.float64)
    return total.index_add(0, index, values.double())


def _removed(model: GatedVit, sae: Sae, site: int, residuals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For residuals (B, D): the latent of every active pair (A,), its activation (A,) and its effect (A, U)."""
    parts = []
    for x in residuals.split(250):
        z = sae.encode(site, x)
        image, latent = z.nonzero(as_tuple=True)
        active = z[image, latent]
        without = x[image] - active[:, None] * sae.decoder[site][latent]
        parts.append((latent, active, model.gates[site](x)[image] - model.gates[site](without)))
    latents, activations, changes = (torch.cat(part) for part in zip(*parts, strict=True))
    return latents, activations, changes
