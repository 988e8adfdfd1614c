"""Fashion-MNIST: from Debian's package, a folder, or a download."""

import gzip
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from training.data.pixel_map import default_cache
from training.data.pixels import DataError, Split

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_LABELS = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def fashion_mnist(root: Path | None, part: str) -> Split:
    """The `train` or `t10k` part, in memory. Raises DataError naming a file that is missing, cut short or not in IDX
    format."""
    if root is not None and not root.is_dir():
        raise DataError(f"data.root is {root}; allowed: the folder of Fashion-MNIST's four files, or none")
    root = root or DEBIAN_FASHION_MNIST
    if not root.is_dir():
        root = _download_fashion_mnist()
    images, classes = (_read_idx(root, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if len(images) != len(classes):
        raise DataError(f"{root} has {len(images)} images and {len(classes)} labels of {part}; allowed: as many")
    return Split(torch.from_numpy(images[..., None].copy()), torch.from_numpy(classes.astype(np.int64)))


def _download_fashion_mnist() -> Path:
    from torchvision.datasets import FashionMNIST

    cache = default_cache()
    try:
        FashionMNIST(str(cache), download=True)
    except Exception as error:
        raise DataError(
            f"Fashion-MNIST is not in {DEBIAN_FASHION_MNIST} (Debian: apt-get install dataset-fashion-mnist) "
            f"and could not be downloaded to {cache}: {error}"
        ) from error
    return cache / "FashionMNIST" / "raw"


@cache
def _read_idx(root: Path, name: str) -> np.ndarray:
    """An array in the IDX format of MNIST (two zero bytes, type 8, rank, big-endian sizes, uint8 data). Read once."""
    path = next((p for p in (root / f"{name}.gz", root / name) if p.is_file()), None)
    if path is None:
        raise DataError(f"{root / name} (or .gz) is missing")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\x00\x00\x08":
            raise ValueError(f"it begins with {raw[:3]!r}")
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"{path} is not a whole IDX file of uint8: {error}") from error
