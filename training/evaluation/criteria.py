"""The criteria for class profiles. Committed before the test images of a run are read.

A profile is non-inferior in a metric when the hypothesis "worse by the margin or more" is rejected at LEVEL. For a
claim about all classes, it must be rejected in each class: an intersection-union test, which needs no correction
(Berger 1982, https://doi.org/10.1080/00401706.1982.10487790).
"""

from collections.abc import Sequence
from typing import Any

from training.model.inference import usage_of

LEVEL = 0.05
"""Significance level, one-sided."""
MOST_USAGE = 0.30
"""Largest unit usage (head usage if only heads are gated) on own images under the profiles, mean over the classes."""
MARGINS = {"recall": 0.01, "precision": 0.01, "auroc": 0.002, "overall_accuracy": 0.01}
"""For each metric, the loss against no steering that must be rejected, as a share: 0.01 is one point."""
MARGINS_OF_DIAL = {"dense": 0.002, "plain-100": 0.005, "plain-75": 0.005, "plain-55": 0.005, "plain-40": 0.005}
"""For each plain ViT (controls.py), the loss of accuracy at its compute that must be rejected for the dial, as a
share."""
TITLES = {"auroc": "AUROC", "overall_accuracy": "accuracy of all images"}
MET, NOT_SHOWN, NOT_MET = "met", "not shown", "not met"


def verdict(change: float, p: float, margin: float) -> str:
    """`met`: a loss of the margin is rejected; `not met`: that much was lost; `not shown`: neither."""
    return MET if p < LEVEL else NOT_MET if change <= -margin else NOT_SHOWN


def criteria(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The criteria over the profiles of single classes: the measurement (for margins, the worst class's change and the
    largest p), the verdict, and the number of classes in which it is `met`."""
    usage = sum(usage_of(entry["after"]) for entry in entries) / len(entries)
    name = "unit usage" if "unit_usage" in entries[0]["after"] else "head usage"
    met = usage <= MOST_USAGE
    rows = [
        {
            "criterion": f"{name} <= {MOST_USAGE:.2f}, mean over the classes",
            "measured": round(usage, 5),
            "met": met,
            "verdict": MET if met else NOT_MET,
        }
    ]
    for metric, margin in MARGINS.items():
        changes = [entry["after"][metric] - entry["before"][metric] for entry in entries]
        p_values = [entry["non_inferiority"][metric] for entry in entries]
        verdicts = [verdict(change, p, margin) for change, p in zip(changes, p_values, strict=True)]
        worst = next(v for v in (NOT_MET, NOT_SHOWN, MET) if v in verdicts)
        rows.append({
            "criterion": f"{TITLES.get(metric, metric)} in every class: a loss of {margin:g} rejected",
            "measured": round(min(changes), 5),
            "met": worst == MET,
            "verdict": worst,
            "p": max(p_values),
            "classes": verdicts.count(MET),
        })  # fmt: skip
    return rows
