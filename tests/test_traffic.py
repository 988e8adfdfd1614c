"""Which profiles have series of their own, by hand and whatever the traffic; no counter falls, no image is lost."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import Page, answers

from export.bundle import Bundle
from service import metrics as module
from service.traffic import HALF_LIFE, MORE, REVIEW_SECONDS, TIMES, Traffic, busiest


def test_images_count_half_as_much_an_hour_later() -> None:
    traffic = Traffic()
    traffic.count("a", 8)
    assert traffic.review(0.0)
    traffic.count("b", 3)
    assert not traffic.review(REVIEW_SECONDS - 1), "too early"
    assert traffic.images == {"a": 8}
    assert traffic.review(HALF_LIFE)
    assert traffic.images == {"a": 4, "b": 3}
    assert traffic.review(HALF_LIFE * 12)
    assert traffic.images == {}, "what is as good as nothing is forgotten"


@pytest.mark.parametrize(
    ("before", "images", "places", "expected"),
    [
        ("", {}, 2, "ab"),
        ("", {"c": 1}, 2, "ac"),
        ("bc", {}, 2, "bc"),
        ("ab", {"c": 10}, 2, "ab"),
        ("ab", {"c": 11}, 2, "ac"),
        ("ab", {"a": 50, "b": 60, "c": 110}, 2, "ab"),
        ("ab", {"a": 50, "b": 60, "c": 111}, 2, "bc"),
        ("ab", {"a": 50, "b": 60, "c": 131, "d": 500}, 2, "cd"),
        ("x", {"d": 5}, 3, "abd"),
        ("ab", {"c": 99}, 0, ""),
        ("", {}, 9, "abcd"),
    ],
    ids=["none", "new", "kept", "not clearly more", "more", "not twice", "twice", "two", "gone", "no places", "all"],
)
def test_who_has_a_place(before: str, images: dict[Any, float], places: int, expected: str) -> None:
    assert busiest("abcd", before, images, places) == set(expected)


KEYS = st.integers(0, 7).map(str)


@given(st.lists(KEYS, unique=True), st.sets(KEYS), st.dictionaries(KEYS, st.integers(0, 90)), st.integers(0, 6))
def test_nobody_outside_has_clearly_more_and_nobody_moves_without_need(
    profiles: list[str], before: set[str], images: dict[Any, float], places: int
) -> None:
    inside = busiest(profiles, before, images, places)
    assert len(inside) == min(places, len(profiles))
    assert inside <= set(profiles)
    for one in inside:
        for other in set(profiles) - inside:
            assert images.get(other, 0) <= TIMES * images.get(one, 0) + MORE
    assert busiest(profiles, inside, images, places) == inside


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("images"), st.integers(0, 5), st.integers(1, 60)),
        st.tuples(st.just("scrape"), st.sampled_from([0, 15, 59, 60, 120, 4000]), st.just(0)),
    ),
    max_size=60,
)


@given(EVENTS, st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_every_image_is_counted_once_and_no_counter_falls_as_places_change_hands(
    bundle: Bundle, events: list[tuple[str, int, int]], places: int
) -> None:
    """Six profiles; what increases between pages is added up as Prometheus does, where a new series starts at 0."""
    names = [f"p{number}" for number in range(6)]
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: clock[0])
        page = Page(places, "top")
        served = page.serve(
            replace(bundle, profiles={name: replace(bundle.profiles["Bag"], name=name) for name in names})
        )
        before: dict[str, float] = {}
        increase: Counter[str] = Counter()
        sent: Counter[str] = Counter()
        for what, number, images in [*events, ("scrape", 0, 0)]:
            if what == "images":
                served.answered(names[number], answers(bundle, images))
                sent[names[number]] += images
                continue
            clock[0] += number
            now = {sample.labels["profile"]: sample.value for sample in page.samples("steervit_images_total")}
            assert len(now) <= 2 * places + 3, "none, custom and other beside them"
            assert ("other" in now) == (places < len(names))
            assert all(now.get(profile, count) >= count for profile, count in before.items())
            increase.update({profile: count - before.get(profile, 0) for profile, count in now.items()})
            before = now
            assert page.value("steervit_heads_kept_total") == 30 * sum(now.values())
        assert increase.total() == sent.total()
        assert all(increase[name] <= sent[name] for name in names)
        if places >= len(names):
            assert all(increase[name] == sent[name] for name in names)


def test_busy_profiles_have_the_series_and_a_new_version_knows_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    page = Page(max_profile_series=2)
    served = page.serve(bundle)
    first, *_, busy = sorted(bundle.profiles)
    served.answered(busy, answers(bundle, 30))
    served.answered(first, answers(bundle, 5))
    assert page.value("steervit_images_total", profile="other") == 30, "counted before anybody knew"
    assert page.value("steervit_images_total", profile=busy) == 0
    served.answered(busy, answers(bundle, 7))
    assert page.value("steervit_images_total", profile=busy) == 7
    assert page.value("steervit_images_total", profile="other") == 30
    assert page.value("steervit_images_total", profile=first) == 5
    assert page.lines("steervit_profile_expected_head_usage{", f'profile="{busy}"') == 1
    page.serve(replace(bundle, manifest=replace(bundle.manifest, version=99)))
    assert page.lines("steervit_images_total{", 'version="99"', f'profile="{busy}"') == 1
