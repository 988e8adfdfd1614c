"""The table over the seeds of a preset: one row per seed from its results.json, and mean and range over the seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.checkpoint import Run
from training.evaluation.changes import CHANGES, CLUSTERS, DIFFERENCES
from training.evaluation.significance import hierarchical_interval, mean
from training.model.inference import usage_of

RIVALS = (
    "profile",
    "learned, random latents",
    "gate-logit bias",
    "gate threshold shift",
    "one bias for all",
    "one set of terms for all",
    "the dial alone",
    "another class's profile",
    "random heads",
    "random units",
    "causal",
    "class-mean",
)
"""The rivals in the table; results.json also has the others."""


def row(results: dict[str, Any]) -> dict[str, Any]:
    """A seed's main numbers, as shares between 0 and 1. Usage is unit usage (head usage if only heads are gated);
    changes are relative to no steering, over the single classes."""
    singles = [p for p in results["profiles"] if len(p["classes"]) == 1]
    columns = {
        "seed": results["seed"],
        "ungated": results["ungated"]["accuracy"],
        "neutral_accuracy": results["neutral"]["accuracy"],
        "neutral_usage": usage_of(results["neutral"]),
        "usage": mean(usage_of(p["after"]) for p in singles),
        "compute_fraction": mean(p["after"]["compute_fraction"] for p in singles),
        "recall_change": results["mean_change"]["recall"],
        "worst_recall_change": min(p["after"]["recall"] - p["before"]["recall"] for p in singles),
        "precision_change": results["mean_change"]["precision"],
        "overall_change": results["mean_change"]["overall_accuracy"],
        "criteria_met": sum(c["met"] for c in results["success"]),
        "criteria": len(results["success"]),
        "pattern": results["pattern"],
        "rivals": {name: results["rivals"][name] for name in RIVALS if name in results["rivals"]},
    }
    for name, control in results.get("controls", {}).items():
        kept = ("accuracy", "head_usage", "mlp_usage", "unit_usage", "compute_fraction")
        columns[name] = {key: control[key] for key in kept if key in control}
        for compared in ("area", "dial_at_its_compute"):
            if compared in control:
                columns[name]["dial_difference"] = control[compared]["difference"]
    if "last_block" in results:
        columns["last_block"] = row(results["last_block"])
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in columns.items()}


def table(runs: Sequence[Run]) -> dict[str, Any]:
    """The rows of evaluated runs, with mean, lowest and highest values. Raises RunError when a run is not evaluated."""
    rows = []
    for run in runs:
        rows.append({**row(run.results()), "sae": _fidelity(run)})
    intervals = {"intervals": _intervals(runs, CHANGES), "dial_intervals": _intervals(runs, DIFFERENCES)}
    summary: dict[str, Any] = {"seeds": rows, **_over(rows), **intervals}
    if all("last_block" in r for r in rows):
        summary["last_block"] = _over([r["last_block"] for r in rows])
    return summary


def _intervals(runs: Sequence[Run], name: str) -> dict[str, list[float]]:
    """For each metric in the tensors of this name (CHANGES or DIFFERENCES), the 95% interval of its mean over seeds and
    images; empty unless all runs have the same test images."""
    stored = [run.read_tensors(name) for run in runs]
    present = [of_run for of_run in stored if of_run]
    images = {meta["images"] for _, meta in present}
    if len(present) < len(runs) or len(images) > 1 or None in images:
        return {}
    of_all = [metric for metric in present[0][0] if all(metric in tensors for tensors, _ in present)]
    over = {metric: np.stack([tensors[metric].numpy() for tensors, _ in present]) for metric in of_all}
    clusters = over.pop(CLUSTERS)[0] if CLUSTERS in over else None
    intervals = {metric: hierarchical_interval(values, clusters) for metric, values in over.items()}
    return {metric: [round(end, 5) for end in ends] for metric, ends in intervals.items()}


def _fidelity(run: Run) -> dict[str, float]:
    """The fidelity of the worst site of a run's autoencoders."""
    of_sites = run.info("sae")["result"]["fidelity"]
    worst = (
        ("fvu", max),
        ("gate_agreement", min),
        ("gate_agreement_clear", min),
        ("dead_training", max),
        ("dead", max),
    )
    return {name: round(choose(site[name] for site in of_sites), 5) for name, choose in worst}


def _over(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean, lowest and highest value of every number of the rows."""
    numbers = [key for key, value in rows[0].items() if isinstance(value, float)]
    functions = (("mean", mean), ("lowest", min), ("highest", max))
    return {name: {key: round(function([r[key] for r in rows]), 5) for key in numbers} for name, function in functions}
