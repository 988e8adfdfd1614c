"""The images of a run and their splits. Their sources: sources.py; their storage: pixels.py.

Letters: B images, H height, W width, C channels.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import ValidationError
from tqdm import tqdm

from training import processes, soundness
from training.config import DataSettings
from training.data.degradation import DegradedPixels
from training.data.fashion_mnist import DEBIAN_FASHION_MNIST, FASHION_MNIST_LABELS
from training.data.pixels import DataError, LazyPixels, Split, eval_transform, image_spec, in_memory, settle
from training.data.sources import find
from training.fields import sentence
from training.image_spec import ImageSpec
from training.steering import SteeringError, check_name

__all__ = (
    "DEBIAN_FASHION_MNIST", "FASHION_MNIST_LABELS", "Data", "DataError", "Split", "augment", "balanced",
    "eval_transform", "load", "shuffled", "steps", "subset",
)  # fmt: skip
MEASURED = 20_000
"""Largest number of training images on which mean and standard deviation are measured."""


@dataclass(frozen=True)
class Data:
    """The images of a run, by split."""

    labels: tuple[str, ...]
    spec: ImageSpec
    train: Split
    selection: Split
    """Held out from training, to choose profiles."""
    test: Split
    """Only read by `evaluate`."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Number and digest of the training images before splitting, and of the test images if the set has its own.
    Together with the settings and the seed they determine the split of every image."""
    warnings: tuple[str, ...] = ()
    """Problems that may harm a model or its evaluation."""


def load(settings: DataSettings, seed: int) -> Data:
    """Find and split the images, and read them into memory if they fit. The same settings and seed give the same splits
    and pixels, however the pixels are stored.

    Raises DataError naming what is missing and where it was expected, a label with too few images, or all files that
    are not images.
    """
    labels, train, test, warnings, selection = find(settings)
    labels = _check_classes(settings, labels, train, test)
    digests = {
        f"{name} images": f"{len(split)} with the digest {_digest(split)}"
        for name, split in {"training": train, "test": test}.items()
        if split is not None
    }
    if test is None:
        held_out, rest = balanced(train.classes, settings.test_fraction, seed)
        train, test = train.take(rest), train.take(held_out)
    if settings.max_train:
        train = subset(train, settings.max_train, seed)
    if settings.max_test:
        test = subset(test, settings.max_test, seed)
    if selection is None:
        chosen, rest = balanced(train.classes, settings.selection_fraction, seed)
        train, selection = train.take(rest), train.take(chosen)
    splits = {"train": train, "selection": selection, "test": test}
    for name, split in splits.items():
        counts = split.classes.bincount(minlength=len(labels))
        if counts.min() == 0:
            short = labels[int(counts.argmin())]
            raise DataError(
                f"label {short!r} has too few images: none is left for the {name} split; allowed: at least 1 in each "
                "of train, selection and test (data.test_fraction, data.selection_fraction)"
            )
    classes = {name: split.classes for name, split in splits.items()}
    warnings = (*warnings, *soundness.of_data(labels, classes))
    if processes.is_main():
        print("data: " + ", ".join(f"{len(split)} {name}" for name, split in splits.items()), flush=True)
        soundness.show("data", warnings)
    errors: list[DataError] = []
    splits = {name: _held(settings, split, name, errors) for name, split in splits.items()}
    settle(errors)
    mean, std = settings.mean, settings.std
    if mean is None or std is None:
        measured = _mean_and_std(settings, splits["train"])
        mean, std = mean or measured[0], std or measured[1]
    try:
        return Data(labels, image_spec(settings, mean, std), digests=digests, warnings=warnings, **splits)
    except ValidationError as error:
        raise DataError(f"data.mean, data.std: {sentence(error)}") from error


def _check_classes(
    settings: DataSettings, labels: tuple[str, ...], train: Split, test: Split | None
) -> tuple[str, ...]:
    """The labels in their canonical form."""
    if len(labels) < 2:
        raise DataError(f"{settings.dataset!r} has {len(labels)} label ({', '.join(labels)}); allowed: at least 2")
    try:
        labels = tuple(map(check_name, labels))
    except SteeringError as error:
        raise DataError(f"a label of {settings.dataset!r}: {error}") from error
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise DataError(f"{settings.dataset!r} has the label {twice!r} more than once; allowed: once")
    for name, split in {"training": train, "test": test}.items():
        if split is None:
            continue
        if len(split) and not 0 <= int(split.classes.min()) <= int(split.classes.max()) < len(labels):
            wrong = next(int(c) for c in split.classes if not 0 <= c < len(labels))
            last = len(labels) - 1
            raise DataError(f"a {name} image of {settings.dataset!r} has class {wrong}; allowed: 0 to {last}")
        counts = split.classes.bincount(minlength=len(labels))
        empty = [labels[index] for index in torch.nonzero(counts == 0).flatten().tolist()]
        if empty:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            raise DataError(
                f"{settings.dataset!r} has no {name} image of {', '.join(map(repr, empty[:5]))}{more}; "
                "allowed: images of every label"
            )
    return labels


def _digest(split: Split) -> str:
    """The digest of a whole data set; reads no file."""
    digest = hashlib.sha256(split.classes.numpy())  # type: ignore[arg-type]
    pixels = split.images.numpy() if isinstance(split.images, torch.Tensor) else split.contents.encode()
    digest.update(pixels)  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


def _held(settings: DataSettings, split: Split, name: str, errors: list[DataError]) -> Split:
    """The split in memory, if the settings say so; otherwise its files are checked. Appends unreadable images to
    `errors`."""
    if isinstance(split.images, DegradedPixels) and name == "train":  # drawn anew in each epoch
        return split
    one = settings.image_size**2 * settings.channels  # bytes
    if settings.memory == "memory" or (settings.memory == "auto" and len(split) * one <= settings.memory_limit):
        return in_memory(split, f"data: {name}", errors)
    if isinstance(split.images, LazyPixels) and not settings.skip_unreadable:  # otherwise they have been checked
        errors += filter(None, split.images.check(f"data: {name}: check"))
    return split


def _mean_and_std(settings: DataSettings, train: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels scaled to 0..1. Computed from counts of pixel values, so they
    do not depend on how the pixels are stored."""
    rows = torch.arange(min(len(train), MEASURED))
    if settings.dataset != "fashion-mnist":  # images may be sorted by class
        rows = torch.linspace(0, len(train) - 1, len(rows), dtype=torch.float64).long()
    counts = torch.zeros(settings.channels, 256, dtype=torch.float64)
    for some in tqdm(rows.split(1024), desc="data: mean", unit="batch", mininterval=5, delay=2, dynamic_ncols=True):
        for channel, values in enumerate(train.images[some].unbind(-1)):
            counts[channel] += values.flatten().bincount(minlength=256)
    value = torch.arange(256, dtype=torch.float64) / 255
    number = counts.sum(1)
    mean = (counts * value).sum(1) / number
    variance = (counts * (value - mean[:, None]).square()).sum(1) / (number - 1)
    std = variance.sqrt().clamp_min(1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def shuffled(images: int, size: int, seed: int, step: int) -> torch.Tensor:
    """The rows of the batch at `step`: int64 (B,); B is at most the number of images."""
    size = min(size, images)
    epoch, offset = divmod(step, images // size)
    return _order(images, seed, epoch)[offset * size : (offset + 1) * size]


@functools.lru_cache(2)
def _order(images: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def steps(split: Split, size: int, epochs: float) -> int:
    """The number of training steps in `epochs`. size: of a batch; each epoch leaves out images that do not fill a
    batch."""
    return round(epochs * (len(split) // min(size, len(split))))


def augment(
    images: torch.Tensor,
    flip: bool,
    shift: int,
    generator: torch.Generator | None = None,
    rank: int = 0,
    processes: int = 1,
) -> torch.Tensor:
    """Images uint8 (B, H, W, C), each mirrored with probability 1/2 and shifted by up to `shift` pixels, with edges
    repeated.

    With several processes, `images` are the rows rank::processes of a batch, and are augmented as in the whole batch.
    """
    b, h, w, _ = images.shape

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (b * processes, 1), generator=generator)[rank::processes]

    rows = (torch.arange(h) + draw(-shift, shift + 1)).clamp(0, h - 1)  # (B, H)
    columns = (torch.arange(w) + draw(-shift, shift + 1)).clamp(0, w - 1)  # (B, W)
    if flip:
        mirrored = torch.rand(b * processes, 1, generator=generator)[rank::processes] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return images[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]]


def subset(split: Split, count: int, seed: int) -> Split:
    """About `count` random images of the split, with the same share of every class, in order; all if there are no
    more."""
    return split.take(balanced(split.classes, count / len(split), seed)[0])


def balanced(classes: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a random share of every class (at least one image of each), and of the rest, both in order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(classes), dtype=torch.bool)
    for index in classes.unique():
        members = torch.nonzero(classes == index).flatten()
        count = max(1, round(fraction * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return torch.nonzero(chosen).flatten(), torch.nonzero(~chosen).flatten()
