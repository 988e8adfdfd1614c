"""How much class profiles gain from the latents' activations, and from knowing the class.

Compares each class profile with its shift terms only, which add the same to every image, and with its scale terms only,
whose effect depends on a latent's activation. Also compares them with what the same search learns without the class:
one bias on the gate logits, and one set of terms, for every image. All learned values, and the factors that match a
usage, come from training and selection images.

Letters: B images, C classes, G gated blocks, U units (heads, then MLP groups).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.config import ProfileSettings
from training.data.splits import Split
from training.evaluation import significance
from training.evaluation.baselines import Rival, each_under, logit_bias, matched
from training.evaluation.class_agnostic import BIAS, TERMS
from training.evaluation.rivals import MATCHING, SLICE
from training.evaluation.significance import mean
from training.model.gated_vit import GatedVit
from training.model.inference import Effect, Outcome, answers, effect, steered_by, usages
from training.model.macs import Macs, count
from training.model.sae import Sae
from training.profiles.fit import own_and_others
from training.profiles.learned import Search, gate_bias, learned
from training.profiles.statistics import measure
from training.sae.activations import residuals
from training.steering import SteeringTerm, Terms, at_strength

NO_STEERING, PROFILE = "no steering", "class profile"
SHIFT, SCALE = "shift alone", "scale alone"
CLASS_BIAS = "class bias"
PREDICTED = "profile of predicted class"


@dataclass(frozen=True)
class Learned:
    """What the search for profiles finds on training images."""

    class_bias: Tensor
    """Constants on the gate logits, per class: (C, G, U)."""
    bias: Tensor
    """Constants on the gate logits, the same for all classes: (G, U)."""
    terms: Terms
    """Terms, the same for all classes."""


def learn(
    settings: ProfileSettings, model: GatedVit, sae: Sae, pool: Split, classes: int, seed: int, bf16: bool
) -> Learned:
    """Run the searches. pool: training images. A search without classes uses as many images per step as one for all
    classes."""
    each, everything = [(label,) for label in range(classes)], [tuple(range(classes))]
    unsteered = answers(model, pool).logits.log_softmax(-1)
    sample = pool.take(torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:10_000])
    macs = count(model)
    stats = measure(model, sae, macs, residuals(model, sample, "ablation: residuals"), sample)
    search = Search(model, macs, pool, unsteered, settings, seed, bf16)
    wide = replace(search, settings=settings.model_copy(update={"rows": settings.rows * classes}))
    terms = learned(wide, sae, stats, everything)[0]
    return Learned(torch.stack(gate_bias(search, each)), gate_bias(wide, everything)[0], terms)


def variants(
    model: GatedVit, macs: Macs, sae: Sae, selection: Split, profiles: Sequence[Terms], learnt: Learned
) -> dict[str, list[Rival]]:
    """The steering of each class's images, by name of the variant. profiles: the terms of every class.

    Biases, and terms for all classes, are scaled to the unit usage of the profiles on selection images.
    """
    rows = [own_and_others(selection, (label,), MATCHING, 0) for label in range(len(profiles))]
    own = [selection.take(of_class[: len(of_class) // 2]) for of_class in rows]
    everyone = selection.take(torch.cat([of_class[: MATCHING // 4] for of_class in rows]))

    def steered(terms: Terms) -> Rival:
        return Rival(steered_by(sae, terms))

    whole = [steered(terms) for terms in profiles]
    usage = [answers(model, images, rival.steer).usage(macs) for images, rival in zip(own, whole, strict=True)]

    def class_bias(label: int) -> Rival:
        return matched(model, macs, own[label], usage[label], lambda f: logit_bias(f * learnt.class_bias[label]))

    def for_all(at: Callable[[float], Rival]) -> list[Rival]:
        return [matched(model, macs, everyone, mean(usage), at)] * len(profiles)

    return {
        NO_STEERING: [Rival()] * len(profiles),
        PROFILE: whole,
        SHIFT: [steered(shift_alone(terms)) for terms in profiles],
        SCALE: [steered(scale_alone(terms)) for terms in profiles],
        CLASS_BIAS: [class_bias(label) for label in range(len(profiles))],
        BIAS: for_all(lambda f: logit_bias(f * learnt.bias)),
        TERMS: for_all(lambda f: steered(at_strength(learnt.terms, f))),
    }


def shift_alone(terms: Terms) -> Terms:
    """The terms with every scale set to 1: their effect does not depend on the image."""
    return {site: tuple(SteeringTerm(t.latent, 1.0, t.shift) for t in of_site) for site, of_site in terms.items()}


def scale_alone(terms: Terms) -> Terms:
    """The terms with every shift set to 0: a silent latent adds nothing."""
    return {site: tuple(SteeringTerm(t.latent, t.scale) for t in of_site) for site, of_site in terms.items()}


def compare_variants(
    model: GatedVit, macs: Macs, split: Split, labels: Sequence[str], steerings: Mapping[str, Sequence[Rival]]
) -> dict[str, dict[str, Any]]:
    """The effect of every variant on the split, by name, and of the profile of the class predicted without steering.

    own: each image under the steering of its own class. natural: all images under the steering of one class, mean over
    the classes. balanced: the same on a slice of each class's images and as many others. Each variant also has its
    paired difference from the class profile, with the 95% interval.
    """
    under = {
        name: _outcomes(model, split, rivals)
        for name, rivals in tqdm(steerings.items(), desc="ablation", unit="variant", dynamic_ncols=True)
    }
    predicted = under[NO_STEERING][0].predicted
    slices = [own_and_others(split, (label,), SLICE, 0) for label in range(len(labels))]
    records = {}
    for name, outcomes in under.items():
        natural = [effect(outcome, split.classes, (label,), macs) for label, outcome in enumerate(outcomes)]
        balanced = [
            effect(outcome.take(rows), split.classes[rows], (label,), macs)
            for label, (outcome, rows) in enumerate(zip(outcomes, slices, strict=True))
        ]
        records[name] = {
            "own": _own(each_under(split.classes, outcomes), split.classes, macs),
            "natural": _mean(natural),
            "balanced": _mean(balanced),
            "against_profile": _against(outcomes, under[PROFILE], split.classes),
            "classes": [
                {"name": label, "natural": whole.to_json(), "balanced": half.to_json()}
                for label, whole, half in zip(labels, natural, balanced, strict=True)
            ],
        }
    return {**records, PREDICTED: {"own": _own(each_under(predicted, under[PROFILE]), split.classes, macs)}}


def _outcomes(model: GatedVit, split: Split, rivals: Sequence[Rival]) -> list[Outcome]:
    """The outcomes under the steering of each class; steering shared by several classes is computed once."""
    outcomes = {rival: answers(model, split, rival.steer, rival.decide) for rival in dict.fromkeys(rivals)}
    return [outcomes[rival] for rival in rivals]


def _mean(effects: Sequence[Effect]) -> dict[str, float]:
    return {field: round(mean(getattr(e, field) for e in effects), 5) for field in effects[0].to_json()}


def _own(outcome: Outcome, classes: Tensor, macs: Macs) -> dict[str, float]:
    """Metrics of each image under its own class. Precision: mean over the classes."""
    effects = [effect(outcome, classes, (label,), macs) for label in range(outcome.logits.shape[1])]
    return {
        **{name: round(usage, 5) for name, usage in usages(outcome, macs).items()},
        "compute_fraction": round(outcome.compute_fraction(macs).mean().item(), 5),
        "accuracy": round((outcome.predicted == classes).double().mean().item(), 5),
        "precision": round(mean(e.precision for e in effects), 5),
    }


def _against(outcomes: Sequence[Outcome], profiles: Sequence[Outcome], classes: Tensor) -> dict[str, Any]:
    """own: each image under its own class. all: each image under every class, mean per image."""

    def right(some: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
        every = torch.stack([outcome.predicted == classes for outcome in some]).double()  # (C, B)
        return every[classes, torch.arange(len(classes))].numpy(), every.mean(0).numpy()

    changes = {}
    for name, variant, profile in zip(("own", "all"), right(outcomes), right(profiles), strict=True):
        low, high = significance.change_interval(profile, variant)
        changes[name] = {
            "accuracy": round(float((variant - profile).mean()), 5),
            "interval": [round(low, 5), round(high, 5)],
        }
    same = [(a.gate == b.gate)[classes == c] for c, (a, b) in enumerate(zip(outcomes, profiles, strict=True))]
    return {**changes, "same_gates": round(torch.cat(same).double().mean().item(), 5)}


def table(records: Mapping[str, dict[str, Any]]) -> str:
    """The records as text of at most 110 columns: means over the classes, then every class under every variant."""
    natural = (("recall", "recall"), ("precis.", "precision"), ("AUROC", "auroc"), ("accur.", "overall_accuracy"))
    half = (("recall", "recall"), ("precis.", "precision"), ("accur.", "overall_accuracy"))
    heads_alone = "unit_usage" not in records[NO_STEERING]["own"]
    units = ("heads", "head_usage") if heads_alone else ("units", "unit_usage")
    usage = (units, ("compute", "compute_fraction"))
    own = (*usage, ("accur.", "accuracy"), ("precis.", "precision"))
    means = [(name, [(r.get("own"), own), (r.get("natural"), natural[1:]), (r.get("balanced"), half)])
             for name, r in records.items()]  # fmt: skip
    classes = [(f"{entry['name'][:12]:12} {name}", [(entry["natural"], usage + natural), (entry["balanced"], half)])
               for index in range(len(records[NO_STEERING]["classes"])) for name, r in records.items() if "classes" in r
               for entry in (r["classes"][index],)]  # fmt: skip
    return "\n".join([
        f"{'':28}{'each image under its class':>32}{'all under one class':>24}{'50/50 slices':>24}",
        *_lines(means),
        "",
        f"{'':38}{'own images':>16}{'all images under one class':>32}{'50/50 slices':>24}",
        *_lines(classes, 38),
    ])  # fmt: skip


Columns = Sequence[tuple[str, str]]
"""(title, key)"""


def _lines(
    rows: Sequence[tuple[str, Sequence[tuple[Mapping[str, float] | None, Columns]]]], width: int = 28
) -> list[str]:
    """A line of titles, then one line for every (name, [(values or none, columns)])."""
    lines = [" " * width + "".join(f"{title:>8}" for _, columns in rows[0][1] for title, _ in columns)]
    for name, groups in rows:
        cells = [f"{values[key]:.4f}" if values else "" for values, columns in groups for _, key in columns]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>8}" for cell in cells))
    return lines
