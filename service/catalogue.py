"""What lies in the repository folder: models, versions, labels. Reads names and sizes, loads nothing.

```
<repository>/<model>/<version>/manifest.json ...      or <repository>/manifest.json: a single bundle
<repository>/<model>/labels.json                      {"stable": 3, "canary": 4}: versions by name
```
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from export.bundle import BundleError, check_inside, is_bundle, versions

log = logging.getLogger("steervit.catalogue")
LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}")
DEFAULT_LABEL = "stable"
"""The version that is served where a request names none, if there is this label; else the newest."""
Fingerprint = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of every file: another one may load although the last one did not."""


@dataclass(frozen=True)
class Found:
    folder: Path
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Shelf:
    """One model."""

    versions: Mapping[int, Found]
    labels: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""
    """What is wrong with labels.json."""


def scan(repository: Path) -> dict[str, Shelf]:
    """By model. Raises BundleError when there is no bundle."""
    if is_bundle(repository):
        name, version = _single(repository)
        return {name: Shelf({version: Found(repository, _fingerprint(repository))})}
    if not repository.is_dir():
        raise BundleError(f"repository is {repository}, which is not a folder")
    shelves = {}
    for model in sorted(path for path in repository.iterdir() if not path.name.startswith(".")):
        try:
            folders = {number: model / str(number) for number in versions(model)}
        except OSError as error:  # of another owner, such as lost+found
            _skip(model, str(error.strerror))
            continue
        found = {number: Found(folder, _fingerprint(folder)) for number, folder in folders.items()}
        if found:
            shelves[model.name] = Shelf(found, *_labels(repository, model, found))
    if not shelves:
        raise BundleError(f"repository is {repository}; allowed: a bundle, or folders <model>/<version>/ with bundles")
    return shelves


@lru_cache
def _skip(folder: Path, reason: str) -> None:
    """Said once, however often the folder is looked at."""
    log.warning("%s is skipped: %s", folder, reason)


def wanted(policy: str, shelf: Shelf) -> list[int]:
    """The versions to serve, rising: of the policy (`latest`, `latest:2`, `all` or `1,3`), and those with a label.

    What is named by number may not be there.
    """
    numbers = sorted(shelf.versions)
    if policy == "all":
        chosen: Sequence[int] = numbers
    elif policy.startswith("latest"):
        chosen = numbers[-int(policy.partition(":")[2] or 1) :]
    else:
        chosen = list(map(int, policy.split(",")))
    return sorted({*chosen, *shelf.labels.values()})


def _labels(repository: Path, model: Path, found: Mapping[int, Found]) -> tuple[dict[str, int], str]:
    path = model / "labels.json"
    try:
        check_inside(path, repository)
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, ""
    except BundleError as error:
        return {}, str(error)
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path}: {error}"
    if not isinstance(value, dict):
        return {}, f"{path} holds a {type(value).__name__}; allowed: an object of versions by name"
    for label, version in value.items():
        if not LABEL.fullmatch(label):
            return {}, f"{path}: label {label!r}; allowed: {LABEL.pattern}"
        if type(version) is not int or version not in found:
            return {}, f"{path}: {label} is {version!r}; allowed: one of {', '.join(map(str, sorted(found)))}"
    return value, ""


def _single(folder: Path) -> tuple[str, int]:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return str(manifest["name"]), int(manifest["version"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{folder / 'manifest.json'}: {type(error).__name__}: {error}") from error


def _fingerprint(folder: Path) -> Fingerprint:
    found = []
    try:
        paths = sorted(folder.iterdir())
    except OSError:  # loading it says what is wrong
        return ()
    for path in paths:
        try:
            stat = path.stat()
        except OSError:  # a link to nowhere, or removed since
            continue
        found.append((path.name, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
