"""The weights of a block as the graphs use them, with scales multiplied in.

Letters: D residual width, H heads, E head width, F hidden neurons of the MLP.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadWeights:
    """A block's attention, head by head, with scales multiplied in."""

    query: Tensor
    """(H, D, E)"""
    query_bias: Tensor | None
    """(H, E)"""
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    """(H, D, E); its bias is in `added`."""
    value_bias: Tensor | None
    output: Tensor
    """(H, E, D)"""
    added: Tensor | None
    """(H, D): what the bias of the values adds to the output, by open head."""
    bias: Tensor | None
    """(D,): bias of the output."""
    query_norm: nn.Module
    key_norm: nn.Module


@dataclass(frozen=True)
class MlpWeights:
    """A block's MLP: two linear layers with a GELU between, the layer scale multiplied in."""

    first: Tensor
    """(D, F)"""
    first_bias: Tensor | None
    approximate: str
    """Approximation of the GELU: none or tanh."""
    second: Tensor
    """(F, D)"""
    second_bias: Tensor | None

    def groups(self, count: int, kept: Sequence[int]) -> "MlpWeights":
        """The hidden neurons of some of `count` equal groups."""
        neurons = self.first.shape[1] // count
        part = [group * neurons + neuron for group in kept for neuron in range(neurons)]
        bias = None if self.first_bias is None else self.first_bias[part]
        return replace(self, first=self.first[:, part], first_bias=bias, second=self.second[part])


@torch.no_grad()
def head_weights(block: Block) -> HeadWeights:
    """The weights of a block's attention, by head, without gradients.

    The scale of the queries and the layer scale are multiplied in. Unless keys are normed, their bias is None: it would
    change no answer.
    """
    attn, gamma = cast(Attention, block.attn), getattr(block.ls1, "gamma", torch.ones(()))
    h, e = attn.num_heads, attn.head_dim
    query, key, value = attn.qkv.weight.view(3, h, e, -1).transpose(2, 3)  # each (H, D, E)
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.view(3, h, e).unbind()
    key_bias: Tensor | None
    query_bias, key_bias, value_bias = biases
    query_norm, key_norm = attn.q_norm, attn.k_norm
    if isinstance(query_norm, nn.Identity):
        query = query * attn.scale
        query_bias = None if query_bias is None else query_bias * attn.scale
    else:
        query_norm = _scaled(query_norm, attn.scale)
    if isinstance(key_norm, nn.Identity):
        key_bias = None
    output = (attn.proj.weight.T * gamma).view(h, e, -1)  # (H, E, D)
    added = None if value_bias is None else torch.einsum("he,hed->hd", value_bias, output)
    bias = None if attn.proj.bias is None else attn.proj.bias * gamma
    return HeadWeights(query, query_bias, key, key_bias, value, value_bias, output, added, bias, query_norm, key_norm)


@torch.no_grad()
def mlp_weights(block: Block) -> MlpWeights | None:
    """The weights of a block's MLP, without gradients; None for timm's other kinds of MLP."""
    mlp, scale = cast(Mlp, block.mlp), getattr(block.ls2, "gamma", torch.ones(()))
    if not (type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and type(mlp.act) is nn.GELU):
        return None
    bias = None if mlp.fc2.bias is None else mlp.fc2.bias * scale
    return MlpWeights(mlp.fc1.weight.T, mlp.fc1.bias, mlp.act.approximate, mlp.fc2.weight.T * scale, bias)


def _scaled(norm: nn.Module, factor: float) -> nn.Module:
    """A norm of the last axis whose output is multiplied by the factor."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
        return nn.Sequential(norm, _Scale(factor))
    scaled = copy.deepcopy(norm)
    for parameter in scaled.parameters():
        parameter.mul_(factor)
    return scaled


class _Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
