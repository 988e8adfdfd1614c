"""Sparse autoencoders of the residuals that the gates read, one per site: steering, and the sparsity of the fit.

    z  = JumpReLU(W_enc (x - b_dec) + b_enc)      the pre-activation where it exceeds the latent's threshold, else 0
    x' = x + sum_k ((scale_k - 1) z_k + shift_k) W_dec[k]

(JumpReLU: arXiv:2407.14435.) Steering keeps the reconstruction error, so neutral terms change nothing, to the bit.

Letters: B images, S sites, L latents, D residual width, T terms.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sae(nn.Module):
    """The autoencoders of all sites, in the form that is saved and served."""

    def __init__(self, sites: int, latents: int, dim: int):
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(sites, latents, dim))
        self.encoder_bias = nn.Parameter(torch.zeros(sites, latents))
        self.decoder = nn.Parameter(torch.zeros(sites, latents, dim))
        self.decoder_bias = nn.Parameter(torch.zeros(sites, dim))
        self.threshold = nn.Parameter(torch.zeros(sites, latents))

    @property
    def sites(self) -> int:
        """The number of sites."""
        return self.encoder.shape[0]

    @property
    def latents(self) -> int:
        """Latents per site."""
        return self.encoder.shape[1]

    @property
    def product_bias(self) -> Tensor:
        """(S, L): the bias b_enc - W_enc b_dec, so that a pre-activation is W_enc x plus this."""
        return self.encoder_bias - torch.einsum("sld,sd->sl", self.encoder, self.decoder_bias)

    def encode(self, site: int, residual: Tensor) -> Tensor:
        """(B, D) -> latents (B, L)."""
        raw = (residual - self.decoder_bias[site]) @ self.encoder[site].T + self.encoder_bias[site]
        return raw * (raw > self.threshold[site])

    def decode(self, site: int, latents: Tensor) -> Tensor:
        """(B, L) -> (B, D)."""
        return latents @ self.decoder[site] + self.decoder_bias[site]

    def steer(self, site: int, residual: Tensor, latent: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The steered input of the gate: residual (B, D), terms each (B, T) -> (B, D). Computes only the T named
        latents."""
        rows = self.encoder[site][latent]  # (B, T, D)
        centred = (residual - self.decoder_bias[site])[:, :, None]  # (B, D, 1)
        raw = (rows @ centred)[:, :, 0] + self.encoder_bias[site][latent]  # (B, T)
        z = raw * (raw > self.threshold[site][latent])
        change = ((scale - 1) * z + shift)[:, None]  # (B, 1, T)
        return residual + (change @ self.decoder[site][latent])[:, 0]


def from_tensors(tensors: dict[str, Tensor]) -> Sae:
    """The frozen autoencoders in the tensors of `sae.safetensors`."""
    sae = Sae(*tensors["encoder"].shape)
    sae.load_state_dict(tensors)
    return sae.eval().requires_grad_(False)


def thresholds(raw: Tensor, k: int, kind: str) -> Tensor:
    """The JumpReLU threshold of each latent (L,), >= 0, from the pre-activations (B, L) of one site.

    BatchTopK has one threshold for all latents, which its JumpReLU uses. TopK has none: each latent gets the threshold
    at which it is active as often as under TopK; for a latent that TopK never chose, it is above all values in the
    sample.
    """
    count, latents = raw.shape
    keep = min(k * count, raw.numel() - 1)
    shared = raw.flatten().topk(keep + 1, sorted=False).values.amin().clamp_min(0)
    if kind == "batch-topk":
        return shared.expand(latents)
    used = (top_k(raw[None], k)[0] > 0).sum(0)  # (L,)
    ordered = raw.sort(0, descending=True).values  # (B, L)
    own = ordered.gather(0, used.clamp_max(count - 1)[None])[0]
    own = torch.where(used == count, 0.0, own)
    return torch.where(used == 0, own.maximum(shared), own).clamp_min(0)


def batch_top_k(values: Tensor, count: int) -> Tensor:
    """Keep the `count` largest of each site's values (B, L) that are above 0; set the rest to 0."""
    threshold = kth_largest(values.detach().flatten(1), count).clamp_min(0)  # (S,)
    return values * (values >= threshold[:, None, None])


def kth_largest(values: Tensor, count: int) -> Tensor:
    """The exact `count`-th largest value of each row of (S, N), as (S,).

    On a CPU, most values are first discarded by a threshold guessed from a sample, which takes a third of the time of
    `topk` or `kthvalue` over all values. A guess that is too high is detected, and only costs time.
    """
    count = min(count, values.shape[1])
    if values.is_cuda or count < 4096:
        return values.topk(count, dim=1, sorted=False).values.amin(1)
    sample = values[:, ::17]  # odd, so that the sample has all latents
    guesses = sample.topk(min(round(1.2 * count / 17), sample.shape[1]), dim=1, sorted=False).values.amin(1)
    largest = []
    for row, guess in zip(values, guesses, strict=True):
        likely = row[row >= guess]
        largest.append((likely if len(likely) >= count else row).topk(count, sorted=False).values.amin())
    return torch.stack(largest)


def top_k(values: Tensor, k: int) -> Tensor:
    """Keep the k largest of each image's latents (S, B, L) that are above 0; set the rest to 0."""
    best = values.topk(min(k, values.shape[-1]), dim=-1)
    return torch.zeros_like(values).scatter(-1, best.indices, F.relu(best.values))
