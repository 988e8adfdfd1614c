"""Which versions are loaded, served and unloaded, by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.catalogue import Fingerprint, Shelf, VersionFolder
from service.plan import Outcome, Tries, outcome, selected, tries
from service.repository import DEFAULT_LABEL, Loaded

OLD: Fingerprint = (("manifest.json", 1, 1),)
NEW: Fingerprint = (("manifest.json", 1, 2),)


def shelf(*versions: int, changed: tuple[int, ...] = (), labels: Mapping[str, int] | None = None) -> Shelf:
    folders = {v: VersionFolder(Path(str(v)), NEW if v in changed else OLD) for v in versions}
    return Shelf(folders, labels or {})


def test_a_request_without_a_version_gets_the_highest_or_the_labelled_one() -> None:
    models: dict[int, Any] = dict.fromkeys((2, 10, 7))
    assert Loaded(models).default == 10
    assert Loaded(models, {DEFAULT_LABEL: 7}).default == 7
    assert Loaded(models, {DEFAULT_LABEL: 3}).default == 10, "which is not loaded"


def test_selected() -> None:
    four = shelf(1, 2, 5, 10, labels={"stable": 2})
    assert selected("latest", four) == [2, 10]
    assert selected("latest:2", four) == [2, 5, 10]
    assert selected("all", four) == [1, 2, 5, 10]
    assert selected("1,7", four) == [1, 2, 7], "7 is named and not there"


@pytest.mark.parametrize(
    ("policy", "of_model", "known", "expected"),
    [
        ("latest", shelf(1, 2, 3), {}, Tries([3], [2, 1])),
        ("all", shelf(1, 2, 3), {}, Tries([3, 2, 1], [])),
        ("1,3", shelf(1, 2, 3), {}, Tries([3, 1], [])),
        ("7", shelf(1, 2), {}, Tries([], [])),
        ("latest", shelf(1, 2, 3, labels={"stable": 1}), {}, Tries([3, 1], [2])),
        ("latest", shelf(1, 2), {2: OLD}, Tries([], [1])),
        ("latest", shelf(1, 2, changed=(2,)), {1: OLD, 2: OLD}, Tries([2], [])),
        ("all", shelf(1, 2, changed=(1,)), {1: OLD, 2: OLD}, Tries([1], [])),
    ],
    ids=[
        "one, or an older one", "all", "named", "named and not there", "labelled", "tried before", "changed",
        "one changed",
    ],
)  # fmt: skip
def test_tries(policy: str, of_model: Shelf, known: Mapping[int, Fingerprint], expected: Tries) -> None:
    assert tries(policy, of_model, known) == expected


GONE = "version {} does not exist; allowed: 1"
MISSING = "version 7 does not exist; allowed: 1, 2"


@pytest.mark.parametrize(
    ("policy", "of_model", "before", "expected"),
    [
        ("latest", shelf(1, 2), {"loaded": {1, 2}}, Outcome({2}, {}, {})),
        ("latest:2", shelf(1, 2), {"loaded": {1, 2}}, Outcome({1, 2}, {}, {})),
        ("latest", shelf(1, 2), {"loaded": {1}, "failures": {2: "bad"}}, Outcome({1}, {}, {2: "bad"})),
        ("latest", shelf(2), {"loaded": {1}, "failures": {2: "bad"}}, Outcome({1}, {}, {2: "bad"})),
        ("latest", shelf(2), {"loaded": {1, 2}, "failures": {3: "bad"}}, Outcome({2}, {}, {})),
        ("1,7", shelf(1, 2), {"loaded": {1}}, Outcome({1}, {}, {7: MISSING})),
        ("2,7", shelf(1), {"loaded": {1, 2}}, Outcome({1}, {}, {2: GONE.format(2), 7: GONE.format(7)})),
        ("7", shelf(1, 2), {"loaded": {7}}, Outcome({7}, {}, {})),
        ("latest", shelf(1, 2, labels={"stable": 1}), {"loaded": {1, 2}}, Outcome({1, 2}, {"stable": 1}, {})),
        (
            "latest",
            shelf(1, 2, 3, labels={"stable": 2}),
            {"loaded": {1, 3}, "labels": {"stable": 1}, "failures": {2: "bad"}},
            Outcome({1, 3}, {"stable": 1}, {2: "bad"}),
        ),
        ("latest", shelf(1, 2), {"loaded": {1, 2}, "labels": {"stable": 1}}, Outcome({2}, {}, {})),
        (
            "latest",
            Shelf(shelf(1, 2).versions, {}, "labels.json is no JSON"),
            {"loaded": {1, 2}, "labels": {"stable": 1}},
            Outcome({1, 2}, {"stable": 1}, {}),
        ),
        ("latest", shelf(1), {"loaded": set(), "failures": {1: "bad"}}, Outcome(set(), {}, {1: "bad"})),
    ],
    ids=[
        "the older one goes", "two are kept", "the new one is bad",
        "the old one is gone from the folder, the new one bad", "what failed is gone", "named and not there",
        "named and gone", "gone from the folder, and retained", "a label keeps its version",
        "a label stays where it was", "a label is taken away", "labels cannot be read", "nothing works",
    ],
)  # fmt: skip
def test_outcome(policy: str, of_model: Shelf, before: dict[str, Any], expected: Outcome) -> None:
    assert outcome(policy, of_model, **{"labels": {}, "failures": {}, **before}) == expected


numbers = st.sets(st.integers(1, 6))


@given(numbers, numbers, numbers, st.sampled_from(["latest", "latest:2", "all", "1", "2,5"]))
def test_nothing_is_lost_and_nothing_is_served_that_is_not_loaded(
    on_shelf: set[int], before: set[int], failed: set[int], policy: str
) -> None:
    """For any versions in the folder, and any result of loading them."""
    of_model = shelf(*on_shelf)
    now, instead = tries(policy, of_model, {})
    assert {*now, *instead} <= on_shelf
    works = {version for version in now if version not in failed}
    if not works | before:
        works = {version for version in instead if version not in failed}
    served, labels, failures = outcome(policy, of_model, works | before, {}, dict.fromkeys(failed & on_shelf, "bad"))
    assert served <= works | before
    assert bool(served) == bool(works | before), "who served something keeps serving"
    assert works & {*selected(policy, of_model)} <= served
    assert labels == {}
    assert {*selected(policy, of_model)} <= served | {*failures} | (on_shelf - failed)
