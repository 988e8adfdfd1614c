"""The batches of a training phase: order, augmentation and mixing, each determined by (seed, step).

So a resumed run gets the same batches as an uninterrupted one, independent of the number of worker processes that
prepare the batches and of training processes that share them.

timm's `create_loader` is not used: its sampler cannot start at a step, its random state depends on the number of
workers, and its prefetcher normalises the pixels, which here is the model's first operation. Its parts are used:
torch's DataLoader, timm's transforms, RandomErasing and FastCollateMixup.

Letters: B images, H height, W width, C channels.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset

from training.config import DataSettings
from training.data.degradation import DegradedPixels
from training.data.splits import Data, DataError, augment, shuffled, steps


@dataclass(frozen=True)
class Batch:
    """The input of a training step, or a process's share of it."""

    images: torch.Tensor
    """uint8 (B, H, W, C): augmented, as they enter the model."""
    target: torch.Tensor
    """int64 (B,): index into the labels. With mixup or cutmix, float32 (B, classes): smoothed rows that sum to 1."""


def training_batches(
    data: Data,
    settings: DataSettings,
    size: int,
    epochs: float,
    seed: int,
    start: int = 0,
    label_smoothing: float = 0.0,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from step `start` on, `steps(data.train, size, epochs)` in all, shuffled per epoch.

    `size` is that of the global batch; process `rank` of `processes` gets its rows rank::processes. Labels are smoothed
    here only when images are mixed; otherwise the loss does it. Raises DataError when the processes cannot share a
    batch equally, when an augmentation is invalid, and for an image that cannot be decoded.
    """
    stream = _Stream(data, settings, size, seed, label_smoothing, rank, processes)
    return _run(stream, range(start, steps(data.train, size, epochs)), settings.workers)


def _run(stream: "_Stream", order: range, workers: int) -> Iterator[tuple[int, Batch]]:
    loader = DataLoader(
        stream,
        batch_size=None,  # an item is a whole batch
        sampler=order,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # otherwise it draws from the generator of the training
    )
    for step, batch in zip(order, loader, strict=True):
        if isinstance(batch, DataError):
            raise batch
        yield step, batch


class _Stream(Dataset[Batch | DataError]):
    """step -> Batch. Errors are returned: one raised in a worker would arrive as text with its traceback."""

    def __init__(
        self,
        data: Data,
        settings: DataSettings,
        size: int,
        seed: int,
        label_smoothing: float,
        rank: int,
        processes: int,
    ):
        self.data, self.settings, self.seed, self.rank, self.processes = data, settings, seed, rank, processes
        self.size = min(size, len(data.train))
        mixed = settings.mixup > 0 or settings.cutmix > 0
        allowed = processes * (2 if mixed else 1)
        if self.size % allowed:
            why = f"{processes} processes" + (", which mix images in pairs" if mixed else "")
            raise DataError(f"a batch has {self.size} images; allowed for {why}: a multiple of {allowed}")
        if settings.augmentation == "timm":
            self.transform, self.erasing = _timm_augmentation(data, settings)
        self.mix = None
        if mixed:
            self.mix = FastCollateMixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                prob=settings.mixup_prob,
                switch_prob=settings.switch_prob,
                label_smoothing=label_smoothing,
                num_classes=len(data.labels),
            )

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            index = shuffled(len(self.data.train), self.size, self.seed, step)[self.rank :: self.processes]
            augmented = self._with_timm if self.settings.augmentation == "timm" else self._shifted
            images = augmented(index, step)
        except DataError as error:
            return error
        classes = self.data.train.classes[index]
        return self._mixed(images, classes, step) if self.mix else Batch(images, classes)

    def _shifted(self, index: torch.Tensor, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_numbers(self.seed, step)[0])
        images = self.data.train.images
        if isinstance(images, DegradedPixels):
            images = images.draw(index, self.seed, step // (len(images) // self.size))
        else:
            images = images[index]
        return augment(images, self.settings.flip, self.settings.shift, generator, self.rank, self.processes)

    def _with_timm(self, index: torch.Tensor, step: int) -> torch.Tensor:
        augmented = []
        for position, row in enumerate(index.tolist()):
            picture = self.data.train.picture(row)
            with seeded(self.seed, step, position * self.processes + self.rank):
                pixels = torch.as_tensor(np.array(self.transform(picture)))  # (C, H, W)
                augmented.append(self._erased(pixels))
        return torch.stack(augmented).permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)

    def _erased(self, pixels: torch.Tensor) -> torch.Tensor:
        """Erases as timm does: normalised pixels are replaced by normal noise."""
        if self.erasing is None:
            return pixels
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.data.spec.mean, self.data.spec.std))
        normalised = self.erasing((pixels / 255 - mean) / std)
        erased: torch.Tensor = ((normalised * std + mean) * 255).round().clamp(0, 255).byte()
        return erased

    def _mixed(self, images: torch.Tensor, classes: torch.Tensor, step: int) -> Batch:
        """Mix row i with row i + B/2, which is in the share of the same process; one draw for the whole global
        batch."""
        assert self.mix is not None
        half = torch.arange(len(classes) // 2)
        order = torch.cat([half, len(classes) - 1 - half])  # timm mixes first with last; its own inverse
        rows = [(images[i].permute(2, 0, 1).numpy(), int(classes[i])) for i in order.tolist()]
        with seeded(self.seed, step):
            mixed, target = self.mix(rows)  # (B, C, H, W), (B, classes)
        return Batch(mixed[order].permute(0, 2, 3, 1).contiguous(), target[order].float())


def _timm_augmentation(data: Data, settings: DataSettings) -> tuple[Callable[[Image.Image], Any], RandomErasing | None]:
    spec = data.spec
    try:
        transform = create_transform(
            (spec.channels, spec.height, spec.width),
            is_training=True,
            use_prefetcher=True,  # stop at uint8
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=0.5 if settings.flip else 0.0,
            color_jitter=settings.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=settings.auto_augment,
            interpolation=settings.train_interpolation,
            mean=spec.mean,
            std=spec.std,
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(f"data.auto_augment is {settings.auto_augment!r}; timm cannot read it: {error}") from error
    erasing = RandomErasing(settings.re_prob, mode="pixel", device="cpu") if settings.re_prob else None
    return transform, erasing


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, Python, numpy and torch draw from `key`; afterwards their random states are restored."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    one, two, three = _numbers(*key)
    random.seed(one)
    np.random.seed(two)
    torch.default_generator.manual_seed(three)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _numbers(*key: int) -> list[int]:
    numbers: list[int] = np.random.SeedSequence([value % 2**64 for value in key]).generate_state(3).tolist()
    return numbers
