"""Stage `profiles`: finds terms with every strategy, then chooses strategy and strength per target on the selection
slice.

A target is a set of classes: each single class, and the contexts of the settings. The test split is not read.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from training import processes
from training.checkpoint import Run, RunError
from training.config import Settings
from training.data.splits import Data, Split, subset
from training.model.gated_vit import GatedNetwork, GatedVit
from training.model.inference import Effect, Outcome, answers, effect, steered_by
from training.model.macs import Macs, count
from training.model.sae import Sae
from training.profiles.last_block import shortcut
from training.profiles.learned import LEARNED, Search, gate_bias, learned
from training.profiles.statistics import measure
from training.profiles.strategies import STRATEGIES, Target
from training.sae.activations import residuals
from training.steering import (
    SteeringError,
    SteeringProfile,
    Terms,
    at_strength,
    canonical,
    check_name,
    profiles_from_json,
    profiles_to_json,
    terms_from_json,
    terms_to_json,
)

T = TypeVar("T")
Trial = tuple[str, float, Terms]
"""(strategy, strength, the terms at that strength)"""
STRENGTHS = {name: strengths for name, (_, strengths) in (*STRATEGIES.items(), *LEARNED.items())}
CONTROLS = ("random", "learned, random latents")
"""Strategies that are found and measured like the others, but never chosen."""
SCREENING, FINAL = 100, 500
"""Number of own images (and as many others) on which all candidates, and then the best of them, are measured."""
FINALISTS = 3
AT_A_TIME = 25
"""Targets per search. Each adds its rows, with their gradients, to every step."""


@dataclass(frozen=True)
class Candidate:
    """The terms of a strategy at a strength, with their `cost` and effect on some images."""

    strategy: str
    strength: float
    terms: Terms
    cost: float
    effect: Effect

    def to_json(self) -> dict[str, Any]:
        """Everything but the terms."""
        chosen = {"strategy": self.strategy, "strength": self.strength, "cost": round(self.cost, 4)}
        return {**chosen, **self.effect.to_json()}


def targets_of(labels: tuple[str, ...], contexts: Mapping[str, tuple[str, ...]]) -> dict[str, Target]:
    """Class indices by profile name: every label, and every context.

    Raises RunError when a context has an unknown label, the name of a label, or an invalid name.
    """
    targets: dict[str, Target] = {label: (index,) for index, label in enumerate(labels)}
    for given, of_context in contexts.items():
        try:
            name, members = check_name(given), [canonical(member) for member in of_context]
        except SteeringError as error:
            raise RunError(f"profiles.contexts: {error}") from error
        unknown = [label for label in members if label not in labels]
        if unknown or not members:
            raise RunError(f"profiles.contexts[{name!r}] names {unknown}; allowed: one or more of {', '.join(labels)}")
        if name in targets:
            what = "a label" if name in labels else "given twice"
            raise RunError(f"profiles.contexts has {name!r}, which is {what}; allowed: another name")
        targets[name] = tuple(labels.index(label) for label in members)
    return targets


def fit_profiles(settings: Settings, data: Data, run: Run, model: GatedVit, sae: Sae) -> tuple[SteeringProfile, ...]:
    """Find or load one profile per target. The targets are divided among the processes."""
    fingerprint = settings.fingerprint("profiles")
    if run.finished("profiles", fingerprint):
        return load_profiles(run)
    targets = targets_of(data.labels, settings.profiles.contexts)
    pool = subset(data.train, settings.profiles.pool, settings.seed)
    network, (pool, selection) = shortcut(model, [pool, data.selection])
    rank_of, count_of = processes.state().process_index, processes.state().num_processes
    mine = list(targets.values())[rank_of::count_of]
    macs = count(model)
    proposals, bias = find(settings, run, network, sae, macs, pool, mine) if mine else ({}, [])
    choose = partial(_choose, settings, macs, network, sae, selection, answers(network, selection))
    progress = tqdm(mine, desc="profiles: choose", unit="target", dynamic_ncols=True, disable=rank_of > 0)
    chosen = [
        choose(target, {strategy: terms[index] for strategy, terms in proposals.items()})
        for index, target in enumerate(progress)
    ]
    gathered = processes.gather(list(zip(mine, chosen, bias, strict=True)))
    if processes.is_main():
        by_target = {target: (choice, of_target) for target, choice, of_target in gathered}
        profiles, choices = [], []
        for name, target in targets.items():
            best, screened = by_target[target][0]
            profiles.append(SteeringProfile(name, tuple(data.labels[i] for i in target), best.strategy, best.terms))
            choices.append({
                "name": name,
                "chosen": best.to_json(),
                "screened": [candidate.to_json() for candidate in screened],
                "best": {c.strategy: terms_to_json(c.terms) for c in reversed(screened)},  # the cheapest of each wins
            })  # fmt: skip
        run.write_tensors("gate_bias", {"bias": torch.stack([by_target[target][1] for target in targets.values()])})
        run.write_json("profiles.json", profiles_to_json(profiles))
        run.finish("profiles", fingerprint, {"choices": choices})
    processes.wait()
    return load_profiles(run)


def find(
    settings: Settings, run: Run, model: GatedNetwork, sae: Sae, macs: Macs, pool: Split, targets: list[Target]
) -> tuple[dict[str, list[Terms]], list[Tensor]]:
    """For each target, the terms of every strategy and control, and the gate-logit bias (G, U), a baseline. The pool
    has training images only."""
    options = settings.profiles
    sample = subset(pool, 10_000, settings.seed)
    stats = measure(model, sae, macs, residuals(model, sample, "profiles: residuals"), sample)
    unsteered = answers(model, pool).logits.log_softmax(-1)  # (B, C)
    proposals = {
        name: [strategy(stats, target, options.terms) for target in targets]
        for name, (strategy, _) in STRATEGIES.items()
    }
    search = Search(model, macs, pool, unsteered, options, settings.seed + 3, settings.bf16)
    for name, (at_random, _) in LEARNED.items():
        by_gradient = partial(learned, search, sae, stats, random_candidates=at_random)
        proposals[name] = _learned_once(settings, run, name, partial(_in_parts, targets, by_gradient))
    return proposals, _in_parts(targets, partial(gate_bias, search))


def _in_parts(targets: list[Target], search: Callable[[list[Target]], list[T]]) -> list[T]:
    """The results of a search for each target. They do not depend on the other targets, so any number can share a
    search."""
    parts = [targets[start : start + AT_A_TIME] for start in range(0, len(targets), AT_A_TIME)]
    return [result for part in parts for result in search(part)]


def _choose(
    settings: Settings,
    macs: Macs,
    model: GatedNetwork,
    sae: Sae,
    selection: Split,
    neutral: Outcome,
    target: Target,
    proposals: dict[str, Terms],
) -> tuple[Candidate, list[Candidate]]:
    """The best candidate for a target, and all screened candidates in order of rising cost."""

    def ranked(images: int, tried: Iterable[Trial]) -> list[Candidate]:
        rows = own_and_others(selection, target, images, settings.seed)
        return rank(model, sae, macs, selection.take(rows), neutral.take(rows), target, tried)

    screened = ranked(SCREENING, _at_strengths(proposals))
    finalists = [candidate for candidate in screened if candidate.strategy not in CONTROLS][:FINALISTS]
    return ranked(FINAL, [(c.strategy, c.strength, c.terms) for c in finalists])[0], screened


def _learned_once(settings: Settings, run: Run, name: str, search: Callable[[], list[Terms]]) -> list[Terms]:
    """The terms of a search that takes minutes; read from the run folder if it finished before an interruption."""
    file = f"profiles.{name.replace(', ', '-').replace(' ', '-')}"
    if processes.state().num_processes > 1:  # each process searches for different targets
        return search()
    stored = run.read_state(file, settings.fingerprint("profiles"))
    if stored:
        return [terms_from_json(terms) for terms in stored[1]["terms"]]
    results = search()
    run.write_state(file, settings.fingerprint("profiles"), {}, {"terms": [terms_to_json(terms) for terms in results]})
    return results


def rank(
    model: GatedNetwork,
    sae: Sae,
    macs: Macs,
    split: Split,
    neutral: Outcome,
    target: Target,
    tried: Iterable[Trial],
) -> list[Candidate]:
    """The trials measured on the split, in order of rising `cost`. neutral: the answers without steering."""
    before = effect(neutral, split.classes, target, macs)
    candidates = []
    for strategy, strength, terms in tried:
        after = effect(answers(model, split, steered_by(sae, terms)), split.classes, target, macs)
        candidates.append(Candidate(strategy, strength, terms, cost(before, after), after))
    return sorted(candidates, key=lambda candidate: candidate.cost)


def load_profiles(run: Run) -> tuple[SteeringProfile, ...]:
    """The chosen profiles of a run. Raises RunError when the stage is not finished."""
    run.info("profiles")
    return profiles_from_json(json.loads((run.folder / "profiles.json").read_text()))


def cost(before: Effect, after: Effect) -> float:
    """Unit usage + 10 x (lost recall + lost accuracy of the others)."""
    lost = max(0.0, before.recall - after.recall) + max(0.0, before.others_accuracy - after.others_accuracy)
    return after.usage + 10 * lost


def own_and_others(split: Split, target: Target, count: int, seed: int) -> torch.Tensor:
    """Indices of at most `count` random images of the target, and of as many others."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.isin(split.classes, torch.tensor(target))
    picked = []
    for rows in (torch.nonzero(own).flatten(), torch.nonzero(~own).flatten()):
        picked.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat([picked[0], picked[1][: len(picked[0])]])


def _at_strengths(proposals: Mapping[str, Terms]) -> Iterator[Trial]:
    for strategy, terms in proposals.items():
        for strength in STRENGTHS[strategy]:
            yield strategy, strength, at_strength(terms, strength)
