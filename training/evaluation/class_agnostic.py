"""Rivals that do not know the class: the same steering for all images, at the mean usage of the class profiles.

They are a constant on the gate logits and a set of terms, found for all classes at once by the search for class
profiles; and, for a model with a dial, a position of the dial. The advantage of class profiles over them is the value
of knowing the class.

Letters: B images, C classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from training.config import Settings
from training.data.splits import Split, subset
from training.dial import Dial
from training.evaluation.baselines import Rival, bisect, logit_bias, matched
from training.evaluation.changes import changes
from training.evaluation.criteria import MARGINS
from training.evaluation.significance import cluster_interval, mean
from training.model.gated_vit import GatedNetwork
from training.model.inference import Outcome, answers, effect, steered_by
from training.model.macs import Macs
from training.model.sae import Sae
from training.profiles.fit import own_and_others
from training.profiles.learned import Search, gate_bias, learned
from training.profiles.statistics import measure
from training.profiles.strategies import Target
from training.sae.activations import residuals
from training.steering import at_strength

CLASS_AGNOSTIC = BIAS, TERMS, DIAL = "one bias for all", "one set of terms for all", "the dial alone"
ROWS = 64
"""Images per step of a search: five times as many as a class profile has by default."""
SAMPLE = 2000
"""Training images on which the latents are chosen."""
EVERYONE = 500
"""Selection images on which the usage is matched, the same number of each class."""


def class_agnostic(
    settings: Settings,
    model: GatedNetwork,
    sae: Sae,
    macs: Macs,
    pool: Split,
    selection: Split,
    usage: float,
    dial: Dial | None,
) -> dict[str, Rival]:
    """The rivals by name, each at this unit usage on selection images, mean over the classes. pool: training images."""
    classes = int(selection.classes.max()) + 1
    everything = [tuple(range(classes))]
    each = max(5, EVERYONE // classes)
    everyone = selection.take(torch.cat([_some(selection, label, each) for label in range(classes)]))
    sample = subset(pool, SAMPLE, settings.seed)
    stats = measure(model, sae, macs, residuals(model, sample, "evaluate: residuals"), sample)
    options = settings.profiles.model_copy(update={"rows": ROWS, "usage_target": usage})
    unsteered = answers(model, pool).logits.log_softmax(-1)
    search = Search(model, macs, pool, unsteered, options, settings.seed + 3, settings.bf16)
    bias, terms = gate_bias(search, everything)[0], learned(search, sae, stats, everything)[0]

    def at_usage(at: Callable[[float], Rival]) -> Rival:
        return matched(model, macs, everyone, usage, at, rounds=12)

    rivals = {
        BIAS: at_usage(lambda f: logit_bias(f * bias)),
        TERMS: at_usage(lambda f: Rival(steered_by(sae, at_strength(terms, f)))),
    }
    if dial is not None:
        rivals[DIAL] = dial_alone(model, macs, everyone, usage, dial)
    return rivals


def dial_alone(model: GatedNetwork, macs: Macs, split: Split, usage: float, dial: Dial) -> Rival:
    """The gate biases of the dial's position with this usage on the split, or of the lowest position if even that has
    more."""

    def at(position: float) -> Rival:
        return logit_bias(torch.from_numpy(dial.at(np.array([position]))[0]))

    def used(position: float) -> float:
        return answers(model, split, decide=at(position).decide).usage(macs)

    return at(bisect(used, usage, 1.0, dial.lowest))


def class_knowledge(
    split: Split, under: Mapping[Target, Outcome], alike: Mapping[str, Outcome], macs: Macs
) -> dict[str, dict[str, Any]]:
    """The advantage of the class profiles over each rival, on natural shares of the classes.

    under: the answers to all images under each class's profile. alike: the answers under the rivals, by name. Each
    rival has its Effect, mean over the classes, and `adds`: for each metric of criteria.MARGINS the paired difference
    between the profiles' mean and the rival, with the 95% interval.
    """
    found = {}
    for name, outcome in alike.items():
        effects = [effect(outcome, split.classes, target, macs).to_json() for target in under]
        values = [changes(outcome, of_class, split.classes, target) for target, of_class in under.items()]
        adds = {}
        for metric in MARGINS:
            of_images = np.mean([value[metric] for value in values], 0)
            interval = cluster_interval(of_images, split.clusters)
            adds[metric] = {
                "change": round(float(of_images.mean()), 5),
                "interval": [round(end, 5) for end in interval],
            }
        found[name] = {**{key: round(mean(e[key] for e in effects), 5) for key in effects[0]}, "adds": adds}
    return found


def _some(split: Split, label: int, count: int) -> torch.Tensor:
    rows = own_and_others(split, (label,), count, 0)
    return rows[: len(rows) // 2]
