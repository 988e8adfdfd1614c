"""The dial: the gate biases with which a model spends a given share of its compute, and their measured effect.

A knot is a budget and the gate biases that reach it. Biases rise with the budget, unit by unit, so a smaller budget
never opens a unit that a larger one closes; between knots they are interpolated. At the last knot, budget 1, every unit
is open. A steering profile also closes units, so the same biases spend less under it. Each profile therefore has its
own curve, which turns a budget into a position on the dial.

Letters: K knots, G gated blocks, U units of a block (heads, then MLP groups), B images.

Standard library, numpy and pydantic only: the server imports this module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.fields import Number

ALL_OPEN = 8.0
"""A gate bias that opens a unit for every image: gate logits lie within +-GATE_BOUND, which is 4."""
MIN_KNOTS = 7
"""Smallest number of knots of a dial."""
MIN_POINTS = 9
"""Smallest number of points of a curve."""
FINE = 0.01
"""Compute fraction. Points of a curve that are no further apart need none between them."""
STEEP = 100.0
"""Compute fraction per position. Points that are further than FINE apart, with a slope above this, are the sides of a
jump: units open for almost every image at once. A budget in it gets the lower side."""


class DialError(ValueError):
    """A dial, curve or budget is invalid; the message names the field, the value and what is allowed."""


@dataclass(frozen=True)
class Point:
    """The measured effect of one position of the dial."""

    budget: Number
    """The position, on the scale of the budgets of the dial's knots."""
    compute_fraction: Number
    """The budget that selects this position: the mean over the images, with an allowance where they are few. It never
    falls from one point of a curve to the next."""
    accuracy: Number
    """Made monotone by isotonic regression."""
    measured_accuracy: Number
    """The accuracy as measured."""


@dataclass(frozen=True)
class Dial:
    """The knots, from almost all units closed to all units open. Raises DialError when they are invalid."""

    budget: NDArray[np.float64]
    """(K,) rising; the last one is 1."""
    gate_bias: NDArray[np.float32]
    """(K, G, U): no unit's bias falls from one knot to the next."""

    def __post_init__(self) -> None:
        budget, bias = self.budget, self.gate_bias
        _require(budget.ndim == 1 and len(budget) >= MIN_KNOTS, "budget", budget, f"{MIN_KNOTS} knots or more")
        rising = bool(np.isfinite(budget).all() and (np.diff(budget) > 0).all() and budget[0] > 0)
        _require(rising and budget[-1] == 1, "budget", budget, "rising numbers above 0, the last one 1")
        _require(bias.ndim == 3 and len(bias) == len(budget), "gate_bias", bias.shape, "(knots, gated blocks, units)")
        _require(bool(np.isfinite(bias).all()), "gate_bias", "not finite", "finite numbers")
        falls = [tuple(map(int, place)) for place in np.argwhere(np.diff(bias, axis=0) < 0)]
        _require(not falls, "gate_bias", f"falling at (knot, gated block, unit) {falls[:3]}", "no fall between knots")
        _require(bool((bias[-1] >= ALL_OPEN).all()), "gate_bias", bias[-1], f"{ALL_OPEN} or more at budget 1")

    @property
    def lowest(self) -> float:
        """The smallest budget."""
        return float(self.budget[0])

    def at(self, position: NDArray[np.float64]) -> NDArray[np.float32]:
        """The gate biases (B, G, U) at positions (B,). Raises DialError for a position outside the dial."""
        outside = ~((position >= self.lowest) & (position <= 1))  # also true for NaN
        if outside.any():
            raise DialError(f"budget is {position[outside][0]:g}; allowed: from {self.lowest:g} to 1")
        right = np.clip(np.searchsorted(self.budget, position), 1, len(self.budget) - 1)
        left = right - 1
        share = ((position - self.budget[left]) / (self.budget[right] - self.budget[left])).astype(np.float32)
        low, high, share = self.gate_bias[left], self.gate_bias[right], share[:, None, None]
        # exact at both ends
        bias: NDArray[np.float32] = np.where(share == 1, high, low + share * (high - low))
        return bias

    def to_json(self) -> list[dict[str, Any]]:
        """The knots, for from_json."""
        return [
            {"budget": float(budget), "gate_bias": np.round(bias.astype(np.float64), 6).tolist()}
            for budget, bias in zip(self.budget, self.gate_bias, strict=True)
        ]

    @classmethod
    def from_json(cls, knots: Sequence[Mapping[str, Any]]) -> "Dial":
        """The dial that to_json wrote. Raises DialError when the knots are invalid."""
        try:
            budget = np.array([knot["budget"] for knot in knots], np.float64)
            bias = np.array([knot["gate_bias"] for knot in knots], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise DialError(
                f"knots cannot be read ({error}); allowed: a budget and gate_bias of one shape each"
            ) from error
        return cls(budget, bias)


def position(budget: float, curve: Sequence[Point]) -> float:
    """The position on the dial at which a model with this curve spends the budget on average; in a jump, less.

    For a budget below or above the curve: the nearer end. Where several positions cost the same: the most accurate,
    which is the highest.
    """
    spent = np.array([point.compute_fraction for point in curve])
    above = int(np.searchsorted(spent, max(budget, spent[0]), side="right"))
    left, right = above - 1, min(above, len(curve) - 1)
    low, high = curve[left].budget, curve[right].budget
    if spent[right] - spent[left] > max(FINE, STEEP * (high - low)):
        return low
    return float(np.interp(budget, spent[[left, right]], [low, high]))


def check_curve(curve: Sequence[Point], name: str) -> None:
    """Raise DialError unless the points form a curve over the dial: rising budgets, compute that never falls."""
    budgets, spent = [p.budget for p in curve], [p.compute_fraction for p in curve]
    _require(len(curve) >= MIN_POINTS, name, f"{len(curve)} points", f"{MIN_POINTS} or more")
    _require(all(a < b for a, b in pairwise(budgets)), name, budgets, "rising budgets")
    _require(all(a <= b for a, b in pairwise(spent)), name, spent, "compute that never falls")
    _require(all(0 < value <= 1 for value in (*budgets, *spent)), name, spent, "numbers above 0, to 1")


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        shown = value.tolist() if isinstance(value, np.ndarray) else value  # in one line
        raise DialError(f"dial: {field} is {shown}; allowed: {allowed}")
