"""Measures the dial: compute and accuracy at each budget, without steering and under each profile.

Curves turn budgets into positions as in the server. Their accuracy is that on the selection slice; their compute is the
mean over it and as many training images, because compute needs no labels, and a larger sample is nearer to new images
(on typefaces: six times the designs). Where it is still small, an allowance is added (`allowance`), so that other
images do not exceed a budget by more than TOLERANCE. The same budgets are then requested on the test split; the compute
spent there shows how accurate the dial is.

A profile is measured on its own images: those of its classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from scipy.interpolate import interp1d
from scipy.optimize import isotonic_regression
from scipy.stats import norm
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import Run, RunError
from training.data.pixels import Split
from training.data.splits import Data
from training.dial import FINE, MIN_POINTS, STEEP, Dial, Point, position
from training.evaluation.baselines import random_units
from training.evaluation.criteria import verdict
from training.evaluation.significance import not_below, standard_error, wilson
from training.model.gated_vit import GatedNetwork, Steer
from training.model.inference import Outcome, answers, rounded, steered_by
from training.model.macs import Macs
from training.model.sae import Sae
from training.steering import SteeringProfile

DRAWS = 3
"""Number of draws of random units."""
HELD_OUT, HELD_OUT_UNSTEERED = 2000, 6000
"""Largest numbers of selection images that the curve of a profile, and that without steering, is measured on."""
TOLERANCE = 0.01
"""Compute fraction by which other images may exceed a budget on average."""
CHANCE = 0.001
"""The largest probability of more than that, for as many images as the curve is measured on."""
OVER, UNDER, WIDE = 0.006, 0.015, 0.02
"""Compute fractions. Interpolation between two points at most WIDE apart is right if what is spent is predicted to be
OVER above what is asked for at most, or UNDER below."""
SHARES = np.linspace(0, 1, 2001)
"""Shares of an interval at which compute is predicted."""
PATIENCE = 6
"""Number of rounds after which every other one halves intervals, so that wrong predictions come to an end."""
ALONG = "along"
"""Name of the tensors in a run folder: the Along of its model."""
UNSTEERED = ""
"""The name of the curve without steering."""


@dataclass(frozen=True)
class Steered:
    """The steering and the images that a curve is measured with."""

    name: str
    steer: Steer | None
    classes: tuple[int, ...]
    """The classes whose images are measured."""


@dataclass(frozen=True)
class Along:
    """The answers of a dial for each image, along the mean compute."""

    spent: np.ndarray
    """(P,): mean compute fraction at each position."""
    right: np.ndarray
    """(P, B): 1 where the image gets its label."""
    clusters: np.ndarray | None = None
    """(B,): as in Split."""

    def write(self, run: Run) -> None:
        """Store it in the run folder."""
        tensors = {"spent": torch.from_numpy(self.spent), "right": torch.from_numpy(self.right > 0)}
        run.write_tensors(ALONG, tensors)

    @classmethod
    def read(cls, run: Run, split: Split) -> "Along":
        """What `write` stored. split: the images. Raises RunError when it is missing."""
        stored = run.read_tensors(ALONG)
        if stored is None:
            raise RunError(f"{run.folder / ALONG}.safetensors is missing: remove results.json, then all is measured")
        return cls(stored.tensors["spent"].numpy(), stored.tensors["right"].double().numpy(), split.clusters)

    def at(self, compute: np.ndarray | float) -> np.ndarray:
        """(*compute.shape, B): `right` at these compute fractions, interpolated between points. Raises ValueError
        outside what the dial spends."""
        spent, first = np.unique(np.maximum.accumulate(self.spent), return_index=True)
        right: np.ndarray = interp1d(spent, self.right[first], axis=0)(compute)
        return right

    def area(self, low: float, high: float) -> np.ndarray:
        """(B,): the mean of `right` over compute from low to high, interpolated between points. Its mean over the
        images is the mean accuracy along the dial: the area under the curve divided by its width."""
        between = self.spent[(self.spent > low) & (self.spent < high)]
        places = np.unique(np.concatenate([[low, high], between]))
        area: np.ndarray = np.trapezoid(self.at(places), places, axis=0) / (high - low)
        return area


def measure_dial(
    dial: Dial,
    model: GatedNetwork,
    sae: Sae,
    profiles: Sequence[SteeringProfile],
    data: Data,
    macs: Macs,
    seed: int,
) -> tuple[dict[str, Any], Along]:
    """The measurements for results.json, and the correct answers along the dial without steering.

    `dials`: the curves, by profile. `dial`: compute and accuracy on the test split at the same budgets, the same with
    random units, the largest distance between requested and spent compute, and how far budgets under profiles were
    exceeded.
    """
    steered = [Steered(p.name, steered_by(sae, p.terms), tuple(map(data.labels.index, p.classes))) for p in profiles]
    budgets = budgets_of(dial)
    unsteered = measure_unsteered(dial, model, data, macs, seed)
    curves, tested = {UNSTEERED: unsteered.curve}, {UNSTEERED: unsteered.tested}
    for of in tqdm(steered, desc="evaluate: dial", unit="curve", dynamic_ncols=True):
        selection, train, own = (of_classes(split, of.classes) for split in (data.selection, data.train, data.test))
        held_out = some(selection, HELD_OUT, seed)
        points = curves[of.name] = calibrated(budgets, dial, model, of.steer, held_out, train, macs, seed)
        reached = [b for b in budgets if points[0].compute_fraction <= b <= points[-1].compute_fraction]
        outcomes = at_positions(dial, model, own, of.steer, [position(budget, points) for budget in reached])
        tested[of.name] = [asked(b, o, own, macs) for b, o in zip(reached, outcomes, strict=True)]
    chosen = budgets[:-1:2]
    by_chance = [random_order(float(b), model, data.test, macs, seed) for b in chosen]
    error = {n: max(abs(p["compute_fraction"] - p["budget"]) for p in points) for n, points in tested.items()}
    largest = {name: round(value, 5) for name, value in error.items()}
    dial_of_test = {"test": tested, "random": by_chance, "largest_error": largest}
    if steered:
        excess = [p["compute_fraction"] - p["budget"] for of in steered for p in tested[of.name]]
        over = [value for value in excess if value > TOLERANCE]
        dial_of_test["exceeded"] = {"budgets": len(excess), "over": len(over), "most": round(max(excess), 5)}
    return {
        "dials": {name: [asdict(point) for point in points] for name, points in curves.items()},
        "dial": dial_of_test,
    }, unsteered.along


@dataclass(frozen=True)
class Unsteered:
    """The measurements of a dial without steering."""

    curve: list[Point]
    """The curve of `calibrated`."""
    tested: list[dict[str, Any]]
    """Compute and accuracy on the test split at the budgets of the curve."""
    along: Along


def budgets_of(dial: Dial) -> np.ndarray:
    """The budgets at which a dial is measured: MIN_POINTS of them, evenly spread."""
    return np.maximum(np.linspace(dial.lowest, 1, MIN_POINTS).round(4), dial.lowest)


def measure_unsteered(knots: Dial, model: GatedNetwork, data: Data, macs: Macs, seed: int) -> Unsteered:
    """Measure the dial of a model without steering."""
    budgets, test = budgets_of(knots), data.test
    held_out = some(data.selection, HELD_OUT_UNSTEERED, seed)
    points = calibrated(budgets, knots, model, None, held_out, data.train, macs, seed)
    outcomes = at_positions(knots, model, test, None, [position(budget, points) for budget in budgets])
    tested = [asked(b, o, test, macs) for b, o in zip(budgets, outcomes, strict=True)]
    spent = np.array([float(outcome.compute_fraction(macs).mean()) for outcome in outcomes])
    right = np.array([(outcome.predicted == test.classes).numpy() for outcome in outcomes], float)
    return Unsteered(points, tested, Along(spent, right, test.clusters))


def compare_areas(one: Along, other: Along) -> tuple[dict[str, float], np.ndarray]:
    """Compares the mean accuracy of two dials over the compute that both reach, on the same images.

    Returns the difference, its standard error, and the p-value of a difference of 0 or less (one-sided, paired over the
    images); and the difference of each image (B,).
    """
    low, high = max(one.spent[0], other.spent[0]), min(one.spent[-1], other.spent[-1])
    values = one.area(low, high) - other.area(low, high)
    return {"from": round(low, 6), "to": round(high, 6), **_compared(values, 0, one.clusters)}, values


def compare_at(compute: float, dial: Along, right: np.ndarray, margin: float) -> tuple[dict[str, Any], np.ndarray]:
    """Compares the accuracy of a dial with that of a model of this compute fraction, on the same images.

    right (B,): whether the model gives an image its label. Returns the difference, its standard error, the p-value of a
    loss of `margin` or more (one-sided, paired over the images), and the verdict; and the difference of each image
    (B,). Raises ValueError for a compute fraction outside what the dial spends.
    """
    values = dial.at(compute) - right
    found = _compared(values, margin, dial.clusters)
    return {"margin": margin, **found, "verdict": verdict(found["difference"], found["p"], margin)}, values


def _compared(values: np.ndarray, margin: float, clusters: np.ndarray | None) -> dict[str, float]:
    """The mean of the differences (B,) of images, its standard error, and the p-value of a loss of `margin` or more."""
    error, p = standard_error(values, clusters), not_below(values, margin, clusters)
    numbers = {"difference": values.mean(), "standard_error": error, "p": p}
    return {name: round(float(value), 6) + 0.0 for name, value in numbers.items()}


def random_order(budget: float, model: GatedNetwork, split: Split, macs: Macs, seed: int) -> dict[str, Any]:
    """Random units that spend the budget, the same for all images; mean of DRAWS."""
    units = model.heads * sum(macs.per_head) + macs.mlp_groups * sum(macs.per_mlp_group)
    usage = max(0.0, 1 - (1 - budget) * macs.dense / units)
    draws = [
        answers(model, split, decide=random_units(macs, model.heads, usage, (seed, draw)).decide)
        for draw in range(DRAWS)
    ]
    measured = [asked(budget, outcome, split, macs) for outcome in draws]
    means = {key: round(float(np.mean([m[key] for m in measured])), 5) for key in ("compute_fraction", "accuracy")}
    return {"budget": measured[0]["budget"], "images": len(split), **means}


def of_classes(split: Split, classes: tuple[int, ...]) -> Split:
    """The images of these classes."""
    return split.take(torch.isin(split.classes, torch.tensor(classes)).nonzero()[:, 0])


def some(split: Split, most: int, seed: int) -> Split:
    """At most this many random images of the split."""
    return split.take(torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:most])


def at_positions(
    dial: Dial, model: GatedNetwork, split: Split, steer: Steer | None, positions: Sequence[float] | np.ndarray
) -> list[Outcome]:
    """The outcome at each position of the dial."""
    biases = torch.from_numpy(dial.at(np.asarray(positions, np.float64))).to(model.device)
    return [answers(model, split, steer, gate_bias=bias) for bias in biases]


def calibrated(
    budgets: Sequence[float] | np.ndarray,
    dial: Dial,
    model: GatedNetwork,
    steer: Steer | None,
    selection: Split,
    train: Split,
    macs: Macs,
    seed: int,
) -> list[Point]:
    """The fine_curve of these selection images and as many random training images (fewer if there are fewer), from the
    positions `budgets` and the knots on: gate biases change evenly between two knots."""
    splits = selection, some(train, len(selection), seed)
    with tqdm(desc="evaluate: curve", unit="position", mininterval=5, dynamic_ncols=True, leave=False) as bar:

        def at(positions: Sequence[float] | np.ndarray) -> list[Outcome]:
            outcomes = []
            for place in positions:
                held_out, more = (at_positions(dial, model, split, steer, [place])[0] for split in splits)
                outcomes.append(held_out.joined(more))
                bar.update()
            return outcomes

        return fine_curve(np.union1d(budgets, dial.budget), at, selection.classes, macs, _clusters(*splits))


def _clusters(selection: Split, train: Split) -> np.ndarray | None:
    """Split.clusters of the images of both splits, in this order; training images of unknown designs count as
    independent."""
    held_out, drawn = selection.clusters, train.clusters
    if held_out is None:
        return None
    return np.concatenate([held_out, held_out.max() + 1 + (np.arange(len(train)) if drawn is None else drawn)])


def fine_curve(
    positions: Sequence[float] | np.ndarray,
    at: Callable[[Sequence[float] | np.ndarray], list[Outcome]],
    classes: Tensor,
    macs: Macs,
    clusters: np.ndarray | None = None,
) -> list[Point]:
    """`curve` through these positions and as many more as it takes: until interpolation is right between any two, or
    until they are the sides of a jump, for units that are closed for almost every image open at about the same
    position. at: returns the outcomes at positions."""
    measured: dict[float, Outcome] = {}
    new = [round(float(place), 6) for place in positions]  # as in points
    for turn in count():
        measured |= zip(new, at(new), strict=True)
        places = sorted(measured)
        points = curve(places, [measured[place] for place in places], classes, macs, clusters)
        missing: set[float] = set()
        for low, high in pairwise(points):
            if high.compute_fraction - low.compute_fraction > FINE and high.budget - low.budget > FINE / STEEP:
                path = predicted(measured[low.budget], measured[high.budget], macs)
                missing.update(_missing(low, high, path, halve=turn > PATIENCE and turn % 2 == 0))
        new = sorted(missing - measured.keys())
        if not new:
            break
    return points


def predicted(start: Outcome, end: Outcome, macs: Macs) -> np.ndarray:
    """How much of the rise in mean compute from start to end is reached at SHARES of the way between their positions,
    0 to 1, if gate logits change evenly; between two knots they do, but for the effect of units of earlier blocks.
    Returns float64, one value for each of SHARES."""
    low, high = start.gate_logit.double(), end.gate_logit.double()
    opened = end.gate.double() - start.gate.double()
    changed = opened != 0
    crossing = -low[changed] / (high[changed] - low[changed])
    costs = (opened * macs.costs(start.heads))[changed]
    spent, _ = np.histogram(crossing.numpy(), SHARES, weights=costs.numpy())
    path = np.maximum.accumulate(np.concatenate([[0.0], spent.cumsum()]))
    return path / path[-1] if path[-1] > 0 else SHARES


def _missing(low: Point, high: Point, path: np.ndarray, *, halve: bool) -> list[float]:
    """The positions to measure between two points: none if interpolation is right there; where half of the rise is
    reached; or both sides of a jump. path: as predicted. halve: the middle, in place of half of the rise."""
    rise, width = high.compute_fraction - low.compute_fraction, high.budget - low.budget
    above = rise * (path - SHARES)
    if rise <= min(WIDE, STEEP * width) and above.max() <= OVER and above.min() >= -UNDER:
        return []
    middle = 0.5 if halve else SHARES[np.searchsorted(path, 0.5)]
    around = middle + np.array([-0.45, 0.45]) * FINE / STEEP / width
    jump = rise * np.ptp(np.interp(around, SHARES, path)) > FINE
    shares = np.clip(around if jump else [middle], 0.02, 0.98)
    return [round(low.budget + float(share) * width, 6) for share in shares]


def curve(
    budgets: Sequence[float] | np.ndarray,
    outcomes: Sequence[Outcome],
    classes: Tensor,
    macs: Macs,
    clusters: np.ndarray | None = None,
) -> list[Point]:
    """The curve with one point per position: the mean compute of all images and its allowance, or that of a lower
    position if it is higher, because budgets are bounds; and the accuracy on the first images, whose classes are given,
    made monotone. clusters: of all images, as in Split."""
    each = [outcome.compute_fraction(macs).numpy() for outcome in outcomes]
    bounds = [of_images.mean() + allowance(of_images, clusters) for of_images in each]
    spent = np.maximum.accumulate(bounds).clip(max=1)
    held_out = [outcome.predicted[: len(classes)] for outcome in outcomes]
    right = np.array([float((predicted == classes).double().mean()) for predicted in held_out])
    rising = zip(spent, isotonic_regression(right).x, right, strict=True)
    return [
        Point(*(round(float(value), 6) for value in (budget, *values)))
        for budget, values in zip(budgets, rising, strict=True)
    ]


def allowance(spent: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """What to add to the mean of spent (B,) so that the mean of as many new images exceeds it by more than TOLERANCE
    with a probability of CHANCE at most, by the normal approximation; 0 where the sample is large, and for a single
    image or cluster, of which nothing is known. clusters (B,): as in Split."""
    error = standard_error(spent, clusters) * math.sqrt(2)  # of the difference of two such means
    return max(0.0, float(norm.isf(CHANCE)) * error - TOLERANCE) if math.isfinite(error) else 0.0


def asked(budget: float, outcome: Outcome, split: Split, macs: Macs) -> dict[str, Any]:
    """Compute and accuracy at a budget, overall and by class; also MLP usage if MLPs have gates."""
    classes, spent = split.classes, outcome.compute_fraction(macs)
    right = outcome.predicted == classes
    low, high = wilson(right.numpy(), split.clusters)
    of_class: Mapping[int, Tensor] = {int(index): classes == index for index in classes.unique()}
    return {
        "budget": round(float(budget), 6),
        "compute_fraction": round(float(spent.mean()), 5),
        "accuracy": round(float(right.double().mean()), 5),
        "accuracy_interval": [round(low, 5), round(high, 5)],
        "images": len(classes),
        "head_usage": round(float(outcome.head_gate.double().mean()), 5),
        **({"mlp_usage": round(float(outcome.mlp_gate.double().mean()), 5)} if outcome.mlp_gate.shape[2] else {}),
        "classes": list(of_class),
        "compute_of_classes": rounded(torch.stack([spent[own].mean() for own in of_class.values()])),
        "accuracy_of_classes": rounded(torch.stack([right[own].double().mean() for own in of_class.values()])),
    }
