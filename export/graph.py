"""The ONNX graphs of a gated ViT and its autoencoders: pixels and steering terms in, logits and gates out.

attention.py and mlp.py write how units are closed, precision.py the linear layers. The rest, the same in all graphs, is
here. Parts that differ between timm's models (patches, positions, classifier, unusual norms and MLPs) go through
PyTorch's exporter.

Letters: B batch, S sites, T terms, G gated blocks, H heads, U units (heads, then MLP groups), N tokens, D residual
width.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import onnx
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from export.attention import ATTENTION
from export.builder import Builder
from export.bundle import GATE_BIAS, INPUTS, OUTPUTS
from export.closing import Closing, closings
from export.ends import Classifier, Stem, gate_outputs, graph_inputs
from export.fused import build_fused
from export.mlp import MLP
from export.precision import Arithmetic, Float
from export.weights import head_weights, mlp_weights
from training.image_spec import ImageSpec
from training.model.gated_vit import Gate, GatedVit
from training.model.sae import Sae
from training.steering import GATE_BOUND


class SteeredVit(nn.Module):
    """The contract of the graphs, in PyTorch."""

    def __init__(self, model: GatedVit, sae: Sae):
        super().__init__()
        self.model = model
        self.sae = sae

    def forward(
        self,
        image: Tensor,
        steering_latent: Tensor,
        steering_scale: Tensor,
        steering_shift: Tensor,
        gate_bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """image uint8 (B, height, width, channels); terms (B, S, T), int64 and float32; gate_bias float32 (B, G, U).

        Returns logits (B, classes), head_gate bool (B, G, H), gate_logit (B, G, U), residual (B, S, D) and, for a model
        with MLP groups, mlp_gate bool (B, G, M).
        """

        def steer(site: int, residual: Tensor) -> Tensor:
            return self.sae.steer(
                site, residual, steering_latent[:, site], steering_scale[:, site], steering_shift[:, site]
            )

        logits, out = self.model(image, steer, gate_bias=gate_bias)
        logit, heads = out["gate_logit"], self.model.heads
        mlp_gate = (logit[:, :, heads:] > 0,) * bool(self.model.mlp_groups)
        return logits, logit[:, :, :heads] > 0, logit, out["residual"], *mlp_gate


def build(
    steered: SteeredVit,
    spec: ImageSpec,
    attention: str,
    metadata: dict[str, str],
    arithmetic: Arithmetic | None = None,
    kept: Sequence[Sequence[int]] | None = None,
    gate_bias: bool = False,
) -> onnx.ModelProto:
    """A graph of the model, checked by onnx.

    attention: a name of ATTENTION, or fused (fused.py). kept: the units of each gated block that are in the graph,
    heads from 0 on and MLP groups after them; the gates of the others must be closed for every image (compact.py).
    None: all units. gate_bias: whether the graph has that input; without it there are no biases.

    A model without gated blocks gives the plain graph, pixels in and logits out, the baseline of the others.
    """
    model, sae, vit = steered.model.eval(), steered.sae, steered.model.vit
    arithmetic = arithmetic or Float()
    if attention == "fused":
        return build_fused(model, sae, spec, metadata, arithmetic.real, kept, gate_bias=gate_bias)
    g = Builder(arithmetic.real)
    pixels = torch.zeros(2, *spec.shape, dtype=torch.uint8)
    x = g.call(Stem(model), "image", pixels, "stem", vit)  # (B, N, D)
    tokens = Stem(model)(pixels)
    steering = _Steering(g, sae) if model.gated_blocks else None
    units = model.heads + model.mlp_groups
    biases = _biases(g, len(model.gated_blocks)) if gate_bias else None
    gates, residuals = [], []
    last = len(vit.blocks) - 1
    for index, block in enumerate(cast(Iterable[Block], vit.blocks)):
        name = f"block{index}"
        heads = groups = None
        if steering and index in model.gated_blocks:
            site = model.gated_blocks.index(index)
            residual = g.op("Gather", x, g.matrix(0), name=f"{name}/residual", axis=1)  # (B, 1, 1, D)
            residual = g.float32(residual, f"{name}/residual/float32")
            steered_residual = steering.apply(site, residual, f"{name}/steering")
            gate = _gate(g, cast(Gate, model.gates[site]), steered_residual, f"{name}/gate")  # (B, 1, 1, U)
            if biases:
                gate = g.op("Add", gate, biases[site], name=f"{name}/gate/biased")
            gates.append(gate)
            residuals.append(residual)
            present = range(units) if kept is None else kept[site]
            heads, groups = _closings(g, gate, present, model, attention == "dispatch", name)
        y = g.norm(block.norm1, x, tokens, f"{name}/norm1")
        leaving = model.leaving if index == last else None
        if leaving is not None:
            x = g.first(x, leaving, f"{name}/leaving")
            tokens = tokens[:, :leaving]
        x = ATTENTION[attention](g, arithmetic, head_weights(block), x, y, heads, leaving, name)
        y = g.norm(block.norm2, x, tokens, f"{name}/norm2")
        if weights := mlp_weights(block):
            closing = groups if model.mlp_groups else None
            x = MLP[attention](g, arithmetic, weights, x, y, closing, model.mlp_groups, name)
        else:  # timm's other kinds go through the exporter, in float32
            x = g.op("Add", x, g.call(nn.Sequential(block.mlp, block.ls2), y, tokens, f"{name}/mlp", vit), name=name)
    logits = g.call(Classifier(vit), x, tokens, "classifier", vit)
    g.output(g.float32(logits, "classifier/logits"), OUTPUTS[0], ["batch", vit.num_classes])
    if steering:
        _gate_outputs(g, model, gates, residuals)
    for name, value in arithmetic.observed:
        g.output(value, f"observed/{name}", ["batch", "tokens", "width"])
    shape = (len(model.gated_blocks), units) if gate_bias else None
    return g.finish(graph_inputs(spec, sae.sites if steering else 0, shape), metadata)


def _gate_outputs(g: Builder, model: GatedVit, gates: Sequence[str], residuals: Sequence[str]) -> None:
    """Add the outputs of the gates. gates: logit / GATE_BOUND of each gated block, (B, 1, 1, U); residuals: (B, 1, 1,
    D) each."""
    scaled = g.op("Concat", *gates, name="gates/scaled", axis=1)  # (B, G, 1, U)
    scaled = g.op("Squeeze", scaled, g.integers(2), name="gates/tanh")
    logit = g.op("Mul", scaled, g.number(GATE_BOUND), name="gates/logit")
    residual = g.op("Concat", *residuals, name="residuals/of_sites", axis=1)
    residual = g.op("Squeeze", residual, g.integers(2), name="residuals")
    gate_outputs(g, model, logit, residual)


def _biases(g: Builder, blocks: int) -> Sequence[str]:
    """gate_bias / GATE_BOUND for each gated block, (B, 1, 1, U); the division is exact."""
    scaled = g.op("Mul", GATE_BIAS, g.number(1 / GATE_BOUND), name="biases/scaled")
    scaled = g.op("Unsqueeze", scaled, g.integers(2), name="biases")  # (B, G, 1, U)
    return g.ops("Split", scaled, names=[f"biases/{site}" for site in range(blocks)], axis=1, num_outputs=blocks)


class _Steering:
    """Sae.steer for every site, with the named latents only. There are few terms, so the number of nodes determines the
    time. What does not depend on the residual is computed for all sites at once, and biases are multiplied out:
    z = W_enc x + (b_enc - W_enc b_dec)."""

    def __init__(self, g: Builder, sae: Sae):
        self._g, self._sae = g, sae
        latent, scale, shift = (
            g.op("Unsqueeze", value, g.integers(3), name=f"steering/{value.removeprefix('steering_')}")
            for value in INPUTS[1:]
        )  # (B, S, T, 1)
        first = g.weight("steering/first", (torch.arange(sae.sites) * sae.latents)[:, None, None], np.int64)
        index = g.op("Add", latent, first, name="steering/index")  # among the latents of all sites
        index = g.op("Squeeze", index, g.integers(3), name="steering/index/row")

        def table(values: Tensor, name: str) -> str:
            stored = g.weight(f"steering/{name}.weight", values.reshape(-1, 1), np.float32)
            return g.op("Gather", stored, index, name=f"steering/{name}", axis=0)  # (B, S, T, 1)

        parts = {
            "latent": INPUTS[1],
            "bias": table(sae.product_bias, "bias"),
            "threshold": table(sae.threshold, "threshold"),
            "scale": g.op("Sub", scale, g.number(1), name="steering/scale-1"),
            "shift": shift,
        }
        self._parts = {
            what: g.ops("Split", value, names=[f"steering/{what}/{site}" for site in range(sae.sites)], axis=1,
                        num_outputs=sae.sites)
            for what, value in parts.items()
        }  # fmt: skip

    def apply(self, site: int, residual: str, name: str) -> str:
        """residual (B, 1, 1, D) -> the steered residual, which the gate reads."""
        g, part = self._g, {what: values[site] for what, values in self._parts.items()}

        def rows(weight: Tensor, what: str) -> str:
            stored = g.weight(f"{name}/{what}.weight", weight[site], np.float32)
            return g.op("Gather", stored, part["latent"], name=f"{name}/{what}", axis=0)  # (B, 1, T, D)

        column = g.op("Reshape", residual, g.integers(0, 1, -1, 1), name=f"{name}/residual")  # (B, 1, D, 1)
        raw = g.op("MatMul", rows(self._sae.encoder, "encoder"), column, name=f"{name}/product")  # (B, 1, T, 1)
        raw = g.op("Add", raw, part["bias"], name=f"{name}/raw")
        active = g.op("Greater", raw, part["threshold"], name=f"{name}/active")
        z = g.op("Where", active, raw, g.number(0), name=f"{name}/z")
        change = g.op("Mul", part["scale"], z, name=f"{name}/scaled")
        change = g.op("Add", change, part["shift"], name=f"{name}/change")
        change = g.op("Reshape", change, g.integers(0, 1, 1, -1), name=f"{name}/change/row")  # (B, 1, 1, T)
        moved = g.op("MatMul", change, rows(self._sae.decoder, "decoder"), name=f"{name}/moved")  # (B, 1, 1, D)
        return g.op("Add", residual, moved, name=name)


def _gate(g: Builder, gate: Gate, residual: str, name: str) -> str:
    """logit / GATE_BOUND, above 0 for an open unit. The weights are divided by GATE_BOUND, which is exact."""
    y = g.norm(gate.norm, residual, torch.empty(0), f"{name}/norm", np.float32)
    weight = g.weight(f"{name}/linear.weight", gate.linear.weight.T / GATE_BOUND, np.float32)
    bias = g.weight(f"{name}/linear.bias", gate.linear.bias / GATE_BOUND, np.float32)
    y = g.op("Add", g.op("MatMul", y, weight, name=f"{name}/product"), bias, name=f"{name}/linear")
    return g.op("Tanh", y, name=name)


def _closings(
    g: Builder, gate: str, units: Sequence[int], model: GatedVit, dispatch: bool, name: str
) -> tuple[Closing, Closing]:
    """The gates as heads and MLP groups read them. gate: (B, 1, 1, U), above 0 for an open unit. units: those in the
    graph."""
    if len(units) < model.heads + model.mlp_groups:
        gate = g.op("Gather", gate, g.integers(*units), name=f"{name}/gate/kept", axis=3)
    open_ = g.op("Greater", gate, g.number(0), name=f"{name}/gate/open")
    heads = [unit for unit in units if unit < model.heads]
    return closings(g, open_, heads, [unit - model.heads for unit in units[len(heads) :]], dispatch, name)
