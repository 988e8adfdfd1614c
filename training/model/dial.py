"""The dial during training: gate biases per unit at knots of usage (vit/dial.py trains it).

Usage is the share of the units' MACs that is spent (Macs.weights). At one knot, the reference, all biases are 0, so the
gates decide as without a dial. Biases rise from knot to knot, as sums of softplus; at the last knot they open every
unit. Letters as in gated_vit.py; K knots.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.dial import ALL_OPEN

KNOTS = 9
LOWEST = 0.08
"""Usage at the first knot."""


class LearnedDial(nn.Module):
    """Usage (B,) -> gate biases (B, G, U)."""

    usage: Tensor
    """(K,): the usage at each knot, rising to 1."""

    def __init__(self, sites: int, units: int, reference: float):
        """reference: the usage at which all biases are 0."""
        super().__init__()
        usage = torch.linspace(LOWEST, 1, KNOTS)
        self.reference = int((usage[:-1] - reference).abs().argmin())
        usage[self.reference] = reference
        self.register_buffer("usage", usage, persistent=False)
        self.step = nn.Parameter(torch.full((KNOTS - 2, sites, units), -0.5))
        """softplus(step) is the rise of the bias from one learned knot to the next."""

    def knots(self) -> Tensor:
        """The gate biases at the knots, (K, G, U)."""
        risen = F.pad(F.softplus(self.step).cumsum(0), (0, 0, 0, 0, 1, 0))  # (K - 1, G, U)
        learned = (risen - risen[self.reference]).clamp(-ALL_OPEN, ALL_OPEN)
        return torch.cat([learned, torch.full_like(learned[:1], ALL_OPEN)])

    def forward(self, usage: Tensor) -> Tensor:
        """The gate biases at a usage (B,), from that of the first knot to 1."""
        right = torch.searchsorted(self.usage, usage.contiguous()).clamp(1, KNOTS - 1)
        low, high = self.usage[right - 1], self.usage[right]
        share = ((usage - low) / (high - low))[:, None, None]
        knots = self.knots()
        return torch.lerp(knots[right - 1], knots[right], share)
