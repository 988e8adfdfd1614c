"""The table over the seeds of a preset: one row per seed from its results.json, and mean and range over the seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.checkpoint import Run, RunError, changed
from training.evaluation.changes import CHANGES, CLUSTERS, DIFFERENCES
from training.evaluation.criteria import MARGINS
from training.evaluation.significance import cluster_interval, mean, seeds_interval
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
    """The rows of evaluated runs, with mean, lowest and highest values; the seeds that have each control with which the
    dial is compared (`dial_seeds`); and 95% intervals of means over seeds and images: of the changes under profiles
    (`intervals`), and of the dial's differences from each control, over the seeds that have it (`dial_intervals`).

    Raises RunError when a run is not evaluated, when two have the same seed, and when they have different settings.
    """
    rows = []
    for run in runs:
        _check_alike(runs[0], run)
        rows.append({**row(run.results()), "sae": _fidelity(run)})
    seeds = [r["seed"] for r in rows]
    if len(set(seeds)) < len(seeds):
        raise RunError(f"the runs have the seeds {', '.join(map(str, seeds))}; allowed: each once")
    having = {name: [r["seed"] for r in rows if _compared(r.get(name))] for r in rows for name in r}
    of_dial = {name: of_control for name, of_control in having.items() if of_control}
    of_seed = dict(zip(seeds, runs, strict=True))
    of_images = {name: _interval([of_seed[s] for s in with_it], DIFFERENCES, name) for name, with_it in of_dial.items()}
    summary: dict[str, Any] = {
        "seeds": rows,
        **_over(rows),
        "intervals": {metric: ends for metric in MARGINS if (ends := _interval(runs, CHANGES, metric))},
        "dial_seeds": of_dial,
        "dial_intervals": {name: ends for name, ends in of_images.items() if ends},
    }
    if all("last_block" in r for r in rows):
        summary["last_block"] = _over([r["last_block"] for r in rows])
    return summary


def _check_alike(first: Run, run: Run) -> None:
    """Raise RunError unless the runs have the same settings, up to the seed."""
    ours, theirs = ({**of.info("profiles")["settings"], "seed": None} for of in (first, run))
    different = [f"{name}: {a} and {b}" for name, a, b in changed(ours, theirs)]
    if different:
        raise RunError(
            f"{first.folder} and {run.folder} have different settings ({'; '.join(different)}); allowed: different "
            "seeds alone"
        )


def _compared(control: object) -> bool:
    """Whether an entry of a row is a control that the dial is compared with."""
    return isinstance(control, dict) and "dial_difference" in control


def _interval(runs: Sequence[Run], name: str, metric: str) -> list[float] | None:
    """The 95% interval of the mean over seeds and images of a metric in the tensors of this name (CHANGES or
    DIFFERENCES); of one seed, over images alone. None unless all runs have the metric, of the same test images."""
    stored = [of_run for run in runs if (of_run := run.read_tensors(name)) and metric in of_run.tensors]
    images = {of_run.meta["images"] for of_run in stored}
    if len(stored) < len(runs) or len(images) > 1 or None in images:
        return None
    tensors = stored[0].tensors
    clusters = tensors[CLUSTERS].numpy() if CLUSTERS in tensors else None
    values = np.stack([of_run.tensors[metric].numpy() for of_run in stored])
    ends = seeds_interval(values, clusters) if len(values) > 1 else cluster_interval(values[0], clusters)
    return [round(end, 5) for end in ends]


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
