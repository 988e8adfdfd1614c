"""The last block, computed exactly from stored vectors: for each image, its input and the contribution of each head.

    logits = tail(residual + bias + sum of the kept heads' contributions)

where tail is the block's MLP, the final norm and the classifier, for the class token only. In models in which only the
last block is gated (the paper's setting), gates can then be studied with these small vectors: a LastBlock replaces the
model, and row numbers replace the images.

Letters: B images, H heads, U units (heads, then MLP groups), D width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import cast

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from training.data.splits import Split
from training.model.gated_vit import Decide, GatedNetwork, GatedVit, Intermediates, Steer, keep_all, keep_positive, mlp


@dataclass(frozen=True)
class LastBlock:
    """The stored vectors of the images of some splits. The gates of earlier blocks decide as without steering."""

    model: GatedVit
    residual: Tensor
    """float32 (B, D): the class token that enters the block, which its gate reads."""
    contribution: Tensor
    """float32 (B, H, D): the contribution of each head when it is open."""

    def __call__(
        self,
        rows: Tensor,
        steer: Steer | None = None,
        decide: Decide = keep_positive,
        gate_bias: Tensor | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """As GatedVit.forward, for the images with these row numbers (B,); only for models in which no other block is
        gated."""
        residual = self.residual[rows]
        with torch.autocast(residual.device.type, enabled=False):
            logit = self.gates[0](residual if steer is None else steer(0, residual))
            if gate_bias is not None:
                logit = logit + gate_bias[:, 0]
            gate = decide(0, logit)
            logits = self.tail(residual, self.contribution[rows], gate)
        head_gate, mlp_gate = gate[:, None].split([self.heads, self.mlp_groups], 2)
        out: Intermediates = {
            "residual": residual[:, None],
            "gate_logit": logit[:, None],
            "head_gate": head_gate,
            "mlp_gate": mlp_gate,
        }
        return logits, out

    @property
    def gates(self) -> nn.ModuleList:
        """One Gate for each gated block."""
        return self.model.gates

    @property
    def heads(self) -> int:
        """Heads of the block."""
        return self.contribution.shape[1]

    @property
    def mlp_groups(self) -> int:
        """MLP groups of the block."""
        return self.model.mlp_groups

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.residual.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.residual.device

    def logits(self, gate: Tensor) -> Tensor:
        """Gates (B, U) -> logits (B, C)."""
        parts = [slice(start, start + 4096) for start in range(0, len(self.residual), 4096)]
        return torch.cat([self.tail(self.residual[p], self.contribution[p], gate[p].to(self.device)) for p in parts])

    def tail(self, residual: Tensor, contribution: Tensor, gate: Tensor) -> Tensor:
        """Residual (B, D), contribution (B, H, D) and gates (B, U) -> logits (B, C)."""
        block, vit = cast(Block, self.model.vit.blocks[-1]), self.model.vit
        bias = cast(Attention, block.attn).proj.bias
        constant = block.ls1(bias) if bias is not None else 0.0
        kept = torch.einsum("bh,bhd->bd", gate[:, : self.heads].float(), contribution)
        x = (residual + constant + kept)[:, None]  # (B, 1, D)
        x = x + block.ls2(mlp(cast(Mlp, block.mlp), block.norm2(x), gate[:, self.heads :]))
        logits: Tensor = vit.forward_head(vit.norm(x))
        return logits


def shortcut(model: GatedVit, splits: Sequence[Split]) -> tuple[GatedNetwork, list[Split]]:
    """A faster equivalent of the model and the splits, if there is one: a LastBlock and row numbers. Otherwise, the
    arguments.

    It requires that only the last block is gated and that only the class token leaves that block.
    """
    if model.gated_blocks != (len(model.vit.blocks) - 1,) or model.leaving != 1:
        return model, list(splits)
    caches = [store(model, split) for split in splits]
    cache = LastBlock(model, torch.cat([c.residual for c in caches]), torch.cat([c.contribution for c in caches]))
    rows = torch.arange(len(cache.residual)).split([len(split) for split in splits])
    return cache, [Split(part, split.classes) for part, split in zip(rows, splits, strict=True)]


@torch.no_grad()
def store(model: GatedVit, split: Split, size: int = 500) -> LastBlock:
    """Store the vectors of a split in one forward pass. Raises ValueError for a distilled model, where two tokens leave
    the block."""
    if model.leaving != 1:
        raise ValueError("the last-block cache is for models of which only the class token leaves the last block")
    block = cast(Block, model.vit.blocks[-1])
    attn = cast(Attention, block.attn)
    h, e = attn.num_heads, attn.head_dim
    weight = attn.proj.weight.view(-1, h, e)  # (D, H, E)
    mixed: list[Tensor] = []
    residuals: list[Tensor] = []
    hooks = [
        attn.proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0][:, 0])),  # (B, H*E), ungated
        # a copy: a view would keep all tokens in memory
        block.norm1.register_forward_pre_hook(lambda _, inputs: residuals.append(inputs[0][:, 0].clone())),
    ]
    last = len(model.gated_blocks) - 1 if model.gated_blocks[-1] == len(model.vit.blocks) - 1 else -1

    def last_open(site: int, logit: Tensor) -> Tensor:
        return keep_all(site, logit) if site == last else (logit > 0).to(logit.dtype)

    try:
        for start in range(0, len(split), size):
            model(split.images[start : start + size], decide=last_open)
    finally:
        for hook in hooks:
            hook.remove()
    heads = torch.cat(mixed).view(-1, h, e)
    return LastBlock(model, torch.cat(residuals), block.ls1(torch.einsum("bhe,dhe->bhd", heads, weight)))


def subsets(heads: int) -> Tensor:
    """Every set of heads, including the empty one: float32 (2^H, H)."""
    return torch.tensor(list(product((0.0, 1.0), repeat=heads)))


@torch.no_grad()
def best_subsets(cache: LastBlock, classes: Tensor, label: int) -> list[dict[str, float | list[int]]]:
    """The oracle: for every number of heads, the fixed set with the highest recall of the class on this split.

    classes (B,). Chosen and measured on the same images, so it is a bound, not a method. MLP groups are open: in the
    last block they run for one token and cost next to nothing.
    """
    own = torch.nonzero(classes == label).flatten()
    of_class = LastBlock(cache.model, cache.residual[own], cache.contribution[own])
    best: dict[int, dict[str, float | list[int]]] = {}
    for subset in subsets(cache.heads):
        gate = torch.cat([subset, torch.ones(cache.mlp_groups)]).expand(len(own), -1)
        recall = (of_class.logits(gate).argmax(-1) == label).double().mean().item()
        count = int(subset.sum())
        if count not in best or recall > float(best[count]["recall"]):  # type: ignore[arg-type]
            kept = torch.nonzero(subset).flatten().tolist()
            best[count] = {"head_usage": count / len(subset), "recall": round(recall, 5), "heads": kept}
    return [best[count] for count in sorted(best)]
