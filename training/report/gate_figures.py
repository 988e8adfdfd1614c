"""Pictures of gates, latents and training: which units run for which class, and how the model learned it."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from training.report.figures import BLUE, GREY, INK, ORANGE, row_height, single_classes, style

HEADS, GROUPS = "Blues", "Oranges"
"""Colour maps of the two kinds of units."""


def heads(results: Mapping[str, Any]) -> Figure:
    """Class x unit: share of the target's images for which the unit is open, before and after. In each block, heads
    come first, then MLP groups."""
    profiles, blocks, names = results["profiles"], results["gated_blocks"], unit_names(results)
    count, with_groups = len(names), names[-1].startswith("m")
    height = row_height(len(profiles), 0.27) * len(profiles) + 1.2
    figure = Figure(figsize=(11.5, height * (1 + with_groups)), layout="constrained")
    axes = figure.subplots(2, 1) if with_groups else figure.subplots(1, 2, sharey=True)
    for axis, when, title in zip(axes, ("before", "after"), ("No steering", "The target's own profile"), strict=True):
        rows = np.array([[value for block in per_unit(profile, when) for value in block] for profile in profiles])
        images = heat_map(axis, rows, names * len(blocks))
        for index in range(1, len(blocks)):
            axis.axvline(index * count - 0.5, color="white", lw=8 if with_groups else 3)
        axis.set_xticks(range(rows.shape[1]), [name[1:] for name in names * len(blocks)], fontsize=7)
        for index, block in enumerate(blocks):
            axis.text((index + 0.5) * count - 0.5, -0.75, f"block {block}", ha="center", fontsize=8.5, color=INK)
        axis.set_yticks(range(len(profiles)), [profile["name"] for profile in profiles], fontsize=8.5)
        axis.set_title(title, fontsize=10, loc="left", pad=20)
        axis.set_xlabel(
            "head (blue), then MLP group (orange) of the block" if with_groups else "head of the block", fontsize=8.5
        )
    for image, unit in reversed([*zip(images, ("head", "MLP group"), strict=False)]):  # each is left of the last
        bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01)
        bar.set_label(f"share of images that keep the {unit}", fontsize=8.5)
    return figure


def unit_names(results: Mapping[str, Any]) -> list[str]:
    """The names of a block's units: h0, h1, ... for its heads, then m0, m1, ... for its MLP groups."""
    profile = results["profiles"][0]
    groups = profile.get("mlp_usage_before", [[]])[0]
    return [f"h{head}" for head in range(len(profile["head_usage_before"][0]))] + [f"m{m}" for m in range(len(groups))]


def per_unit(profile: Mapping[str, Any], when: str) -> list[list[float]]:
    """Share of the target's images for which each unit is open (G, U), before or after steering."""
    of_heads = profile[f"head_usage_{when}"]
    groups = profile.get(f"mlp_usage_{when}", [[]] * len(of_heads))
    return [[*heads, *of_groups] for heads, of_groups in zip(of_heads, groups, strict=True)]


def heat_map(axis: Any, values: np.ndarray, names: Sequence[str], top: float = 1.0) -> list[Any]:
    """Draw values (rows, columns) from 0 to `top`. names: of the columns, h... for heads and m... for MLP groups, which
    have different colours and a gap between them. Returns the image of the heads and, if there are any, that of the
    groups."""
    is_group = np.array([name.startswith("m") for name in names])
    images = []
    for shown, colours in ((~is_group, HEADS), (is_group, GROUPS)):
        if shown.any():
            masked = np.ma.masked_array(values, np.broadcast_to(~shown, values.shape))
            images.append(axis.imshow(masked, vmin=0, vmax=top, cmap=colours, aspect="auto"))
    for first in np.flatnonzero(is_group[1:] & ~is_group[:-1]):
        axis.axvline(first + 0.5, color="white", lw=1.5)
    axis.set_xticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return images


def usage_per_block(results: Mapping[str, Any]) -> Figure:
    """Usage of the heads, and of the MLP groups, of each gated block, without steering and under own profiles: bars are
    means, dots are classes."""
    blocks, profiles = results["gated_blocks"], single_classes(results["profiles"])
    kinds = [kind for kind in ("head", "mlp") if f"{kind}_usage_before" in profiles[0]]
    width = max(5.0, 1.1 * len(blocks) + 1.5)
    figure = Figure(figsize=(width, 3.3 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), squeeze=False)[:, 0]
    for axis, kind in zip(axes, kinds, strict=True):
        style(axis, "y")
        for offset, when, colour, label in ((-0.2, "before", GREY, "no steering"), (0.2, "after", BLUE, "own profile")):
            usage = np.array([profile[f"{kind}_usage_{when}"] for profile in profiles]).mean(2)  # (C, G)
            axis.bar(np.arange(len(blocks)) + offset, usage.mean(0), 0.36, color=colour, alpha=0.4, label=label)
            for index in range(len(blocks)):
                places = index + offset + np.linspace(-0.12, 0.12, len(profiles))
                axis.plot(places, usage[:, index], "o", color=colour, ms=4.5, mec="white", mew=0.6)
        axis.set_xticks(range(len(blocks)), [f"block {block}" for block in blocks])
        axis.set(ylabel="head usage" if kind == "head" else "MLP usage", ylim=(0, 1.02))
    figure.legend(handles=axes[0].containers, loc="outside upper center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def gates(results: Mapping[str, Any]) -> Figure:
    """Block x unit without steering: usage over all classes, how far it differs by class, share near the threshold."""
    diagnostics, blocks, names = results["diagnostics"], results["gated_blocks"], unit_names(results)
    usage = np.array(diagnostics["usage"])  # (C, G, U)
    panels = [
        ("Usage, mean over classes", usage.mean(0), 1.0),
        ("Usage, highest class minus lowest", usage.max(0) - usage.min(0), 1.0),
    ]
    if "near_threshold" in diagnostics:
        near = np.array(diagnostics["near_threshold"])  # (G, U)
        panels.append(("Share of gates with |logit| < 0.1", near, max(0.1, float(near.max()))))
    width = max(11.5, 0.4 * len(names) * len(panels))
    figure = Figure(figsize=(width, 0.42 * len(blocks) + 1.1), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values, top) in zip(axes, panels, strict=True):
        heat_map(axis, values, names, top)
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > 0.6 * top else INK
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axis.tick_params(axis="x", labelsize=8.5)
        axis.set_yticks(range(len(blocks)), [f"block {block}" for block in blocks], fontsize=8.5)
        axis.set_title(title, fontsize=9.5, loc="left")
    return figure


def latents(described: Sequence[dict[str, Any]], names: Sequence[str]) -> Figure:
    """A row per term: its effect on each unit's gate logit, and the images that activate its latent most. names:
    unit_names."""
    terms = [(profile["name"], term) for profile in described for term in profile["terms"]]
    effects = np.array([term["effect"] for _, term in terms])  # (rows, U)
    most = max(max(len(term["images"]) for _, term in terms), 1)
    figure = Figure(figsize=(0.36 * (effects.shape[1] + most) + 3.2, 0.36 * len(terms) + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[effects.shape[1], most])
    top = max(float(np.abs(effects).max()), 1e-6)
    image = left.imshow(effects, cmap="PuOr", vmin=-top, vmax=top, aspect="auto")
    of_terms = [f"{name}: block {term['block']}, latent {term['latent']}" for name, term in terms]
    left.set_yticks(range(len(terms)), of_terms, fontsize=7.5)
    left.set_xticks(range(len(names)), names, fontsize=8)
    of_heads = sum(name.startswith("h") for name in names)
    if of_heads < len(names):
        left.axvline(of_heads - 0.5, color=INK, lw=1.2)
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


def curves(points: Sequence[dict[str, Any]], usage: str = "head usage") -> Figure:
    """Accuracy and usage on training batches over all phases, and the requested usage if points have it.

    usage: the name of the usage.
    """
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
        Line2D([], [], color=ORANGE, label=usage),
    ]
    if any("target" in point for point in points):
        handles.append(Line2D([], [], color=INK, ls="--", label="usage target"))
    axis.legend(handles=handles, loc="lower right", fontsize=8.5, framealpha=0.9, edgecolor="none")
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a twentieth of the points: unlike a running average, it has no lag."""
    half = len(values) // 40
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
