"""Streaming data sets: webdataset shards, and streamed Hugging Face sets.

They are read once, strictly: timm's reader of shards skips images that it cannot decode, with a line in the log.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.config import DataSettings
from training.data.pixel_map import default_cache, mapped
from training.data.pixels import DataError, Split, eval_transform, image_spec, in_threads, open_image, readable

Sample = tuple[str, bytes | Image.Image, int]
"""Name, encoded or decoded image, class."""


def streamed(settings: DataSettings, split: str, dataset: Any) -> Split:
    """A split of timm's IterableImageDataset as a mapped file, made on first use.

    Raises DataError when `data.memory` is `lazy`, for the first image or class that cannot be read, and when there are
    fewer images than the set declares.
    """
    if settings.memory == "lazy":
        raise DataError(f"data.memory is 'lazy'; allowed for {settings.dataset!r}: auto, map, memory")
    reader = dataset.reader
    shards = hasattr(reader, "split_info") and hasattr(reader.split_info, "filenames")
    source: list[Any] = _shard_files(reader) if shards else [str(settings.root), reader.num_samples]
    made_for: dict[str, Any] = {
        "dataset": settings.dataset,
        "split": split,
        "keys": [settings.image_key, settings.label_key],
        "source": source,
    }
    spec = image_spec(settings)
    transform = eval_transform(spec)

    def decode(sample: Sample) -> tuple[np.ndarray | DataError, int]:
        name, image, index = sample
        try:
            return transform(open_image(image) if isinstance(image, bytes) else image), index
        except Exception as error:  # Pillow raises many types
            return DataError(f"{name} is not a readable image: {error}"), index

    def decoded() -> Iterator[tuple[np.ndarray | DataError, int]]:
        samples = _of_shards(reader) if shards else _of_stream(reader, f"{settings.dataset}, {split}")
        total, count = reader.num_samples or None, 0
        bar = tqdm(samples, f"data: {split}", total, unit="image", mininterval=5, delay=2, dynamic_ncols=True)
        for row in in_threads(decode, bar):
            yield row
            count += 1
        if total is not None and count != total:
            raise DataError(f"{settings.dataset}, {split}: {count} images were read where the set says {total}")

    made_for |= {"skip_unreadable": True} if settings.skip_unreadable else {}
    rows = readable(decoded(), settings.skip_unreadable, f"data: {split}")
    on_disk = mapped(settings.cache or default_cache(), f"{settings.dataset}-{split}", made_for, spec, rows)
    return replace(on_disk, contents=json.dumps([file[:2] for file in source] if shards else reader.num_samples))


def _shard_files(reader: Any) -> list[list[Any]]:
    files: list[list[Any]] = []
    for name in reader.split_info.filenames:
        path = os.path.join(reader.root, name)
        if os.path.exists(path):
            status = os.stat(path)
            files.append([name, status.st_size, status.st_mtime_ns])
        else:  # an address
            files.append([path, None, None])
    return files


def _of_shards(reader: Any) -> Iterator[Sample]:
    keys = [*filter(None, reader.input_key.split(";")), "jpeg"]
    field = reader.target_key or reader.split_info.alt_label
    for shard in reader.split_info.filenames:
        for sample in _of_shard(os.path.join(reader.root, shard)):
            name = f"{sample['__url__']}: {sample['__key__']}"
            image = next((sample[key] for key in keys if key in sample), None)
            if image is None:
                raise DataError(f"{name} has no image; allowed: {', '.join(keys)} (data.image_key)")
            try:
                index = int(json.loads(sample["json"])[field] if field else sample["cls"])
            except (KeyError, ValueError, TypeError) as error:
                place = f"{field!r} in its .json" if field else ".cls"
                raise DataError(f"{name} has no class number: {place} is missing (data.label_key)") from error
            yield name, image, index


def _of_shard(url: str) -> Iterator[dict[str, Any]]:
    from webdataset import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with gopen(url) as stream:
            yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{url} is not a readable shard: {error.args[0]}") from error


def _of_stream(reader: Any, title: str) -> Iterator[Sample]:
    count = 0
    try:
        for image, index in reader:
            yield f"{title}: image {count}", image, int(index)
            count += 1
    except (OSError, ValueError) as error:
        raise DataError(f"{title}: image {count} is not a readable image: {error}") from error
