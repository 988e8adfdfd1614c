"""Steering and gates in the graph for GPUs (fused.py), in float32.

Steering works on all latents of a site at once: two dense products, instead of gathering the weights of each image's
terms.

Letters: B batch, S sites, T terms, L latents, G gated blocks, U units of a block (heads, then MLP groups), D residual
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from export.builder import MICROSOFT, Builder
from export.bundle import GATE_BIAS, INPUTS
from training.model.gated_vit import Gate, GatedVit
from training.model.sae import Sae
from training.steering import GATE_BOUND, Terms


class Steering:
    """Sae.steer for all latents: x + ((scale - 1) z + shift) through the decoder, where scale - 1 and shift are 0 for a
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
    """The same terms for every image: products with the named latents only; constants are added up at export.

    With amount = scale - 1 and constant = amount bias + shift, the change of a latent is amount product + constant
    where it is active, else shift. So it is constant, plus amount product where active and minus amount bias elsewhere.
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


@dataclass(frozen=True)
class Gated:
    """Heads or MLP groups of a block that are in the graph."""

    units: tuple[int, ...]
    open: str | None
    """bool (B, 1, units); None: all are open."""

    def closed(self, g: Builder, value: str, width: int, name: str) -> str:
        """value (B, Q, width), in which each unit has an equal part, with the parts of closed units set to 0."""
        if self.open is None:
            return value
        of_unit = g.op("Reshape", value, g.integers(0, 0, len(self.units), width // len(self.units)),
                       name=f"{name}/by_unit")  # fmt: skip
        gate = g.op("Reshape", self.open, g.integers(0, 1, len(self.units), 1), name=f"{name}/gate")
        of_unit = g.op("Where", gate, of_unit, g.weight(f"{name}/nothing", 0), name=f"{name}/gated/by_unit")
        return g.op("Reshape", of_unit, g.integers(0, 0, width), name=f"{name}/gated")


def by_kind(g: Builder, open_: str, units: Sequence[int], model: GatedVit, name: str) -> tuple[Gated, Gated | None]:
    """The heads and, in a model with MLP groups, the groups among the units of a block. open_: bool (B, 1, units)."""
    heads = tuple(unit for unit in units if unit < model.heads)
    groups = tuple(unit - model.heads for unit in units[len(heads) :])
    of_heads = of_groups = open_
    if heads and groups:
        names = [f"{name}/gate/open/heads", f"{name}/gate/open/mlp_groups"]
        of_heads, of_groups = g.ops("Split", open_, g.integers(len(heads), len(groups)), names=names, axis=2)
    return Gated(heads, of_heads), Gated(groups, of_groups) if model.mlp_groups else None


class GateThresholds:
    """The thresholds that the products of open gates exceed: where tanh(product + bias) + gate_bias / GATE_BOUND is 0.
    With gate biases it is computed once for all blocks: atanh(-b) - bias, where atanh(-b) is log((1 - b) / (1 + b)) /
    2, which is infinite from -1 and 1 on."""

    def __init__(self, g: Builder, model: GatedVit, gate_bias: bool):
        self._g, self._units = g, model.heads + model.mlp_groups
        self._bias = [cast(Gate, gate).linear.bias / GATE_BOUND for gate in model.gates]
        self._below: Sequence[str] = ()
        if gate_bias:
            b = g.op("Mul", GATE_BIAS, g.number(1 / GATE_BOUND), name="biases/scaled")
            b = g.op("Clip", b, g.number(-1), g.number(1), name="biases")
            ratio = [g.op(kind, g.number(1), b, name=f"biases/{kind}") for kind in ("Sub", "Add")]
            log = g.op("Log", g.op("Div", *ratio, name="biases/ratio"), name="biases/log")
            needed = g.op("Mul", log, g.number(0.5), name="biases/needed")  # (B, G, U)
            needed = g.op("Sub", needed, g.weight("biases/linear.bias", torch.stack(self._bias), np.float32),
                          name="biases/below")  # fmt: skip
            names = [f"biases/below/{site}" for site in range(len(self._bias))]
            self._below = [needed] if len(names) == 1 else g.ops(
                "Split", needed, names=names, axis=1, num_outputs=len(names)
            )  # fmt: skip

    def exceeded(self, product: str, site: int, units: Sequence[int], name: str) -> str:
        """bool (B, 1, units): whether the gates are open. product: of gate_product, of these units."""
        g, at = self._g, f"{name}/gate"
        if self._below:
            below = self._below[site]
            if len(units) < self._units:
                below = g.op("Gather", below, g.integers(*units), name=f"{at}/below", axis=2)
        else:
            below = g.weight(f"{at}/below", -self._bias[site][list(units)], np.float32)
        return g.op("Greater", product, below, name=f"{at}/open")


def gate_product(
    g: Builder,
    gate: Gate,
    residual: str,
    steering: Steering | FixedSteering,
    site: int,
    units: Sequence[int],
    name: str,
) -> str:
    """The products of some units with the gate's weights, (B, 1, units). With the bias added and before tanh, that is
    logit / GATE_BOUND."""
    moved, added = steering.moved(site, residual, f"{name}/steering")
    norm, at, picked = gate.norm, f"{name}/gate", list(units)
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
    return g.op("MatMul", y, weight, name=f"{at}/product")


def gate_logits(
    g: Builder, model: GatedVit, products: Sequence[str], left: Sequence[Sequence[int]], gate_bias: bool
) -> str:
    """The gate logits (B, G, U). Units that are not in the graph have the lowest logit."""
    bias = torch.stack([cast(Gate, gate).linear.bias for gate in model.gates]) / GATE_BOUND  # (G, U)
    present = torch.tensor([[unit in of for unit in range(bias.shape[1])] for of in left])
    if present.all():
        product = g.op("Concat", *products, name="gates/products", axis=1)
    else:
        packed = g.op("Concat", *products, name="gates/products/packed", axis=2)  # (B, 1, units in the graph)
        packed = g.op("Squeeze", packed, g.integers(1), name="gates/products/row")
        place = (present.flatten().cumsum(0) - 1).clamp_min(0).view_as(present)
        product = g.op("Gather", packed, g.weight("gates/place", place, np.int64), name="gates/products", axis=1)
    scaled = g.op("Add", product, g.weight("gates/linear.bias", bias, np.float32), name="gates/scaled")
    logit = g.op("Mul", g.op("Tanh", scaled, name="gates/tanh"), g.number(GATE_BOUND), name="gates/logit")
    if gate_bias:
        logit = g.op("Add", logit, GATE_BIAS, name="gates/logit/biased")
    if present.all():
        return logit
    inside = g.weight("gates/present", present, np.bool_)
    return g.op("Where", inside, logit, g.number(-GATE_BOUND), name="gates/logit/all")
