"""The content of the repository folder: models, versions, labels, settings. Reads names and sizes; loads no model.

```
<repository>/<model>/<version>/manifest.json ...      or <repository>/manifest.json: a single bundle
<repository>/<model>/labels.json                      {"stable": 3, "canary": 4}: versions by name
<repository>/<model>/serving.json                     {"max_batch": 8}: settings of the model (serving_file.py)
```
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from export.bundle import VERSION, BundleError, check_inside, is_bundle, locked, versions
from service import serving_file

LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}")
DEFAULT_LABEL = "stable"
"""The label of the version that serves requests without a version; if no version has it, the newest serves them."""
Fingerprint = tuple[tuple[str, int, int], ...]
"""Name, size and modification time of every file, including serving.json. When it changes, the version is loaded
again."""


@dataclass(frozen=True)
class VersionFolder:
    """One version: its folder, and the state of its files at the last scan."""

    path: Path
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Shelf:
    """One model."""

    versions: Mapping[int, VersionFolder]
    labels: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""
    """What is wrong with labels.json."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings in serving.json."""
    settings_problem: str = ""
    """What is wrong with serving.json."""


class Catalogue(dict[str, Shelf]):
    """The shelves by model."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[Path, str] = {}
        """Paths that are skipped because they are unreadable or not folders, with the reason."""


def scan(repository: Path) -> Catalogue:
    """The catalogue of a repository. Raises BundleError when it has no bundle."""
    shelves = Catalogue()
    if is_bundle(repository):
        name, version = _single(repository)
        shelves[name] = Shelf({version: VersionFolder(repository, _fingerprint(repository))})
        return shelves
    if not repository.is_dir():
        raise BundleError(f"repository is {repository}, which is not a folder")
    for model in _folders(repository, lambda name: not name.startswith("."), shelves.skipped):
        versions = {}
        of_settings = _states([model / "serving.json"])  # before reading it: a change meanwhile is read next time
        for folder in _folders(model, lambda name: bool(VERSION.fullmatch(name)), shelves.skipped):
            with contextlib.suppress(FileNotFoundError):  # removed since
                versions[int(folder.name)] = VersionFolder(folder, _fingerprint(folder) + of_settings)
        if versions:
            labels = _read(path := model / "labels.json", repository, partial(_labels, path, versions))
            shelves[model.name] = Shelf(
                versions, *labels, *_read(model / "serving.json", repository, serving_file.read)
            )
    if not shelves:
        skipped = "".join(f"; {path}: {reason}" for path, reason in shelves.skipped.items())
        raise BundleError(
            f"repository is {repository}; allowed: a bundle, or folders <model>/<version>/ with bundles{skipped}"
        )
    return shelves


def _folders(parent: Path, named: Callable[[str], bool], skipped: dict[Path, str]) -> list[Path]:
    """The subfolders with a name that `named` accepts, sorted by name. Other and unreadable entries are added to
    `skipped`."""
    folders = []
    try:
        paths = sorted(path for path in parent.iterdir() if named(path.name))
    except FileNotFoundError:  # removed since
        return []
    except OSError as error:
        skipped[parent] = error.strerror or str(error)
        return []
    for path in paths:
        try:
            if stat.S_ISDIR(path.stat().st_mode):
                folders.append(path)
            elif VERSION.fullmatch(path.name):
                skipped[path] = "is not a folder"
        except FileNotFoundError:
            if path.is_symlink():
                skipped[path] = "is a dangling link"
        except OSError as error:
            skipped[path] = error.strerror or str(error)
    return folders


def _labels(path: Path, versions: Collection[int], value: Any) -> dict[str, int]:
    """The labels in the JSON value of a labels.json. Raises BundleError."""
    if not isinstance(value, dict):
        raise BundleError(f"{path} holds a {type(value).__name__}; allowed: an object of versions by name")
    for label, version in value.items():
        if not LABEL.fullmatch(label):
            raise BundleError(f"{path}: label {label!r}; allowed: {LABEL.pattern}")
        if type(version) is not int or version not in versions:
            allowed = ", ".join(map(str, sorted(versions)))
            raise BundleError(f"{path}: {label} is {version!r}; allowed: one of {allowed}")
    return value


def set_label(repository: Path, name: str, label: str, version: int) -> None:
    """Set a label of a model to a version, in its labels.json. Readers see either the old file or the new one.

    Raises BundleError as check_label does, or when the version does not exist.
    """
    model = repository / name
    with locked(model):
        labels = {**check_label(repository, name, label), label: version}
        if version not in versions(model):
            raise BundleError(f"{model}: {label} is {version}; allowed: one of {versions(model)}")
        temporary = model / f".labels.json.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(labels) + "\n")
            os.replace(temporary, model / "labels.json")
        finally:
            temporary.unlink(missing_ok=True)


def check_label(repository: Path, name: str, label: str) -> Mapping[str, int]:
    """The labels of a model. Raises BundleError when they cannot be read or `label` cannot be added: its name is
    invalid, or the model would have labels without DEFAULT_LABEL, so that the newest version would serve requests
    without a version."""
    if not LABEL.fullmatch(label):
        raise BundleError(f"label is {label!r}; allowed: {LABEL.pattern}")
    model = repository / name
    labels, problem = _read(path := model / "labels.json", repository, partial(_labels, path, versions(model)))
    if problem:
        raise BundleError(problem)
    if label != DEFAULT_LABEL and DEFAULT_LABEL not in labels:
        raise BundleError(
            f"label is {label!r}, but {path} has no {DEFAULT_LABEL!r}, so the newest version serves "
            f"requests that name none; allowed: {DEFAULT_LABEL!r} first"
        )
    return labels


def _read(path: Path, repository: Path, parse: Callable[[Any], Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
    """What `parse` makes of a JSON file, nothing if it is missing; and its problem, if any."""
    try:
        check_inside(path, repository)
        return parse(json.loads(path.read_bytes())), ""
    except FileNotFoundError:
        return {}, ""
    except BundleError as error:
        return {}, str(error)
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path}: {error}"


def _single(folder: Path) -> tuple[str, int]:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return str(manifest["name"]), int(manifest["version"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{folder / 'manifest.json'}: {type(error).__name__}: {error}") from error


def _fingerprint(folder: Path) -> Fingerprint:
    """The state of a folder. Empty if it cannot be read; loading it then reports the reason. Raises
    FileNotFoundError."""
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        raise
    except OSError:
        return ()
    return _states(paths)


def _states(paths: Iterable[Path]) -> Fingerprint:
    """The states of the paths that exist and can be read."""
    files = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # a dangling link, or removed since
            continue
        files.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(files)
