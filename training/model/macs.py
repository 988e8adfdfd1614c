"""Counts multiply-accumulates (MACs) per image; the only place that does.

Counted: every convolution and Linear layer, and the two matrix products of attention, with every unit open and with
only the class token in the last block's query, output projection and MLP. Not counted: norms, activations, softmax,
biases, and the gates with their steering (D*U + 2*T*D per site, T terms: with 32 of them 0.13% of the Fashion-MNIST
bundle and 0.46% of that of typefaces).

Letters: B images, G gated blocks, H heads, M MLP groups, U = H + M units.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import nn

from training.model.gated_vit import GatedVit


@dataclass(frozen=True)
class Macs:
    """The compute of an image, in MACs."""

    dense: int
    """The whole model with every unit open."""
    per_head: tuple[int, ...]
    """MACs of one head in each gated block: its share of q, k and v, the attention and the output projection."""
    per_mlp_group: tuple[int, ...] = ()
    """MACs of one MLP group in each gated block; empty if only heads are gated."""
    mlp_groups: int = 0
    """M; 0 if only heads are gated."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name, without those of MLP groups if only heads are gated."""
        return {name: value for name, value in asdict(self).items() if "mlp_group" not in name or value}

    def fraction(self, head_gate: torch.Tensor, mlp_gate: torch.Tensor | None = None) -> torch.Tensor:
        """Compute fraction (B,) of gates (B, G, H) and (B, G, M): MACs spent / MACs with every unit open."""
        closed = (1 - head_gate.double()).sum(2) @ torch.tensor(self.per_head, dtype=torch.float64)  # (B,)
        if mlp_gate is not None and self.per_mlp_group:
            groups = (1 - mlp_gate.double()).sum(2)  # (B, G)
            closed = closed + groups @ torch.tensor(self.per_mlp_group, dtype=torch.float64)
        return 1 - closed / self.dense

    def costs(self, heads: int) -> torch.Tensor:
        """The weight of each unit in `usage`, float64 (G, U), whole numbers: its MACs, or 1 if only heads are gated."""
        if not self.mlp_groups:
            return torch.ones(len(self.per_head), heads, dtype=torch.float64)
        of_blocks = zip(self.per_head, self.per_mlp_group, strict=True)
        return torch.tensor(
            [[head] * heads + [group] * self.mlp_groups for head, group in of_blocks], dtype=torch.float64
        )

    def weights(self, heads: int) -> torch.Tensor:
        """The costs divided by their sum, float64 (G, U)."""
        costs = self.costs(heads)
        return costs / costs.sum()

    def usage(self, gate: torch.Tensor) -> torch.Tensor:
        """Unit usage (B,) of gates (B, G, U): MACs of the open units / MACs of all units. If only heads are gated, it
        is head usage: every head counts the same."""
        costs = self.costs(gate.shape[2] - self.mlp_groups).to(gate)
        return (gate * costs).sum((1, 2)) / costs.sum()


def count(model: GatedVit) -> Macs:
    """The MACs of a model in evaluation mode."""
    vit = model.vit
    stem = 0

    def add(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal stem
        assert isinstance(layer, nn.Conv2d)
        stem += layer.weight.numel() * output.shape[2] * output.shape[3]

    hooks = [m.register_forward_hook(add) for m in vit.patch_embed.modules() if isinstance(m, nn.Conv2d)]
    image = torch.zeros(1, len(model.mean), *vit.patch_embed.img_size, device=model.mean.device)
    try:
        with torch.no_grad():
            tokens = vit._pos_embed(vit.patch_embed(image)).shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    classifier = cast(nn.Linear, vit.head)
    dense = stem + model.leaving * classifier.weight.numel()  # a distilled model has a second head of the same size
    per_head, per_mlp_group = [], []
    for index, block in enumerate(cast(Iterable[Block], vit.blocks)):
        attn, module = cast(Attention, block.attn), cast(Mlp, block.mlp)
        queries = model.leaving if index == len(vit.blocks) - 1 else tokens
        head = head_macs(vit.embed_dim, attn.head_dim, tokens, queries)
        dense += attn.num_heads * head
        neurons = queries * (module.fc1.weight.numel() + module.fc2.weight.numel())
        dense += neurons
        if index in model.gated_blocks:
            per_head.append(head)
            if model.mlp_groups:
                per_mlp_group.append(neurons // model.mlp_groups)
    return Macs(dense, tuple(per_head), tuple(per_mlp_group), model.mlp_groups)


def head_macs(dim: int, head_dim: int, tokens: int, queries: int) -> int:
    """MACs of a head: q and output projection of the query tokens, k and v of all tokens, scores and their weighted
    sum."""
    return 2 * queries * dim * head_dim + 2 * tokens * dim * head_dim + 2 * queries * tokens * head_dim
