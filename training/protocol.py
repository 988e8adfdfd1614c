"""Step `evaluate`: the whole protocol on the test split, read once. results.json has every number of the report.

Declared beforehand (SUCCESS): what the profiles must reach, over all classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from training import significance
from training.baselines import (
    Rival,
    by_predicted_class,
    logit_bias,
    prior_bias,
    random_heads,
    residual_direction,
    threshold_shift,
)
from training.checkpoint import Run
from training.data import Data, Split
from training.evaluate import Outcome, answers, effect, steered_by
from training.fit_profiles import own_and_others
from training.fit_sae import residuals
from training.gated_vit import GatedVit, keep_all
from training.macs import Macs, count
from training.sae import Sae
from training.steering import SteeringProfile, terms_from_json

SLICE = 1000
"""Images of the target, and as many others, that the rivals of a profile are measured on."""
RANDOM_DRAWS = 3


def evaluate(data: Data, run: Run, model: GatedVit, sae: Sae, profiles: Sequence[SteeringProfile]) -> dict[str, Any]:
    """Measure no steering, every profile on all test images, and every rival on a slice; write results.json."""
    macs, test = count(model), data.test
    targets = [tuple(data.labels.index(label) for label in profile.classes) for profile in profiles]
    ungated, neutral = answers(model, test, decide=keep_all), answers(model, test)
    under = [
        answers(model, test, steered_by(sae, profile.terms))
        for profile in tqdm(profiles, desc="evaluate: profiles", unit="profile", dynamic_ncols=True)
    ]
    choices = {choice["name"]: choice for choice in run.info("profiles")["result"]["choices"]}
    means = _class_means(model, data.selection)
    stored = run.read_tensors("gate_bias")
    assert stored is not None
    entries = []
    for index, profile in enumerate(tqdm(profiles, desc="evaluate: rivals", unit="profile", dynamic_ncols=True)):
        entry = _profile_entry(profile, targets[index], neutral, under[index], test, macs)
        entry["rivals"] = _rivals(
            model, sae, data, targets[index], entry["after"]["head_usage"], choices[profile.name]["best"],
            stored[0]["bias"][index], means, neutral, macs,
        )  # fmt: skip
        entries.append(entry)
    singles = [index for index, target in enumerate(targets) if len(target) == 1]
    _adjust([entries[index] for index in singles])
    for index in singles:
        entries[index]["other_profiles"] = _under_others(index, singles, targets, under, test, macs)
    whole = {"ungated": ungated, "neutral": neutral}
    if len(singles) == len(data.labels):
        whole["by_predicted_class"] = by_predicted_class(neutral, [under[index] for index in singles])
    results = {
        "split": "test",
        "images": len(test),
        "labels": list(data.labels),
        "gated_blocks": list(model.gated_blocks),
        "macs": macs.to_json(),
        **{name: _whole(outcome, test, macs) for name, outcome in whole.items()},
        "profiles": entries,
        **_summary([entries[index] for index in singles]),
    }
    run.write_json("results.json", results)
    return results


def _profile_entry(
    profile: SteeringProfile, target: tuple[int, ...], neutral: Outcome, under: Outcome, test: Split, macs: Macs
) -> dict[str, Any]:
    own = torch.isin(test.classes, torch.tensor(target))
    right = [(outcome.predicted == test.classes).numpy() for outcome in (neutral, under)]
    before, after = (values[own.numpy()] for values in right)
    recall, precision = prior_bias(neutral, test.classes, target, effect(under, test.classes, target, macs).precision)
    return {
        "name": profile.name,
        "classes": list(profile.classes),
        "strategy": profile.strategy,
        "terms": sum(map(len, profile.terms.values())),
        "images": int(own.sum()),
        "before": effect(neutral, test.classes, target, macs).to_json(),
        "after": effect(under, test.classes, target, macs).to_json(),
        "recall_interval_before": _rounded(significance.wilson(before)),
        "recall_interval_after": _rounded(significance.wilson(after)),
        "recall_change_interval": _rounded(significance.change_interval(before, after)),
        "overall_change_interval": _rounded(significance.change_interval(*right)),
        "mcnemar": significance.mcnemar(before, after),
        "below_one_point": significance.mcnemar_below(before, after, 0.01),
        "prior_bias": {"recall": round(recall, 5), "precision": round(precision, 5)},
        "head_usage_before": _per_head(neutral.take(own)),
        "head_usage_after": _per_head(under.take(own)),
    }


def _rivals(
    model: GatedVit,
    sae: Sae,
    data: Data,
    target: tuple[int, ...],
    usage: float,
    strategies: dict[str, Any],
    bias: torch.Tensor,
    means: torch.Tensor,
    neutral: Outcome,
    macs: Macs,
) -> dict[str, dict[str, float]]:
    """By name: what each does on the same slice of the test images; "no steering" is among them."""
    rows = own_and_others(data.test, target, SLICE, 0)
    split = data.test.take(rows)
    own = data.selection.take(own_and_others(data.selection, target, 150, 0)[:150])
    wanted = torch.tensor(target)
    found = {"no steering": effect(neutral.take(rows), split.classes, target, macs)}
    rivals = {
        "gate threshold shift": threshold_shift(model, own, usage),
        "gate-logit bias": logit_bias(bias),
        "residual direction": residual_direction(model, own, usage, means[:, wanted].mean(1) - means.mean(1)),
    }
    for strategy, terms in strategies.items():
        rivals[strategy] = Rival(steered_by(sae, terms_from_json(terms)))
    for name, rival in rivals.items():
        found[name] = effect(answers(model, split, rival.steer, rival.decide), split.classes, target, macs)
    draws = [
        effect(answers(model, split, decide=random_heads(model, usage, seed).decide), split.classes, target, macs)
        for seed in range(RANDOM_DRAWS)
    ]
    shown = {name: measured.to_json() for name, measured in found.items()}
    shown["random heads"] = {
        key: round(float(np.mean([draw.to_json()[key] for draw in draws])), 5) for key in draws[0].to_json()
    }
    return shown


def _under_others(
    index: int,
    singles: Sequence[int],
    targets: Sequence[tuple[int, ...]],
    under: Sequence[Outcome],
    test: Split,
    macs: Macs,
) -> dict[str, float]:
    """The images of a class under the profiles of the other classes, on average."""
    effects = [effect(under[other], test.classes, targets[index], macs) for other in singles if other != index]
    names = ("recall", "head_usage")
    return {name: round(float(np.mean([getattr(e, name) for e in effects])), 5) for name in names}


def _adjust(entries: Sequence[dict[str, Any]]) -> None:
    """Benjamini-Hochberg over the classes, in place."""
    for field in ("mcnemar", "below_one_point"):
        for entry, p in zip(entries, significance.benjamini_hochberg([e[field] for e in entries]), strict=True):
            entry[f"{field}_adjusted"] = p


def _summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the single classes: mean changes of the profiles and of every rival, and the criteria set beforehand."""

    def mean(values: Sequence[float]) -> float:
        return round(float(np.mean(values)), 5)

    changes = {
        key: mean([entry["after"][key] - entry["before"][key] for entry in entries]) for key in entries[0]["before"]
    }
    rivals = {}
    for name in entries[0]["rivals"]:
        measured = [(entry["rivals"][name], entry["rivals"]["no steering"]) for entry in entries]
        rivals[name] = {
            "head_usage": mean([found["head_usage"] for found, _ in measured]),
            **{
                key: mean([found[key] - none[key] for found, none in measured])
                for key in ("recall", "precision", "others_accuracy", "auroc")
            },
            "worst_recall": round(min(found["recall"] - none["recall"] for found, none in measured), 5),
        }
    worst = min(entry["after"]["recall"] - entry["before"]["recall"] for entry in entries)
    criteria = [
        ("mean recall change >= -0.5 point", changes["recall"], changes["recall"] >= -0.005),
        ("worst recall change >= -3 points", round(worst, 5), worst >= -0.03),
        (
            "classes significantly below -1 point (BH, 5%): none",
            sum(entry["below_one_point_adjusted"] < 0.05 for entry in entries),
            all(entry["below_one_point_adjusted"] >= 0.05 for entry in entries),
        ),
        ("mean overall accuracy change >= -1 point", changes["overall_accuracy"], changes["overall_accuracy"] >= -0.01),
    ]
    return {
        "mean_change": changes,
        "rivals": rivals,
        "success": [{"criterion": c, "measured": m, "met": bool(ok)} for c, m, ok in criteria],
    }


@torch.no_grad()
def _class_means(model: GatedVit, split: Split) -> torch.Tensor:
    """(S, C, D): mean residual of every class at every gated block."""
    found = residuals(model, split, "evaluate: residuals")
    return torch.stack([found[:, split.classes == c].mean(1) for c in range(int(split.classes.max()) + 1)], 1)


def _whole(outcome: Outcome, split: Split, macs: Macs) -> dict[str, float]:
    return {
        "accuracy": (outcome.predicted == split.classes).double().mean().item(),
        "head_usage": round(outcome.head_gate.double().mean().item(), 5),
        "compute_fraction": round(macs.fraction(outcome.head_gate).mean().item(), 5),
    }


def _per_head(outcome: Outcome) -> list[list[float]]:
    """Share of images that keep each head: gated blocks x heads."""
    return [[round(v, 4) for v in row] for row in outcome.head_gate.double().mean(0).tolist()]


def _rounded(values: tuple[float, float]) -> list[float]:
    return [round(value, 5) for value in values]
