"""What a sceptic would use in place of SAE latents for a selective profile, found from the same images.

- A linear probe on the residual that each gate reads; if it fires, a constant per unit is added to the gate logits.
- The same search over scale terms with other dictionaries: principal components, thresholded to be as sparse as the
SAE's latents, and an autoencoder whose decoder is random and frozen (arXiv:2602.14111).

Letters: B images, S sites, L latents, D width, G gated blocks, U units.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import SaeSettings
from training.evaluation.baselines import Rival
from training.model.gated_vit import keep_positive
from training.model.sae import Sae
from training.profiles.selective import Task, optimise
from training.sae.fit import Fitting


@dataclass(frozen=True)
class Probe:
    """A bias on the gate logits that a linear probe at each site switches on."""

    weight: Tensor
    """(S, D)"""
    offset: Tensor
    """(S,): the probe fires if weight x residual + offset is above 0."""
    bias: Tensor
    """(G, U): added to the gate logits if the probe fires."""
    firing: dict[int, Tensor] = field(default_factory=dict, compare=False)
    """Whether the probe fires on the current batch: (B, 1) by site."""

    def fires(self, site: int, residual: Tensor) -> Tensor:
        """Whether the probe of a site fires on each image: bool (B,)."""
        return residual @ self.weight[site] + self.offset[site] > 0

    def steer(self, site: int, residual: Tensor) -> Tensor:
        """Returns the residual unchanged; records where the probe fires."""
        self.firing[site] = self.fires(site, residual)[:, None].float()
        return residual

    def at(self, strength: float) -> Rival:
        """The probe with its bias multiplied by a strength."""

        def decide(site: int, logit: Tensor) -> Tensor:
            return keep_positive(site, logit + strength * self.bias[site] * self.firing[site])

        return Rival(self.steer, decide)

    def touched(self, residuals: Tensor) -> Tensor:
        """Whether it fires at any site on the unsteered residuals (S, B, D) of each image: bool (B,)."""
        return torch.stack([self.fires(site, of_site) for site, of_site in enumerate(residuals)]).any(0)


def probe(task: Task, what: str = "probe") -> Probe:
    """A logistic regression per site that fires on `leak` of the background, with a bias from the search for terms."""
    sites, _, dim = task.own.residuals.shape
    weight, offset = torch.zeros(sites, dim), torch.zeros(sites)
    for site in range(sites):
        weight[site], offset[site] = _fitted(task.own.residuals[site], task.others.residuals[site], task.settings.leak)
    units = task.network.heads + task.network.mlp_groups
    raw = torch.zeros(len(task.network.gates), units, requires_grad=True)
    switch = Probe(weight, offset, raw)

    def shifted(site: int, logit: Tensor) -> Tensor:
        return logit + 6 * torch.tanh(raw[site] / 6) * switch.firing[site]

    within = switch.touched(task.others.residuals)
    optimise(task, [raw], what, within, steer=switch.steer, shift_logit=shifted)
    return Probe(weight, offset, 6 * torch.tanh(raw.detach() / 6))


def _fitted(own: Tensor, others: Tensor, leak: float) -> tuple[Tensor, Tensor]:
    """Weight (D,) and offset of a logistic regression; both kinds of images have equal total weight, L2 on the
    weight."""
    mean, deviation = others.mean(0), others.std(0).clamp_min(1e-6)
    x, y = (torch.cat([own, others]) - mean) / deviation, torch.cat([torch.ones(len(own)), torch.zeros(len(others))])
    each = torch.where(y > 0, 0.5 / len(own), 0.5 / len(others))
    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            each * F.binary_cross_entropy_with_logits(x @ w + b, y, reduction="none")
        ).sum() + 1e-3 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = w.detach() / deviation
    return weight, -(others @ weight).quantile(1 - leak)


@torch.no_grad()
def principal(residuals: Tensor, active: float) -> Sae:
    """Both directions of every principal component of residuals (S, B, D), each as one latent: z = v (x - mean) if that
    is above a quantile, so that the latent is active on this share of the residuals."""
    sites, _, dim = residuals.shape
    pca = Sae(sites, 2 * dim, dim)
    for site, x in enumerate(residuals):
        centred = x - x.mean(0)
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)  # (D, D), the largest first
        rows = torch.cat([directions, -directions])
        pca.encoder[site], pca.decoder[site], pca.decoder_bias[site] = rows, rows, x.mean(0)
        pca.threshold[site] = (centred @ rows.T).quantile(1 - active, 0).clamp_min(0)
    return pca.eval().requires_grad_(False)


class FrozenDecoder(Fitting):
    """Autoencoders with random, frozen decoder rows; only the encoder learns."""

    def __init__(self, train: Tensor, settings: SaeSettings):
        super().__init__(train, settings)
        with torch.no_grad():
            self.decoder.copy_(F.normalize(torch.randn_like(self.decoder), dim=-1))
            self.encoder.copy_(self.decoder)
            self.decoder_bias.zero_()

    def _remove_parallel_gradient(self) -> None:
        assert self.decoder.grad is not None
        self.decoder.grad = None


def frozen(train: Tensor, held_out: Tensor, settings: SaeSettings, seed: int, bf16: bool) -> Sae:
    """Frozen-decoder autoencoders fitted to residuals (S, B, D), with thresholds from held-out ones."""
    torch.manual_seed(seed)
    fitting = FrozenDecoder(train, settings)
    fitting.fit(seed, bf16)
    return fitting.folded(held_out)
