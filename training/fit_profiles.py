"""Stage `profiles`: terms by every strategy, then strategy and strength per class by the selection slice."""

import json
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from training.checkpoint import Run
from training.config import Settings
from training.data import Data, Split, balanced
from training.evaluate import Effect, Outcome, answers, effect
from training.fit_sae import residuals
from training.gated_vit import GatedVit
from training.macs import Macs, count
from training.sae import Sae
from training.steering import SteeringProfile, Terms, at_strength, profiles_from_json, profiles_to_json
from training.strategies import class_mean, learned, statistics

STRENGTHS = {"learned": (0.75, 1.0, 1.25), "class-mean": (-0.5, 1.0, 3.0)}
"""What is tried. A negative strength turns an amplification into a suppression."""


def fit_profiles(settings: Settings, data: Data, run: Run, model: GatedVit, sae: Sae) -> tuple[SteeringProfile, ...]:
    """Find, or load, one profile a class. Nothing of the test split is read."""
    if run.finished("profiles", settings.fingerprint("profiles")):
        return load_profiles(run)
    torch.manual_seed(settings.seed + 2)
    targets = [(index,) for index in range(len(data.labels))]
    sample = data.train.take(balanced(data.train.classes, min(1.0, 10_000 / len(data.train)), settings.seed)[0])
    stats = statistics(model, sae, residuals(model, sample, "profiles: residuals"), sample.classes)
    found: dict[str, list[Terms]] = {
        "learned": learned(model, sae, stats, targets, data.train, settings.profiles, settings.seed + 3, settings.bf16),
        "class-mean": [class_mean(stats, target, settings.profiles.terms) for target in targets],
    }
    profiles, choices = [], []
    neutral = answers(model, sae, data.selection)
    macs = count(model)
    for target in tqdm(targets, desc="profiles: choose", unit="class", dynamic_ncols=True):
        label = data.labels[target[0]]
        slice_ = _own_and_others(data.selection, target, settings.seed)
        profile, choice = choose(model, sae, data.selection.take(slice_), neutral.take(slice_), target, macs, found)
        profiles.append(replace(profile, name=label, classes=(label,)))
        choices.append({"class": label, **choice})
    run.write_json("profiles.json", profiles_to_json(profiles))
    result = {"choices": choices, "found": {k: [_terms_json(t) for t in v] for k, v in found.items()}}
    run.finish("profiles", settings.fingerprint("profiles"), result)
    return tuple(profiles)


def load_profiles(run: Run) -> tuple[SteeringProfile, ...]:
    """The chosen profiles of a run. Raises RunError when the stage is not finished."""
    run.info("profiles")
    return profiles_from_json(json.loads((run.folder / "profiles.json").read_text()))


def choose(
    model: GatedVit,
    sae: Sae,
    split: Split,
    neutral: Outcome,
    target: tuple[int, ...],
    macs: Macs,
    found: dict[str, list[Terms]],
) -> tuple[SteeringProfile, dict[str, Any]]:
    """The best of all strategies and strengths by `cost`, and what each measured on `split`."""
    before = effect(neutral, split.classes, target, macs)
    own = torch.isin(split.classes, torch.tensor(target)).float().mean().item()
    tried = []
    for strategy, of_target in found.items():
        for strength in STRENGTHS[strategy]:
            terms = at_strength(of_target[target[0]], strength)
            after = effect(answers(model, sae, split, terms), split.classes, target, macs)
            tried.append((cost(before, after, own), strategy, strength, terms, after))
    best = min(tried, key=lambda entry: entry[0])
    measured = [{"strategy": t[1], "strength": t[2], "cost": round(t[0], 4), **t[4].to_json()} for t in tried]
    evaluation = {"selection": {"images": round(own * len(split)), "tried": measured}}
    profile = SteeringProfile("", (), best[1], best[3])
    return profile, {"strategy": best[1], "strength": best[2], "before": before.to_json(), **evaluation}


def cost(before: Effect, after: Effect, own: float) -> float:
    """Head usage, plus 10 for every unit of recall lost, and of the others' accuracy lost beyond half a point.

    own: share of the target's images among those that were measured.
    """

    def others_accuracy(measured: Effect) -> float:
        return (measured.overall_accuracy - own * measured.recall) / (1 - own)

    lost = max(0.0, before.recall - after.recall)
    lost += max(0.0, others_accuracy(before) - others_accuracy(after) - 0.005)
    return after.head_usage + 10 * lost


def _own_and_others(split: Split, target: tuple[int, ...], seed: int) -> torch.Tensor:
    """Indices of the target's images and of as many others."""
    own = torch.isin(split.classes, torch.tensor(target))
    others = torch.nonzero(~own).flatten()
    chosen = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: int(own.sum())]]
    return torch.cat([torch.nonzero(own).flatten(), chosen])


def _terms_json(terms: Terms) -> dict[str, Any]:
    return {str(site): [[t.latent, t.scale, t.shift] for t in of_site] for site, of_site in terms.items()}
