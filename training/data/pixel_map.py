"""A cache of pixels on disk: streaming data sets are read once, into a memory-mapped file.

```
<cache>/<name>-<digest>/
  pixels.u8      uint8 (B, H, W, C)        classes.npy    int64 (B,)
  made_for.json  what the pixels depend on
```
A folder is written under a temporary name and renamed when it is complete, so it never exists in part. Of several
processes, one writes and the others wait.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.pixels import DataError, MappedPixels, Split
from training.image_spec import ImageSpec


def default_cache() -> Path:
    """The folder `steervit` in $XDG_CACHE_HOME, by default ~/.cache. It may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steervit"


def mapped(
    cache: Path, name: str, made_for: dict[str, Any], spec: ImageSpec, rows: Iterable[tuple[np.ndarray, int]]
) -> Split:
    """The split in the mapped file for `made_for` (JSON); the file is made from `rows` if it does not exist yet.

    `rows` are (uint8 (H, W, C), class), read only to make the file. Raises DataError when there are no rows, and when
    an existing file does not match its JSON.
    """
    made_for = {**made_for, "image": {k: v for k, v in spec.to_json().items() if k not in ("mean", "std")}}
    digest = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"{''.join(c if c.isalnum() else '-' for c in name)}-{digest}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when the process dies
            if not folder.is_dir():
                _write(folder, made_for, rows)
    except OSError as error:
        raise DataError(f"data.cache: {error}") from error
    return _read(folder, made_for, spec)


def _write(folder: Path, made_for: dict[str, Any], rows: Iterable[tuple[np.ndarray, int]]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that died: we hold the lock
    partial.mkdir()
    try:
        classes = []
        with open(partial / "pixels.u8", "wb") as file:
            for pixels, index in rows:
                file.write(pixels.tobytes())
                classes.append(index)
            file.flush()
            os.fsync(file.fileno())
        if not classes:
            raise DataError(f"{made_for['dataset']}, {made_for['split']}: no images were found")
        np.save(partial / "classes.npy", np.array(classes, np.int64))
        (partial / "made_for.json").write_text(json.dumps(made_for, indent=1, sort_keys=True) + "\n")
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(folder: Path, made_for: dict[str, Any], spec: ImageSpec) -> Split:
    try:
        stored = json.loads((folder / "made_for.json").read_text())
        classes = torch.from_numpy(np.load(folder / "classes.npy", allow_pickle=False))
        size = (folder / "pixels.u8").stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is damaged ({error}): remove it, and it is made again") from error
    if stored != made_for or size != len(classes) * spec.height * spec.width * spec.channels:
        raise DataError(f"{folder} is not what its name says, or was cut short: remove it, and it is made again")
    return Split(MappedPixels(torch.arange(len(classes)), spec, folder / "pixels.u8", len(classes)), classes)
