"""Images as a model reads them, uint8 (B, H, W, C): a tensor in memory, files decoded on access, or a mapped file.

Letters: B images, H height, W width, C channels.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training import image_files, processes
from training.config import DataSettings
from training.image_spec import ImageSpec, check_mode

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 64  # largest number of decoded images that wait for their turn
SHOWN = 100
"""Largest number of images that a message names."""


class DataError(Exception):
    """The data are missing, or are not what the settings say."""


class Source(Protocol):
    """A source of images, by row."""

    def open(self, row: int) -> Image.Image:
        """The decoded image. Raises what Pillow or the library behind the source raises."""
        ...

    def name(self, row: int) -> str:
        """The name of the image in messages."""
        ...

    def identity(self) -> str:
        """A text that changes whenever the files change; it identifies the source of a mapped file."""
        ...

    def contents(self) -> str:
        """A digest of the images: Split.contents."""
        ...


@dataclass(frozen=True)
class Pixels(ABC):
    """Rows of a set of images that is not in memory. Indexing it like a tensor (by slice, int, int64 or bool tensor)
    reads these images: uint8 (B, H, W, C)."""

    rows: torch.Tensor
    """int64 (B,): the rows of the set, in order."""
    spec: ImageSpec
    """Specification of the pixels that indexing returns."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, W, C), like a tensor's shape."""
        return (len(self), *self.spec.shape)

    def __getitem__(self, key: slice | int | torch.Tensor) -> torch.Tensor:
        rows = self.rows[key]
        return self.read(rows[None])[0] if rows.ndim == 0 else self.read(rows)

    @abstractmethod
    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Read rows of the whole set: uint8 (B, H, W, C)."""

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """The image at `index`, upright, grey or RGB, in its stored size: the input of augmentation."""


@dataclass(frozen=True)
class LazyPixels(Pixels):
    """Images decoded and transformed at every access, by a pool of threads."""

    source: Source

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """As Pixels.read. Raises DataError on an image that cannot be read."""
        images = list(in_threads(self._decoder(eval_transform(self.spec)), rows.tolist()))
        return torch.from_numpy(np.stack(images)) if images else torch.empty((0, *self.spec.shape), dtype=torch.uint8)

    def picture(self, index: int) -> Image.Image:
        """As Pixels.picture. Raises DataError when the image cannot be read."""
        return self._decoder(lambda image: upright(image, self.spec.channels))(int(self.rows[index]))

    def decoded(self, title: str) -> Iterator[np.ndarray | DataError]:
        """Every image in order, as uint8 (H, W, C), or the error if it cannot be read; shows a progress bar."""
        return self._every(eval_transform(self.spec), title)

    def check(self, title: str) -> list[DataError | None]:
        """The error of each image that cannot be read, else None. Decodes all images."""
        return list(self._every(lambda image: check_mode(image.mode), title))

    def _every(self, transform: Callable[[Image.Image], R], title: str) -> Iterator[R | DataError]:
        bar = tqdm(self.rows.tolist(), desc=title, unit="image", mininterval=5, delay=2, dynamic_ncols=True)
        return in_threads(caught(self._decoder(transform)), bar)

    def _decoder(self, transform: Callable[[Image.Image], R]) -> Callable[[int], R]:
        def decode(row: int) -> R:
            try:
                with self.source.open(row) as image:
                    return transform(image)
            except Exception as error:  # Pillow and the libraries behind a source raise many types
                raise DataError(f"{self.source.name(row)} is not a readable image: {error}") from error

        return decode


@dataclass(frozen=True)
class MappedPixels(Pixels):
    """A file of uint8 (images, H, W, C), read through the page cache."""

    path: Path
    total: int
    """Images in the file."""

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """As Pixels.read; returns a copy in memory."""
        # opened at every access: a memmap cannot be sent to another process, and opening takes microseconds
        mapped = np.memmap(self.path, np.uint8, "r", shape=(self.total, *self.spec.shape))
        return torch.from_numpy(np.asarray(mapped[rows.numpy()]))

    def picture(self, index: int) -> Image.Image:
        """As Pixels.picture, in the size that the model reads, the only one stored."""
        return as_picture(self[index])


Images = torch.Tensor | Pixels


@dataclass(frozen=True)
class Split:
    """Images and their classes."""

    images: Images
    """uint8 (B, H, W, C): pixels as they enter the model. Pixels that are not in memory are read when indexed."""
    classes: torch.Tensor
    """int64 (B,): index into the labels."""
    contents: str = ""
    """For a whole data set, a digest of its images that does not depend on their location. Empty for images in
    memory."""
    factors: torch.Tensor | None = None
    """float32 (B, factors): the factors that each image was made from, if known (typefaces.FACTORS)."""

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def clusters(self) -> np.ndarray | None:
        """int64 (B,): the design of each image, the first factor. Images of one design are not independent; None: all
        images are independent."""
        return None if self.factors is None else self.factors[:, 0].long().numpy()

    def take(self, index: torch.Tensor) -> "Split":
        """The split of these rows. Images that are not in memory are not read."""
        images, factors = self.images, None if self.factors is None else self.factors[index]
        if isinstance(images, Pixels):
            return Split(replace(images, rows=images.rows[index]), self.classes[index], factors=factors)
        return Split(images[index], self.classes[index], factors=factors)

    def picture(self, index: int) -> Image.Image:
        """The image at `index`, upright, grey or RGB, in its stored size."""
        return self.images.picture(index) if isinstance(self.images, Pixels) else as_picture(self.images[index])


def in_memory(split: Split, title: str, errors: list[DataError]) -> Split:
    """The same split with its images read into one uint8 tensor. Appends an error for each unreadable image to
    `errors`."""
    images = split.images
    if isinstance(images, torch.Tensor):
        return split
    values = torch.empty(images.shape, dtype=torch.uint8)
    if isinstance(images, LazyPixels):
        for row, pixels in enumerate(images.decoded(title)):
            if isinstance(pixels, DataError):
                errors.append(pixels)
            else:
                values[row] = torch.from_numpy(pixels)
    else:
        for start in range(0, len(images), 4096):
            values[start : start + 4096] = images[start : start + 4096]
    return Split(values, split.classes, factors=split.factors)


def caught(function: Callable[[T], R]) -> Callable[[T], R | DataError]:
    """The function, changed to return a DataError instead of raising it."""

    def call(item: T) -> R | DataError:
        try:
            return function(item)
        except DataError as error:
            return error

    return call


def readable(rows: Iterable[tuple[R | DataError, int]], skip: bool, title: str) -> Iterator[tuple[R, int]]:
    """The rows with readable images; afterwards settles the errors of the others."""
    errors = []
    for image, index in rows:
        if isinstance(image, DataError):
            errors.append(image)
        else:
            yield image, index
    settle(errors, skip, title)


def settle(errors: Sequence[DataError], skip: bool = False, title: str = "data") -> None:
    """Raise DataError listing all images that cannot be read; with skip, print the list instead."""
    if not errors:
        return
    number = "1 image is" if len(errors) == 1 else f"{len(errors)} images are"
    lines = [f"  {error}" for error in errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"  and {len(errors) - SHOWN} more")
    if not skip:
        raise DataError("\n".join([f"{number} not readable (--data.skip-unreadable leaves out such images):", *lines]))
    if processes.is_main():
        print("\n".join([f"{title}: {number} not readable and left out:", *lines]), flush=True)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function(item) for each item, in order, computed by a pool of threads that runs a bounded number of items
    ahead."""
    with ThreadPoolExecutor() as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def image_spec(settings: DataSettings, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> ImageSpec:
    """The image specification of the settings. Without mean and std they are 0.5, for uses where only the geometry
    matters."""
    return ImageSpec(
        height=settings.image_size,
        width=settings.image_size,
        channels=settings.channels,
        resize=math.floor(settings.image_size / settings.crop_fraction),
        interpolation=settings.interpolation,
        mean=mean or (0.5,) * settings.channels,
        std=std or (0.5,) * settings.channels,
    )


def eval_transform(spec: ImageSpec) -> Callable[[Image.Image], np.ndarray]:
    """PIL image -> uint8 (H, W, C), as in the server. Raises ValueError for more than 8 bits per channel."""

    def transform(image: Image.Image) -> np.ndarray:
        check_mode(image.mode)
        return image_files.to_pixels(image, spec)

    return transform


def upright(image: Image.Image, channels: int) -> Image.Image:
    """As image_files.upright. Raises ValueError for more than 8 bits per channel."""
    check_mode(image.mode)
    return image_files.upright(image, channels)


def open_image(content: bytes) -> Image.Image:
    """The decoded image of a file. Raises ValueError, or what Pillow raises for a broken file."""
    return image_files.load(content, lambda image: check_mode(image.mode))


def as_picture(pixels: torch.Tensor) -> Image.Image:
    """uint8 (H, W, C) -> PIL image, grey or RGB."""
    return Image.fromarray(pixels.numpy().squeeze(2) if pixels.shape[2] == 1 else pixels.numpy())
