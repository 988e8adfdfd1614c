"""The series of the metrics page, while models and profiles come and go and threads count concurrently."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from processes import COMMITTED
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from export.bundle import Bundle
from service import exposition
from service import metrics as module
from service.batcher import BatchStats
from service.calls import Answer
from service.config import Settings
from service.counting import CUSTOM, NONE, OTHER, Key
from service.engine import Outputs
from service.exposition import profile_label
from service.metrics import Metrics, ModelMetrics
from service.model import MAX_RESOLVED, Model
from service.receipt import measures
from service.tuning import Plan, Surroundings


class Page:
    def __init__(self, max_profile_series: int = 200, head_series: Literal["all", "top", "none"] = "all") -> None:
        self.metrics = Metrics(CollectorRegistry(), max_profile_series, head_series=head_series)

    def serve(self, bundle: Bundle) -> ModelMetrics:
        served = self.metrics.for_model(bundle, "dispatch.fp32", "cpu", Plan(2, 1, 0, False, 32))
        served.follow_queue(lambda: (0, 0.0, 0.0), 8)
        return served

    def lines(self, *parts: str) -> int:
        page = self.metrics.page.text().splitlines()
        return sum(all(part in line for part in parts) for line in page)

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels."""
        return sum(sample.value for sample in self.samples(name) if labels.items() <= sample.labels.items())

    def samples(self, name: str) -> list[Sample]:
        lines = [line for line in self.metrics.page.text().splitlines() if line.startswith(f"{name}{{")]
        return [sample for metric in text_string_to_metric_families("\n".join(lines)) for sample in metric.samples]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the metrics."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


def of_version(bundle: Bundle, version: int) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, version=version))


def answers(bundle: Bundle, count: int) -> Outputs:
    """With every head on."""
    manifest = bundle.manifest
    shape = count, len(manifest.gated_blocks), manifest.heads
    scores, macs = np.zeros((count, 10), np.float32), np.full(count, manifest.macs.dense)
    groups = np.ones((*shape[:2], manifest.mlp_groups), bool)
    return Outputs(
        scores, np.ones(shape, bool), groups, np.ones((*shape[:2], manifest.units), np.float32), np.ones(count),
        np.ones(count), macs, np.ones(count, np.int64), None, 0.01,
    )  # fmt: skip


def test_the_measures_of_a_receipt_by_hand(bundle: Bundle) -> None:
    dense = bundle.manifest.macs.dense
    outputs = replace(
        answers(bundle, 2),
        head_usage=np.array([1, 0.5]),
        macs=np.array([4, 3]) * (dense // 4),
        near_threshold=np.array([0, 3]),
    )
    model, steering = SimpleNamespace(bundle=bundle), SimpleNamespace(budget=0.9)
    measured = measures(model, steering, Answer(outputs, 0.2))
    usage = 1.0 if bundle.manifest.mlp_groups else None
    assert (measured.mlp_usage, measured.budget) == (usage, 0.9)
    assert measured[:5] == pytest.approx((0.2, 0.01, 0.75, 0.875, 3), rel=1e-6)


@pytest.mark.parametrize(("kept", "series"), [("all", 15 * 30), ("top", 10 * 30 + 5), ("none", 15)])
def test_head_series_are_kept_for_all_the_busiest_or_no_profiles(
    kept: Literal["all", "top", "none"], series: int, bundle: Bundle
) -> None:
    """13 profiles, none and custom. Sums over heads are the same in every mode."""
    page = Page(head_series=kept)
    served = page.serve(bundle)
    for number, name in enumerate(bundle.profiles, 1):
        served.answered(name, answers(bundle, 20 * number))
    assert page.lines("steervit_heads_kept_total{") == series
    for number, name in enumerate(bundle.profiles, 1):
        assert page.value("steervit_heads_kept_total", profile=name) == 30 * 20 * number
        by_head = kept == "all" or (kept == "top" and number > 3)
        assert page.lines("steervit_heads_kept_total{", f'profile="{name}"', 'head="5"') == 5 * by_head


def test_series_of_an_unloaded_version_are_retained_for_a_while(bundle: Bundle, now: list[float]) -> None:
    page = Page()
    first = page.serve(of_version(bundle, 1))
    of_one = page.lines('version="1"')
    assert of_one > 13 * 30, "a series for each head and profile"
    page.serve(of_version(bundle, 2))
    first.retire()
    for seconds in (1, 119):
        now[0] = seconds
        assert page.lines("steervit_heads_kept_total", 'version="1"') == 15 * 30, "its counts are there still"
        assert page.lines("steervit_model_info", 'version="1"') == 0
    now[0] = 120
    assert page.lines('version="1"') == 0
    assert page.lines('version="2"') == of_one


def test_series_do_not_grow_with_swaps_that_nobody_scrapes(bundle: Bundle, now: list[float]) -> None:
    page = Page()
    page.serve(of_version(bundle, 1))
    of_one = page.lines(f'model="{bundle.manifest.name}"')
    for version in range(2, 20):
        page.serve(of_version(bundle, version)).retire()
        now[0] += 121
    assert len(page.metrics._versions.values) <= 2
    assert page.lines(f'model="{bundle.manifest.name}"') == of_one


def test_counts_continue_when_a_version_is_soon_loaded_again(bundle: Bundle, now: list[float]) -> None:
    page = Page()
    for images, seconds in ((3, 100), (6, 221), (3, 400)):
        served = page.serve(bundle)
        served.answered("Bag", answers(bundle, 3))
        assert page.value("steervit_images_total", profile="Bag") == images
        served.retire()
        now[0] = seconds


def test_failed_loads_of_a_version_that_is_gone_are_forgotten(bundle: Bundle, now: list[float]) -> None:
    page = Page()
    page.metrics.load_failed("m", 7)
    page.metrics.failed_versions("m", [7])
    for seconds, failed, left in ((1000, [7], 1), (1001, [], 1), (1120, [], 1), (1121, [], 0)):
        now[0] = seconds
        page.metrics.failed_versions("m", failed)
        assert page.lines("steervit_model_load_failures_total", 'version="7"') == left
        assert page.lines("steervit_model_load_failed{", 'version="7"') == len(failed)


def test_the_digest_of_profiles_follows_what_they_do(bundle: Bundle) -> None:
    page = Page()
    served = page.serve(bundle)

    def digest() -> str:
        (sample,) = page.samples("steervit_profiles_info")
        return str(sample.labels["profiles_digest"])

    first, of_bag = digest(), replace(bundle.profiles["Bag"], terms={})
    served.use(dict(reversed(bundle.profiles.items())))
    assert digest() == first, "whatever the order"
    others = ({**bundle.profiles, "Bag": of_bag}, {**bundle.profiles, "new": of_bag}, {"Bag": of_bag}, {"new": of_bag})
    for profiles in others:
        served.use(profiles)
        assert digest() != first
        first = digest()


def test_series_that_a_replacement_lacks_end_with_the_replaced_version(bundle: Bundle, now: list[float]) -> None:
    page = Page()
    first = page.serve(bundle)
    first.answered("Bag", answers(bundle, 1))
    others = {name: profile for name, profile in bundle.profiles.items() if name != "Shirt"}
    second = page.serve(replace(bundle, profiles=others))
    assert page.lines("steervit_model_info{") == 1, "a series twice would spoil the page"
    first.answered("Bag", answers(bundle, 1))
    second.answered("Bag", answers(bundle, 1))
    first.retire()
    assert page.lines("steervit_model_info{") == 1
    assert page.lines("steervit_profile_expected_head_usage", 'profile="Shirt"') == 0
    assert page.lines("steervit_profile_expected_head_usage", 'profile="Bag"') == 1
    now[0] = 120
    assert page.lines('profile="Shirt"') == 0
    assert page.value("steervit_images_total", profile="Bag") == 3


def test_heads_start_anew_when_a_version_comes_with_other_blocks(bundle: Bundle, now: list[float]) -> None:
    page = Page()
    first = page.serve(bundle)
    first.answered("Bag", answers(bundle, 1))
    fewer = replace(bundle, manifest=replace(bundle.manifest, gated_blocks=bundle.manifest.gated_blocks[1:]))
    second = page.serve(fewer)
    first.answered("Bag", answers(bundle, 1))
    second.answered("Bag", answers(fewer, 1))
    assert page.lines("steervit_heads_kept_total", 'profile="Bag"') == 24
    assert page.value("steervit_heads_kept_total", profile="Bag") == 24


def test_a_profile_removed_again_is_retained_for_the_full_time(bundle: Bundle, now: list[float]) -> None:
    page = Page()
    served = page.serve(bundle)
    without = {name: profile for name, profile in bundle.profiles.items() if name != "Shirt"}
    for seconds, profiles in ((0, without), (100, bundle.profiles), (110, without)):
        now[0] = seconds
        served.use(profiles)
    for seconds, lines in ((125, 1), (235, 0)):
        now[0] = seconds
        assert page.lines("steervit_images_total", 'profile="Shirt"', f'version="{COMMITTED.name}"') == lines


def test_a_profile_that_comes_back_keeps_counting(bundle: Bundle, now: list[float]) -> None:
    page = Page()
    served = page.serve(bundle)
    without = {name: profile for name, profile in bundle.profiles.items() if name != "Shirt"}
    for number, profiles in enumerate((without, bundle.profiles, {"Bag": bundle.profiles["Bag"]}, bundle.profiles)):
        now[0] += 200
        served.use(profiles)
        served.answered("Bag", answers(bundle, 1))
        assert page.value("steervit_heads_kept_total", profile="Bag") == 30 * (number + 1)
        if "Shirt" in profiles:
            assert page.lines("steervit_heads_kept_total", 'profile="Shirt"') == 30
    served.use({"Bag": bundle.profiles["Bag"]})
    served.answered("Shirt", answers(bundle, 2))
    assert page.value("steervit_images_total", profile="other") == 2, "its call was in progress"
    now[0] += 120
    assert page.lines('profile="Shirt"') == 0


@pytest.mark.parametrize("name", ["none", "custom", "other", "profile:none", "profile:profile:other"])
def test_a_profile_with_a_reserved_name_has_series_of_its_own(name: str, bundle: Bundle) -> None:
    page = Page()
    odd = replace(bundle.profiles["Bag"], name=name, evaluation={"after": {"head_usage": 0.125}})
    served = page.serve(replace(bundle, profiles={"Bag": bundle.profiles["Bag"], name: odd}))
    keys: dict[Key, int] = {name: 1, NONE: 2, CUSTOM: 4, "not served": 8}
    for key, images in keys.items():
        served.answered(key, answers(bundle, images))
        served.shadowed(key, answers(bundle, images), answers(bundle, images))
    for metric in ("steervit_images_total", "steervit_shadow_images_total"):
        labels = {f"profile:{name}": 1, "none": 2, "custom": 4, "other": 8}
        assert {label: page.value(metric, profile=label) for label in labels} == labels
    assert page.value("steervit_profile_expected_head_usage", profile=f"profile:{name}") == 0.125
    stated = bundle.manifest.evaluation["head_usage"]
    assert page.value("steervit_profile_expected_head_usage", profile="none") == stated
    assert page.lines("steervit_profile_expected_head_usage{", 'profile="other"') == 0


def test_names_that_mean_something_to_the_page_or_to_python_stand_in_it_as_they_are(bundle: Bundle) -> None:
    name = '100% {of} "all"\\\n%d'
    page = Page()
    served = page.serve(replace(bundle, profiles={name: replace(bundle.profiles["Bag"], name=name)}))
    served.answered(name, answers(bundle, 3))
    assert page.value("steervit_images_total", profile=name) == 3
    assert page.value("steervit_heads_kept_total", profile=name, block="2", head="5") == 3


def test_a_large_page_leaves_the_interpreter_to_others_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pause after each SLICE of work, by a clock that advances with the work alone."""
    clock, pauses = [0.0], [0]

    def sleep(seconds: float) -> None:
        assert seconds > 0
        pauses[0] += 1

    monkeypatch.setattr(exposition, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))
    for number in exposition.in_slices(range(100)):
        assert pauses[0] == number // 11, "of eleven items"
        clock[0] += exposition.SLICE / 10.5


def test_no_two_profiles_share_a_label() -> None:
    names = ["none", "custom", "other", "Bag", "None", "no", "", "profile", ":none"]
    keys = [NONE, CUSTOM, OTHER, *(f"{prefix}{name}" for prefix in ("", "profile:", "profile:" * 2) for name in names)]
    assert len({profile_label(key) for key in keys}) == len(keys)
    assert profile_label("Bag") == "Bag"


def test_no_count_is_lost_when_threads_count_during_swaps_and_scrapes(bundle: Bundle) -> None:
    """Two inference threads, two that answer, and one that swaps models and profiles, while the page is read: no thread
    passes its middle before a page is read that was begun meanwhile."""
    page, rounds, read = Page(), 400, Event()
    served, steered = page.serve(bundle), answers(bundle, 2)
    profiles = [bundle.profiles, {"Bag": bundle.profiles["Bag"]}]

    def run() -> None:
        for number in range(rounds):
            read.wait() if number == rounds // 2 else None
            served.batch(BatchStats(2, 0.003, (0.5, 100.0)))

    def answer() -> None:
        for number in range(rounds):
            read.wait() if number == rounds // 2 else None
            page.metrics.in_flight.inc()
            served.answered("Shirt", steered)
            served.decoded(0.2)
            page.metrics.request("/a/Predict", "OK", 0.01)
            page.metrics.in_flight.dec()

    def swap() -> None:
        for number in range(60):
            read.wait() if number == 30 else None
            served.use(profiles[number % 2])
            page.serve(of_version(bundle, 100 + number)).retire()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(5) as pool:
            threads = [pool.submit(work) for work in (run, run, answer, answer, swap)]
            while not all(thread.done() for thread in threads):
                page.metrics.page.text()
                read.set()
            for thread in threads:
                thread.result()
    finally:
        sys.setswitchinterval(before)
    version = str(bundle.manifest.version)
    assert page.value("steervit_images_total", version=version) == 4 * rounds
    assert page.value("steervit_heads_kept_total", version=version) == 4 * rounds * 30
    assert page.value("steervit_gates_near_threshold_total", version=version) == 4 * rounds
    assert page.value("steervit_macs_dense_total", version=version) == 4 * rounds * bundle.manifest.macs.dense
    for name, bound, below, every in (
        ("steervit_batch_size_images", "2.0", 2, 2), ("steervit_queue_duration_seconds", "0.5", 2, 4),
        ("steervit_decode_duration_seconds", "0.1", 0, 2),
    ):  # fmt: skip
        assert page.value(f"{name}_bucket", version=version, le=bound) == below * rounds
        assert page.value(f"{name}_count", version=version) == every * rounds
    assert page.value("steervit_queue_duration_seconds_sum", version=version) == pytest.approx(201 * rounds)
    assert page.value("steervit_requests_total", code="OK") == 2 * rounds
    assert page.value("steervit_request_duration_seconds_count", method="/a/Predict") == 2 * rounds
    assert page.value("steervit_requests_in_flight") == 0


def test_strengths_of_clients_do_not_fill_the_cache_forever(bundle: Bundle) -> None:
    settings = Settings(repository=Path("unused"), threads=1)
    with ThreadPoolExecutor(1) as pool:
        model = Model(bundle, settings, Metrics(CollectorRegistry(), 1), pool, Surroundings(True, False))
        try:
            first, often = (model.steering("Bag", {}, strength) for strength in (0.5, 1.0))
            for number in range(MAX_RESOLVED + 10):
                model.steering("Shirt", {}, number / 1000)
                assert model.steering("Bag", {}, 1.0) is often, "used again and again"
            late = model.steering("Coat", {}, 1.0)
            assert model.steering("Coat", {}, 1.0) is late, "there is room for what comes late"
            assert model.steering("Bag", {}, 0.5) is not first, "used longest ago"
            model.use({"Bag": replace(bundle.profiles["Bag"], terms={})})
            assert model.steering("Bag", {}, 1.0).digest != often.digest, "of the profile before"
        finally:
            model.batcher.close()
