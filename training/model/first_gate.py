"""A gated model from its first gate on. The blocks before it, a third of a pass or more, do not depend on steering.

Letters: B images, N tokens, D residual width.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor
from tqdm import tqdm

from training.data.splits import Split
from training.model.gated_vit import GatedVit, attention
from training.model.inference import BATCH


@torch.no_grad()
def from_first_gate(model: GatedVit, splits: Sequence[Split]) -> tuple[GatedVit, list[Split]]:
    """The model from its first gated block on, and the splits with the tokens (B, N, D) that enter this block instead
    of images, on the CPU."""
    first = model.gated_blocks[0]
    before = cast(Iterable[Block], model.vit.blocks[:first])

    def tokens(images: Tensor) -> Tensor:
        x = model.embed(images)
        for block in before:
            x = x + block.ls1(attention(cast(Attention, block.attn), block.norm1(x), None, x.shape[1]))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x.cpu()

    later = copy.deepcopy(model)
    later.vit.blocks = later.vit.blocks[first:]
    later.gated_blocks = tuple(block - first for block in model.gated_blocks)
    later.embed = lambda image: image.to(later.device)  # type: ignore[method-assign]
    entered = []
    for split in splits:
        starts = tqdm(range(0, len(split), BATCH), "first gate", unit="batch", delay=5, dynamic_ncols=True)
        x = torch.cat([tokens(split.images[start : start + BATCH]) for start in starts])
        entered.append(replace(split, images=x))
    return later, entered


@torch.no_grad()
def tokens_size(model: GatedVit, splits: Sequence[Split]) -> int:
    """Size of the tokens of `from_first_gate`, in bytes."""
    return model.embed(splits[0].images[:1]).nbytes * sum(len(split) for split in splits)
