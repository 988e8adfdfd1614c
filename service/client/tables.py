"""Answers as text, for the command line: tables, and JSON for programs."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from service.client.unit_map import legend, unit_map
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; all but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def as_dict(message: Message) -> dict[str, Any]:
    """The message with the field names of the proto file, including fields that are 0 or empty. 64-bit integers are
    strings, as in all JSON of protobuf."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def answer_json(names: Sequence[str], answer: Message) -> str:
    """The answer to a call with images as one line of JSON; each image's part has the file name as `image`."""
    content = as_dict(answer)
    for entries in content.values():
        if isinstance(entries, list):
            entries[:] = [{"image": name, **entry} for name, entry in zip(names, entries, strict=True)]
    return json.dumps(content)


def predict_table(names: Sequence[str], answer: pb.PredictResponse, colour: bool = False) -> str:
    """One row per image: its classes, and how many units ran; then the map of units, and the receipt.

    names: of the images, in order. colour: of the map.
    """
    rows = []
    for name, prediction in zip(names, answer.predictions, strict=True):
        best, *others = prediction.classes
        second = ", ".join(f"{other.label} {other.probability:.2f}" for other in others)
        units = [_share_of(prediction.head_mask), f"{prediction.head_usage:.2f}"]
        if prediction.mlp_mask:
            units += [_share_of(prediction.mlp_mask), f"{prediction.mlp_usage:.2f}"]
        compute = f"{prediction.compute_fraction:.3f}"
        rows.append([name, best.label, f"{best.probability:.2f}", second, *units, compute])
    units = ["heads", "usage", *["MLP groups", "usage"] * any(p.mlp_mask for p in answer.predictions)]
    shown = table(["image", "class", "p", "then", *units, "compute"], rows)
    map_ = unit_map([(_steering(answer.receipt), answer.predictions)], colour)
    return f"{shown}\n\n{legend(len(rows))}\n\n{map_}\n\n{_served_by(answer.receipt)}"


def _share_of(mask: Sequence[pb.BlockHeads] | Sequence[pb.BlockMlpGroups]) -> str:
    """The number of units that ran, of all gated ones."""
    return f"{sum(sum(block.kept) for block in mask)}/{sum(len(block.kept) for block in mask)}"


def _steering(receipt: pb.Receipt) -> str:
    return f"profile {receipt.profile}" if receipt.profile else "no profile"


def _served_by(receipt: pb.Receipt) -> str:
    steering = _steering(receipt)
    if receipt.HasField("budget"):
        steering += f", budget {receipt.budget:g} (spent {receipt.compute_fraction:.3f})"
    if receipt.brownout:
        steering += f", lowered to budget {receipt.budget_applied:g}"
    return (
        f"model {receipt.model} version {receipt.version} "
        f"({receipt.graph}, bundle {receipt.bundle_digest}), {steering}, steering {receipt.steering_digest}\n"
        f"queue {receipt.queue_seconds * 1000:.1f} ms, inference {receipt.inference_seconds * 1000:.1f} ms"
    )


def compare_table(names: Sequence[str], answer: pb.CompareResponse, colour: bool = False) -> str:
    """One row per image: label, head usage and compute fraction, unsteered and steered, and +opened -closed units; then
    both maps of units, and the receipt. colour: of the maps."""
    rows = []
    for name, comparison in zip(names, answer.comparisons, strict=True):
        before, after = comparison.unsteered, comparison.steered
        changes = [c.opened for c in comparison.head_changes] + [c.opened for c in comparison.mlp_changes]
        opened = sum(changes)
        labels = [f"{p.classes[0].label} {p.classes[0].probability:.2f}" for p in (before, after)]
        rows.append(
            [
                name, *labels, "" if comparison.same_label else "other",
                f"{before.head_usage:.2f} -> {after.head_usage:.2f}",
                f"{before.compute_fraction:.3f} -> {after.compute_fraction:.3f}",
                f"+{opened} -{len(changes) - opened}",
            ]
        )  # fmt: skip
    shown = table(["image", "unsteered", "steered", "label", "head usage", "compute", "units"], rows)
    sides = [
        ("unsteered", [comparison.unsteered for comparison in answer.comparisons]),
        (f"steered: {_steering(answer.receipt)}", [comparison.steered for comparison in answer.comparisons]),
    ]
    map_ = unit_map(sides, colour)
    return f"{shown}\n\n{legend(len(rows))}\n\n{map_}\n\n{_served_by(answer.receipt)}"


def explain_table(names: Sequence[str], answer: pb.ExplainResponse) -> str:
    """For each image and site: the gates, and the latents with their effect on each gate. Latents that are 0, with and
    without steering, affect none and are only counted."""
    parts = []
    for name, explanation in zip(names, answer.explanations, strict=True):
        best = explanation.prediction.classes[0]
        parts.append(f"{name}: {best.label} {best.probability:.2f}, head usage {explanation.prediction.head_usage:.2f}")
        count = len(explanation.prediction.head_mask[0].kept)
        for site in explanation.sites:
            units = [f"h{index}" if index < count else f"m{index - count}" for index in range(len(site.gate_logits))]
            rows = [
                ["unsteered gate", "", "", *(f"{v:+.2f}" for v in site.unsteered_gate_logits)],
                ["gate", "", "", *(f"{v:+.2f}" for v in site.gate_logits)],
            ]
            shown = [latent for latent in site.latents if latent.value or latent.steered_value]
            for latent in shown:
                changed = f"{latent.steered_value:.2f}" if latent.steered_value != latent.value else ""
                effects = [f"{v:+.2f}" for v in latent.gate_effects]
                rows.append([f"latent {latent.latent}", f"{latent.value:.2f}", changed, *effects])
            hidden = len(site.latents) - len(shown)
            left_out = f"; {hidden} inactive ones left out" if hidden else ""
            parts.append(f"\nsite {site.site} (block {site.block}), {site.active_latents} latents active{left_out}")
            parts.append(table(["", "value", "steered", *units], rows))
        parts.append("")
    return "\n".join(parts).rstrip()


ROWS = 15
"""Largest number of rows of the table of a dial."""
COLUMNS, LINES = 68, 14
"""Size of the plot without its axes; with them it is 78 columns wide."""


def dial_table(curve: Sequence[pb.DialPoint]) -> str:
    """A row for each point of the dial, or for ROWS that are spread over compute: the compute fraction that was
    measured, the accuracy, and the position."""
    rows = [
        [f"{p.compute_fraction:.3f}", f"{p.accuracy:.4f}", f"{p.measured_accuracy:.4f}", f"{p.position:.4f}"]
        for p in (curve[index] for index in spread([p.compute_fraction for p in curve]))
    ]
    note = f"\n{len(rows)} of {len(curve)} points; --json has all" if len(rows) < len(curve) else ""
    return table(["compute", "accuracy", "as measured", "position"], rows) + note


def spread(values: Sequence[float], most: int = ROWS) -> list[int]:
    """The indices of at most this many rising values, evenly spread between the first and the last."""
    if len(values) <= most:
        return list(range(len(values)))
    evenly = np.linspace(values[0], values[-1], most)
    return sorted({int(np.abs(np.array(values) - value).argmin()) for value in evenly})


def dial_plot(curve: Sequence[pb.DialPoint]) -> str:
    """Accuracy against compute: o where it was measured, . between."""
    compute, accuracy = [p.compute_fraction for p in curve], [p.accuracy for p in curve]
    left, right = min(compute), max(compute)
    low, high = min(accuracy), max(accuracy)
    cells = [[" "] * COLUMNS for _ in range(LINES)]

    def put(x: float, y: float, mark: str) -> None:
        column = round((x - left) / ((right - left) or 1) * (COLUMNS - 1))
        line = round((high - y) / ((high - low) or 1) * (LINES - 1))
        cells[line][column] = mark

    for column in range(COLUMNS):
        x = left + column / (COLUMNS - 1) * (right - left)
        put(x, float(np.interp(x, compute, accuracy)), ".")
    for x, y in zip(compute, accuracy, strict=True):
        put(x, y, "o")
    labels = {0: f"{high:.4f}", LINES - 1: f"{low:.4f}"}
    lines = [f"{labels.get(index, ''):>8} |{''.join(line).rstrip()}" for index, line in enumerate(cells)]
    ends = f"{left:.2f}{'compute'.center(COLUMNS - 8)}{right:.2f}"
    return "\n".join(["accuracy", *lines, f"{'':8} +{'-' * COLUMNS}", f"{'':10}{ends}"])


def profiles_table(profiles: Sequence[pb.Profile]) -> str:
    """One row per profile: its terms, and its evaluation before and after."""

    def change(before: float, after: float) -> str:
        return f"{before:.3f} -> {after:.3f}"

    rows = [
        [
            p.name, p.kind, p.strategy, str(p.terms), change(p.before.recall, p.after.recall),
            change(p.before.precision, p.after.precision), change(p.before.head_usage, p.after.head_usage),
            change(p.before.compute_fraction, p.after.compute_fraction), p.steering_digest,
        ]
        for p in profiles
    ]  # fmt: skip
    return table(
        ["profile", "kind", "strategy", "terms", "recall", "precision", "head usage", "compute", "digest"], rows
    )


Served = tuple[oi.RepositoryIndexResponse.ModelIndex, pb.GetModelResponse | None]
"""An entry of the repository's index, with the model if it is served."""


def models_table(models: Sequence[Served]) -> str:
    """One row per version: its state, and what it reads and runs if it is served. Below, why others are not."""
    rows, reasons = [], []
    for entry, model in models:
        row = [entry.name, entry.version, entry.state]
        if model:
            row += [
                f"{model.height}x{model.width}x{model.channels}", str(len(model.labels)), str(len(model.gated_blocks)),
                str(model.heads), str(model.mlp_groups), str(model.profiles),
                f"{model.lowest_budget:.2f} to 1" if model.dial else "none", f"{model.graph} {model.provider}",
            ]  # fmt: skip
        else:
            row += ["-"] * 8
            reasons.append(f"{entry.name} version {entry.version}: {entry.reason}")
        rows.append(row)
    columns = ["model", "version", "state", "input", "classes", "gated blocks", "heads", "MLP groups", "profiles"]
    shown = table([*columns, "budgets", "runs"], rows)
    return "\n".join([shown, "", *reasons]) if reasons else shown


def models_json(models: Sequence[Served]) -> str:
    """The same as one line of JSON: each entry of the index, with `model` as GetModel answers it, or null."""
    return json.dumps(
        {"models": [{**as_dict(entry), "model": as_dict(model) if model else None} for entry, model in models]}
    )
