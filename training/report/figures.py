"""Pictures of the effect of profiles, from results.json: per class, against other strategies and baselines, over seeds.

The colours of Okabe and Ito, which colour-blind readers can distinguish; kinds also have different markers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression

from training.evaluation.class_agnostic import CLASS_AGNOSTIC
from training.model.inference import usage_of
from training.profiles.strategies import STRATEGIES

BLUE, VERMILION, ORANGE, GREEN, GREY, INK = "#0072b2", "#d55e00", "#e69f00", "#009e73", "#7d838c", "#222222"
KINDS: dict[str, tuple[str, str, str]] = {
    "profile": ("*", VERMILION, "the chosen profiles"),
    "strategy": ("o", BLUE, "steering strategy"),
    "control": ("D", ORANGE, "control: random latents, another's profile"),
    "alike": ("P", GREEN, "one steering for all images, class unknown"),
    "baseline": ("s", GREY, "baseline without latents"),
    "model": ("^", INK, "separately trained model, class unknown"),
}
"""Marker, colour and meaning of each kind of rival."""
FLOOR = -0.08
"""Changes below this are drawn at the edge, with their number, because they would flatten everything else."""


def kind_of(name: str) -> str:
    """The kind of a rival by its name in results.json."""
    if name == "profile":
        return "profile"
    if name in ("random", "another class's profile") or "random latents" in name:
        return "control"
    if name in CLASS_AGNOSTIC:
        return "alike"
    return "strategy" if name in STRATEGIES or name.startswith("learned") else "baseline"


def single_classes(profiles: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The profiles of single classes, which means and tests are taken over."""
    return [profile for profile in profiles if len(profile["classes"]) == 1]


def usage_name(results: Mapping[str, Any]) -> str:
    """The name of the usage that is compared: unit usage, or head usage in a model without MLP groups."""
    return "unit usage" if "unit_usage" in results["neutral"] else "head usage"


def style(axis: Any, grid: str = "both") -> None:
    """Apply the common style of all figures to an axis. grid: x, y or both."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(labelsize=8.5, color="#999999", length=3)
    axis.grid(axis=grid, color="#e6e6e6", lw=0.7)
    axis.set_axisbelow(True)


def rows_of(axis: Any, profiles: Sequence[dict[str, Any]]) -> np.ndarray:
    """Set up an axis with a row per profile from the top, contexts set apart. Returns the heights of the rows."""
    apart = np.array([0.6 if len(profile["classes"]) > 1 else 0.0 for profile in profiles])
    heights: np.ndarray = np.arange(len(profiles)) + apart
    axis.set_yticks(heights, [profile["name"] for profile in profiles])
    axis.set_ylim(heights[-1] + 0.6, -0.6)
    return heights


def arrows(results: Mapping[str, Any]) -> Figure:
    """Before -> after for each profile: usage, recall with Wilson intervals, and the change with its paired
    interval."""
    profiles = results["profiles"]
    figure = Figure(figsize=(11.5, row_height(len(profiles), 0.4) * len(profiles) + 1.3), layout="constrained")
    usage, recall, change = figure.subplots(1, 3, sharey=True, width_ratios=[3, 4, 3])
    for axis in (usage, recall, change):
        style(axis)
        heights = rows_of(axis, profiles)
    for y, p in zip(heights, profiles, strict=True):
        start, end = usage_of(p["before"]), usage_of(p["after"])
        usage.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 1.5})
        usage.plot(start, y, "o", color=GREY, ms=5)
        start, end = p["before"]["recall"], p["after"]["recall"]
        for key, value, offset, colour, marker in (
            ("recall_interval_before", start, -0.17, GREY, "o"),
            ("recall_interval_after", end, 0.17, BLUE, ">" if end >= start else "<"),
        ):
            recall.plot(p[key], [y + offset] * 2, color=colour, lw=1.6, solid_capstyle="butt")
            recall.plot(value, y + offset, marker, color=colour, ms=5.5)
        difference = 100 * (end - start)
        significant = p.get("recall_p_adjusted", 1.0) < 0.05
        colour = VERMILION if end < start else BLUE
        change.plot([100 * v for v in p["recall_change_interval"]], [y, y], color=colour, lw=1.6)
        change.plot(difference, y, "o", color=colour, ms=6, mfc=colour if significant else "white")
    name = usage_name(results)
    usage.set(xlabel=name, xlim=(0, 1.02))
    usage.set_title(f"{name.capitalize()} on the target's images", fontsize=9.5, loc="left")
    recall.set(xlabel="recall")
    recall.set_title("Recall, 95% Wilson intervals", fontsize=9.5, loc="left")
    change.axvline(0, color=INK, lw=0.8)
    change.set(xlabel="points")
    change.set_title("Change of recall, paired 95% interval", fontsize=9.5, loc="left")
    handles = [
        Line2D([], [], marker="o", color=GREY, label="no steering"),
        Line2D([], [], marker=">", color=BLUE, label="own profile"),
        Line2D([], [], marker="o", ls="", color=INK, mfc=INK, label="change with p < 0.05 (Benjamini-Hochberg)"),
        Line2D([], [], marker="o", ls="", color=INK, mfc="white", label="other changes"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def precision(results: Mapping[str, Any]) -> Figure:
    """Changes for each profile: recall, precision, the others' accuracy; and recall by a bias on the logit."""
    profiles = results["profiles"]
    figure = Figure(figsize=(11.5, row_height(len(profiles), 0.36) * len(profiles) + 1.3), layout="constrained")
    axis = figure.subplots()
    style(axis)
    heights = rows_of(axis, profiles)
    for field, marker, colour, label in (
        ("recall", "o", BLUE, "recall"),
        ("precision", "s", ORANGE, "precision"),
        ("others_accuracy", "|", INK, "accuracy of all other images"),
    ):
        values = [100 * (p["after"][field] - p["before"][field]) for p in profiles]
        axis.plot(values, heights, marker, color=colour, ms=9 if marker == "|" else 7, mew=1.8, label=label)
    free = [100 * (p["prior_bias"]["recall"] - p["before"]["recall"]) for p in profiles]
    label = "recall by a bias on the class logit at that precision, no steering"
    axis.plot(free, heights, "D", mfc="white", mec=VERMILION, ms=6, label=label)
    lows = [100 * min(p["after"][f] - p["before"][f] for f in ("recall", "precision")) for p in profiles]
    highs = [100 * max(p["after"][f] - p["before"][f] for f in ("recall", "precision")) for p in profiles]
    axis.hlines(heights, lows, highs, color="#cccccc", lw=1.2, zorder=0)
    axis.axvline(0, color=INK, lw=0.8)
    axis.set(xlabel="change under the profile, points")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def trained_models(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The separately trained controls as rivals: changes against the gated model without steering."""
    singles = single_classes(results["profiles"])
    counts = {p["classes"][0]: p["images"] for p in singles}
    models = []
    for name, model in results.get("controls", {}).items():
        recall = dict(zip(results["labels"], model["recall"], strict=True))
        others, own = [], []
        for p in singles:
            label = p["classes"][0]
            rest = [other for other in counts if other != label]
            right = sum(counts[other] * recall[other] for other in rest)
            others.append(right / max(sum(counts[o] for o in rest), 1) - p["before"]["others_accuracy"])
            own.append(recall[label] - p["before"]["recall"])
        models.append({
            "name": f"{name} model ({model['compute_fraction']:.2f} compute)", "kind": "model",
            "usage": usage_of(model), "recall": float(np.mean(own)), "others_accuracy": float(np.mean(others)),
        })  # fmt: skip
    return models


def frontier(results: Mapping[str, Any]) -> Figure:
    """Mean change of recall, and of the others' accuracy, over mean usage: every strategy, baseline and model."""
    singles = single_classes(results["profiles"])
    points = [
        {"name": name, "kind": kind_of(name), "usage": usage_of(value), **value}
        for name, value in results["rivals"].items()
    ]
    if "profile" not in results["rivals"]:
        usage = float(np.mean([usage_of(p["after"]) for p in singles]))
        points.append({"name": "profile", "kind": "profile", "usage": usage, **results["mean_change"]})
    points += [point for point in trained_models(results) if point["usage"] is not None]
    height = max(3.4, 0.17 * len(points) + 0.5)
    width, total = 11.5, 2 * height + 1.9
    figure = Figure(figsize=(width, total))
    for index, (field, text) in enumerate((
        ("recall", "Recall of the class"),
        ("others_accuracy", "Accuracy of the other images under that profile"),
    )):  # fmt: skip
        bottom = (total - 0.75 - (index + 1) * height - index * 0.75) / total
        axis = figure.add_axes((0.06, bottom, 0.66, height / total))
        style(axis)
        _frontier_panel(axis, points, field, height)
        axis.set_xlabel(f"{usage_name(results)}, mean over the classes")
        axis.set_title(f"{text}: mean change over the classes", fontsize=10, loc="left")
    handles = [
        Line2D([], [], ls="", marker=marker, color=colour, ms=11 if marker == "*" else 7, label=meaning)
        for kind, (marker, colour, meaning) in KINDS.items()
        if any(point["kind"] == kind for point in points)
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.05, 1), ncols=3, frameon=False, fontsize=8.5,
        handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip
    return figure


def _frontier_panel(axis: Any, points: Sequence[dict[str, Any]], field: str, height: float) -> None:
    """Draw a panel, with labels in a column at the right, in the order of their points and at least a line apart."""
    values = np.array([point[field] for point in points])
    shown = np.maximum(values, FLOOR) * 100
    reach = max(shown.max() - shown.min(), 1.0)
    low, high = shown.min() - 0.08 * reach, shown.max() + 0.08 * reach
    axis.set(xlim=(0, 1.03), ylim=(low, high), ylabel="points")
    axis.axhline(0, color="#999999", lw=0.8)
    order = sorted(range(len(points)), key=lambda i: (shown[i], values[i], points[i]["usage"]))
    line = 0.155 / height * (high - low)
    labels = spread(shown[order], line, low, high)
    for i, y in zip(order, labels, strict=True):
        x, (marker, colour, _) = points[i]["usage"], KINDS[points[i]["kind"]]
        sign = {"marker": marker, "color": colour, "mec": "white", "mew": 0.7, "ls": "", "clip_on": False}
        axis.plot(x, shown[i], **sign, ms=15 if marker == "*" else 7.5, zorder=3)
        if values[i] < FLOOR:
            axis.plot(x, low, "v", color=colour, ms=4, clip_on=False, zorder=4)
        axis.plot([x, 1.06], [shown[i], y], color=colour, lw=0.6, alpha=0.4, clip_on=False, zorder=1)
        axis.plot(1.075, y, **sign, ms=11 if marker == "*" else 6)
        axis.text(1.145, y, number(100 * values[i]), fontsize=8.5, va="center", ha="right", color=INK)
        axis.text(1.16, y, points[i]["name"], fontsize=8.5, va="center", color=INK)


def number(value: float) -> str:
    """A number with sign, one decimal and a true minus; 0.0 has no sign."""
    text = f"{value:+.1f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def row_height(rows: int, usual: float) -> float:
    """Inches per row of a picture that has a row per class."""
    return usual if rows <= 40 else min(usual, 0.18)


def spread(ideal: Sequence[float] | np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Positions at least `gap` apart that are nearest (least squares) to the `ideal` ones, which must be rising.

    They are between low and high if that range is wide enough. (Isotonic regression of ideal[i] - i * gap.)
    """
    steps = gap * np.arange(len(ideal))
    shifted = isotonic_regression(np.asarray(ideal, float) - steps).x
    places: np.ndarray = np.clip(shifted, low, max(low, high - gap * (len(ideal) - 1))) + steps
    return places


def last_block(results: Mapping[str, Any]) -> Figure:
    """For each of 20 classes at most, the change of recall over the open heads: the best subset of each size, and the
    profile's arrow."""
    part = results["last_block"]
    profiles = [p for p in single_classes(part["profiles"]) if p["classes"][0] in part.get("oracle", {})][:20]
    columns = min(5, len(profiles))
    rows = -(-len(profiles) // columns)
    figure = Figure(figsize=(11.5, 2.05 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis in axes[len(profiles) :]:
        axis.set_visible(False)
    for axis, p in zip(axes, profiles, strict=False):
        style(axis)
        base = p["before"]["recall"]
        best = part["oracle"][p["classes"][0]]
        change = [100 * max(FLOOR, subset["recall"] - base) for subset in best]
        axis.plot([subset["head_usage"] for subset in best], change, "o-", color=ORANGE, ms=3.5, lw=1)
        end = (p["after"]["head_usage"], 100 * max(FLOOR, p["after"]["recall"] - base))
        start = (p["before"]["head_usage"], 0)
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 1.6})
        axis.plot(*start, "o", color=GREY, ms=5.5)
        axis.axhline(0, color="#999999", lw=0.8)
        axis.set_title(p["name"], fontsize=9)
        axis.set_xlim(-0.04, 1.04)
    figure.supxlabel("head usage of the last block", fontsize=9)
    figure.supylabel("change of recall, points", fontsize=9)
    handles = [
        Line2D([], [], marker="o", color=ORANGE, ms=4, label="best subset of each size (a bound)"),
        Line2D([], [], marker="o", ls="", color=GREY, label="no steering"),
        Line2D([], [], marker=">", color=BLUE, label="own profile"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8.5)
    return figure
