"""Finds a data set by its name: labels, training images, and test images if it has its own.

Decoding is deferred where possible: sets with random access become LazyPixels, or MappedPixels when `data.memory` is
`map`; streaming sets (`wds/`, `hfids/`) always become MappedPixels.
"""

import codecs
import hashlib
import importlib.util
import os
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_dataset

from training.config import DataSettings
from training.data import folders
from training.data.fashion_mnist import FASHION_MNIST_LABELS, fashion_mnist
from training.data.pixel_map import default_cache, mapped
from training.data.pixels import DataError, LazyPixels, Source, Split, image_spec, open_image, readable, settle
from training.data.shards import streamed
from training.data.typefaces import typefaces

PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}


class DataSet(NamedTuple):
    """A whole data set."""

    labels: tuple[str, ...]
    train: Split
    test: Split | None
    """None: to be split off from `train`."""
    warnings: tuple[str, ...] = ()
    selection: Split | None = None
    """None: to be split off from `train`."""


def find(settings: DataSettings) -> DataSet:
    """The whole data set of the settings. Raises DataError naming what is missing and where it was expected."""
    return SOURCES.get(settings.dataset.partition("/")[0], _timm)(settings)


def _fashion_mnist(settings: DataSettings) -> DataSet:
    if (settings.image_size, settings.channels, settings.crop_fraction) != (28, 1, 1.0):
        raise DataError("fashion-mnist is 28 x 28 and grey; allowed: image_size 28, channels 1, crop_fraction 1")
    train, test = (fashion_mnist(settings.root, part) for part in ("train", "t10k"))
    return DataSet(FASHION_MNIST_LABELS, train, test)


def _typefaces(settings: DataSettings) -> DataSet:
    labels, parts = typefaces(settings)
    return DataSet(labels, parts["train"], parts["test"], selection=parts["selection"])


@dataclass(frozen=True)
class Files:
    """Image files, one per row."""

    paths: tuple[str, ...]

    def open(self, row: int) -> Image.Image:
        """The decoded image. Raises OSError, or what open_image raises."""
        return open_image(Path(self.paths[row]).read_bytes())

    def name(self, row: int) -> str:
        """The file's path."""
        return self.paths[row]

    def identity(self) -> str:
        """A digest that changes with the files' names, sizes or times."""
        digest = hashlib.sha256()
        for path in self.paths:
            status = os.stat(path)
            digest.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"))
        return digest.hexdigest()

    def contents(self) -> str:
        """A digest that changes with the files' sizes, and with their names relative to their common folder."""
        digest, root = hashlib.sha256(), os.path.commonpath(self.paths)
        for path in self.paths:
            digest.update(os.fsencode(f"{path.removeprefix(root)}\0{os.stat(path).st_size}\n"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """A data set of timm with random access. Bypasses timm's ImageDataset, which replaces an image that it cannot
    decode by the next one."""

    dataset: Any
    title: str

    def open(self, row: int) -> Image.Image:
        """The decoded image. Raises what the data set or open_image raises."""
        if not hasattr(self.dataset, "reader"):
            image: Image.Image = self.dataset[row][0]
            return image
        with self.dataset.reader[row][0] as file:
            return open_image(file.read())

    def name(self, row: int) -> str:
        """The data set and the row."""
        return f"{self.title}: image {row}"

    def identity(self) -> str:
        """A text that changes with the set's fingerprint (hfds), or with its files' names, sizes or times."""
        reader = getattr(self.dataset, "reader", None)
        if reader:
            return str(reader.dataset._fingerprint)
        root = Path(self.dataset.root, getattr(self.dataset, "base_folder", "")).resolve()
        files = Files(tuple(sorted(str(path) for path in root.rglob("*") if path.is_file())))
        return f"{len(self.dataset)} images of {root}: {files.identity()}"

    def contents(self) -> str:
        """The number of images: a fingerprint would change when the same set is downloaded again."""
        return str(len(self.dataset))


def _split(settings: DataSettings, split: str, source: Source, classes: torch.Tensor) -> Split:
    spec = image_spec(settings)
    pixels = LazyPixels(torch.arange(len(classes)), spec, source)
    skip, title = settings.skip_unreadable, f"data: {split}"
    if settings.memory != "map":
        if skip:  # before the images are divided among the splits
            reasons = pixels.check(f"{title}: check")
            settle([reason for reason in reasons if reason], skip, title)
            kept = torch.tensor([reason is None for reason in reasons])
            pixels, classes = replace(pixels, rows=pixels.rows[kept]), classes[kept]
        return Split(pixels, classes, source.contents())
    labelled = hashlib.sha256(classes.numpy().tobytes()).hexdigest()
    made_for: dict[str, Any]
    made_for = {"dataset": settings.dataset, "split": split, "source": source.identity(), "classes": labelled}
    made_for |= {"skip_unreadable": True} if skip else {}
    rows = readable(zip(pixels.decoded(title), classes.tolist(), strict=True), skip, title)
    on_disk = mapped(settings.cache or default_cache(), f"{settings.dataset}-{split}", made_for, spec, rows)
    return replace(on_disk, contents=source.contents())


def _folder(settings: DataSettings) -> DataSet:
    if settings.root is None or not settings.root.is_dir():
        raise DataError(f"data.root is {settings.root}; allowed: a folder of images, one sub-folder a label")
    train, test, warnings = folders.find(settings.root, settings.copies)

    def split(name: str, part: folders.Part) -> Split:
        return _split(settings, name, Files(part.paths), torch.tensor(part.classes))

    return DataSet(train.labels, split("train", train), split("test", test) if test else None, warnings)


def _timm(settings: DataSettings) -> DataSet:
    prefix = settings.dataset.partition("/")[0]
    package = PACKAGES.get(prefix)
    if package and importlib.util.find_spec(package) is None:
        raise DataError(
            f"data.dataset {settings.dataset!r} needs the package {package!r}: pip install 'steervit[train]'"
        )
    splits: list[Split] = []
    labels: tuple[str, ...] = ()
    for split in (settings.train_split, settings.test_split):
        where = f"data.dataset {settings.dataset!r}, data.root {settings.root}, {split}"
        try:
            dataset = _create(settings, split)
            if prefix in ("wds", "hfids"):
                part = streamed(settings, split, dataset)
            else:
                part = _split(settings, split, *_rows(dataset, where))
        except DataError:
            raise
        except Exception as error:  # timm and the libraries behind it raise many types
            raise DataError(f"{where}: {error}") from error
        splits.append(part)
        labels = labels or _labels(settings, dataset, part.classes)
    return DataSet(labels, splits[0], splits[1])


def _create(settings: DataSettings, split: str) -> Any:
    prefix = settings.dataset.partition("/")[0]
    options: dict[str, Any] = {}
    if prefix in ("wds", "hfds", "hfids"):
        options = {"input_key": settings.image_key, "target_key": settings.label_key}
    if prefix != "wds":
        options["download"] = settings.download
    root = str(settings.root) if settings.root else None if prefix in ("hfds", "hfids") else ""
    return create_dataset(settings.dataset, root, split=split, is_training=False, **options)


def _rows(dataset: Any, where: str) -> tuple[Source, torch.Tensor]:
    """The images of a data set and their classes, without decoding any."""
    reader = getattr(dataset, "reader", None)
    if reader is not None:
        classes = list(reader.dataset[reader.label_key])
    elif hasattr(dataset, "targets"):
        classes = dataset.targets
    else:
        raise DataError(f"{where} has no list of labels; allowed: a set with `targets`, or a folder")
    source: Source = Rows(dataset, where)
    if hasattr(dataset, "samples"):  # torchvision's ImageFolder and ImageNet
        source = Files(tuple(path for path, _ in dataset.samples))
    return source, torch.as_tensor(classes).long()


def _labels(settings: DataSettings, dataset: Any, classes: torch.Tensor) -> tuple[str, ...]:
    if settings.labels is not None:
        return _read_labels(settings.labels)
    if getattr(dataset, "classes", None):
        named = [name if isinstance(name, str) else name[0] for name in dataset.classes]  # ImageNet has synonyms
        shared = {name for name, count in Counter(named).items() if count > 1}  # and two cranes, a bird and a machine
        return tuple(f"{name} ({index})" if name in shared else name for index, name in enumerate(named))
    numbered = getattr(dataset, "class_to_idx", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if numbered:
        return tuple(str(name) for name, _ in sorted(numbered.items(), key=lambda item: item[1]))
    return tuple(str(number) for number in range(int(classes.max()) + 1))


def _read_labels(path: Path) -> tuple[str, ...]:
    """The labels in a file, one per line, in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.labels is {path}: {error}") from error
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # first: UTF-16's mark begins alike
    marks |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
        if "\0" in text:
            raise UnicodeError("null characters")
    except UnicodeError as error:
        guess = ("UTF-16BE" if content[:1] == b"\0" else "UTF-16LE") if b"\0" in content else "ISO-8859-1"
        command = f"iconv -f {guess} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(f'{path}.utf8')}"
        raise DataError(
            f"data.labels is {path}, which is not {encoding.removesuffix('-sig').upper()} ({error}); allowed: UTF-8, "
            f"or UTF-16 with a byte-order mark. If it is {guess}: {command}"
        ) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


SOURCES: dict[str, Callable[[DataSettings], DataSet]] = {
    "fashion-mnist": _fashion_mnist,
    "typefaces": _typefaces,
    "typefaces-small": _typefaces,
    "folder": _folder,
}
"""By data.dataset up to a slash; all other sets are timm's. config.py lists the allowed names."""
