"""Statistics and baselines with numbers computed by hand."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from training.checkpoint import Run, RunError
from training.config import VitSettings
from training.data.splits import Split
from training.evaluation import significance
from training.evaluation.ablation import _against, compare_variants, scale_alone, shift_alone, table
from training.evaluation.baselines import (
    Rival,
    bisect,
    each_under,
    fixed_units,
    greedy_order,
    greedy_units,
    logit_bias,
    matched,
    prior_bias,
    random_units,
    residual_direction,
    static_units,
    threshold_shift,
)
from training.evaluation.changes import CHANGES, DIFFERENCES, changes, placements, ratio, write_values
from training.evaluation.class_agnostic import class_knowledge
from training.evaluation.criteria import MARGINS, criteria
from training.evaluation.dial import Along, asked, compare_areas, compare_at
from training.evaluation.protocol import _profile_entry, _whole
from training.evaluation.rivals import Measured, Slice, _measured, compare
from training.evaluation.seeds import RIVALS, _interval
from training.evaluation.seeds import table as table_of_seeds
from training.evaluation.selective import judged
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.first_gate import from_first_gate
from training.model.gated_vit import GatedVit
from training.model.inference import Effect, Outcome, answers, auroc, effect, gate_diagnostics, steered_by
from training.model.macs import Macs, count
from training.model.sae import Sae
from training.profiles.fit import own_and_others, targets_of
from training.profiles.selective import Examples
from training.steering import SteeringProfile, SteeringTerm

LABELS = ["a", "b", "c"]


def right(*counts: tuple[int, bool]) -> NDArray[np.bool_]:
    return np.concatenate([np.full(count, value) for count, value in counts])


def test_wilson_intervals_of_the_papers_class() -> None:
    """76 and 82 of 100: the intervals overlap."""
    low, high = significance.wilson(right((76, True), (24, False)))
    assert (round(low, 2), round(high, 2)) == (0.67, 0.83)
    low, high = significance.wilson(right((82, True), (18, False)))
    assert (round(low, 2), round(high, 2)) == (0.73, 0.88)


def test_images_of_a_cluster_count_as_one_when_they_are_alike() -> None:
    """Ten designs of 40 images, each all right or all wrong, are worth ten images; seven of four, which change
    together, seven."""
    answers, designs = np.repeat(right((6, True), (4, False)), 40), np.repeat(np.arange(10), 40)
    low, high = significance.wilson(answers, designs)
    share_error = math.sqrt(0.24 / 9)  # of ten clusters
    images = 0.24 / share_error**2
    centre, z = (0.6 + 1.96**2 / (2 * images)) / (1 + 1.96**2 / images), 1.96
    reach = z / (1 + z * z / images) * math.sqrt(0.24 / images + (z / (2 * images)) ** 2)
    assert (low, high) == pytest.approx((centre - reach, centre + reach), abs=1e-4)
    narrow = significance.wilson(answers)
    assert high - low > 3 * (narrow[1] - narrow[0])
    assert significance.wilson(np.ones(400, bool), designs) == significance.wilson(np.ones(10, bool))
    apart = np.arange(400)
    assert significance.wilson(answers, apart) == pytest.approx(narrow, rel=2e-3)
    assert significance.effective_images(answers.astype(float), designs) == pytest.approx(9, rel=0.01)
    assert significance.effective_images(answers.astype(float), None) == 400

    before = np.repeat(right((6, True), (1, False)), 4)
    of_four = np.repeat(np.arange(7), 4)
    expected = significance.mcnemar(before[::4], ~before[::4])
    assert significance.paired(before, ~before, of_four) == pytest.approx(expected)
    assert significance.paired(before, ~before) < expected / 100
    assert significance.paired(before, before, of_four) == 1.0


def test_mcnemar_counts_only_what_changed() -> None:
    before = right((50, True), (1, True), (5, False), (44, False))
    after = right((50, True), (1, False), (5, True), (44, False))
    # 5 of 6 changes in one direction: 2 * (C(6,5) + C(6,6)) / 2^6
    assert significance.mcnemar(before, after) == pytest.approx(2 * (6 + 1) / 64)
    assert significance.mcnemar(before, before) == 1.0


def test_non_inferiority_of_a_published_trial() -> None:
    """Tango 1998: one of 44 patients is right only under the old treatment; margin 0.1: Z = 1.709."""
    before, after = right((44, True)), right((43, True), (1, False))
    # 88 q^2 - 9.9 q + 0.11 = 0, so q = 0.1, and Z = (-1 + 4.4) / sqrt(44 (0.2 - 0.11))
    assert significance.non_inferiority(before, after, 0.1) == pytest.approx(norm.sf(3.4 / math.sqrt(3.96)))
    assert significance.non_inferiority(before, after, 0.1) == pytest.approx(norm.sf(1.709), abs=1e-4)
    # nobody changes: q = 0.01, Z = sqrt(n 0.01 / 0.99)
    assert significance.non_inferiority(before, before, 0.01) == pytest.approx(norm.sf(math.sqrt(44 / 99)))
    # at the margin exactly the test is undecided, and margin 0 is McNemar's test: 5 gained, 1 lost
    assert significance.non_inferiority(right((90, True), (10, False)), right((80, True), (20, False)), 0.1) == 0.5
    before, after = right((1, True), (5, False), (4, True)), right((1, False), (5, True), (4, True))
    assert significance.non_inferiority(before, after, 0.0) == pytest.approx(norm.sf(4 / math.sqrt(6)))
    # 14 (1 + 0.01) = 2 * 707 * 0.01, so both roots are q = 0.01; as a float, their difference squared is below 0
    before, after = right((707, True)), right((693, True), (14, False))
    assert significance.non_inferiority(before, after, 0.01) == pytest.approx(norm.sf(-6.93 / math.sqrt(707 * 0.0099)))


def test_non_inferiority_counts_designs_that_change_together_once() -> None:
    """The trial again, each patient four times; five images that do not change; and 112 designs of seven images."""
    before, after = right((44, True)).repeat(4), right((43, True), (1, False)).repeat(4)
    p = significance.non_inferiority(before, after, 0.1, np.arange(44).repeat(4))
    assert p == pytest.approx(norm.sf(1.709), rel=0.05)
    assert significance.non_inferiority(before, after, 0.1) < p / 100
    few = significance.non_inferiority(before[:5], before[:5], 0.01, np.array([0, 0, 1, 1, 1]))
    assert few == pytest.approx(norm.sf(math.sqrt(2 / 99))), "nothing is shown by two designs"
    rng, shown, designs = np.random.default_rng(0), 0, np.arange(112).repeat(7)
    before = np.ones(784, bool)
    for _ in range(1000):
        shown += significance.non_inferiority(before, rng.random(784) > 0.01, 0.01, designs) < 0.05
    assert shown / 1000 < 0.05 + 0.021, "a loss of the margin is rejected in one of 20 cases (and 3 standard errors)"


@pytest.mark.parametrize("designs", [None, [0, 0, 0, 1, 1]], ids=["images", "designs"])
@pytest.mark.parametrize("lost", [False, True])
def test_one_image_of_a_label_shows_nothing(lost: bool, designs: list[int] | None) -> None:
    """Label 0 has one image; or two, of one design. One of them may be lost."""
    classes = torch.tensor([1, 1, 1, 0, 0] if designs else [1, 1, 1, 1, 0])
    split = Split(torch.zeros(5), classes, factors=None if designs is None else torch.tensor(designs)[:, None])
    neutral = outcome([[0.0, 1.0]] * 3 + [[1.0, 0.0]] * 2)
    under = outcome([[0.0, 1.0]] * 3 + [[1.0, 0.0], [0.0, 1.0] if lost else [1.0, 0.0]])
    values = changes(neutral, under, classes, (0,))
    profile = SteeringProfile("a", ("a",), "by hand", {})
    entry = _profile_entry(profile, (0,), neutral, under, values, split, Macs(10, (1,)))
    json.dumps(entry, allow_nan=False)
    assert entry["recall_change_interval"] == [-1, 1]
    low, high = entry["recall_interval_before"]
    assert high - low > 0.7
    assert entry["non_inferiority"]["recall"] > 0.4
    assert 0 <= entry["power"]["power"] < (0.2 if lost else 1.01)


def test_power_and_detectable_margin_by_hand() -> None:
    """1,000 images, 3% of the answers change: standard error sqrt(0.03 / 1000) = 0.00548."""
    assert significance.power(1000, 0.03, 0.01, 0.05) == pytest.approx(norm.cdf(0.01 / 0.0054772 - 1.64485), abs=1e-4)
    margin = significance.detectable(1000, 0.03, 0.05)
    assert margin == pytest.approx((1.64485 + 0.84162) * 0.0054772, abs=1e-5)
    assert significance.power(1000, 0.03, margin, 0.05) == pytest.approx(0.8)
    assert significance.power(1000, 0.0, 0.01, 0.05) == 1.0


def test_the_power_is_how_often_non_inferiority_is_shown() -> None:
    rng, shown = np.random.default_rng(0), 0
    for _ in range(400):
        draw = rng.random(1000)
        before, after = draw > 0.015, (draw < 0.015) | (draw > 0.03)  # 1.5% gained, 1.5% lost
        shown += significance.non_inferiority(before, after, 0.01) < 0.05
    assert shown / 400 == pytest.approx(significance.power(1000, 0.03, 0.01, 0.05), abs=0.075)  # 3 standard errors


def test_changes_are_means_over_images() -> None:
    """Recall, precision, AUROC and accuracy of two classes; their values average to the changes that Effect has."""
    torch.manual_seed(0)
    classes = torch.arange(60) % 3
    before, after = (Outcome(torch.randn(60, 3), torch.ones(60, 1, 2) > 0, torch.ones(60, 1, 2), 2) for _ in range(2))
    for target in ((0,), (0, 2)):
        values = changes(before, after, classes, target)
        first, second = (effect(outcome, classes, target, Macs(10, (1,))) for outcome in (before, after))
        assert set(values) == set(MARGINS)
        for metric, of_images in values.items():
            assert of_images.mean() == pytest.approx(getattr(second, metric) - getattr(first, metric), abs=1e-9)
    # half of four claimed images are right: deviations of 1/2 at 4 of 8 images, scaled by 8 / 4
    part, whole = np.array([1.0, 1, 0, 0, 0, 0, 0, 0]), np.array([1.0, 1, 1, 1, 0, 0, 0, 0])
    assert ratio(part, whole).tolist() == [1.5, 1.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5]
    # own 0.9 beats both others and 0.3 one; the others stand below both of the own, or below one
    score, own = np.array([0.9, 0.3, 0.1, 0.5]), np.array([True, True, False, False])
    assert placements(score, own).tolist() == [0.75 + 0.5, 0.75 - 0.5, 0.75 + 0.5, 0.75 - 0.5]


def test_a_loss_of_the_margin_is_rejected_by_the_normal_approximation() -> None:
    values = np.array([0.02, -0.02] * 50)  # standard error 0.02 sqrt(100 / 99) / 10
    assert significance.not_below(values, 0.004) == pytest.approx(norm.sf(0.004 / (0.002 * math.sqrt(100 / 99))))
    assert significance.not_below(values - 0.004, 0.004) == pytest.approx(0.5)
    # nothing changes: each of five images, or two designs, keeps its answer with a probability of 0.99
    assert significance.not_below(np.zeros(5), 0.01) == pytest.approx(0.99**5)
    assert significance.not_below(np.zeros(5), 0.01, np.array([0, 0, 1, 1, 1])) == pytest.approx(0.99**2)
    assert significance.not_below(np.zeros(1), 0.01) == 0.5, "a single image has no standard error"
    assert significance.not_below(np.full(5, -0.01), 0.01) == 1.0


def test_images_of_a_design_count_once_if_they_are_alike() -> None:
    values, pairs = np.array([1.0, 1.0, 0.0, 0.0]), np.array([7, 7, 3, 3])
    assert significance.standard_error(values) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert significance.standard_error(values, np.arange(4)) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert significance.standard_error(values, pairs) == pytest.approx(0.5), "two values, 1 and 0"
    assert significance.not_below(values, 0.5, pairs) == pytest.approx(norm.sf(2))
    # 16 designs of 25 images, half of them all better: a standard error of 0.5 / sqrt(15) instead of 0.5 / sqrt(399)
    halves, designs = np.repeat([0.0, 1.0], 200), np.repeat(np.arange(16), 25)
    low, high = significance.change_interval(np.zeros(400), halves, designs)
    assert (low, high) == pytest.approx((0.25, 0.75), abs=0.07)
    # every image is better, in designs of one, two and seven images
    assert significance.change_interval(np.zeros(10), np.ones(10), np.repeat([0, 1, 2], [1, 2, 7])) == (1, 1)


def test_intervals_over_images_and_seeds_in_cases_with_a_known_answer() -> None:
    rng = np.random.default_rng(1)
    plain = rng.choice([-1.0, 0.0, 0.0, 1.0, 1.0], 500)
    expected = significance.change_interval(np.zeros(500), plain)
    assert significance.cluster_interval(plain) == pytest.approx(expected, abs=0.01)
    # the same in every seed: the error of the images, since all seeds have the same images
    of_seeds = significance.seeds_interval(np.stack([plain] * 3))
    assert of_seeds == pytest.approx(expected, abs=0.01)
    # all images of a seed alike: Student's t of three numbers, of mean 0.2 and standard deviation 0.1
    low, high = significance.seeds_interval(np.array([[0.1] * 9, [0.2] * 9, [0.3] * 9]))
    assert (low, high) == pytest.approx((0.2 - 4.303 * 0.1 / math.sqrt(3), 0.2 + 4.303 * 0.1 / math.sqrt(3)), abs=1e-4)
    assert significance.seeds_interval(np.full((3, 9), 0.25)) == (0.25, 0.25)
    # all images of a cluster alike: as if the clusters were the images
    clusters, spread = np.repeat(np.arange(50), 10), rng.normal(0.0, 0.2, (3, 1))
    few = plain[:50] + spread
    found = significance.seeds_interval(few.repeat(10, 1), clusters)
    assert found == pytest.approx(significance.seeds_interval(few))
    found = significance.cluster_interval(plain[:50].repeat(10), clusters)
    assert found == pytest.approx(significance.change_interval(np.zeros(50), plain[:50]), abs=0.03)
    assert found[1] - found[0] > 2 * (expected[1] - expected[0])
    assert significance.seeds_interval(plain[:30].reshape(3, 10), np.zeros(10, int)) == (-1, 1), "a single cluster"


@pytest.mark.parametrize(("of_seed", "of_image", "of_both"), [(1, 0.01, 0.01), (0.2, 1, 1), (0, 1, 0), (0, 0, 1)])
def test_intervals_over_three_seeds_cover_the_mean(of_seed: float, of_image: float, of_both: float) -> None:
    """Seeds, images, or both of them differ; the mean of their population is 0. With 400 draws, 3 standard errors."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        values = of_seed * rng.normal(size=(3, 1)) + of_image * rng.normal(size=40) + of_both * rng.normal(size=(3, 40))
        low, high = significance.seeds_interval(values)
        covered += low <= 0 <= high
    assert covered / 400 > 0.95 - 0.033


def test_four_images_of_a_design_that_answer_alike_count_as_one_in_every_result() -> None:
    """60 designs of one image, and of four: the same intervals, standard errors and p-values. Without steering half of
    the images are right, under the profiles nine of ten."""
    generator, classes, macs = torch.Generator().manual_seed(0), torch.arange(60) % 3, Macs(10, (1,))

    def drawn(share: float) -> Outcome:
        right = torch.rand(60, generator=generator) < share
        logits = torch.rand(60, 3, generator=generator) + 2 * torch.eye(3)[(classes + ~right) % 3]
        return Outcome(logits, torch.rand(60, 1, 2, generator=generator) > 0.5, torch.ones(60, 1, 2), 2)

    outcomes = [drawn(share) for share in (0.5, 0.9, 0.9, 0.9)]

    def results(times: int) -> dict[str, Any]:
        rows = torch.arange(60).repeat_interleave(times)
        split = Split(torch.zeros(len(rows), 1), classes[rows], factors=rows[:, None])
        neutral, *under = (outcome.take(rows) for outcome in outcomes)
        right = np.stack([(o.predicted == split.classes).double().numpy() for o in (neutral, under[0])])
        along = Along(np.array([0.5, 1.0]), right, split.clusters)
        measured = [
            {
                name: _measured(o, Slice(split, (c,), neutral, under[c], [], {}), macs)
                for name, o in {"no steering": neutral, "profile": under[c]}.items()
            }
            for c in range(3)
        ]
        profile, values = SteeringProfile("a", ("a",), "by hand", {}), changes(neutral, under[0], split.classes, (0,))
        return {
            "class_knowledge": class_knowledge(split, {(c,): under[c] for c in range(3)}, {"one": neutral}, macs),
            "profile": _profile_entry(profile, (0,), neutral, under[0], values, split, macs),
            "whole": _whole(neutral, split, macs),
            "rivals": compare(measured),
            "selective": judged(macs, Examples(split, neutral, torch.zeros(1, len(rows), 1)), under[0], (0,)),
            "budget": asked(0.5, neutral, split, macs),
            "at": compare_at(0.75, along, right[0], 0.05)[0],
            "area": compare_areas(along, replace(along, right=right[:1].repeat(2, 0)))[0],
        }

    one, four = (dict(numbers(results(times))) for times in (1, 4))
    assert one.keys() == four.keys()
    for name, value in one.items():
        if not name.endswith("images"):
            assert four[name] == pytest.approx(value, abs=0.012), name
    low, high = (one[f"rivals.no steering.against_profile.interval.{end}"] for end in (0, 1))
    assert low < one["rivals.no steering.against_profile.recall"] < high < 0


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in JSON, each with its path."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from numbers(entry, f"{name}.{key}".lstrip("."))
    if isinstance(value, (int, float)):
        yield name, float(value)


def test_seeds_have_an_interval_only_over_the_same_images(tmp_path: Path) -> None:
    runs = [Run(tmp_path / name) for name in "abc"]
    for run, change in zip(runs, (-0.01, 0.01, 0.01), strict=True):
        values = {"recall": torch.full((9,), change, dtype=torch.float64)}
        run.write_tensors(CHANGES, values, {"images": "9 of them" if run != runs[2] else None})
    assert _interval(runs[:2], CHANGES, "recall") == pytest.approx([-0.127, 0.127], abs=1e-3), "12.7 times 0.01"
    assert _interval(runs, CHANGES, "recall") is None
    assert _interval(runs[:2], CHANGES, "precision") is None
    split = Split(torch.zeros(9, 2, 2, 1), torch.zeros(9), factors=torch.arange(9)[:, None] // 3)
    write_values(runs[0], CHANGES, {"recall": np.repeat([-0.5, 0.5, 0.5], 3)}, split, "9 of them")
    assert _interval(runs[:1], CHANGES, "recall") == [-0.5, 0.5], "of three designs, drawn as a whole"
    assert _interval([*runs[:2], Run(tmp_path / "older")], CHANGES, "recall") is None


def evaluated(folder: Path, seed: int, **differences: float) -> Run:
    """An evaluated run with 9 test images, to which the dial differs by so much from these controls."""
    run, whole = Run(folder), {"accuracy": 0.9, "head_usage": 0.5, "compute_fraction": 0.7, "recall": 0.9}
    changes_of = {"recall": 0.01 * seed, "precision": 0.0, "overall_accuracy": 0.0}
    run.write_json("results.json", {
        "seed": seed, "ungated": whole, "neutral": whole, "mean_change": changes_of, "success": [], "pattern": [],
        "profiles": [{"classes": ["a"], "before": whole, "after": whole}], "rivals": {RIVALS[0]: whole},
        "controls": {n: {**whole, "dial_at_its_compute": {"difference": d}} for n, d in differences.items()},
    })  # fmt: skip
    for name, values in ((CHANGES, changes_of), (DIFFERENCES, differences)):
        tensors = {key: torch.full((9,), value, dtype=torch.float64) for key, value in values.items()}
        run.write_tensors(name, tensors, {"images": "9 of them"})
    measures = ("fvu", "gate_agreement", "gate_agreement_clear", "dead_training", "dead")
    run.finish("sae", {"seed": seed}, {"fidelity": [dict.fromkeys(measures, 0.5)]})
    run.finish("profiles", {"seed": seed, "vit": {"dim": 24}}, {})
    return run


def test_controls_that_some_seeds_lack_are_compared_over_the_others(tmp_path: Path) -> None:
    """`small` has three seeds, `heads` the first alone, `wide` the last two. All images of a seed are alike."""
    runs = [
        evaluated(tmp_path / "0", 0, small=0.01, heads=0.05),
        evaluated(tmp_path / "1", 1, small=0.02, wide=0.1),
        evaluated(tmp_path / "2", 2, small=0.03, wide=0.1),
    ]
    found = table_of_seeds(runs)
    assert found["dial_seeds"] == {"small": [0, 1, 2], "heads": [0], "wide": [1, 2]}
    reach = 4.303 * 0.01 / math.sqrt(3)
    assert found["dial_intervals"]["small"] == pytest.approx([0.02 - reach, 0.02 + reach], abs=1e-4)
    assert found["dial_intervals"]["heads"] == [0.05, 0.05]
    assert found["dial_intervals"]["wide"] == [0.1, 0.1]
    runs[1].remove_tensors(DIFFERENCES)
    assert table_of_seeds(runs)["dial_intervals"] == {"heads": [0.05, 0.05]}
    assert table_of_seeds(runs)["dial_seeds"] == found["dial_seeds"]
    assert found["mean"]["recall_change"] == 0.01
    assert found["intervals"]["recall"] == pytest.approx([0.01 - reach, 0.01 + reach], abs=1e-4)
    with pytest.raises(RunError, match=r"the runs have the seeds 0, 1, 1; allowed: each once"):
        table_of_seeds([*runs[:2], runs[1]])
    runs[2].finish("profiles", {"seed": 2, "vit": {"dim": 48}}, {})
    with pytest.raises(RunError, match=r"0 and .*2 have different settings \(vit.dim: 24 and 48\); allowed: diff"):
        table_of_seeds(runs)


def test_verdicts_by_hand() -> None:
    def entry(usage: float, **changed: tuple[float, float]) -> dict[str, Any]:
        none = dict.fromkeys(MARGINS, 0.9)
        after = {metric: 0.9 + changed.get(metric, (0.0, 0.0))[0] for metric in MARGINS}
        p_values = {metric: changed.get(metric, (0.0, 0.0))[1] for metric in MARGINS}
        return {"before": none, "after": {**after, "head_usage": usage}, "non_inferiority": p_values}

    rows = criteria([entry(0.2), entry(0.3, recall=(-0.005, 0.2)), entry(0.3, precision=(-0.011, 0.6))])
    found = {row["criterion"].split()[0]: row for row in rows}
    assert (found["head"]["measured"], found["head"]["verdict"]) == (pytest.approx(0.26667, abs=1e-5), "met")
    assert [found[name]["verdict"] for name in ("recall", "precision", "AUROC")] == ["not shown", "not met", "met"]
    assert (found["recall"]["measured"], found["recall"]["p"], found["recall"]["classes"]) == (-0.005, 0.2, 2)
    assert [row["met"] for row in rows] == [True, False, False, True, True]
    assert criteria([entry(0.31)])[0]["verdict"] == "not met"
    with_groups = entry(0.2)
    with_groups["after"] |= {"mlp_usage": 0.4, "unit_usage": 0.35}
    assert criteria([with_groups])[0] == {
        "criterion": "unit usage <= 0.30, mean over the classes", "measured": 0.35, "met": False, "verdict": "not met"
    }  # fmt: skip


def test_benjamini_hochberg_by_hand() -> None:
    # sorted 0.01, 0.03, 0.04 times 3/1, 3/2, 3/3, made monotone from the right
    assert significance.benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert significance.benjamini_hochberg([]) == []


def test_the_interval_of_a_change_covers_it_and_is_paired() -> None:
    before = right((500, True), (500, False))
    after = before.copy()
    after[:30] = False
    after[500:560] = True
    low, high = significance.change_interval(before, after)
    # +60 - 30 of 1000; standard error sqrt(0.09 - 0.0009) / sqrt(1000) = 0.0094, far below that of unpaired shares
    assert low == pytest.approx(0.03 - 1.96 * 0.0094, abs=0.003)
    assert high == pytest.approx(0.03 + 1.96 * 0.0094, abs=0.003)
    assert significance.change_interval(before, before) == (0.0, 0.0)


@pytest.mark.parametrize("clusters", [None, np.arange(5)])
def test_independent_images_count_as_many(clusters: NDArray[np.int64] | None) -> None:
    values = np.array([1.0, 0.0, -1.0, 0.0, 0.0])
    assert significance.effective_images(values, clusters) == pytest.approx(5)
    assert significance.effective_images(np.ones(1), None) == 1, "a single image has no standard error"


def test_auroc_of_a_score_by_hand() -> None:
    score, own = torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([True, True, False, False])
    assert auroc(score, own) == (2 + 1.5) / 4


def outcome(logits: list[list[float]], gate: float = 1.0) -> Outcome:
    gates = torch.full((len(logits), 1, 2), gate)
    return Outcome(torch.tensor(logits), gates > 0.5, gates - 0.5, gates.shape[2])


def test_prior_bias_is_the_free_recall_at_the_same_precision() -> None:
    classes = torch.tensor([0, 0, 0, 1, 1])
    # margins of class 0 over class 1: own 2, -0.5, -1.5; others -1, -3
    neutral = outcome([[2.0, 0.0], [0.0, 0.5], [0.0, 1.5], [0.0, 1.0], [0.0, 3.0]])
    assert prior_bias(neutral, classes, [0], 1.0) == (pytest.approx(2 / 3), 1.0)  # up to the other image at -1
    assert prior_bias(neutral, classes, [0], 0.75) == (1.0, pytest.approx(3 / 4))  # that image is paid
    assert prior_bias(neutral, classes, [0], 1.1) == (0.0, 0.0)


def test_the_profile_of_the_predicted_class_answers() -> None:
    neutral = outcome([[1.0, 0.0], [0.0, 1.0]])
    under_0, under_1 = outcome([[5.0, 0.0], [6.0, 0.0]], 0.0), outcome([[0.0, 7.0], [0.0, 8.0]], 1.0)
    chosen = each_under(neutral.predicted, [under_0, under_1])
    assert chosen.logits.tolist() == [[5.0, 0.0], [0.0, 8.0]]
    assert chosen.head_gate[:, 0, 0].tolist() == [False, True]


def test_bisect_finds_where_a_falling_function_crosses_in_either_direction() -> None:
    assert bisect(lambda x: 1 - x / 8, 0.25, 0.0, 8.0) == pytest.approx(6.0, abs=0.01)
    assert bisect(lambda x: 1 + x / 8, 0.25, 0.0, -8.0) == pytest.approx(-6.0, abs=0.01)
    assert bisect(lambda x: 1.0, 0.25, 0.0, 8.0) == pytest.approx(8.0, abs=0.01)


def test_rivals_decide_the_gates_that_they_say() -> None:
    torch.manual_seed(0)
    spec = ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,))
    model = GatedVit(create_vit(VitSettings(dim=24, depth=3, heads=3), spec, 4), (1, 2), spec).eval()
    images = torch.randint(256, (5, 28, 28, 1), dtype=torch.uint8)
    kept = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    rival = fixed_units(kept)
    assert torch.equal(model(images, rival.steer, rival.decide)[1]["head_gate"], kept.expand(5, 2, 3))
    bias = torch.tensor([[0.0, -9.0, 0.0], [-9.0, 0.0, 0.0]])  # every gate starts open, at most at 4
    gates = model(images, None, logit_bias(bias).decide)[1]["head_gate"]
    assert torch.equal(gates, (bias == 0).float().expand(5, 2, 3))
    drawn = model(images, None, random_units(count(model), 3, 0.5, seed=[1]).decide)[1]["head_gate"]
    assert drawn[0].sum() == 3
    assert (drawn == drawn[0]).all()
    for gate, used in zip(model.gates, ([0, 1, 1], [1, 0, 0]), strict=True):
        gate.linear.bias.data = 4 * torch.tensor(used) - 2.0
    static = static_units(count(model), model, Split(images, torch.zeros(5, dtype=torch.long)), 0.5)
    assert model(images, None, static.decide)[1]["head_gate"][0].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_rivals_with_a_strength_reach_the_usage_that_they_are_compared_at() -> None:
    """The direction opens units, so its factor must be negative."""
    torch.manual_seed(0)
    spec = ImageSpec(16, 16, 1, 16, "bicubic", (0.3,), (0.4,))
    model = GatedVit(create_vit(VitSettings(dim=24, depth=3, heads=3), spec, 4), (1, 2), spec).eval()
    for parameter in model.vit.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    for gate in model.gates:
        torch.nn.init.normal_(gate.linear.weight)
    split = Split(torch.randint(256, (40, 16, 16, 1), dtype=torch.uint8), torch.zeros(40, dtype=torch.long))
    opening, macs = torch.stack([gate.linear.weight.data.sum(0) for gate in model.gates]), count(model)
    assert answers(model, split).usage(macs) > 0.35
    for rival in (threshold_shift(model, macs, split, 0.25), residual_direction(model, macs, split, 0.25, opening)):
        assert answers(model, split, rival.steer, rival.decide).usage(macs) == pytest.approx(0.25, abs=0.03)


@settings(max_examples=50)
@given(
    units=st.lists(st.tuples(st.integers(1, 50), st.integers(-20, 20)), min_size=1, max_size=12), usage=st.floats(0, 1)
)
def test_units_close_in_the_order_of_loss_per_cost_if_losses_add_up(units: list[tuple[int, int]], usage: float) -> None:
    costs, added = np.array(units, float).T
    order = greedy_order(costs, lambda kept: float(added[~kept].sum()), usage)
    assert sorted(order.tolist()) == list(range(len(units)))
    kept = next(n for n in range(len(units), -1, -1) if costs[order[:n]].sum() <= usage * costs.sum())
    gone = (added / costs)[order[kept:]]
    assert (np.diff(gone) <= 1e-12).all()  # the cheapest went first, so stands last
    assert not len(gone) or gone.max() <= (added / costs)[order[:kept]].min(initial=np.inf) + 1e-12


def test_a_unit_is_measured_again_after_others_are_closed() -> None:
    """Two units do the same: without one nothing is lost, without both everything. The third adds 1, the fourth 2."""
    asked = []

    def loss(kept: NDArray[np.bool_]) -> float:
        asked.append(kept.tolist())
        return 9.0 * (not kept[:2].any()) + 1.0 * (not kept[2]) + 2.0 * (not kept[3])

    assert greedy_order(np.ones(4), loss, 0.25).tolist() == [1, 3, 2, 0]
    assert len(asked) == 1 + 4 + 2 + 1  # of the three left only the twin and the third, then the fourth
    torch.manual_seed(0)
    spec = ImageSpec(16, 16, 1, 16, "bicubic", (0.3,), (0.4,))
    model = GatedVit(create_vit(VitSettings(dim=24, depth=2, heads=3), spec, 3), (1,), spec).eval()
    split = Split(torch.randint(256, (6, 16, 16, 1), dtype=torch.uint8), torch.zeros(6, dtype=torch.long))
    change = [answers(model, split, decide=fixed_units(1 - torch.eye(3)[i : i + 1]).decide).logits for i in range(3)]
    least = min(range(3), key=lambda i: change[i].sum().item())
    rival = greedy_units(count(model), model, split, 2 / 3, lambda logits: logits.sum().item())
    assert rival.decide(0, torch.zeros(1, 3)).tolist() == (1 - torch.eye(3)[least : least + 1]).tolist()


def test_the_class_adds_the_profiles_mean_minus_that_of_one_steering_for_all() -> None:
    torch.manual_seed(0)
    classes = torch.arange(90) % 3
    one, *under = (Outcome(torch.randn(90, 3), torch.rand(90, 1, 2) > 0.5, torch.ones(90, 1, 2), 2) for _ in range(4))
    macs, profiles = Macs(10, (1,)), {(c,): outcome for c, outcome in enumerate(under)}
    found = class_knowledge(Split(torch.zeros(90), classes), profiles, {"one": one}, macs)["one"]
    for metric in MARGINS:
        pairs = [
            [getattr(effect(o, classes, target, macs), metric) for o in (profiles[target], one)] for target in profiles
        ]
        mean_profile, mean_one = np.mean(pairs, 0)
        assert found[metric] == pytest.approx(mean_one, abs=1e-5)
        adds = found["adds"][metric]
        assert adds["change"] == pytest.approx(mean_profile - mean_one, abs=1e-5)
        assert adds["interval"][0] < adds["change"] < adds["interval"][1]
    assert found["head_usage"] == pytest.approx(one.head_gate.double().mean().item(), abs=1e-5)
    same = class_knowledge(Split(torch.zeros(90), classes), dict.fromkeys(profiles, one), {"one": one}, macs)["one"]
    assert all(value == {"change": 0.0, "interval": [0.0, 0.0]} for value in same["adds"].values())


@settings(max_examples=50)
@given(heads=st.integers(1, 6), blocks=st.integers(1, 5), usage=st.floats(0, 1), seed=st.integers(0, 99))
def test_random_units_reach_the_usage_to_within_one_unit(heads: int, blocks: int, usage: float, seed: int) -> None:
    of_heads, of_both = Macs(1, (5,) * blocks), Macs(1, (5,) * blocks, (30,) * (blocks - 1) + (1,), 2)
    logit = torch.zeros(1, heads)
    kept = random_units(of_heads, heads, usage, [seed]).decide
    assert sum(kept(site, logit).sum().item() for site in range(blocks)) == round(usage * blocks * heads)
    decide = random_units(of_both, heads, usage, [seed]).decide
    gate = torch.stack([decide(site, torch.zeros(1, heads + 2)) for site in range(blocks)], 1)
    largest = of_both.weights(heads).max().item()
    assert of_both.usage(gate.double()).item() == pytest.approx(usage, abs=largest / 2 + 1e-9)


def test_one_learned_bias_is_scaled_down_to_the_compared_usage() -> None:
    """Gate logits 4 tanh(bias / 4) of 1.85, 2.54 and 3.39, by head: which bias leaves half of them open?"""
    torch.manual_seed(0)
    spec = ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,))
    model = GatedVit(create_vit(VitSettings(dim=24, depth=2, heads=3), spec, 4), (1,), spec).eval()
    model.gates[0].linear.bias.data = torch.tensor([2.0, 3.0, 5.0])
    split = Split(torch.randint(256, (8, 28, 28, 1), dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    rival = matched(model, count(model), split, 0.5, lambda factor: logit_bias(-10 * factor * torch.ones(1, 3)))
    assert rival.decide(0, torch.tensor([[2.44, 2.64, 2.64]])).tolist() == [[0.0, 1.0, 1.0]]


def test_rivals_are_compared_with_the_profile_image_by_image() -> None:
    """Two classes of four images; the rival gets 1 + 2 of them right, the profile 3 + 2, no steering 2 + 2."""
    by_hand = dict.fromkeys(Effect.__dataclass_fields__, 0.5)

    def measured(right: str, recall: float) -> Measured:
        return Measured(Effect(**{**by_hand, "recall": recall}), np.array(list(right), np.float64))

    first = {"no steering": measured("1100", 0.5), "profile": measured("1110", 0.75), "rival": measured("0010", 0.25)}
    second = {"no steering": measured("1100", 0.5), "profile": measured("1100", 0.5), "rival": measured("0011", 0.5)}
    found = compare([first, second])["rival"]
    assert found["recall"] == pytest.approx(-0.125)  # mean of -0.25 and 0
    assert found["worst_recall"] == -0.25
    assert found["against_profile"]["recall"] == pytest.approx(3 / 8 - 5 / 8)
    assert found["against_profile"]["p"] == pytest.approx(2 * (1 + 6 + 15) / 64)  # 2 gained, 4 lost
    assert compare([first, second])["profile"]["against_profile"]["p"] == 1.0


def test_a_mean_of_draws_is_tested_by_the_signs_of_the_images() -> None:
    """Six images are 0.4 worse, one is 0.6 better: 1.8 in total. How many of the 128 choices of signs are as far
    off?"""
    profile, rival = np.array([1.0] * 6 + [0.0]), np.array([0.6] * 6 + [0.6])
    sums = [sum(signs) for signs in itertools.product(*([(0.4, -0.4)] * 6), (0.6, -0.6))]
    expected = sum(abs(total) >= 1.8 - 1e-9 for total in sums) / len(sums)
    assert significance.paired(profile, rival) == pytest.approx(expected)
    assert significance.paired(profile, profile) == 1.0
    assert significance.paired(np.array([1.0, 0.0]), np.array([0.5, 0.0])) == 1.0, "one image, and either sign"
    assert significance.paired(profile, 1 - profile) == significance.mcnemar(profile > 0, profile == 0)


def test_shift_terms_ignore_the_image_and_scale_terms_need_an_active_latent() -> None:
    torch.manual_seed(0)
    sae = Sae(1, 6, 8).requires_grad_(False)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    terms = {0: (SteeringTerm(1, -2.0, 3.0), SteeringTerm(4, 0.5, 1.0))}
    residual = torch.randn(40, 8)
    z = sae.encode(0, residual)[:, [1, 4]]
    shift, scale = (steered_by(sae, part(terms)) for part in (shift_alone, scale_alone))
    assert shift is not None
    assert scale is not None
    decoder = sae.decoder[0]
    torch.testing.assert_close(shift(0, residual) - residual, (3 * decoder[1] + decoder[4]).expand(40, 8))
    expected = z @ torch.stack([-3 * decoder[1], -0.5 * decoder[4]])
    torch.testing.assert_close(scale(0, residual) - residual, expected)
    silent = (z == 0).all(1)
    assert 0 < silent.sum() < 40
    assert torch.equal(scale(0, residual)[silent], residual[silent])


def test_variants_are_compared_under_the_images_class_and_under_every_class() -> None:
    """Three classes of 4, 4 and 12 images; the profile of class c keeps 1, 2 or all 3 heads of every image."""
    torch.manual_seed(2)
    spec = ImageSpec(16, 16, 1, 16, "bicubic", (0.3,), (0.4,))
    model = GatedVit(create_vit(VitSettings(dim=24, depth=2, heads=3), spec, 3), (1,), spec).eval()
    for parameter in model.vit.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter)
    classes = torch.tensor([0] * 4 + [1] * 4 + [2] * 12)
    split = Split(torch.randint(256, (20, 16, 16, 1), dtype=torch.uint8), classes)
    profiles = [fixed_units(torch.tensor([[1.0, float(c > 0), float(c > 1)]])) for c in range(3)]
    steerings = {"no steering": [Rival()] * 3, "class profile": profiles, "one bias for all": [profiles[1]] * 3}
    records = compare_variants(model, count(model), split, LABELS, steerings)
    later, (entered,) = from_first_gate(model, [split])
    assert compare_variants(later, count(model), entered, LABELS, steerings) == records
    assert torch.equal(answers(later, entered).logits, answers(model, split).logits)
    own, bias = records["class profile"]["own"], records["one bias for all"]
    assert own["head_usage"] == pytest.approx((4 * 1 + 4 * 2 + 12 * 3) / 60)
    assert bias["own"]["head_usage"] == bias["natural"]["head_usage"] == pytest.approx(2 / 3, abs=1e-5)
    assert records["class profile"]["natural"]["head_usage"] == pytest.approx(2 / 3, abs=1e-5)  # mean of 1/3, 2/3 and 1
    assert bias["against_profile"]["same_gates"] == pytest.approx((4 * 2 + 4 * 3 + 12 * 2) / 60, abs=1e-5)
    right = torch.stack([answers(model, split, None, rival.decide).predicted == classes for rival in profiles]).double()
    assert not (right == right[0]).all()  # the heads matter here
    of_own = torch.cat([right[0, :4], right[1, 4:8], right[2, 8:]])
    assert own["accuracy"] == pytest.approx(of_own.mean().item())
    assert records["class profile"]["natural"]["overall_accuracy"] == pytest.approx(right.mean().item(), abs=1e-5)
    against = bias["against_profile"]
    assert against["own"]["accuracy"] == pytest.approx((right[1] - of_own).mean().item(), abs=1e-5)
    assert against["all"]["accuracy"] == pytest.approx((right[1] - right.mean(0)).mean().item(), abs=1e-5)
    wrong, correct = (outcome((sign * torch.eye(3)[classes]).tolist()) for sign in (-1.0, 1.0))
    lost = _against([wrong] * 3, [correct] * 3, classes)
    assert lost["own"] == lost["all"] == {"accuracy": -1.0, "interval": [-1.0, -1.0]}
    assert [entry["name"] for entry in bias["classes"]] == LABELS
    predicted = answers(model, split).predicted
    kept = torch.tensor([1, 2, 3])[predicted].double().mean().item()
    assert records["profile of predicted class"]["own"]["head_usage"] == pytest.approx(kept / 3, abs=1e-5)
    lines = table(records).splitlines()
    assert len(lines) == 2 + 4 + 1 + 2 + 3 * 3
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("heads", [1, 2])
def test_gate_diagnostics_by_hand(heads: int) -> None:
    """Two heads, or a head and an MLP group."""
    logit = torch.tensor([[[0.05, 2.0]], [[-0.05, -2.0]], [[3.0, -0.5]]])
    found = gate_diagnostics(Outcome(torch.zeros(3, 2), logit > 0, logit, heads), torch.tensor([0, 0, 1]))
    assert found == {"usage": [[[0.5, 0.5]], [[1.0, 0.0]]], "near_threshold": [[0.6667, 0.0]]}


def test_the_slice_holds_as_many_others_as_own_images() -> None:
    classes = torch.tensor([0] * 6 + [1] * 20 + [2] * 20)
    split = Split(torch.zeros(46, 1, 1, 1, dtype=torch.uint8), classes)
    rows = own_and_others(split, (0,), 10, seed=0)
    assert classes[rows].eq(0).sum() == 6
    assert len(rows) == len(set(rows.tolist())) == 12


def test_contexts_are_sets_of_labels() -> None:
    labels = ("a", "b", "c")
    assert targets_of(labels, {"ends": ("a", "c")}) == {"a": (0,), "b": (1,), "c": (2,), "ends": (0, 2)}
    with pytest.raises(RunError, match=r"profiles.contexts\['x'\] names \['d'\]; allowed: one or more of a, b, c"):
        targets_of(labels, {"x": ("a", "d")})
    with pytest.raises(RunError, match=r"profiles\.contexts has 'a', which is a label"):
        targets_of(labels, {"a": ("b",)})
    composed, decomposed = "caf\xe9", "cafe\u0301"
    assert targets_of((composed, "b"), {"drinks": (decomposed, "b")})["drinks"] == (0, 1)
    with pytest.raises(RunError, match=r"profiles\.contexts has 'caf\xe9', which is a label"):
        targets_of((composed, "b"), {decomposed: ("b",)})
    with pytest.raises(RunError, match=r"profiles\.contexts has 'caf\xe9', which is given twice"):
        targets_of(labels, {composed: ("b",), decomposed: ("c",)})
    with pytest.raises(RunError, match=r"profiles\.contexts: name is ''; allowed: a string of 1 to 200 characters"):
        targets_of(labels, {"": ("b",)})
