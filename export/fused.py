"""The graph for GPUs: the same model in a few large operations.

Time on a GPU depends on the number of kernels and the bytes between them. So the queries, keys and values of a block
are one product, attention is one operator, and residual additions are fused with the norm that follows them
(onnxruntime's MultiHeadAttention, SkipLayerNormalization, BiasGelu). A closed head is multiplied by 0: a GPU cannot
skip it without asking the host. Nothing depends on data or runs on the host, so the graph can be captured as a
CUDA graph: tests/test_fused.py checks its operators against a list.

Patches, tokens, and the weights they meet are `real`; gates, steering (fused_gates.py) and the classifier are float32.

Letters: B batch, H heads, E head width, N tokens, Q tokens that leave the block, D residual width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from export.builder import MICROSOFT, Builder
from export.bundle import INPUTS, OUTPUTS
from export.ends import Classifier, Stem, gate_outputs, graph_inputs
from export.fused_gates import FixedSteering, Gated, GateThresholds, Steering, by_kind, gate_logits, gate_product
from export.weights import HeadWeights, head_weights, mlp_weights
from training.image_spec import ImageSpec
from training.model.gated_vit import Gate, GatedVit
from training.model.sae import Sae
from training.steering import Terms

GREY = 128
"""Subtracted from every pixel: float16 represents -128 to 127 exactly, and sums of products with these values round
less than with 0 to 255."""


@dataclass(frozen=True)
class _Stream:
    """The residual between two parts of a block: x + delta + bias, which the next norm adds up."""

    x: str
    delta: str | None
    bias: Tensor | None


def build_fused(
    model: GatedVit,
    sae: Sae,
    spec: ImageSpec,
    metadata: dict[str, str],
    real: type[np.floating[Any]],
    kept: Sequence[Sequence[int]] | None = None,
    terms: Terms | None = None,
    gate_bias: bool = False,
) -> onnx.ModelProto:
    """A graph of the model, checked by onnx.

    kept, gate_bias: as for export.graph.build. terms: of a graph for one steering. They are then constants, and
    the graph's only input is the image.
    """
    vit = model.vit
    g = Builder(real)
    x, tokens = _stem(g, model, spec)
    stream = _Stream(x, None, None)
    steering = Steering(g, sae) if terms is None else FixedSteering(g, sae, terms)
    units = model.heads + model.mlp_groups
    left = [range(units)] * len(model.gated_blocks) if kept is None else kept
    thresholds = GateThresholds(g, model, gate_bias)
    products, residuals = [], []
    last = len(vit.blocks) - 1
    for index, block in enumerate(cast(Iterable[Block], vit.blocks)):
        name = f"block{index}"
        y, x = _norm(g, block.norm1, stream, tokens, f"{name}/norm1")
        heads, groups = Gated(tuple(range(model.heads)), None), None
        if index in model.gated_blocks:
            site = model.gated_blocks.index(index)
            residual = g.op("Gather", x, g.integers(0), name=f"{name}/residual", axis=1)  # (B, 1, D)
            residual = g.float32(residual, f"{name}/residual/float32")
            residuals.append(residual)
            opened = ""
            if decides := left[site] or (0,) * (site == 0 and not any(left)):  # one at least: outputs need a shape
                product = gate_product(g, cast(Gate, model.gates[site]), residual, steering, site, decides, name)
                products.append(product)
                opened = thresholds.exceeded(product, site, decides, name)
            heads, groups = by_kind(g, opened, left[site], model, name)
        leavers = y
        if index == last:
            x, leavers = (g.first(value, model.leaving, f"{name}/leaving/{of}") for of, value in (("x", x), ("y", y)))
        mixed = _attention(g, head_weights(block), leavers, y, heads, name)
        if index == last:
            tokens = tokens[:, : model.leaving]
        y, x = _norm(g, block.norm2, _Stream(x, *mixed), tokens, f"{name}/norm2")
        stream = _Stream(x, *_mlp(g, block, y, tokens, groups, model, f"{name}/mlp"))
    x = _sum(g, stream, "tokens")
    logits = g.call(Classifier(vit), x, tokens, "classifier", vit)
    g.output(g.float32(logits, "classifier/logits"), OUTPUTS[0], ["batch", vit.num_classes])
    logit = gate_logits(g, model, products, left, gate_bias)
    gate_outputs(g, model, logit, g.op("Concat", *residuals, name="residuals", axis=1))
    shape = (len(model.gated_blocks), units) if gate_bias else None
    return g.finish(graph_inputs(spec, sae.sites if terms is None else 0, shape), metadata)


def _stem(g: Builder, model: GatedVit, spec: ImageSpec) -> tuple[str, Tensor]:
    """The tokens that enter the first block, and an example of them. Unless the patches are a plain product and the
    positions are added, PyTorch's exporter writes this part, in float32."""
    vit, pixels = model.vit, torch.zeros(2, *spec.shape, dtype=torch.uint8)
    patch = vit.patch_embed
    with torch.no_grad():
        tokens = model.embed(pixels)
        positions = _positions(vit) if _plain_patches(patch) else None
    if positions is None:
        return g.call(Stem(model), INPUTS[0], pixels, "stem", vit), tokens
    proj = cast(nn.Conv2d, patch.proj)
    (rows, columns), (high, wide) = patch.grid_size, proj.kernel_size
    std, mean = model.std.view(1, -1, 1, 1), model.mean.view(1, -1, 1, 1)
    weight = proj.weight / std  # (D, C, high, wide)
    bias = ((GREY - mean) * weight).sum((1, 2, 3)) + (0 if proj.bias is None else proj.bias)
    added = positions.clone()
    prefix = vit.num_prefix_tokens
    added[:, prefix:] += bias
    shape = (0, rows, high, columns, wide * spec.channels)
    x = g.op("Reshape", INPUTS[0], g.integers(*shape), name="stem/rows")
    x = g.op("Transpose", x, name="stem/patches", perm=[0, 1, 3, 2, 4])
    x = g.op("Reshape", x, g.integers(0, rows * columns, high * wide * spec.channels), name="stem/patch")
    x = g.op("Sub", g.real(x, "stem/pixels"), g.weight("stem/grey", GREY), name="stem/centred")
    by_pixel = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (high * wide * C, D)
    x = g.op("MatMul", x, g.weight("stem/proj.weight", by_pixel), name="stem/proj")
    if prefix:
        x = g.op("Pad", x, g.integers(0, prefix, 0, 0, 0, 0), name="stem/prefixed")
    x = g.op("Add", x, g.weight("stem/positions", added), name="stem/tokens")
    if not isinstance(vit.norm_pre, nn.Identity):
        x = g.call(vit.norm_pre, x, tokens, "stem/norm_pre", vit)
    return x, tokens


def _plain_patches(patch: nn.Module) -> bool:
    """Whether the patches do not overlap and all pass through the same linear layer."""
    if type(patch) is not PatchEmbed or patch.grid_size is None:
        return False
    proj = patch.proj
    return (
        isinstance(proj, nn.Conv2d) and isinstance(patch.norm, nn.Identity) and patch.flatten
        and proj.stride == proj.kernel_size and proj.padding == (0, 0) and proj.groups == 1
        and patch.img_size == tuple(g * k for g, k in zip(patch.grid_size, proj.kernel_size, strict=True))
    )  # fmt: skip


def _positions(vit: VisionTransformer) -> Tensor | None:
    """(1, N, D): what the ViT adds to the tokens of the patches after zeros for the prefix; None if it does more."""
    patches = vit.patch_embed.num_patches
    torch.manual_seed(0)
    drawn = torch.randn(1, patches, vit.embed_dim)
    added: Tensor = vit._pos_embed(torch.zeros_like(drawn))
    if added.shape != (1, vit.num_prefix_tokens + patches, vit.embed_dim):
        return None
    plain = nn.functional.pad(drawn, (0, 0, vit.num_prefix_tokens, 0)) + added
    return added if torch.equal(vit._pos_embed(drawn), plain) else None


def _norm(g: Builder, norm: nn.Module, stream: _Stream, tokens: Tensor, name: str) -> tuple[str, str]:
    """The normed residual, and the residual."""
    if not isinstance(norm, nn.LayerNorm) or stream.delta is None:
        x = _sum(g, stream, f"{name}/residual")
        return g.norm(norm, x, tokens, name), x
    parameters = [*g.affine(norm, name)]
    if stream.bias is not None:
        parameters.append(g.weight(f"{name}/added.bias", stream.bias))
    g.ops(
        "SkipLayerNormalization", stream.delta, stream.x, *parameters, names=(name, "", "", f"{name}/residual"),
        domain=MICROSOFT, epsilon=norm.eps,
    )  # fmt: skip
    return name, f"{name}/residual"


def _sum(g: Builder, stream: _Stream, name: str) -> str:
    x = stream.x
    if stream.delta is not None:
        x = g.op("Add", x, stream.delta, name=f"{name}/sum")
    if stream.bias is not None:
        x = g.op("Add", x, g.weight(f"{name}/added.bias", stream.bias), name=f"{name}/biased")
    return x


def _attention(
    g: Builder, w: HeadWeights, leavers: str, y: str, heads: Gated, name: str
) -> tuple[str | None, Tensor | None]:
    """Queries of the tokens (B, Q, D), keys and values of y (B, N, D). Returns the output without its bias, and
    the bias."""
    if not heads.units:
        return None, w.bias
    picked, h, e = list(heads.units), len(heads.units), w.query.shape[2]
    parts = {"query": w.query, "key": w.key, "value": w.value}
    wide = {what: weight[picked].transpose(0, 1).flatten(1) for what, weight in parts.items()}  # (D, heads * E)
    biases = {
        "query": _bias(w.query_bias, picked),
        "key": _bias(w.key_bias, picked),
        "value": _bias(w.value_bias, picked),
    }
    norms = {"query": w.query_norm, "key": w.key_norm, "value": nn.Identity()}
    at = f"{name}/attention"
    if leavers == y and all(isinstance(norm, nn.Identity) for norm in norms.values()):
        stored = g.weight(f"{at}/qkv.weight", torch.cat(list(wide.values()), 1))
        bias = torch.cat([torch.zeros(h * e) if b is None else b for b in biases.values()])
        mixed = g.op(
            "Attention", y, stored, g.weight(f"{at}/qkv.bias", bias), name=at, domain=MICROSOFT, num_heads=h, scale=1.0,
            qkv_hidden_sizes=[h * e] * 3,
        )  # fmt: skip
    else:
        read = {"query": leavers, "key": y, "value": y}
        inputs = []
        for what, norm in norms.items():
            part = g.op("MatMul", read[what], g.weight(f"{at}/{what}.weight", wide[what]), name=f"{at}/{what}")
            if (own := biases[what]) is not None:
                part = g.op("Add", part, g.weight(f"{at}/{what}.bias", own), name=f"{at}/{what}/biased")
            inputs.append(_by_head_norm(g, norm, part, (h, e), f"{at}/{what}"))
        mixed = g.op("MultiHeadAttention", *inputs, name=at, domain=MICROSOFT, num_heads=h, scale=1.0)
    mixed = heads.closed(g, mixed, h * e, at)
    weight = g.weight(f"{at}/output.weight", w.output[picked].flatten(0, 1))
    return g.op("MatMul", mixed, weight, name=f"{at}/output"), w.bias


def _bias(bias: Tensor | None, heads: list[int]) -> Tensor | None:
    return None if bias is None else bias[heads].flatten()


def _by_head_norm(g: Builder, norm: nn.Module, part: str, shape: tuple[int, int], name: str) -> str:
    """The norm of queries or keys (B, Q, heads * E), by head."""
    if isinstance(norm, nn.Identity):
        return part
    h, e = shape
    part = g.op("Reshape", part, g.integers(0, 0, h, e), name=f"{name}/by_head")
    part = g.norm(norm, part, torch.zeros(2, 3, h, e), f"{name}/norm")
    return g.op("Reshape", part, g.integers(0, 0, h * e), name=f"{name}/normed")


def _mlp(
    g: Builder, block: Block, y: str, tokens: Tensor, groups: Gated | None, model: GatedVit, name: str
) -> tuple[str | None, Tensor | None]:
    """The output without its bias, and the bias. For two linear layers with a GELU between; timm's other kinds go
    through the exporter, in float32."""
    w = mlp_weights(block)
    if w is None:
        return g.call(nn.Sequential(block.mlp, block.ls2), y, tokens, name, model.vit), None
    if groups and not groups.units:
        return None, w.second_bias
    if groups:
        w = w.groups(model.mlp_groups, groups.units)
    hidden = g.op("MatMul", y, g.weight(f"{name}/fc1.weight", w.first), name=f"{name}/fc1")
    if w.first_bias is None:
        hidden = g.op("Gelu", hidden, name=f"{name}/gelu", approximate=w.approximate)
    else:
        kind = "FastGelu" if w.approximate == "tanh" else "BiasGelu"
        hidden = g.op(kind, hidden, g.weight(f"{name}/fc1.bias", w.first_bias), name=f"{name}/gelu", domain=MICROSOFT)
    if groups:
        hidden = groups.closed(g, hidden, w.first.shape[1], name)
    return g.op("MatMul", hidden, g.weight(f"{name}/fc2.weight", w.second), name=f"{name}/fc2"), w.second_bias
