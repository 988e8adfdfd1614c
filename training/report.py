"""Step `report`: results.json and the curves of a run as one self-contained page, report.html, and its pictures."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from training.checkpoint import Run, RunError

PAGE = Path(__file__).with_name("report.html.jinja")
BEFORE, AFTER, WORSE = "#8a8f98", "#1f6fb4", "#c2452d"


def write_report(run: Run) -> None:
    """Reads results.json, vit.json, sae.json and profiles.stage.json; writes report.html and PNG files beside them."""
    path = run.folder / "results.json"
    if not path.is_file():
        raise RunError(f"{path} is missing: run the step 'evaluate' first")
    results = json.loads(path.read_text())
    vit, sae = run.info("vit"), run.info("sae")
    pictures = {
        "effects": effects(results),
        "heads": heads(results),
        "usage": usage_per_block(results),
        "rivals": rivals(results),
        "curves": curves(vit["result"]["curves"]),
    }
    encoded = {}
    for name, figure in pictures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        run.write(f"{name}.png", buffer.getvalue())
        encoded[name] = base64.b64encode(buffer.getvalue()).decode()
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE.read_text())
    classes = [profile for profile in results["profiles"] if "other_profiles" in profile]
    html = page.render(
        r=results,
        sae=sae["result"],
        settings=vit["settings"],
        pictures=encoded,
        free_recall=_mean(p["prior_bias"]["recall"] - p["before"]["recall"] for p in classes),
        other_recall=_mean(p["other_profiles"]["recall"] - p["before"]["recall"] for p in classes),
        other_usage=_mean(p["other_profiles"]["head_usage"] for p in classes),
    )
    run.write("report.html", html.encode())
    print(f"report: {run.folder / 'report.html'}", flush=True)


def effects(results: dict[str, Any]) -> Figure:
    """Per profile, before -> after: recall over head usage, and the change of recall beside that of precision."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=[3, 2], layout="constrained")
    for profile in results["profiles"]:
        before, after = profile["before"], profile["after"]
        colour = AFTER if after["recall"] >= before["recall"] - 0.005 else WORSE
        start, end = (before["head_usage"], before["recall"]), (after["head_usage"], after["recall"])
        left.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 3})
        left.plot(*start, "o", color=BEFORE, markersize=5)
    for name, x, y in _spread(
        [(p["name"], p["before"]["head_usage"], p["before"]["recall"]) for p in results["profiles"]]
    ):
        left.text(x + 0.015, y, name, fontsize=8, color="#333333", va="center")
    left.set(xlabel="head usage on the class's images", ylabel="recall of the class", xlim=(0, 1.05))
    left.set_title("No steering (dot) to the class's profile (arrow head)", fontsize=10)
    left.grid(alpha=0.25)
    names = [profile["name"] for profile in results["profiles"]]
    places = range(len(names))
    for offset, field, colour in ((-0.2, "recall", AFTER), (0.2, "precision", "#e0a030")):
        change = [100 * (p["after"][field] - p["before"][field]) for p in results["profiles"]]
        right.barh([place + offset for place in places], change, 0.38, color=colour, label=field)
    right.set_yticks(list(places), names, fontsize=8)
    right.invert_yaxis()
    right.axvline(0, color="#333333", lw=0.8)
    right.set(xlabel="change under the profile, points")
    right.set_title("Recall never without precision", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    right.grid(axis="x", alpha=0.25)
    return figure


def _spread(labels: Sequence[tuple[str, float, float]], near: float = 0.2) -> list[tuple[str, float, float]]:
    """Labels (text, x, y) moved down where they would lie on one another."""
    heights = [y for _, _, y in labels]
    gap = max(max(heights) - min(heights), 0.02) / 24
    placed: list[tuple[str, float, float]] = []
    for text, x, y in sorted(labels, key=lambda label: -label[2]):
        for _, other_x, other_y in placed:
            if abs(other_x - x) < near and abs(other_y - y) < gap:
                y = other_y - gap
        placed.append((text, x, y))
    return placed


def heads(results: dict[str, Any]) -> Figure:
    """Class x head: share of the class's images that keep the head, before and after."""
    profiles, blocks = results["profiles"], results["gated_blocks"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.36 * len(profiles) + 1.6), sharey=True, layout="constrained")
    for axis, key, title in zip(
        axes, ("head_usage_before", "head_usage_after"), ("No steering", "The class's own profile"), strict=True
    ):
        rows = [[value for block in profile[key] for value in block] for profile in profiles]
        image = axis.imshow(rows, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        count = len(profiles[0][key][0])
        for index in range(1, len(blocks)):
            axis.axvline(index * count - 0.5, color="white", lw=2.5)
        axis.set_xticks([count * i + (count - 1) / 2 for i in range(len(blocks))], [f"block {b}" for b in blocks])
        axis.set_yticks(range(len(profiles)), [profile["name"] for profile in profiles])
        axis.tick_params(length=0, labelsize=9)
        axis.set_title(f"{title} (one column a head)", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of images that keep the head", shrink=0.9)
    return figure


def rivals(results: dict[str, Any]) -> Figure:
    """Strategies and baselines: mean change of recall over mean head usage; up and left is better."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    found = results["rivals"]
    for name, x, y in _spread([(n, v["head_usage"], 100 * v["recall"]) for n, v in found.items()]):
        value = found[name]
        colour = AFTER if name == "learned" else "#333333" if name == "no steering" else BEFORE
        axis.plot(value["head_usage"], 100 * value["recall"], "o", color=colour, markersize=6)
        axis.text(x + 0.008, y, name, fontsize=8, va="center", color=colour)
    axis.axhline(0, color="#bbbbbb", lw=0.8)
    axis.set(xlabel="head usage, mean over classes", ylabel="recall, mean change, points")
    axis.margins(x=0.16)
    axis.grid(alpha=0.25)
    return figure


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / max(len(listed), 1)


def usage_per_block(results: dict[str, Any]) -> Figure:
    """Mean head usage of each gated block, without steering and under the classes' own profiles."""
    blocks = results["gated_blocks"]

    def mean(key: str, index: int) -> float:
        values = [sum(profile[key][index]) / len(profile[key][index]) for profile in results["profiles"]]
        return sum(values) / len(values)

    figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for offset, key, colour, label in (
        (-0.2, "head_usage_before", BEFORE, "no steering"),
        (0.2, "head_usage_after", AFTER, "own profile"),
    ):
        heights = [mean(key, index) for index in range(len(blocks))]
        axis.bar([i + offset for i in range(len(blocks))], heights, 0.38, color=colour, label=label)
    axis.set_xticks(range(len(blocks)), [f"block {block}" for block in blocks])
    axis.set(ylabel="head usage, mean over classes", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=9)
    axis.grid(axis="y", alpha=0.25)
    return figure


def curves(points: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy and head usage on training batches, over all phases."""
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    start = 0
    for phase in dict.fromkeys(point["phase"] for point in points):
        of_phase = [point for point in points if point["phase"] == phase]
        steps = [start + point["step"] for point in of_phase]
        axis.plot(steps, _smooth([p["accuracy"] for p in of_phase]), color=AFTER, lw=1.2)
        axis.plot(steps, _smooth([p["usage"] for p in of_phase]), color="#e0a030", lw=1.2)
        axis.axvline(start, color="#bbbbbb", lw=0.8)
        axis.text(start, 1.02, f" {phase}", fontsize=8, color="#555555")
        start = steps[-1]
    axis.plot([], [], color=AFTER, label="accuracy, augmented batches")
    axis.plot([], [], color="#e0a030", label="head usage")
    axis.set(xlabel="step", ylim=(0, 1.1))
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    axis.grid(alpha=0.25)
    return figure


def _smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else weight * smoothed[-1] + (1 - weight) * value)
    return smoothed
