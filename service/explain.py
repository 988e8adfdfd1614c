"""The effects of an image's latents on its gates, computed on the host from weights of the bundle.

A gate reads x' = x + sum_k (z'_k - z_k) W_dec[k]; its logits are 4 tanh(linear(norm(x')) / 4). The effect of a latent
is the logits with its share z'_k W_dec[k] of x' minus the logits without it.

Letters: L latents, D residual width, U units (heads, then MLP groups), T terms, K reported latents.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from export.verify import load_weights
from training.steering import GATE_BOUND, GATE_EPSILON, SteeringArrays

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    """The explanation of one image at one site."""

    latent: NDArray[np.int64]
    """(K,): the steered ones first, then by value."""
    value: Floats
    """(K,) z."""
    steered_value: Floats
    """(K,) z': equal to z without steering."""
    effect: Floats
    """(K, U) on the gate logits."""
    gate_logit: Floats
    """(U,) of the steered gate, biases included."""
    unsteered_gate_logit: Floats
    """(U,) on the same residual, without biases."""
    active: int
    """Latents that are not zero."""


class Explainer:
    """Computes explanations in numpy, with the autoencoders and gates of a bundle."""

    def __init__(self, bundle: Bundle):
        """Raises BundleError."""
        self._weights = load_weights(bundle.folder, bundle.manifest)

    def explain(
        self, site: int, residual: Floats, steering: SteeringArrays, bias: Floats | None, count: int
    ) -> Explanation:
        """residual (D,); steering (1, S, T); bias (U,) or None: of the site's gate. count: latents to report beside the
        steered ones."""
        w = {name: value[site] for name, value in self._weights.items() if not name.startswith("gates.")}
        raw = w["encoder"] @ (residual - w["decoder_bias"]) + w["encoder_bias"]  # (L,)
        z = np.where(raw > w["threshold"], raw, np.float32(0))
        latent, scale, shift = (a[0, site] for a in (steering.latent, steering.scale, steering.shift))
        steers = (scale != 1) | (shift != 0)
        steered = z.copy()
        steered[latent[steers]] = scale[steers] * z[latent[steers]] + shift[steers]
        reads = residual + (steered - z) @ w["decoder"]  # (D,)
        others = np.argsort(-np.abs(z), kind="stable")[:count]
        shown = np.array(list(dict.fromkeys([*latent[steers].tolist(), *others[z[others] != 0].tolist()])), np.int64)
        logit = self._gate(site, reads)
        without = self._gate(site, reads - steered[shown, None] * w["decoder"][shown])  # (K, U)
        return Explanation(
            shown, z[shown], steered[shown], logit - without, logit if bias is None else logit + bias,
            self._gate(site, residual), int((z != 0).sum()),
        )  # fmt: skip

    def _gate(self, site: int, x: Floats) -> Floats:
        """(..., D) -> gate logits (..., U)."""
        w = {part: self._weights[f"gates.{site}.{part}"] for part in ("norm.weight", "norm.bias")}
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + GATE_EPSILON) * w["norm.weight"] + w["norm.bias"]
        linear, bias = (self._weights[f"gates.{site}.linear.{part}"] for part in ("weight", "bias"))
        logit: Floats = GATE_BOUND * np.tanh((y @ linear.T + bias) / GATE_BOUND)
        return logit
