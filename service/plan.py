"""Which versions of a model to load, serve and unload: pure functions of the folder, the policy and the loaded
versions."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from service.catalogue import Fingerprint, Shelf


class Tries(NamedTuple):
    """Versions of a model to load, and substitutes to try."""

    now: list[int]
    """New or changed versions that the policy selects, the newest first."""
    instead: list[int]
    """Substitutes, to be tried in turn until one loads: an older version is better than none."""


class Outcome(NamedTuple):
    """The state of a model after the loading."""

    served: set[int]
    labels: dict[str, int]
    failures: dict[int, str]
    """Why a version is not loaded."""


def selected(policy: str, shelf: Shelf) -> list[int]:
    """The versions to serve, in order: by the policy (`latest`, `latest:2`, `all` or `1,3`), and those with a label.

    A version that the policy names may be missing.
    """
    numbers = sorted(shelf.versions)
    if policy == "all":
        chosen = numbers
    elif policy.startswith("latest"):
        chosen = numbers[-int(policy.partition(":")[2] or 1) :]
    else:
        chosen = list(map(int, policy.split(",")))
    return sorted({*chosen, *shelf.labels.values()})


def tries(policy: str, shelf: Shelf, known: Mapping[int, Fingerprint]) -> Tries:
    """The versions to try. known: the fingerprints of the last attempts."""
    numbers = selected(policy, shelf)
    changed = [v for v in sorted(shelf.versions, reverse=True) if shelf.versions[v].fingerprint != known.get(v)]
    names_versions = policy[0].isdigit()  # a version named by number has no substitute
    return Tries(
        [version for version in changed if version in numbers],
        [version for version in changed if version not in numbers and not names_versions],
    )


def outcome(
    policy: str, shelf: Shelf, loaded: Collection[int], labels: Mapping[str, int], failures: Mapping[int, str]
) -> Outcome:
    """The state after loading. loaded: all loaded versions; labels: the previous ones."""
    numbers = selected(policy, shelf)
    labels = _labels(shelf, loaded, labels)
    kept = {*numbers} & {*shelf.versions} | {*labels.values()}
    if not {*numbers} <= {*loaded}:  # another version substitutes for one that does not load
        kept |= {*shelf.versions}
    served = {*loaded} & kept or {*loaded}  # a version that is no longer selected is better than none
    there = ", ".join(map(str, sorted(shelf.versions)))
    missing = {
        version: f"version {version} does not exist; allowed: {there}"
        for version in numbers
        if version not in shelf.versions and version not in served
    }
    known = {v: why for v, why in failures.items() if v in shelf.versions or v in numbers}
    return Outcome(served, labels, known | missing)


def _labels(shelf: Shelf, loaded: Collection[int], labels: Mapping[str, int]) -> dict[str, int]:
    """The labels of labels.json. A label without a loaded version is unchanged; all are, if the file is invalid."""
    if shelf.problem:
        return dict(labels)
    return {label: labels[label] for label in shelf.labels if label in labels} | {
        label: version for label, version in shelf.labels.items() if version in loaded
    }
