"""Real images as uint8 arrays in memory, and their splits.

Letters: B images, H height, W width, C channels.
"""

import gzip
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset, create_transform
from tqdm import tqdm

from training.config import DataSettings
from training.image_spec import ImageSpec

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_LABELS = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(Exception):
    """The data are not where, or not what, the settings say."""


@dataclass(frozen=True)
class Split:
    images: torch.Tensor
    """uint8 (B, H, W, C): pixels as they enter the model."""
    classes: torch.Tensor
    """int64 (B,): index into the labels."""

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, index: torch.Tensor) -> "Split":
        return Split(self.images[index], self.classes[index])


@dataclass(frozen=True)
class Data:
    labels: tuple[str, ...]
    spec: ImageSpec
    train: Split
    selection: Split
    """Held out of train: profiles are chosen on it."""
    test: Split
    """Read by `evaluate` alone."""


def load(settings: DataSettings, seed: int) -> Data:
    """Load, transform and split the data set. The same settings and seed give the same splits.

    Raises DataError with what is missing and where it was looked for.
    """
    if settings.dataset == "fashion-mnist":
        if (settings.image_size, settings.channels, settings.crop_fraction) != (28, 1, 1.0):
            raise DataError("fashion-mnist is 28 x 28 and grey; allowed: image_size 28, channels 1, crop_fraction 1")
        labels = FASHION_MNIST_LABELS
        train, test = (_fashion_mnist(settings.root, part) for part in ("train", "t10k"))
    elif settings.dataset == "folder":
        labels, train, test = _folder(settings, seed)
    else:
        labels, train, test = _timm(settings)
    if settings.max_train:
        train = train.take(balanced(train.classes, settings.max_train / len(train), seed)[0])
    if settings.max_test:
        test = test.take(balanced(test.classes, settings.max_test / len(test), seed)[0])
    chosen, rest = balanced(train.classes, settings.selection_fraction, seed)
    selection, train = train.take(chosen), train.take(rest)
    pixels = train.images[:20_000].double() / 255
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2)).clamp_min(1e-3)
    spec = image_spec(settings, tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist()))
    return Data(labels, spec, train, selection, test)


def image_spec(settings: DataSettings, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageSpec:
    return ImageSpec(
        height=settings.image_size,
        width=settings.image_size,
        channels=settings.channels,
        resize=math.floor(settings.image_size / settings.crop_fraction),
        interpolation=settings.interpolation,
        mean=mean,
        std=std,
    )


def eval_transform(spec: ImageSpec) -> Callable[[Image.Image], np.ndarray]:
    """PIL image -> uint8 (H, W, C): upright, converted, resized and cropped, as timm evaluates."""
    resize_and_crop = create_transform(
        (spec.channels, spec.height, spec.width),
        is_training=False,
        use_prefetcher=True,  # stop at uint8: scaling and normalisation are in the model
        interpolation=spec.interpolation,
        crop_pct=spec.height / spec.resize,
    )
    mode = "L" if spec.channels == 1 else "RGB"

    def transform(image: Image.Image) -> np.ndarray:
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:  # as Pillow advises
            image = image.convert("RGBA")
        pixels = np.asarray(resize_and_crop(image.convert(mode)))  # (C, H, W)
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))

    return transform


def batches(split: Split, size: int, epochs: float, seed: int, start: int = 0) -> Iterator[tuple[int, Split]]:
    """(step, batch) from step `start` on: shuffled per epoch, the last partial batch of an epoch dropped.

    The order depends on the seed and the epoch alone, so a resumed run sees what it would have seen.
    """
    size = min(size, len(split))
    per_epoch = len(split) // size
    for step in range(start, steps(split, size, epochs)):
        epoch, offset = divmod(step, per_epoch)
        if offset == 0 or step == start:
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        yield step, split.take(order[offset * size : (offset + 1) * size])


def steps(split: Split, size: int, epochs: float) -> int:
    return round(epochs * (len(split) // min(size, len(split))))


def augment(images: torch.Tensor, flip: bool, shift: int) -> torch.Tensor:
    """uint8 (B, H, W, C): mirrored half of the time, shifted by up to `shift` pixels, edges repeated."""
    b, h, w, _ = images.shape
    rows = (torch.arange(h) + torch.randint(-shift, shift + 1, (b, 1))).clamp(0, h - 1)  # (B, H)
    columns = (torch.arange(w) + torch.randint(-shift, shift + 1, (b, 1))).clamp(0, w - 1)  # (B, W)
    if flip:
        columns = torch.where(torch.rand(b, 1) < 0.5, columns.flip(1), columns)
    return images[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]]


def balanced(classes: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a random share of every class (at least one image of each), and of the rest; both in order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(classes), dtype=torch.bool)
    for index in classes.unique():
        members = torch.nonzero(classes == index).flatten()
        count = max(1, round(fraction * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return torch.nonzero(chosen).flatten(), torch.nonzero(~chosen).flatten()


def _fashion_mnist(root: Path | None, part: str) -> Split:
    root = root or DEBIAN_FASHION_MNIST
    if not root.is_dir():
        root = _download_fashion_mnist()
    images, classes = (_read_idx(root, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return Split(torch.from_numpy(images[..., None].copy()), torch.from_numpy(classes.astype(np.int64)))


def _download_fashion_mnist() -> Path:
    from torchvision.datasets import FashionMNIST

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steervit"
    try:
        FashionMNIST(str(cache), download=True)
    except Exception as error:
        raise DataError(
            f"Fashion-MNIST is not in {DEBIAN_FASHION_MNIST} (Debian: apt-get install dataset-fashion-mnist) "
            f"and could not be downloaded to {cache}: {error}"
        ) from error
    return cache / "FashionMNIST" / "raw"


def _read_idx(root: Path, name: str) -> np.ndarray:
    """An array in the IDX format of MNIST (two zero bytes, type 8, rank, big-endian sizes, uint8 data)."""
    path = next((p for p in (root / f"{name}.gz", root / name) if p.is_file()), None)
    if path is None:
        raise DataError(f"{root / name} (or .gz) is missing")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of uint8")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _timm(settings: DataSettings) -> tuple[tuple[str, ...], Split, Split]:
    """A map-style data set that timm knows, read into memory: its train split, and its validation or test split."""
    channels = (0.5,) * settings.channels
    transform = eval_transform(image_spec(settings, channels, channels))
    splits, labels = [], ()
    for name in ("train", "validation"):
        try:
            found = create_dataset(
                settings.dataset, str(settings.root or ""), split=name, is_training=False, download=settings.download
            )
        except Exception as error:  # timm and the libraries behind it raise many kinds
            raise DataError(f"data.dataset {settings.dataset!r}, data.root {settings.root}, {name}: {error}") from error
        found.transform = transform
        labels = tuple(found.classes if hasattr(found, "classes") else found.reader.class_to_idx)
        rows = [found[i] for i in tqdm(range(len(found)), desc=f"data: {name}", unit="image", mininterval=5)]
        images, classes = zip(*rows, strict=True)
        splits.append(Split(torch.from_numpy(np.stack(images)), torch.tensor(classes)))
    return labels, splits[0], splits[1]


def _folder(settings: DataSettings, seed: int) -> tuple[tuple[str, ...], Split, Split]:
    if settings.root is None or not settings.root.is_dir():
        raise DataError(f"data.root is {settings.root}; allowed: a folder of images, one sub-folder a label")
    train_root, test_root = settings.root / "train", settings.root / "test"
    own_test = train_root.is_dir() and test_root.is_dir()
    root = train_root if own_test else settings.root
    labels = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(labels) < 2:
        raise DataError(f"{root} has {len(labels)} sub-folders; allowed: one a label, at least 2")
    channels = (0.5,) * settings.channels
    transform = eval_transform(image_spec(settings, channels, channels))
    train = _read_folder(root, labels, transform)
    if own_test:
        return labels, train, _read_folder(test_root, labels, transform)
    held_out, rest = balanced(train.classes, settings.test_fraction, seed)
    return labels, train.take(rest), train.take(held_out)


def _read_folder(root: Path, labels: tuple[str, ...], transform: Callable[[Image.Image], np.ndarray]) -> Split:
    paths, classes = [], []
    for index, label in enumerate(labels):
        found = sorted(p for p in (root / label).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(found) < 3:
            raise DataError(f"{root / label} has {len(found)} images; allowed: at least 3 a label")
        paths += found
        classes += [index] * len(found)

    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return transform(image)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable image: {error}") from error

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read, paths))
    return Split(torch.from_numpy(np.stack(images)), torch.tensor(classes))
