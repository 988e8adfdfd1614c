"""The residuals that the gates read, for a whole split: in memory, or in a memory-mapped file if there are many.

Letters: B images, S sites, D residual width.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import RunError
from training.data.splits import Split
from training.model.gated_vit import GatedNetwork


@torch.no_grad()
def residuals(
    model: GatedNetwork, split: Split, what: str, size: int = 500, folder: Path | None = None, memory: int | None = None
) -> Tensor:
    """Residuals (S, B, D) on the CPU, without augmentation; computed for all sites in one pass, on the model's device.

    They are float32 in memory. If that takes more than `memory` bytes, they are float16 in a mapped file in `folder`,
    which is deleted with the tensor (or the process). Raises RunError when a residual does not fit float16.
    """
    shape = (len(model.gates), len(split), model.dim)
    mapped = folder is not None and memory is not None and 4 * shape[0] * shape[1] * shape[2] > memory
    result = _file(cast(Path, folder), shape) if mapped else torch.empty(shape)
    starts = range(0, len(split), size)
    for start in tqdm(starts, desc=what, unit="batch", mininterval=5, dynamic_ncols=True):
        images = split.images[start : start + size].to(model.device)
        batch = model(images)[1]["residual"].transpose(0, 1)  # (S, b, D)
        if mapped and batch.abs().max() > torch.finfo(torch.float16).max:
            raise RunError(
                f"sae.memory_limit is {memory} bytes, and residuals of {batch.abs().max():.3g} do not fit the float16 "
                f"file for what exceeds it; allowed: {4 * result.numel()} or more for this model and data"
            )
        result[:, start : start + size] = batch.cpu()
    return result


def _file(folder: Path, shape: tuple[int, int, int]) -> Tensor:
    """A float16 tensor in a file without a name, so that an interruption leaves nothing behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))


def chunks(values: Tensor, size: int = 8192) -> Iterator[Tensor]:
    """The residuals (S, B, D) as float32 pieces (S, <= size, D), in order."""
    for piece in values.split(size, 1):
        yield piece.float()


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (S, 1, D) of residuals (S, B, D), and the root mean square about it (S, 1, 1). Summed in float64."""
    sites, count, dim = values.shape
    mean = torch.zeros(sites, 1, dim, dtype=torch.float64)
    for piece in chunks(values):
        mean += piece.double().sum(1, keepdim=True) / count
    square = torch.zeros(sites, 1, 1, dtype=torch.float64)
    for piece in chunks(values):
        square += (piece.double() - mean).pow(2).sum((1, 2), keepdim=True) / (count * dim)
    return mean.float(), square.sqrt().float()
