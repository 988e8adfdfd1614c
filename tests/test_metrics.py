"""The series that the metrics page has, as models and profiles come and go."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, generate_latest

from export.bundle import Bundle
from service import metrics as module
from service.counting import Buckets, Histogram
from service.engine import Engine
from service.metrics import Metrics, ModelMetrics
from service.steering import resolve
from service.tuning import Plan
from training.steering import NEUTRAL


class Page:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, 200)

    def serve(self, bundle: Bundle) -> ModelMetrics:
        served = self.metrics.for_model(bundle, "dispatch.fp32", "cpu", Plan(2, 1, 0, False, 32))
        served.follow_queue(lambda: 0, 8)
        return served

    def lines(self, *parts: str) -> int:
        page = generate_latest(self.registry).decode().splitlines()
        return sum(all(part in line for part in parts) for line in page)


def test_series_of_an_unloaded_version_go_away_by_themselves(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    page, now = Page(), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    page.serve(bundle)
    page.serve(of_version(bundle, 9)).retire()
    now[0] = module.LINGER_SECONDS - 1
    assert page.lines("steervit_images_total", 'version="9"') == 15
    now[0] += 1
    assert page.lines('version="9"') == 0, "without any further change of the models"
    assert page.lines("steervit_images_total", 'version="3"') == 15


def test_a_profile_called_like_a_group_of_images_has_series_of_its_own(
    bundle: Bundle, sample_pixels: NDArray[np.uint8]
) -> None:
    """Groups: images without steering (none), with inline terms (custom), of profiles past the cap (other)."""
    page = Page()
    names = ("none", "custom", "other", "profile:none")
    shirt = bundle.profiles["Shirt"]
    named = replace(bundle, profiles={name: replace(shirt, name=name) for name in names})
    served = page.serve(named)
    outputs = Engine(bundle, "cpu", 1).run(sample_pixels[:1], resolve(bundle, "", NEUTRAL, 1.0).arrays)
    labels = [*names, *module.Group]
    for times, label in enumerate(labels, 1):
        for _ in range(times):
            served.answered(label, outputs)
    images = {
        sample.labels["profile"]: sample.value
        for family in page.registry.collect()
        for sample in family.samples
        if sample.name == "steervit_images_total"
    }
    assert images == {
        "profile:none": 1, "profile:custom": 2, "profile:other": 3, "profile:profile:none": 4,
        "none": 5, "custom": 6, "other": 7,
    }  # fmt: skip
    usage = bundle.manifest.evaluation["head_usage"]
    assert page.lines('profile="none"', "expected_head_usage", str(usage)) == 1
    assert (
        page.lines('profile="profile:none"', "expected_head_usage", str(shirt.evaluation["after"]["head_usage"])) == 1
    )


def test_a_histogram_counts_each_value_in_its_bucket() -> None:
    histogram = Histogram((1, 2, 4))
    histogram.observe(0.5, 1, 1.5, 4, 5)
    assert histogram.read() == Buckets((1, 2, 4), (2, 3, 4, 5), 12.0)


def of_version(bundle: Bundle, version: int) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, version=version))


def test_series_of_what_is_unloaded_are_retained_for_a_while(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page()
    first = page.serve(of_version(bundle, 1))
    of_one = page.lines('version="1"')
    assert of_one > 13 * 30, "a series for each head and profile"
    page.serve(of_version(bundle, 2))
    first.retire()
    assert page.lines("steervit_heads_kept_total", 'version="1"') == 15 * 30, "its counts are there still"
    assert page.lines("steervit_model_info", 'version="1"') == 0
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.0)
    page.serve(of_version(bundle, 3)).retire()
    assert page.lines('version="1"') == 0
    assert page.lines('version="2"') == of_one
    for version in range(4, 20):  # whatever comes and goes, no more is there than two versions have
        page.serve(of_version(bundle, version)).retire()
        assert page.lines(f'model="{bundle.manifest.name}"') <= 2 * of_one


def test_a_version_that_is_replaced_takes_along_what_the_new_one_lacks(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.0)
    page = Page()
    first = page.serve(bundle)
    others = {name: profile for name, profile in bundle.profiles.items() if name != "Shirt"}
    page.serve(replace(bundle, profiles=others))
    first.retire()
    assert page.lines("steervit_profile_expected_head_usage", 'profile="Shirt"') == 0
    assert page.lines("steervit_profile_expected_head_usage", 'profile="Bag"') == 1
    page.serve(of_version(bundle, 9)).retire()
    assert page.lines('profile="Shirt"') == 0
    assert page.lines("steervit_images_total", 'profile="Bag"') == 1


def test_a_profile_that_goes_again_stays_as_long_again(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    page, now = Page(), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    served = page.serve(bundle)
    without = {name: profile for name, profile in bundle.profiles.items() if name != "Shirt"}
    for seconds, profiles in ((0, without), (100, bundle.profiles), (110, without)):
        now[0] = seconds
        served.use(profiles)
    for seconds, lines in ((125, 1), (235, 0)):
        now[0] = seconds
        page.serve(of_version(bundle, 2)).retire()
        assert page.lines("steervit_images_total", 'profile="Shirt"', 'version="3"') == lines


def test_a_profile_that_comes_back_keeps_counting(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.0)
    page = Page()
    served = page.serve(bundle)
    without = {name: profile for name, profile in bundle.profiles.items() if name != "Shirt"}
    for profiles in (without, bundle.profiles, {"Bag": bundle.profiles["Bag"]}, bundle.profiles):
        served.use(profiles)
        assert page.lines("steervit_heads_kept_total", 'profile="Bag"') == 30
        if "Shirt" in profiles:
            assert page.lines("steervit_heads_kept_total", 'profile="Shirt"') == 30
    served.use(without)
    served.use({"Bag": bundle.profiles["Bag"]})
    assert page.lines('profile="Shirt"') == 0
