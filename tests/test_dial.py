"""The dial: biases that rise with the budget, knots that spend their budgets, curves from budgets to positions."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SPEC, STEERED, images, model_of, small

from training.config import Settings, VitSettings
from training.data.pixels import Split
from training.data.splits import Data
from training.data.streams import Batch
from training.dial import ALL_OPEN, FINE, STEEP, Dial, DialError, Point, check_curve, position
from training.evaluation.dial import (
    CHANCE,
    OVER,
    TOLERANCE,
    UNDER,
    Along,
    allowance,
    asked,
    at_positions,
    compare_areas,
    compare_at,
    curve,
    fine_curve,
    measure_dial,
)
from training.model.dial import KNOTS, LOWEST, LearnedDial
from training.model.gated_vit import GatedVit, keep_all, keep_positive
from training.model.inference import Outcome, answers, steered_by
from training.model.macs import Macs, count
from training.steering import SteeringProfile
from training.vit import dial as training

RISING = np.linspace(0.4, 1, 7)


def learned(seed: int, sites: int = 2, units: int = 5, reference: float = 0.5) -> LearnedDial:
    dial = LearnedDial(sites, units, reference)
    torch.nn.init.normal_(dial.step, 1.0, 2.0, generator=torch.Generator().manual_seed(seed))
    return dial


@pytest.fixture(scope="module")
def model() -> GatedVit:
    """A model with random weights and a dial that opens units in random order."""
    steered = model_of(small(), mlp_groups=2)
    steered.model.dial = learned(3).requires_grad_(False)
    return steered.model


@pytest.fixture(scope="module")
def split() -> Split:
    return Split(torch.from_numpy(images(300)), torch.arange(300) % 5)


@given(seed=st.integers(0, 10_000), reference=st.floats(0.1, 0.95))
@settings(max_examples=30)
def test_biases_rise_with_usage_and_are_zero_at_the_reference(seed: int, reference: float) -> None:
    dial = learned(seed, reference=reference)
    usage = torch.rand(20, generator=torch.Generator().manual_seed(seed)).sort().values * (1 - LOWEST) + LOWEST
    assert (dial(usage).diff(dim=0) >= 0).all()
    assert (dial(torch.tensor([reference])) == 0).all()
    assert (dial(torch.ones(1)) == ALL_OPEN).all()
    assert torch.equal(dial(dial.usage), dial.knots())
    assert len(dial.usage) == KNOTS


def test_excess_by_hand() -> None:
    """Three images asked for 0.3, 0.35 and 0.6: the first two are half as near as an image to itself."""
    asked_for, spent = torch.tensor([0.3, 0.35, 0.6]), torch.tensor([0.5, 0.45, 0.9])
    assert training.excess(spent, asked_for).item() == pytest.approx(0.2 * 0.1)
    assert training.excess(torch.tensor([0.2, 0.45, 0.9]), asked_for).item() == pytest.approx(-0.1 * 0.1)
    assert training.excess(spent[:1], asked_for[:1]).item() == 0


def test_excess_does_not_depend_on_the_spread_of_images_with_one_budget() -> None:
    """Their mean is right, but each is 0.2 away: the square of a batch's mean would be 0.04 / 12 on average."""
    generator = torch.Generator().manual_seed(0)
    found = [
        training.excess(0.5 + 0.2 * torch.randn(12, generator=generator), torch.full((12,), 0.5)).item()
        for _ in range(4000)
    ]
    assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / math.sqrt(len(found)))
    assert np.std(found) / math.sqrt(len(found)) < 0.0002


def test_batches_ask_for_every_usage() -> None:
    torch.manual_seed(0)
    usage = training.draw(20_000, torch.device("cpu"))
    assert (usage == 1).double().mean().item() == pytest.approx(training.OPEN_SHARE, abs=0.01)
    assert (usage == usage.new_tensor(LOWEST)).double().mean().item() == pytest.approx(training.LOWEST_SHARE, abs=0.01)
    spread = usage[(usage < 1) & (usage > LOWEST)]
    assert spread.quantile(0.25).item() == pytest.approx(LOWEST + (1 - LOWEST) / 4, abs=0.02)


def test_an_open_image_is_open_under_any_noise() -> None:
    decide = training.open_where(torch.tensor([True, False]), keep_positive)
    assert decide(0, torch.tensor([[-3.0, 2.0], [-3.0, 2.0]])).tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("taught", [False, True], ids=["by its average", "by a teacher"])
def test_the_loss_of_a_batch_by_hand(taught: bool, model: GatedVit, split: Split, tmp_path: Path) -> None:
    """Cross-entropy with every unit open; elsewhere less of it, and the divergence from the average with every unit
    open. If there is a teacher, the divergence from it everywhere. The excess is of images with closed units alone."""
    vit = VitSettings(dial=True, mlp_groups=2, label_smoothing=0, usage_weight=3, distillation_weight=0.5)
    batch, macs = Batch(split.images, split.classes), count(model)
    average, teacher = (model_of(small(), mlp_groups=2).model for _ in range(2))
    for seed, other in enumerate((average, teacher)):
        torch.nn.init.normal_(other.vit.head.weight, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(0)
    requested = training.draw(len(split), torch.device("cpu"))
    torch.manual_seed(0)
    settings = Settings(step="vit", out=tmp_path, bf16=False, vit=vit)  # type: ignore[call-arg]
    loss, record = training.dial_step(model, average, teacher if taught else None, 0.0, settings, batch, macs)

    whole, own_label = requested == 1, (torch.arange(len(split)), split.classes)
    assert 20 < whole.sum() < 80
    logits, out = model(split.images, usage=requested)
    spent = macs.usage(torch.cat([out["head_gate"], out["mlp_gate"]], 2))[~whole]
    answer, opened = logits.log_softmax(1), model(split.images, decide=keep_all)[0].log_softmax(1)

    def divergence(of: GatedVit, answer: torch.Tensor) -> torch.Tensor:
        wanted = of(split.images, decide=keep_all)[0].log_softmax(1)
        return (wanted.exp() * (wanted - answer)).sum(1)

    each = 0.5 * divergence(teacher if taught else average, answer) - training.OTHERS * answer[own_label]
    each[whole] = -opened[own_label][whole] + taught * 0.5 * divergence(teacher, opened)[whole]
    expected = each.mean() + 3 * training.excess(spent, requested[~whole])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert record["error"].item() == pytest.approx((spent - requested[~whole]).mean().item(), rel=1e-5)
    assert record["usage"].item() == pytest.approx((spent.sum() + whole.sum()).item() / len(split), rel=1e-5)


def test_a_batch_of_open_images_alone_has_no_error(
    model: GatedVit, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "draw", lambda images, device: torch.ones(images, device=device))
    vit, batch = VitSettings(dial=True, mlp_groups=2), Batch(split.images[:2], split.classes[:2])
    settings = Settings(step="vit", out=tmp_path, bf16=False, vit=vit)  # type: ignore[call-arg]
    loss, record = training.dial_step(model, model, None, 0.0, settings, batch, count(model))
    assert loss.isfinite()
    assert (record["error"], record["usage"]) == (0, 1)


def test_the_finished_dial_spends_what_its_knots_say(model: GatedVit, split: Split) -> None:
    macs = count(model)
    dial = training.calibrate(model, split, macs)
    outcomes = at_positions(dial, model, split, None, dial.budget)
    spent = np.array([float(outcome.compute_fraction(macs).mean()) for outcome in outcomes])
    # the compute of random weights jumps, and nothing spends a value between
    assert np.median(abs(spent - dial.budget)) < 0.001
    assert np.mean(abs(spent - dial.budget) < 0.005) > 0.7
    plain = answers(model, split, decide=keep_all)
    assert torch.equal(outcomes[-1].logits, plain.logits), "all open is the plain network"
    assert Dial.from_json(dial.to_json()).budget.tolist() == dial.budget.tolist()

    points = curve(dial.budget, outcomes, split.classes, macs)
    check_curve(points, "curve")
    half = position(0.9, points)
    again = asked(0.9, at_positions(dial, model, split, None, [half])[0], split, macs)
    assert again["compute_fraction"] == pytest.approx(0.9, abs=0.01)
    by_class = np.mean(again["compute_of_classes"])  # as many images of each
    assert by_class == pytest.approx(again["compute_fraction"], abs=1e-4)


def test_a_bias_is_the_same_in_the_answers_and_in_the_network(model: GatedVit, split: Split) -> None:
    bias = learned(5)(torch.tensor([0.4]))[0]
    direct = model(split.images, None, keep_positive, bias[None].expand(len(split), -1, -1))[0]
    torch.testing.assert_close(answers(model, split, gate_bias=bias).logits, direct)
    neutral = answers(model, split, gate_bias=torch.zeros_like(bias))
    assert torch.equal(neutral.logits, answers(model, split).logits)


def test_positions_by_hand() -> None:
    bias = np.zeros((7, 1, 2), np.float32)
    bias[:, 0, 0] = [-4, -3, -2, -1, 0, 2, ALL_OPEN]
    bias[:, 0, 1] = [-1, -1, -1, -1, 0, 4, ALL_OPEN]
    dial = Dial(RISING, bias)
    assert dial.at(np.array([0.4, 0.45, 0.9, 1.0])).tolist() == [
        [[-4, -1]], [[-3.5, -1]], [[pytest.approx(2), pytest.approx(4)]], [[8, 8]],
    ]  # fmt: skip
    points = [Point(b, s, 0.5, 0.5) for b, s in zip(RISING, (0.3, 0.4, 0.5, 0.5, 0.6, 0.8, 1.0), strict=True)]
    assert position(0.35, points) == pytest.approx(0.45)
    assert position(0.5, points) == pytest.approx(0.7), "the last position of those that spend as much"
    assert position(0.7, points) == pytest.approx(0.85)
    assert position(0.1, points) == pytest.approx(0.4), "as little as there is"
    assert position(0.405, points) == pytest.approx(0.505)
    jump = [Point(b, s, 0.5, 0.5) for b, s in ((0.4, 0.3), (0.6, 0.5), (0.6001, 0.55), (0.602, 0.555), (1.0, 1.0))]
    assert position(0.548, jump) == position(0.51, jump) == pytest.approx(0.6), "in a jump: its lower side"
    assert position(0.5525, jump) == pytest.approx(0.60105), "steep, but no jump"


@pytest.mark.parametrize(
    ("budget", "message"),
    [(0.39, "budget is 0.39; allowed: from 0.4 to 1"), (1.5, "budget is 1.5;"), (math.nan, "budget is nan;")],
)
def test_what_is_not_on_the_dial_is_refused(budget: float, message: str) -> None:
    dial = Dial(RISING, np.linspace(-8, 8, 7, dtype=np.float32)[:, None, None])
    with pytest.raises(DialError, match=message):
        dial.at(np.array([0.5, budget]))


@pytest.mark.parametrize(
    ("budget", "bias", "message"),
    [
        (RISING[:6], np.zeros(6), "budget is .*; allowed: 7 knots or more"),
        (RISING - 0.1, np.zeros(7), "rising numbers above 0, the last one 1"),
        (RISING, [0, 1, 2, 1, 3, 4, 8], r"falling at \(knot, gated block, unit\) \[\(2, 0, 0\)\]"),
        (RISING, np.linspace(0, 7, 7), "8.0 or more at budget 1"),
        (RISING, [0, 1, 2, np.nan, 8, 8, 8], "gate_bias is not finite; allowed: finite numbers"),
    ],
)
def test_a_broken_dial_is_refused(budget: np.ndarray, bias: np.ndarray, message: str) -> None:
    with pytest.raises(DialError, match=message):
        Dial(budget, np.asarray(bias, np.float32)[:, None, None])


def test_curves_are_made_monotone_and_say_what_was_measured() -> None:
    macs = Macs(100, (10,))
    copies = 5000  # so many that nothing is allowed for new images
    gates = [
        torch.tensor([[[a, b]], [[c, d]]]).repeat(copies, 1, 1)
        for a, b, c, d in ((1, 0, 1, 0), (0, 1, 0, 0), (1, 1, 1, 1))
    ]
    right = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.eye(2)]
    outcomes = [
        Outcome(logits.repeat(copies, 1), gate > 0, gate - 0.5, 2) for logits, gate in zip(right, gates, strict=True)
    ]
    points = curve(np.array([0.8, 0.9, 1.0]), outcomes, torch.zeros(2 * copies, dtype=torch.int64), macs)
    # spent: 0.9, 0.85, 1; correct: 1, 0.5, 0.5
    assert [point.compute_fraction for point in points] == pytest.approx([0.9, 0.9, 1.0])
    assert [point.accuracy for point in points] == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert [point.measured_accuracy for point in points] == [1.0, 0.5, 0.5]


def opening(thresholds: torch.Tensor, bend: float = 0) -> Callable[[Sequence[float] | np.ndarray], list[Outcome]]:
    """Images that open their units, of one block, at these positions (B, U). bend: how far from evenly gate logits
    change."""

    def at(positions: Sequence[float] | np.ndarray) -> list[Outcome]:
        logits = [(place - thresholds) * (1 + bend * math.sin(50 * place)) for place in positions]
        return [Outcome(torch.zeros(len(of), 2), of[:, None] > 0, of[:, None], of.shape[1]) for of in logits]

    return at


IMAGES = 20_000  # so many that nothing is allowed for new ones
CLASSES = torch.zeros(IMAGES, dtype=torch.int64)
NINE = np.linspace(0.4, 1.0, 9)
EVENLY = torch.linspace(0, 1, IMAGES, dtype=torch.double)


def errors(points: list[Point], thresholds: torch.Tensor, budgets: np.ndarray) -> np.ndarray:
    """What is spent above each budget, if units are 0.6 of the compute."""
    places = [position(budget, points) for budget in budgets]
    return np.array([0.4 + 0.6 * float((thresholds < place).double().mean()) for place in places]) - budgets


@pytest.mark.parametrize(
    ("thresholds", "left"),
    [(0.4 + 0.6 * EVENLY**0.1, 0), (0.86 + 0.05 * EVENLY, 0), (0.86 + 0.00001 * EVENLY, 0.6)],
    ids=["a bend", "a slope", "a jump"],
)
def test_every_budget_is_kept_and_only_a_jump_leaves_some_over(thresholds: torch.Tensor, left: float) -> None:
    at, every = opening(thresholds[:, None]), np.linspace(0.4, 1.0, 200)
    coarse = curve(NINE, at(NINE), CLASSES, Macs(1000, (600,)))
    fine = fine_curve(NINE, at, CLASSES, Macs(1000, (600,)))
    check_curve(fine, "fine")
    assert errors(fine, thresholds, every).max() <= OVER + 0.001
    assert errors(fine, thresholds, every).min() == pytest.approx(-left, abs=UNDER)
    assert abs(errors(coarse, thresholds, every)).max() > 0.02
    assert len(fine) < 70


@settings(deadline=None, max_examples=15)
@given(
    sides=st.lists(st.floats(0.4, 0.999), min_size=2, max_size=8, unique=True).map(sorted),
    shares=st.lists(st.floats(0.01, 1), min_size=8, max_size=8),
    bend=st.sampled_from([0, 0.5]),
)
def test_no_curve_is_further_off_than_it_may_be(sides: list[float], shares: list[float], bend: float) -> None:
    """Each stretch between two sides opens the unit for its share of the images."""
    stretches = np.concatenate([[0], np.cumsum(shares[: len(sides) - 1])])
    thresholds = torch.from_numpy(np.interp(EVENLY.numpy() * stretches[-1], stretches, sides))
    seen: list[float] = []

    def at(positions: Sequence[float] | np.ndarray) -> list[Outcome]:
        seen.extend(positions)
        return opening(thresholds[:, None], bend)(positions)

    points = fine_curve(NINE, at, CLASSES, Macs(1000, (600,)))
    assert len(points) == len(seen) == len(set(seen)), "each position is measured once"
    off = errors(points, thresholds, np.linspace(0.4, 1.0, 50))
    assert off.max() <= FINE + bend * OVER
    jumps = [b.compute_fraction - a.compute_fraction for a, b in pairwise(points) if b.budget - a.budget < FINE / STEEP]
    assert off.min() >= -max([UNDER * (1 + bend), *jumps]) - 0.001


def test_jumps_of_all_images_at_once_are_enclosed_at_once() -> None:
    """Gates that do not look at the image: two units of 0.3, which open at 0.7201 and 0.7301."""
    thresholds = torch.tensor([[0.7201, 0.7301]]).repeat(5, 1)
    points = fine_curve(NINE, opening(thresholds), torch.zeros(5, dtype=torch.int64), Macs(1000, (300,)))
    assert sorted({point.compute_fraction for point in points}) == [0.4, 0.7, 1.0]
    assert len(points) <= len(NINE) + 6
    assert errors(points, thresholds, np.array([0.69, 0.71, 0.99])) == pytest.approx([-0.29, -0.01, -0.29])


@pytest.mark.parametrize("groups", [0, 2], ids=["heads", "units"])
def test_units_that_are_opened_one_by_one_spend_what_is_computed(groups: int, split: Split) -> None:
    """An open unit changes later gates. Opened from the last block on, it changes none that is not open already."""
    model = model_of(small(), mlp_groups=groups).model
    macs, bias = count(model), np.full((2, 3 + groups), -0.1, np.float32)
    bias[1] -= 1
    start = answers(model, split, gate_bias=torch.from_numpy(bias))
    budgets, biases = training.opened(start, bias, macs)
    between = (biases[1:] + biases[:-1]) / 2
    outcomes = [answers(model, split, gate_bias=torch.from_numpy(b)) for b in (*biases, *between)]
    spent = [float(outcome.compute_fraction(macs).mean()) for outcome in outcomes]
    assert spent[: len(budgets)] == pytest.approx(budgets.tolist(), abs=1e-5)
    assert len(budgets) > 4
    assert (np.diff(budgets) >= training.STEP - 1e-6).all()
    assert budgets[-1] == 1
    for low, middle, high in zip(budgets[:-1], spent[len(budgets) :], budgets[1:], strict=True):
        assert low - 1e-5 <= middle <= high + 1e-5
    assert (np.diff(biases, axis=0) >= 0).all()
    assert (biases[-1] >= ALL_OPEN).all()
    every = answers(model, split, decide=keep_all)
    assert training.opened(every, bias, macs)[0].tolist() == [1], "nothing is closed"


@pytest.mark.parametrize("copies", [1, 40], ids=["fewer training images", "more"])
def test_curves_are_of_held_out_and_training_images_and_results_of_the_test_split(model: GatedVit, copies: int) -> None:
    """Compute is that of the selection slice and as many training images, accuracy that of the slice alone. The
    training images are one of each class, or copies of these."""
    train, selection, test = (Split(torch.from_numpy(images(n, n)), torch.arange(n) % 5) for n in (5, 60, 40))
    splits = train.take(torch.arange(5).repeat(copies)), selection, test
    data, macs, sae = Data(tuple("abcde"), SPEC, *splits), count(model), model_of(small(), mlp_groups=2).sae
    dial = training.calibrate(model, data.selection, macs)
    profile = SteeringProfile("b", ("b",), "by hand", STEERED)
    results, _ = measure_dial(dial, model, sae, [profile], data, macs, 0)
    assert results["dials"].keys() == results["dial"]["test"].keys() == {"", "b"}
    for name, tested in results["dial"]["test"].items():
        distances = [abs(point["compute_fraction"] - point["budget"]) for point in tested]
        assert results["dial"]["largest_error"][name] == pytest.approx(max(distances), abs=1e-5)
    excess = [point["compute_fraction"] - point["budget"] for point in results["dial"]["test"]["b"]]
    assert results["dial"]["exceeded"] == {
        "budgets": len(excess), "over": int(np.sum(np.array(excess) > TOLERANCE)),
        "most": pytest.approx(max(excess), abs=1e-5),
    }  # fmt: skip
    largest = max(*macs.per_head, *macs.per_mlp_group) / macs.dense
    for point in results["dial"]["random"]:
        assert point["compute_fraction"] == pytest.approx(point["budget"], abs=largest), "to within a unit"

    def measured(split: Split, name: str, positions: Sequence[float]) -> list[Outcome]:
        own = split.take((split.classes == 1).nonzero()[:, 0]) if name else split
        return at_positions(dial, model, own, steered_by(sae, STEERED) if name else None, positions)

    for name, points in results["dials"].items():
        tested = results["dial"]["test"][name]
        held_out, drawn = (measured(of, name, [point["budget"] for point in points]) for of in (selection, train))
        if name:
            each = [
                np.append(own.compute_fraction(macs), [other.compute_fraction(macs)[0]] * min(copies, 12))
                for own, other in zip(held_out, drawn, strict=True)
            ]
            expected = np.maximum.accumulate([spent.mean() + allowance(spent) for spent in each])
            assert [p["compute_fraction"] for p in points] == pytest.approx(np.minimum(expected, 1), abs=1e-6)
        classes = selection.classes[selection.classes == 1] if name else selection.classes
        right = [(outcome.predicted == classes).double().mean().item() for outcome in held_out]
        assert [point["measured_accuracy"] for point in points] == pytest.approx(right, abs=1e-6)
        along = [Point(**point) for point in points]
        outcomes = measured(data.test, name, [position(point["budget"], along) for point in tested])
        spent = [outcome.compute_fraction(macs).mean().item() for outcome in outcomes]
        assert [point["compute_fraction"] for point in tested] == pytest.approx(spent, abs=1e-5)
        assert {point["images"] for point in tested} == {len(outcomes[0].logits)} == {8 if name else 40}


def test_the_allowance_by_hand() -> None:
    """The standard error of 101 images is 0.2 / 10, and that of the difference from as many new ones 0.0283."""
    spent = 0.5 + 0.2 * np.array([-1, 1] * 50 + [0]) * math.sqrt(101 / 100)
    assert allowance(spent) == pytest.approx(3.0902 * 0.0283 - 0.01, abs=1e-4)
    assert allowance(np.tile(spent, 1000)) == 0, "a sample so large that its mean is known"
    assert allowance(np.tile(spent, 1000), np.tile(np.arange(101), 1000)) == pytest.approx(allowance(spent), abs=1e-6)
    assert allowance(spent[:1]) == allowance(spent, np.zeros(101)) == 0, "one image or design says nothing"


@pytest.mark.parametrize("of_design", [1, 8], ids=["independent images", "eight of each design"])
def test_new_images_do_not_exceed_a_budget_by_more_than_the_tolerance(of_design: int) -> None:
    """4,000 pairs of samples: the mean of the second against that of the first and its allowance."""
    draw, designs = np.random.default_rng(0), 300
    clusters = np.repeat(np.arange(designs), of_design)
    samples = draw.choice([0.4, 0.55, 0.9], (4000, 2, designs), p=[0.4, 0.3, 0.3])
    first, second = (samples[:, k].repeat(of_design, axis=1) for k in (0, 1))
    excess = second.mean(1) - first.mean(1)
    allowed = np.array([allowance(of_images, clusters) for of_images in first])
    assert np.mean(excess > TOLERANCE) > 0.2, "without an allowance"
    assert np.mean(excess - allowed > TOLERANCE) < 3 * CHANCE


def test_areas_under_two_dials_by_hand() -> None:
    """From 0.6 on, where both begin: 0.875, 0.875, 1 and 1 of the four images; and 0.5, 0.5, 0.5 and 1."""
    one = Along(np.array([0.4, 0.8, 1.0]), np.array([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], float))
    other = Along(np.array([0.6, 1.0]), np.array([[0, 0, 0, 1], [1, 1, 1, 1]], float))
    assert one.area(0.6, 1.0).tolist() == pytest.approx([0.875, 0.875, 1, 1])
    compared, differences = compare_areas(one, other)
    assert differences.tolist() == pytest.approx([0.375, 0.375, 0.5, 0])
    assert compared == {
        "from": 0.6, "to": 1.0, "difference": 0.3125, "standard_error": 0.108253, "p": 0.001946,
    }  # fmt: skip
    assert compare_areas(other, one)[0]["p"] == pytest.approx(1 - 0.001946)
    assert compare_areas(one, one)[0]["p"] == 1
    model = np.array([1, 0, 0, 1], float)  # the dial has 0.5, 0.5, 1 and 1 there, so 0.25 more, with an error of 0.32
    compared, differences = compare_at(0.6, one, model, 0.005)
    assert differences.tolist() == pytest.approx([-0.5, 0.5, 1, 0])
    assert compared == {
        "margin": 0.005, "difference": 0.25, "standard_error": 0.322749, "p": 0.214738, "verdict": "not shown",
    }  # fmt: skip
    assert compare_at(1.0, one, np.zeros(4), 0.002)[0]["verdict"] == "met"
