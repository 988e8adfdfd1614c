"""Finds image files in folders: which folders are splits, which are labels, what is skipped and why.

```
root/<label>/**/*.png   or   root/train/<label>/ and root/test/<label>/: names of TRAIN and of TESTS, in any case
```
timm's reader is not used: it takes the innermost folder as the label and silently skips empty ones.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from training import processes
from training.data.pixels import DataError, in_threads
from training.steering import canonical

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
TRAIN = ("train", "training")
TESTS = ("test", "testing", "val", "valid", "validation")
"""Names of the folder of test images, next to the one of training images. The first that exists is used."""
SYSTEM = {
    "__macosx", "@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin", "lost+found", "__pycache__",
    "system volume information",
}  # fmt: skip
"""Folders that operating systems and file servers create, in lower case."""
MOST_SHOWN = 20
"""Largest number of labels to print."""
TAIL = 4096
"""Bytes. Files of equal size with the same last bytes are compared as a whole."""

Skipped = dict[str, list[str]]
"""Reason -> names."""


@dataclass(frozen=True)
class Part:
    """The image files of one split, label by label."""

    root: Path
    labels: tuple[str, ...]
    folders: tuple[Path, ...]
    """One per label."""
    files: tuple[tuple[str, ...], ...]
    """A sorted tuple per label."""
    skipped: Mapping[str, Skipped]
    """By label; under "" the skipped entries next to the folders of the labels."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All files, label by label."""
        return tuple(path for files in self.files for path in files)

    @property
    def classes(self) -> list[int]:
        """The class of each path: an index into the labels."""
        return [index for index, files in enumerate(self.files) for _ in files]

    def without(self, paths: Iterable[str], reason: str) -> "Part":
        """The part without these files, which are listed as skipped for this reason."""
        left_out, skipped = set(paths), dict(self.skipped)
        for label, folder, files in zip(self.labels, self.folders, self.files, strict=True):
            names = [os.path.relpath(path, folder) for path in files if path in left_out]
            if names:
                skipped[label] = {**skipped.get(label, {}), reason: names}
        kept = tuple(tuple(path for path in files if path not in left_out) for files in self.files)
        return replace(self, files=kept, skipped=skipped)


def find(root: Path, copies: str) -> tuple[Part, Part | None, tuple[str, ...]]:
    """The training images, the test images if the root has a folder of them, and warnings. Prints what is read and
    skipped.

    copies: `refuse`, `drop` or `keep` exact copies that could end up in both training and test. Raises DataError naming
    the folder or files that are not allowed.
    """
    train_root, test_root, beside = _splits(root)
    train = _part(train_root, _labels(train_root), beside)
    test = None if test_root is None else _part(test_root, _labels_of_test(test_root, train), {})
    warnings = _look_like_splits(train) if test is None else ()
    train, test, of_copies = _without_copies(root, train, test, copies)
    for part in filter(None, (train, test)):
        _print(part)
        least = 1 if part is test else 3 if test is None else 2
        for label, folder, files in zip(part.labels, part.folders, part.files, strict=True):
            if len(files) < least:
                skipped = f"; skipped: {_listed(part.skipped[label])}" if label in part.skipped else ""
                raise DataError(f"{show(folder)} has {len(files)} images; allowed: at least {least} a label{skipped}")
    return train, test, (*warnings, *of_copies)


def show(path: object) -> str:
    """A path as printable text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


def _splits(root: Path) -> tuple[Path, Path | None, Skipped]:
    """The folders of training and test images, and the skipped entries next to them; the root and None if there are no
    splits."""
    folders, skipped = _folders(root)
    splits: dict[str, Path] = {}
    for name, path in folders.items():
        split = name.casefold()
        if split not in TRAIN + TESTS or not _folders(path)[0]:  # a label with this name would have images, not folders
            continue
        kind = "train" if split in TRAIN else split
        if kind in splits:
            raise DataError(f"{show(root)} has {splits[kind].name!r} and {name!r}; allowed: one of them")
        splits[kind] = path
    if not splits:
        return root, None, {}
    tests = [splits[name] for name in TESTS if name in splits]
    if "train" not in splits or not tests:
        raise DataError(
            f"{show(next(iter(splits.values())))} has folders of its own; allowed: in {show(root)} one sub-folder a "
            f"label, or train/<label>/ and one of {', '.join(f'{name}/<label>/' for name in TESTS)}"
        )
    others = [name for name, path in folders.items() if path not in (splits["train"], tests[0])]
    return splits["train"], tests[0], {**skipped, **({"beside the splits": others} if others else {})}


def _folders(root: Path) -> tuple[dict[str, Path], Skipped]:
    """The sub-folders by name, sorted, and the skipped entries; both empty if there is no such folder."""
    folders, skipped = {}, defaultdict(list)
    for entry in _entries(root) if root.is_dir() else ():
        reason = _reason(entry)
        if reason is None and entry.is_dir():
            folders[entry.name] = root / entry.name
        else:
            skipped[reason or "beside the labels"].append(entry.name)
    return folders, dict(skipped)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{show(folder)} cannot be listed: {error.strerror}") from error


def _reason(entry: os.DirEntry[str]) -> str | None:
    """Why a file or folder is skipped regardless of its content."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.name.casefold() in SYSTEM:
        return "of the system"
    return "dangling links" if entry.is_symlink() and not os.path.exists(entry.path) else None


def _labels(root: Path) -> dict[str, Path]:
    """The folders by label, sorted. Raises DataError for fewer than two, and for names that are not valid labels."""
    folders = _folders(root)[0]
    if len(folders) < 2:
        inner = [path for path in folders.values() if len(_folders(path)[0]) > 1]
        hint = f" (--data.root {show(inner[0])}?)" if inner else ""
        raise DataError(f"{show(root)} has {len(folders)} sub-folders; allowed: one a label, at least 2{hint}")
    known: dict[str, str] = {}
    for name in folders:
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise DataError(f"{show(root / name)} has a name that is not UTF-8; allowed: labels in UTF-8, so rename it")
        normal = canonical(name)
        if normal in known:
            raise DataError(f"{root} has {known[normal]!a} and {name!a}, which are one label; allowed: one folder")
        known[normal] = name
    return folders


def _labels_of_test(root: Path, train: Part) -> dict[str, Path]:
    """The folders by label of the training images: the same names, regardless of how accents are encoded."""
    normal = {canonical(name): path for name, path in _folders(root)[0].items()}
    known = {canonical(label): label for label in train.labels}
    unknown = sorted(normal.keys() - known.keys())
    if unknown:
        name = show(normal[unknown[0]].name)
        raise DataError(
            f"{show(root)} has the folder {name!r}, which {show(train.root)} lacks; allowed: the same labels"
        )
    return {label: normal.get(name, root / label) for name, label in known.items()}


def _part(root: Path, labels: Mapping[str, Path], beside: Skipped) -> Part:
    skipped = {"": {**_folders(root)[1], **beside}}
    files = []
    for label, folder in labels.items():
        images: list[Path] = []
        reasons: Skipped = defaultdict(list)
        if folder.is_dir():
            above = tuple(parent.stat() for parent in folder.absolute().parents)
            _walk(folder, folder, above, images, reasons)
        files.append(tuple(str(path) for path in sorted(images)))
        skipped[label] = dict(reasons)
    skipped = {label: reasons for label, reasons in skipped.items() if reasons}
    return Part(root, tuple(labels), tuple(labels.values()), tuple(files), skipped)


def _walk(top: Path, folder: Path, above: tuple[os.stat_result, ...], images: list[Path], skipped: Skipped) -> None:
    """Collect the images below a folder, following links."""
    here = (*above, folder.stat())
    for entry in _entries(folder):
        path, suffix = folder / entry.name, os.path.splitext(entry.name)[1].lower()
        reason = _reason(entry)
        if reason is None and entry.is_dir():
            if not any(os.path.samestat(entry.stat(), other) for other in here):
                _walk(top, path, here, images, skipped)
                continue
            reason = "links in a circle"
        if reason is None and suffix in IMAGE_SUFFIXES:
            images.append(path)
        else:
            skipped[reason or suffix or "without a suffix"].append(str(path.relative_to(top)))


def _look_like_splits(train: Part) -> tuple[str, ...]:
    """A warning if labels have the same sub-folders. Raises DataError for labels that are certainly splits."""
    inner = [
        {os.path.relpath(path, folder).rpartition(os.sep)[0].partition(os.sep)[0] for path in files}
        for folder, files in zip(train.folders, train.files, strict=True)
    ]  # "" is the folder itself
    words = [set(re.split(r"[^a-z]+", label.casefold())) for label in train.labels]
    of_train, of_test = ([bool(of_label & set(names)) for of_label in words] for names in (TRAIN, TESTS))
    splits = [a or b for a, b in zip(of_train, of_test, strict=True)]
    nested = all("" not in folders for folders, split in zip(inner, splits, strict=True) if split)
    if any(of_train) and any(of_test) and (all(splits) or nested):
        names = [label for label, split in zip(train.labels, splits, strict=True) if split]
        raise DataError(
            f"{show(train.root)} has the folders {', '.join(map(repr, names))}, which are splits, not labels; "
            f"allowed: train/<label>/ and one of {', '.join(f'{name}/<label>/' for name in TESTS)}"
        )
    shared = sorted(inner[0])
    if "" not in shared and len(shared) > 1 and all(folders == inner[0] for folders in inner):
        return (
            f"the labels {_few(train.labels)} all have the sub-folders {_few(shared)}: if those are the labels, name "
            "the folders above them train and test",
        )
    return ()


def _without_copies(root: Path, train: Part, test: Part | None, copies: str) -> tuple[Part, Part | None, list[str]]:
    """The parts without the copies that `copies` drops, and warnings about the others."""
    tests = set(test.paths) if test else set()
    groups = _copies([*train.paths, *tests])
    label_of = {
        path: label
        for part in filter(None, (train, test))
        for label, files in zip(part.labels, part.files, strict=True)
        for path in files
    }

    def pairs(listed: Sequence[Sequence[str]]) -> str:
        return _few([" = ".join(show(os.path.relpath(path, root)) for path in group[:2]) for group in listed], 3)

    warnings = []
    contradicting = [group for group in groups if len({label_of[path] for path in group}) > 1]
    if contradicting:
        warnings.append(f"{len(contradicting)} images have several labels ({pairs(contradicting)})")
    if test is None:
        leaks, surplus = groups, [path for group in groups for path in group[1:]]
        what = f"{len(surplus)} images are exact copies of others, so one could be in training and one in the test"
        cure = "use the first of each"
    else:
        leaks, surplus, leaking = [], [], 0
        for group in groups:
            there, here = ([path for path in group if (path in tests) == whether] for whether in (True, False))
            if there and here:
                leaks.append([there[0], *here])
                leaking += len(there)
                surplus += here
        what = f"{leaking} test images are exact copies of training images"
        cure = "leave them out of training"
        inside = sum(len([path for path in group if path not in tests][1:]) for group in groups)
        if inside:
            warnings.append(f"{inside} training images are exact copies of other training images")
    if leaks and copies == "refuse":
        raise DataError(
            f"data.root is {show(root)}, where {what} ({pairs(leaks)}); allowed: none, or data.copies 'drop' ({cure}) "
            "or 'keep'"
        )
    if leaks and copies == "drop":
        train = train.without(surplus, "copies")
    elif leaks:
        warnings.append(f"{what} ({pairs(leaks)})")
    return train, test, warnings


def _copies(paths: Sequence[str]) -> list[list[str]]:
    """Groups of two or more files with the same content, each sorted. Only few files are read as a whole. A file that
    cannot be read is in no group."""

    def ending(path: str) -> bytes:
        with open(path, "rb") as file:
            file.seek(-min(TAIL, os.path.getsize(path)), os.SEEK_END)
            return file.read()

    def content(path: str) -> bytes:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def or_itself(key: Callable[[str], object], path: str) -> object:
        try:
            return key(path)
        except OSError:  # reading the image will name it
            return path

    groups = [sorted(paths)]
    steps: tuple[Callable[[str], object], ...] = (os.path.getsize, ending, content)
    for key in steps:
        candidates = [path for group in groups for path in group]
        keys = dict(zip(candidates, in_threads(partial(or_itself, key), candidates), strict=True))
        split = defaultdict(list)
        for index, group in enumerate(groups):
            for path in group:
                split[index, keys[path]].append(path)
        groups = [group for group in split.values() if len(group) > 1]
    return groups


def _print(part: Part) -> None:
    if not processes.is_main():
        return
    counts = [len(files) for files in part.files]
    each = f"{min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "") + " each"
    print(f"data: {show(part.root)}: {sum(counts)} images of {len(counts)} labels, {each}")
    rows = {label: f"{count} images" for label, count in zip(part.labels, counts, strict=True)}
    if len(rows) > MOST_SHOWN:  # labels with something skipped
        rows = {label: row for label, row in rows.items() if label in part.skipped}
    for label, row in [*rows.items()][:MOST_SHOWN]:
        print(
            f"data:   {label}: {row}" + (f"; skipped: {_listed(part.skipped[label])}" if label in part.skipped else "")
        )
    if len(rows) > MOST_SHOWN:
        print(f"data:   and {len(rows) - MOST_SHOWN} other labels with skipped entries")
    if "" in part.skipped:
        print(f"data:   beside the labels, skipped: {_listed(part.skipped[''])}")
    print(end="", flush=True)


def _listed(skipped: Skipped) -> str:
    ordered = sorted(skipped.items(), key=lambda item: (-len(item[1]), item[0]))
    return ", ".join(f"{len(names)} {reason} ({show(_few(names, 1))})" for reason, names in ordered)


def _few(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
