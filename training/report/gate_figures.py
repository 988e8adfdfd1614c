"""Pictures of gates, latents and training: which heads run, for which class, and how the model came to it."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from training.report.figures import BLUE, GREY, INK, ORANGE, row_height, single_classes, style


def heads(results: Mapping[str, Any]) -> Figure:
    """Class x head: share of the target's images that keep the head, before and after."""
    profiles, blocks = results["profiles"], results["gated_blocks"]
    figure = Figure(figsize=(11.5, row_height(len(profiles), 0.27) * len(profiles) + 1.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, title in zip(
        axes, ("head_usage_before", "head_usage_after"), ("No steering", "The target's own profile"), strict=True
    ):
        rows = np.array([[value for block in profile[key] for value in block] for profile in profiles])
        image = axis.imshow(rows, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        count = len(profiles[0][key][0])
        for index in range(1, len(blocks)):
            axis.axvline(index * count - 0.5, color="white", lw=3)
        axis.set_xticks(range(rows.shape[1]), [str(i % count) for i in range(rows.shape[1])], fontsize=7)
        for index, block in enumerate(blocks):
            axis.text((index + 0.5) * count - 0.5, -0.75, f"block {block}", ha="center", fontsize=8.5, color=INK)
        axis.set_yticks(range(len(profiles)), [profile["name"] for profile in profiles], fontsize=8.5)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(title, fontsize=10, loc="left", pad=20)
        axis.set_xlabel("head of the block", fontsize=8.5)
    figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01).set_label("share of images that keep the head", fontsize=8.5)
    return figure


def usage_per_block(results: Mapping[str, Any]) -> Figure:
    """Head usage of each gated block, without steering and under own profiles: bars are means, dots are classes."""
    blocks, profiles = results["gated_blocks"], single_classes(results["profiles"])
    figure = Figure(figsize=(max(5.0, 1.1 * len(blocks) + 1.5), 3.3), layout="constrained")
    axis = figure.subplots()
    style(axis, "y")
    for offset, key, colour, label in (
        (-0.2, "head_usage_before", GREY, "no steering"),
        (0.2, "head_usage_after", BLUE, "own profile"),
    ):
        usage = np.array([profile[key] for profile in profiles]).mean(2)  # (C, G)
        axis.bar(np.arange(len(blocks)) + offset, usage.mean(0), 0.36, color=colour, alpha=0.4, label=label)
        for index in range(len(blocks)):
            places = index + offset + np.linspace(-0.12, 0.12, len(profiles))
            axis.plot(places, usage[:, index], "o", color=colour, ms=4.5, mec="white", mew=0.6)
    axis.set_xticks(range(len(blocks)), [f"block {block}" for block in blocks])
    axis.set(ylabel="head usage", ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def gates(results: Mapping[str, Any]) -> Figure:
    """Block x head without steering: usage over all classes, how far it differs by class, share near the threshold."""
    diagnostics, blocks = results["diagnostics"], results["gated_blocks"]
    usage = np.array(diagnostics["usage"])  # (C, G, H)
    panels = [
        ("Usage, mean over classes", usage.mean(0), 1.0),
        ("Usage, highest class minus lowest", usage.max(0) - usage.min(0), 1.0),
    ]
    if "near_threshold" in diagnostics:
        near = np.array(diagnostics["near_threshold"])  # (G, H)
        panels.append(("Share of gates with |logit| < 0.1", near, max(0.1, float(near.max()))))
    figure = Figure(figsize=(11.5, 0.42 * len(blocks) + 1.1), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values, top) in zip(axes, panels, strict=True):
        axis.imshow(values, vmin=0, vmax=top, cmap="Blues", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > 0.6 * top else INK
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(values.shape[1]), [f"h{head}" for head in range(values.shape[1])], fontsize=8.5)
        axis.set_yticks(range(len(blocks)), [f"block {block}" for block in blocks], fontsize=8.5)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(title, fontsize=9.5, loc="left")
    return figure


def latents(described: Sequence[dict[str, Any]]) -> Figure:
    """A row a term: its effect on each head's gate logit, and the images that activate it most."""
    terms = [(profile["name"], term) for profile in described for term in profile["terms"]]
    effects = np.array([term["effect"] for _, term in terms])  # (rows, H)
    most = max(max(len(term["images"]) for _, term in terms), 1)
    figure = Figure(figsize=(0.36 * (effects.shape[1] + most) + 3.2, 0.36 * len(terms) + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[effects.shape[1], most])
    top = max(float(np.abs(effects).max()), 1e-6)
    image = left.imshow(effects, cmap="PuOr", vmin=-top, vmax=top, aspect="auto")
    names = [f"{name}: block {term['block']}, latent {term['latent']}" for name, term in terms]
    left.set_yticks(range(len(terms)), names, fontsize=7.5)
    left.set_xticks(range(effects.shape[1]), [f"h{head}" for head in range(effects.shape[1])], fontsize=8)
    left.set_title("change of the gate logits", fontsize=9)
    right.set_title("images that activate the latent most", fontsize=9)
    for row, (_, term) in enumerate(terms):
        for column, shown in enumerate(term["images"]):
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown["png"]))).convert("RGB"))
            extent = (column - 0.46, column + 0.46, row + 0.46, row - 0.46)
            right.imshow(pixels, extent=extent, aspect="equal")
    right.set(xlim=(-0.5, most - 0.5), ylim=(len(terms) - 0.5, -0.5), xticks=[], yticks=[])
    figure.colorbar(image, ax=left, location="bottom", shrink=0.8, pad=0.01).ax.tick_params(labelsize=7.5)
    for axis in (left, right):
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def curves(points: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy and head usage on training batches over all phases, and the usage asked for where points have it."""
    figure = Figure(figsize=(11.5, 3.5), layout="constrained")
    axis = figure.subplots()
    style(axis)
    start, phases = 0, []
    for phase in dict.fromkeys(point["phase"] for point in points):
        of_phase = [point for point in points if point["phase"] == phase]
        steps = [start + point["step"] for point in of_phase]
        for field, colour in (("accuracy", BLUE), ("usage", ORANGE)):
            values = [point[field] for point in of_phase]
            axis.plot(steps, values, color=colour, lw=0.6, alpha=0.35)
            axis.plot(steps, smooth(values), color=colour, lw=1.6)
        targets = [(step, point["target"]) for step, point in zip(steps, of_phase, strict=True) if "target" in point]
        if targets:
            axis.plot(*zip(*targets, strict=True), color=INK, lw=1.1, ls="--")
        axis.axvline(start, color="#bbbbbb", lw=0.8)
        phases.append((start, steps[-1], phase))
        start = steps[-1]
    axis.set(xlabel="step", ylim=(0, 1.04), xlim=(0, max(start, 1)), ylabel="share")
    for first, final, phase in phases:
        wide = final - first > 0.06 * start
        axis.text(
            (first + final) / 2, 1.06, phase, fontsize=8.5, ha="center", color="#555555", rotation=0 if wide else 35
        )
    handles = [
        Line2D([], [], color=BLUE, label="accuracy on augmented batches"),
        Line2D([], [], color=ORANGE, label="head usage"),
    ]
    if any("target" in point for point in points):
        handles.append(Line2D([], [], color=INK, ls="--", label="usage asked for"))
    axis.legend(handles=handles, loc="lower right", fontsize=8.5, framealpha=0.9, edgecolor="none")
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the points around each: no lag, as a running average would have."""
    half = len(values) // 40
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
