"""The alternatives to a profile at its unit usage (head usage if only heads are gated): every strategy and baseline, on
one slice of images per target.

Methods with a strength are set to the profile's usage by bisection on selection images of the target; methods that are
the same for all images (class_agnostic.py), to the profiles' mean usage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.checkpoint import Run
from training.config import ProfileSettings
from training.data.splits import Split
from training.evaluation import significance
from training.evaluation.baselines import (
    Rival,
    greedy_units,
    logit_bias,
    matched,
    random_units,
    residual_direction,
    static_units,
    threshold_shift,
)
from training.evaluation.significance import Rightness, mean
from training.model.gated_vit import GatedNetwork
from training.model.inference import Effect, Outcome, answers, effect, steered_by
from training.model.macs import Macs
from training.model.sae import Sae
from training.profiles.fit import own_and_others
from training.profiles.learned import answer_loss
from training.profiles.strategies import Target
from training.sae.activations import residuals
from training.steering import SteeringProfile, Terms, at_strength, terms_from_json

SLICE = 250
"""Largest number of images of the target, and of others."""
MATCHING = 200
"""Selection images of the target on which a rival's usage is matched to the profile's."""
GREEDY = 80
"""How many of these, with as many others, are used to close units greedily."""
DRAWS = 5
"""Draws of random methods."""
NO_STEERING, PROFILE, SHAM = "no steering", "profile", "another class's profile"
AT_USAGE = ("learned, random latents",)
"""Strategies whose strength is matched to the profile's usage; the others have their best strength."""


@dataclass(frozen=True)
class Slice:
    """The images on which the rivals of a profile are measured, and their known outcomes."""

    split: Split
    target: Target
    neutral: Outcome
    under: Outcome
    """Outcome under the profile."""
    others: list[Outcome]
    """Outcomes under the profiles of the other classes."""
    alike: dict[str, Outcome]
    """Outcomes under rivals that are the same for all images, by name."""

    @classmethod
    def of(
        cls,
        split: Split,
        target: Target,
        neutral: Outcome,
        under: Outcome,
        others: list[Outcome],
        alike: Mapping[str, Outcome],
    ) -> "Slice":
        """A slice of at most SLICE images of the target and as many others. The outcomes passed in are of the whole
        split."""
        rows = own_and_others(split, target, SLICE, 0)
        taken = {name: outcome.take(rows) for name, outcome in alike.items()}
        return cls(
            split.take(rows), target, neutral.take(rows), under.take(rows), [o.take(rows) for o in others], taken
        )


@dataclass(frozen=True)
class Measured:
    """The measured effect of a rival on a slice; for random methods, the mean of the draws."""

    effect: Effect
    own_right: Rightness
    """For each image of the target, whether it got its label, or the share of the draws in which it did."""
    own_clusters: NDArray[np.int64] | None = None
    """Split.clusters of these images."""


def usage_to_match(
    model: GatedNetwork, macs: Macs, sae: Sae, selection: Split, profile: SteeringProfile, target: Target
) -> float:
    """The profile's unit usage on the images on which its rivals are matched."""
    return answers(model, _own(selection, target), steered_by(sae, profile.terms)).usage(macs)


def rivals_of(
    run: Run,
    settings: ProfileSettings,
    model: GatedNetwork,
    macs: Macs,
    sae: Sae,
    selection: Split,
    profiles: Sequence[SteeringProfile],
    targets: Sequence[Target],
    usages: Sequence[float],
    seed: int,
) -> Callable[[int, Slice], dict[str, Measured]]:
    """(index of the profile, its slice) -> the effect of every rival on the slice, by name. usages: the usages to
    match."""
    choices = {choice["name"]: choice["best"] for choice in run.info("profiles")["result"]["choices"]}
    biases = run.tensors("gate_bias")["bias"]
    means = _class_means(model, selection)

    def measure(index: int, images: Slice) -> dict[str, Measured]:
        target, usage = targets[index], usages[index]
        own = _own(selection, target)
        units = "units" if macs.mlp_groups else "heads"
        wanted = torch.tensor(target)
        rivals = {
            "gate threshold shift": [threshold_shift(model, macs, own, usage)],
            "gate-logit bias": [matched(model, macs, own, usage, lambda f: logit_bias(f * biases[index]))],
            "residual direction": [
                residual_direction(model, macs, own, usage, means[:, wanted].mean(1) - means.mean(1))
            ],
            f"random {units}": [random_units(macs, model.heads, usage, (seed, draw, *target)) for draw in range(DRAWS)],
        }
        for strategy, value in choices[profiles[index].name].items():
            terms = terms_from_json(value)
            if strategy in AT_USAGE:

                def at(factor: float, terms: Terms = terms) -> Rival:
                    return Rival(steered_by(sae, at_strength(terms, factor)))

                rival = matched(model, macs, own, usage, at)
            else:
                rival = Rival(steered_by(sae, terms))
            rivals[strategy] = [rival]

        rivals[f"static {units} of the class"] = [static_units(macs, model, own, usage)]
        few = selection.take(own_and_others(selection, target, GREEDY, 0))
        loss = partial(_loss, settings, few, target, answers(model, few).logits)
        rivals[f"greedy static {units} of the class"] = [greedy_units(macs, model, few, usage, loss)]

        def found(outcomes: Sequence[Outcome]) -> Measured:
            return _mean([_measured(outcome, images, macs) for outcome in outcomes])

        results = {NO_STEERING: found([images.neutral]), PROFILE: found([images.under])}
        if images.others:
            results[SHAM] = found(images.others)
        results |= {name: found([outcome]) for name, outcome in images.alike.items()}
        for name, draws in rivals.items():
            results[name] = found([answers(model, images.split, draw.steer, draw.decide) for draw in draws])
        return results

    return measure


def compare(measured: Sequence[dict[str, Measured]]) -> dict[str, dict[str, Any]]:
    """Means over the single classes, by rival: usage, changes from no steering, and recall against the profile.

    against_profile: the paired difference of recall from the profile, over all images of all classes, with its 95%
    interval and p. For random methods, an image has the mean of all draws.
    """
    found = {}
    of_classes = [c for m in measured if (c := m[PROFILE].own_clusters) is not None]
    clusters = np.concatenate(of_classes) if of_classes else None
    for name in measured[0]:
        pairs = [(of_class[name].effect, of_class[NO_STEERING].effect) for of_class in measured]
        rival, profile = (np.concatenate([m[n].own_right for m in measured]) for n in (name, PROFILE))
        found[name] = {
            **{
                key: round(mean(getattr(rival, key) for rival, _ in pairs), 5)
                for key in ("head_usage", "mlp_usage", "unit_usage", "compute_fraction")
                if getattr(pairs[0][0], key) is not None
            },
            **{
                key: round(mean(getattr(rival, key) - getattr(none, key) for rival, none in pairs), 5)
                for key in ("recall", "precision", "others_accuracy", "auroc")
            },
            "worst_recall": round(min(rival.recall - none.recall for rival, none in pairs), 5),
            "against_profile": {
                "recall": round(float(rival.mean() - profile.mean()), 5),
                "interval": [round(v, 5) for v in significance.change_interval(profile, rival, clusters)],
                "p": significance.paired(profile, rival, clusters),
            },
        }
    return found


def _own(selection: Split, target: Target) -> Split:
    rows = own_and_others(selection, target, MATCHING, 0)
    return selection.take(rows[: len(rows) // 2])


def _loss(settings: ProfileSettings, split: Split, target: Target, neutral: Tensor, logits: Tensor) -> float:
    """The loss of the search for a profile. neutral (B, C): the logits without steering."""
    own = torch.isin(split.classes, torch.tensor(target))
    return answer_loss(settings, logits.log_softmax(-1), neutral.log_softmax(-1), split.classes, own).item()


def _measured(outcome: Outcome, images: Slice, macs: Macs) -> Measured:
    classes = images.split.classes
    own = torch.isin(classes, torch.tensor(images.target))
    right = (outcome.predicted == classes)[own].double().numpy()
    clusters = images.split.clusters
    of_own = None if clusters is None else clusters[own.numpy()]
    return Measured(effect(outcome, classes, images.target, macs), right, of_own)


def _mean(draws: Sequence[Measured]) -> Measured:
    effects = [draw.effect for draw in draws]
    fields = effects[0].to_json()
    own_right = np.mean([draw.own_right for draw in draws], axis=0)
    return replace(
        draws[0], effect=Effect(**{f: mean(getattr(e, f) for e in effects) for f in fields}), own_right=own_right
    )


@torch.no_grad()
def _class_means(model: GatedNetwork, split: Split) -> Tensor:
    """(S, C, D): mean residual of every class at every gated block."""
    found = residuals(model, split, "evaluate: residuals")
    return torch.stack([found[:, split.classes == c].mean(1) for c in range(int(split.classes.max()) + 1)], 1)
