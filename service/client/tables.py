"""Answers as text, for the command line."""

from collections.abc import Sequence

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


def predict_table(names: Sequence[str], answer: pb.PredictResponse) -> str:
    """One row an image: its classes, and the heads that ran; then the receipt. names: of the images, in order."""
    rows = []
    for name, prediction in zip(names, answer.predictions, strict=True):
        best, *others = prediction.classes
        second = ", ".join(f"{other.label} {other.probability:.2f}" for other in others)
        kept = sum(sum(block.kept) for block in prediction.head_mask)
        total = sum(len(block.kept) for block in prediction.head_mask)
        heads = f"{kept}/{total}"
        compute = f"{prediction.compute_fraction:.3f}"
        rows.append(
            [name, best.label, f"{best.probability:.2f}", second, heads, f"{prediction.head_usage:.2f}", compute]
        )
    shown = table(["image", "class", "p", "then", "heads", "usage", "compute"], rows)
    return f"{shown}\n\n{_served_by(answer.receipt)}"


def _served_by(receipt: pb.Receipt) -> str:
    steering = f"profile {receipt.profile}" if receipt.profile else "inline terms or none"
    return (
        f"model {receipt.model} version {receipt.version} "
        f"({receipt.graph}, bundle {receipt.bundle_digest}), {steering}, steering {receipt.steering_digest}\n"
        f"queue {receipt.queue_seconds * 1000:.1f} ms, inference {receipt.inference_seconds * 1000:.1f} ms"
    )


def compare_table(names: Sequence[str], answer: pb.CompareResponse) -> str:
    """One row an image: label, head usage and compute fraction, unsteered and steered, and +opened -closed heads."""
    rows = []
    for name, comparison in zip(names, answer.comparisons, strict=True):
        before, after = comparison.unsteered, comparison.steered
        opened = sum(change.opened for change in comparison.head_changes)
        labels = [f"{p.classes[0].label} {p.classes[0].probability:.2f}" for p in (before, after)]
        rows.append(
            [
                name, *labels, "" if comparison.same_label else "other",
                f"{before.head_usage:.2f} -> {after.head_usage:.2f}",
                f"{before.compute_fraction:.3f} -> {after.compute_fraction:.3f}",
                f"+{opened} -{len(comparison.head_changes) - opened}",
            ]
        )  # fmt: skip
    shown = table(["image", "unsteered", "steered", "label", "head usage", "compute", "heads"], rows)
    return f"{shown}\n\n{_served_by(answer.receipt)}"


def explain_table(names: Sequence[str], answer: pb.ExplainResponse) -> str:
    """Of each image and site: the gates, and the latents with what they do to each gate."""
    parts = []
    for name, explanation in zip(names, answer.explanations, strict=True):
        best = explanation.prediction.classes[0]
        parts.append(f"{name}: {best.label} {best.probability:.2f}, head usage {explanation.prediction.head_usage:.2f}")
        for site in explanation.sites:
            heads = [f"head {index}" for index in range(len(site.gate_logits))]
            rows = [
                ["unsteered gate", "", "", *(f"{v:+.2f}" for v in site.unsteered_gate_logits)],
                ["gate", "", "", *(f"{v:+.2f}" for v in site.gate_logits)],
            ]
            for latent in site.latents:
                changed = f"{latent.steered_value:.2f}" if latent.steered_value != latent.value else ""
                effects = [f"{v:+.2f}" for v in latent.gate_effects]
                rows.append([f"latent {latent.latent}", f"{latent.value:.2f}", changed, *effects])
            parts.append(f"\nsite {site.site} (block {site.block}), {site.active_latents} latents active")
            parts.append(table(["", "value", "steered", *heads], rows))
        parts.append("")
    return "\n".join(parts).rstrip()


def profiles_table(profiles: Sequence[pb.Profile]) -> str:
    """One row a profile: its terms, and its evaluation before and after."""

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
