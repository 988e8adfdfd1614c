"""The frontier of a model with a dial: accuracy against compute, with all controls and rivals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.report.figures import BLUE, GREY, INK, ORANGE, VERMILION, single_classes, style

LINES = {
    "static": (GREY, "--", "s", "a dial whose gates do not look at the image"),
    "heads": (ORANGE, ":", "v", "a dial of heads alone"),
}
"""Colour, dashes, marker and meaning of controls with a dial."""


def frontier(results: Mapping[str, Any]) -> Figure:
    """Accuracy on the test split over mean compute, with 95% intervals (Wilson). Random units that are worse than
    everything else are numbers at the lower edge, so that the rest can be told apart."""
    figure = Figure(figsize=(9.2, 5.6), layout="constrained")
    axis = figure.subplots()
    style(axis)
    controls = results.get("controls", {})
    for name, (colour, dashes, marker, meaning) in LINES.items():
        if points := controls.get(name, {}).get("dial"):
            axis.plot(*_line(points), color=colour, ls=dashes, marker=marker, ms=5, lw=1.6, label=meaning)
    points = results["dial"]["test"][""]
    spent, accuracy = _line(points)
    low, high = np.array([p["accuracy_interval"] for p in points]).T
    axis.fill_between(spent, 100 * low, 100 * high, color=BLUE, alpha=0.15, lw=0)
    axis.plot(spent, accuracy, color=BLUE, marker="o", ms=6, lw=2.2, label="the dial, no steering")
    profiles = _under_profiles(results)
    if profiles:
        axis.plot(
            *_line(profiles), color=VERMILION, marker="*", ms=10, lw=1.4, ls="-.",
            label="the dial, each image under the profile of its class (class known)",
        )  # fmt: skip
    plain = [control for control in controls.values() if "dial" not in control]
    for control in plain:
        ends = 100 * np.array(control["accuracy_interval"])
        axis.plot([control["compute_fraction"]] * 2, ends, color=INK, lw=1.3, zorder=3)
    if plain:
        axis.plot(
            *_line(plain), ls="", marker="D", ms=6.5, color=INK, zorder=4, label="plain ViTs, each trained for its size"
        )
    floor = axis.get_ylim()[0]
    spent_at_random, at_random = _line(results["dial"]["random"])
    axis.plot(spent_at_random, at_random, color=GREY, ls="", marker="x", ms=6, label="the same network, random units")
    axis.set_ylim(bottom=floor)
    for place, value in zip(spent_at_random, at_random, strict=True):
        if value < floor:
            axis.annotate(
                f"x {value:.1f}", (place, floor), (0, 18), textcoords="offset points", ha="center", fontsize=9,
                color=GREY, arrowprops={"arrowstyle": "->", "color": GREY},
            )  # fmt: skip
    axis.set_xlabel("Compute of an image, as a share of the whole network's (mean)")
    axis.set_ylabel("Accuracy on the test split, %")
    axis.set_xlim(max(0.0, min(spent.min(), *[p["compute_fraction"] for p in plain], 1.0) - 0.04), 1.02)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return figure


def _line(points: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p["compute_fraction"] for p in points]), np.array([100 * p["accuracy"] for p in points])


def _under_profiles(results: Mapping[str, Any]) -> list[dict[str, float]]:
    """The mean over the profiles of one class, at budgets that each of them can spend."""
    tested = [results["dial"]["test"][p["name"]] for p in single_classes(results["profiles"])]
    by_budget = [{point["budget"]: point for point in points} for points in tested]
    common = sorted(set.intersection(*map(set, by_budget))) if by_budget else []
    return [
        {key: float(np.mean([points[b][key] for points in by_budget])) for key in ("compute_fraction", "accuracy")}
        for b in common
    ]
