"""Sparse autoencoders of the residuals that the gates read, one a site, and how they steer.

    z  = JumpReLU(W_enc (x - b_dec) + b_enc)      the pre-activation where it exceeds the latent's threshold, else 0
    x' = x + sum_k ((scale_k - 1) z_k + shift_k) W_dec[k]

(JumpReLU: arXiv:2407.14435.) Steering preserves the error of the autoencoder, so neutral terms change nothing, to the
bit.

Letters: B images, S sites, L latents, D residual width, T terms.
"""

import torch
from torch import Tensor, nn


class Sae(nn.Module):
    """The autoencoders of all sites, as they are saved and served."""

    def __init__(self, sites: int, latents: int, dim: int):
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(sites, latents, dim))
        self.encoder_bias = nn.Parameter(torch.zeros(sites, latents))
        self.decoder = nn.Parameter(torch.zeros(sites, latents, dim))
        self.decoder_bias = nn.Parameter(torch.zeros(sites, dim))
        self.threshold = nn.Parameter(torch.zeros(sites, latents))

    @property
    def sites(self) -> int:
        return self.encoder.shape[0]

    @property
    def latents(self) -> int:
        """Latents a site."""
        return self.encoder.shape[1]

    def encode(self, site: int, residual: Tensor) -> Tensor:
        """(B, D) -> latents (B, L)."""
        raw = (residual - self.decoder_bias[site]) @ self.encoder[site].T + self.encoder_bias[site]
        return raw * (raw > self.threshold[site])

    def decode(self, site: int, latents: Tensor) -> Tensor:
        """(B, L) -> (B, D)."""
        return latents @ self.decoder[site] + self.decoder_bias[site]

    def steer(self, site: int, residual: Tensor, latent: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """What the gate reads: residual (B, D), terms each (B, T) -> (B, D). Computes the T named latents only."""
        rows = self.encoder[site][latent]  # (B, T, D)
        centred = (residual - self.decoder_bias[site])[:, :, None]  # (B, D, 1)
        raw = (rows @ centred)[:, :, 0] + self.encoder_bias[site][latent]  # (B, T)
        z = raw * (raw > self.threshold[site][latent])
        change = ((scale - 1) * z + shift)[:, None]  # (B, 1, T)
        return residual + (change @ self.decoder[site][latent])[:, 0]


def from_tensors(tensors: dict[str, Tensor]) -> Sae:
    """The frozen autoencoders that `sae.safetensors` holds."""
    sae = Sae(*tensors["encoder"].shape)
    sae.load_state_dict(tensors)
    return sae.eval().requires_grad_(False)
