"""Which versions of a model are tried, served and let go: functions of what lies on its shelf, of the policy, and of
what is loaded, without effects."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from service.catalogue import Fingerprint, Shelf


class Tries(NamedTuple):
    """The versions of a model to try to load."""

    now: list[int]
    """New or changed versions that are wanted, the newest first."""
    instead: list[int]
    """Others, to be tried one after the other while nothing of the model works: rather an older one than none."""


class Outcome(NamedTuple):
    """What is to be true of a model when loading is over."""

    served: set[int]
    labels: dict[str, int]
    failures: dict[int, str]
    """Why a version is not loaded."""


def wanted(policy: str, shelf: Shelf) -> list[int]:
    """The versions to serve, rising: of the policy (`latest`, `latest:2`, `all` or `1,3`), and those with a label.

    What is named by number may not be there.
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
    """known: the versions as they were when they were last tried."""
    numbers = wanted(policy, shelf)
    changed = [v for v in sorted(shelf.versions, reverse=True) if shelf.versions[v].fingerprint != known.get(v)]
    names_versions = policy[0].isdigit()  # who names one does not want another
    return Tries(
        [version for version in changed if version in numbers],
        [version for version in changed if version not in numbers and not names_versions],
    )


def outcome(
    policy: str, shelf: Shelf, loaded: Collection[int], labels: Mapping[str, int], failures: Mapping[int, str]
) -> Outcome:
    """loaded: the versions that are, those just loaded and those from before; labels: as they were."""
    numbers = wanted(policy, shelf)
    labels = _labels(shelf, loaded, labels)
    kept = {*numbers} & {*shelf.versions} | {*labels.values()}
    if not {*numbers} <= {*loaded}:  # another one is served in the place of one that does not work
        kept |= {*shelf.versions}
    served = {*loaded} & kept or {*loaded}  # rather what was there than nothing
    there = ", ".join(map(str, sorted(shelf.versions)))
    missing = {
        version: f"version {version} is asked for and is not there; allowed: {there}"
        for version in numbers
        if version not in shelf.versions and version not in served
    }
    known = {v: why for v, why in failures.items() if v in shelf.versions or v in numbers}
    return Outcome(served, labels, known | missing)


def _labels(shelf: Shelf, loaded: Collection[int], labels: Mapping[str, int]) -> dict[str, int]:
    """As labels.json says; one whose version is not loaded stays where it was, and all do if the file is wrong."""
    if shelf.problem:
        return dict(labels)
    return {label: labels[label] for label in shelf.labels if label in labels} | {
        label: version for label, version in shelf.labels.items() if version in loaded
    }
