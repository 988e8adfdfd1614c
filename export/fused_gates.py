"""Steering and gates in the graph for GPUs (fused.py), in float32.

Steering works on all latents of a site at once: two dense products, instead of gathering the weights of each image's
terms.

Letters: B batch, S sites, T terms, L latents, G gated blocks, H heads, D residual width.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from export.builder import MICROSOFT, Builder
from export.bundle import INPUTS
from training.model.gated_vit import Gate, GatedVit
from training.model.sae import Sae
from training.steering import GATE_BOUND, Terms


class Steering:
    """Sae.steer of all latents: x + ((scale - 1) z + shift) through the decoder, where scale - 1 and shift are 0 for a
    latent without a term. What does not depend on the residual is computed for all sites at once."""

    def __init__(self, g: Builder, sae: Sae):
        self._g, self._sae, self._bias = g, sae, sae.product_bias
        first = g.op("Gather", INPUTS[1], g.integer(0), name="steering/first", axis=2)  # (B, S)
        none = g.op("Mul", first, g.integer(0), name="steering/none")
        zeros = g.weight("steering/zeros.weight", np.zeros((1, sae.latents)), np.float32)
        zero = g.op("Gather", zeros, none, name="steering/zero", axis=0)  # (B, S, L)
        scale = g.op("Sub", INPUTS[2], g.number(1), name="steering/scale-1")
        amount, shift = (
            g.op("ScatterElements", zero, INPUTS[1], value, name=f"steering/{what}", axis=2, reduction="add")
            for what, value in (("amount", scale), ("shift", INPUTS[3]))
        )
        bias = g.weight("steering/bias", self._bias, np.float32)  # (S, L)
        constant = g.op("Add", g.op("Mul", amount, bias, name="steering/biased"), shift, name="steering/constant")
        parts = {"amount": amount, "shift": shift, "constant": constant}
        self._parts = {
            what: [value] if sae.sites == 1 else g.ops(
                "Split", value, names=[f"steering/{what}/{site}" for site in range(sae.sites)], axis=1,
                num_outputs=sae.sites,
            )
            for what, value in parts.items()
        }  # fmt: skip

    def moved(self, site: int, residual: str, name: str) -> tuple[str | None, Tensor | None]:
        """residual (B, 1, D) -> what steering adds to it: (B, 1, D), and the same for every image (D,).

        (scale - 1) z + shift is `amount` product + `constant` where the latent is active, else `shift`.
        """
        g, sae = self._g, self._sae
        amount, shift, constant = (self._parts[what][site] for what in ("amount", "shift", "constant"))
        raw, active = _active(g, sae.encoder[site], sae.threshold[site] - self._bias[site], residual, name)
        scaled = g.op("Mul", raw, amount, name=f"{name}/scaled")
        scaled = g.op("Add", scaled, constant, name=f"{name}/scaled/constant")
        change = g.op("Where", active, scaled, shift, name=f"{name}/change")  # (B, 1, L)
        decoder = g.weight(f"{name}/decoder.weight", sae.decoder[site], np.float32)
        return g.op("MatMul", change, decoder, name=f"{name}/moved"), None


class FixedSteering:
    """The same terms for every image: products with the named latents alone; constants are added up at export.

    With amount = scale - 1 and constant = amount bias + shift, the change of a latent is amount product + constant
    where it is active, else shift. So it is constant, plus amount product where it is active, else - amount bias.
    """

    def __init__(self, g: Builder, sae: Sae, terms: Terms):
        self._g, self._sae, self._terms, self._bias = g, sae, terms, sae.product_bias

    def moved(self, site: int, residual: str, name: str) -> tuple[str | None, Tensor | None]:
        """As Steering.moved."""
        g, sae, terms = self._g, self._sae, self._terms.get(site, ())
        if not terms:
            return None, None
        latents = [term.latent for term in terms]
        amount, shift = torch.tensor([(term.scale - 1, term.shift) for term in terms], dtype=torch.float64).unbind(1)
        bias, decoder = self._bias[site][latents].double(), sae.decoder[site][latents].double()
        added = (amount * bias + shift) @ decoder
        scaled = amount.nonzero().flatten().tolist()
        if not scaled:
            return None, added
        named = [latents[index] for index in scaled]
        raw, active = _active(g, sae.encoder[site][named], sae.threshold[site][named] - bias[scaled], residual, name)
        without = g.weight(f"{name}/inactive", -bias[scaled], np.float32)
        change = g.op("Where", active, raw, without, name=f"{name}/change")  # (B, 1, T)
        weight = g.weight(f"{name}/decoder.weight", amount[scaled, None] * decoder[scaled], np.float32)
        return g.op("MatMul", change, weight, name=f"{name}/moved"), added


def _active(g: Builder, encoder: Tensor, cut: Tensor, residual: str, name: str) -> tuple[str, str]:
    """encoder (L, D), cut (L,) -> the products (B, 1, L), and whether they exceed it."""
    raw = g.op("MatMul", residual, g.weight(f"{name}/encoder.weight", encoder.T, np.float32), name=f"{name}/raw")
    return raw, g.op("Greater", raw, g.weight(f"{name}/cut", cut, np.float32), name=f"{name}/active")


def gate_product(
    g: Builder,
    gate: Gate,
    residual: str,
    steering: Steering | FixedSteering,
    site: int,
    heads: Sequence[int],
    name: str,
) -> tuple[str, str]:
    """The products of some heads with the gate's weights, (B, 1, heads), and whether their gates are open. The product
    plus the bias is logit / GATE_BOUND before tanh."""
    moved, added = steering.moved(site, residual, f"{name}/steering")
    norm, at, picked = gate.norm, f"{name}/gate", list(heads)
    parameters = [g.weight(f"{at}/norm.{what}", getattr(norm, what), np.float32) for what in ("weight", "bias")]
    if moved is None and added is not None:
        residual = g.op("Add", residual, g.weight(f"{at}/added", added, np.float32), name=f"{at}/shifted")
    if moved is None:
        y = g.op("LayerNormalization", residual, *parameters, name=f"{at}/norm", axis=-1, epsilon=norm.eps)
    else:
        if added is not None:
            parameters.append(g.weight(f"{at}/added", added, np.float32))
        y = g.op(
            "SkipLayerNormalization", moved, residual, *parameters, name=f"{at}/norm", domain=MICROSOFT,
            epsilon=norm.eps,
        )  # fmt: skip
    weight = g.weight(f"{at}/linear.weight", gate.linear.weight[picked].T / GATE_BOUND, np.float32)
    product = g.op("MatMul", y, weight, name=f"{at}/product")
    below = g.weight(f"{at}/below", -gate.linear.bias[picked] / GATE_BOUND, np.float32)
    return product, g.op("Greater", product, below, name=f"{at}/open")


def gate_logits(g: Builder, model: GatedVit, products: Sequence[str], left: Sequence[Sequence[int]]) -> str:
    """The gate logits (B, G, H). Heads that are not in the graph have the lowest logit."""
    bias = torch.stack([cast(Gate, gate).linear.bias for gate in model.gates]) / GATE_BOUND  # (G, H)
    present = torch.tensor([[head in of for head in range(model.heads)] for of in left])
    if present.all():
        product = g.op("Concat", *products, name="gates/products", axis=1)
    else:
        packed = g.op("Concat", *products, name="gates/products/packed", axis=2)  # (B, 1, heads in the graph)
        packed = g.op("Squeeze", packed, g.integers(1), name="gates/products/row")
        place = (present.flatten().cumsum(0) - 1).clamp_min(0).view_as(present)
        product = g.op("Gather", packed, g.weight("gates/place", place, np.int64), name="gates/products", axis=1)
    scaled = g.op("Add", product, g.weight("gates/linear.bias", bias, np.float32), name="gates/scaled")
    logit = g.op("Mul", g.op("Tanh", scaled, name="gates/tanh"), g.number(GATE_BOUND), name="gates/logit")
    if present.all():
        return logit
    inside = g.weight("gates/present", present, np.bool_)
    return g.op("Where", inside, logit, g.number(-GATE_BOUND), name="gates/logit/all")
