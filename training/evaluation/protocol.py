"""Step `evaluate`: the whole protocol on the test split. Writes results.json, with every number of the report.

The criteria (criteria.py) were set before a test image was read, and apply to all classes together.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training import soundness
from training.checkpoint import Run
from training.config import Settings
from training.data.pixels import Split
from training.data.splits import Data, subset
from training.dial import Dial
from training.evaluation import significance
from training.evaluation.baselines import each_under, prior_bias
from training.evaluation.changes import CHANGES, DIFFERENCES, Values, changes, write_values
from training.evaluation.class_agnostic import class_agnostic, class_knowledge
from training.evaluation.controls import LAST_BLOCK, Control, controls
from training.evaluation.criteria import LEVEL, MARGINS, MARGINS_OF_DIAL, criteria
from training.evaluation.dial import Along, compare_areas, compare_at, measure_dial, measure_unsteered
from training.evaluation.latent_images import describe_latents
from training.evaluation.rivals import Slice, compare, rivals_of, usage_to_match
from training.evaluation.significance import mean
from training.model.first_gate import from_first_gate, tokens_size
from training.model.gated_vit import GatedNetwork, GatedVit, keep_all
from training.model.inference import Outcome, answers, effect, gate_diagnostics, rounded, steered_by, usage_of, usages
from training.model.macs import Macs, count
from training.model.sae import Sae
from training.profiles.fit import load_profiles
from training.profiles.last_block import best_subsets, shortcut, store
from training.profiles.strategies import Target
from training.sae.fit import load_sae
from training.steering import SteeringProfile, digest
from training.vit.fit import load_vit

PATTERN = (
    "under its own profile at most 0.36 of the {units} run, and recall is at least 2 points higher than without "
    "steering, significantly so (in pairs, Benjamini-Hochberg over the classes, 5%)"
)
MADE_OF = ("vit.safetensors", "sae.safetensors", "profiles.json")
"""The files of a run that its results follow from, the model first."""
STATE = "evaluate.state"
"""Name of the tensors in a run folder: what an interrupted `evaluate` has measured."""
TOKENS = 2 * 2**30
"""Bytes. Up to this size, the tokens that enter the first gated block are kept for all images, in place of the
images."""


def evaluate(
    settings: Settings, data: Data, run: Run, model: GatedVit, sae: Sae, profiles: Sequence[SteeringProfile]
) -> dict[str, Any]:
    """Measure no steering, every profile, every rival and the trained controls; write results.json.

    What was measured on the same files before is kept: only controls that were trained since are measured.
    """
    made_of = run.digest(*MADE_OF, also=(settings.fingerprint("profiles"), dict(data.digests)))
    results = run.results() if run.has_results() else {}
    if results.get("made_of") == made_of:
        print(f"evaluate: keeps what {run.folder / 'results.json'} has; without that file all is measured", flush=True)
    else:
        results = _measure(settings, data, run, model, sae, profiles, made_of) | {"made_of": made_of}
        run.write_json("results.json", results)
        run.remove_tensors(STATE)
    _compare_controls(settings, data, run, results, count(model).dense)
    of_results = soundness.of_results(results)
    soundness.show("evaluate", of_results)
    of_stages = (*soundness.of_vit(run.info("vit")), *soundness.of_sae(run.info("sae")))
    results["warnings"] = [*data.warnings, *of_stages, *of_results]
    run.write_json("results.json", results)
    return results


def _measure(
    settings: Settings,
    data: Data,
    run: Run,
    model: GatedVit,
    sae: Sae,
    profiles: Sequence[SteeringProfile],
    made_of: str,
) -> dict[str, Any]:
    """The results of the model itself: all but the controls. made_of: the digest of what they follow from. If this is
    interrupted, the part before the dial, about half of the time, is kept for the next run."""
    network, entered = _from_the_gates(settings, model, data)
    dial = _knots(run) if settings.vit.dial else None
    stored = run.read_tensors(STATE)
    if stored and stored.meta["made_of"] == made_of:
        results: dict[str, Any] = stored.meta["results"]
    else:
        results = _protocol(settings, entered, run, model, network, sae, profiles, dial)
        run.write_tensors(STATE, {}, {"made_of": made_of, "results": results})
    if dial is not None:
        of_dial, along = measure_dial(dial, network, sae, profiles, entered, count(model), settings.seed)
        results |= of_dial
        along.write(run)
    results["latents"] = describe_latents(model, sae, profiles, data.selection, data.labels)
    return results


def _compare_controls(settings: Settings, data: Data, run: Run, results: dict[str, Any], dense: int) -> None:
    """Add the controls that are trained to the results. Those that are there, and not trained again since, are kept.

    dense: the MACs of the run's own model with every unit open.
    """
    present = {name: control for name, control in controls(settings, data, run).items() if control.run.has("vit")}
    last_block = present.pop(LAST_BLOCK, None)
    if last_block and last_block.run.has("profiles"):
        made_of = last_block.run.digest(*MADE_OF)
        if results.get("last_block", {}).get("made_of") != made_of:
            results["last_block"] = _last_block(last_block, data) | {"made_of": made_of}
    along = Along.read(run, data.test) if settings.vit.dial else None
    stored = run.read_tensors(DIFFERENCES)
    known = results.get("controls", {})
    differences: dict[str, Values] = {}
    for name, control in present.items():
        made_of = control.run.digest(MADE_OF[0])
        if known.get(name, {}).get("made_of") == made_of:
            of_images = stored.tensors[name].numpy() if stored and name in stored.tensors else np.empty(0)
        else:
            entry, of_images = _control(name, control, data, dense, along)
            results["controls"] = known = {**known, name: entry | {"made_of": made_of}}
        if len(of_images):
            differences[name] = of_images
    if known:
        write_values(run, DIFFERENCES, differences, data.test, _shared(settings, data))


def _from_the_gates(settings: Settings, model: GatedVit, data: Data) -> tuple[GatedNetwork, Data]:
    """A faster equivalent of the model, and its data: if they fit, the tokens that enter the first gated block instead
    of images. Of the training images, only those for finding profiles. The whole network skips the units that a batch
    closes."""
    splits = [subset(data.train, settings.profiles.pool, settings.seed), data.selection, data.test]
    network, entered = shortcut(model, splits)
    if network is model:
        if tokens_size(model, splits) <= TOKENS:
            model, entered = from_first_gate(model, splits)
        network = copy.copy(model)
        network.skipping = True
    return network, replace(data, train=entered[0], selection=entered[1], test=entered[2])


def _protocol(
    settings: Settings,
    data: Data,
    run: Run,
    model: GatedVit,
    network: GatedNetwork,
    sae: Sae,
    profiles: Sequence[SteeringProfile],
    dial: Dial | None,
) -> dict[str, Any]:
    """The results. network, data: from _from_the_gates."""
    macs, selection, test = count(model), data.selection, data.test
    targets = [tuple(data.labels.index(label) for label in profile.classes) for profile in profiles]
    ungated = answers(network, test, decide=keep_all)
    neutral = answers(network, test)
    under = [
        answers(network, test, steered_by(sae, profile.terms))
        for profile in tqdm(profiles, desc="evaluate: profiles", unit="profile", dynamic_ncols=True)
    ]
    values = [changes(neutral, outcome, test.classes, target) for target, outcome in zip(targets, under, strict=True)]
    entries = [
        _profile_entry(profile, target, neutral, outcome, of_images, test, macs)
        for profile, target, outcome, of_images in zip(profiles, targets, under, values, strict=True)
    ]
    singles = [index for index, target in enumerate(targets) if len(target) == 1]
    means = {metric: np.mean([values[i][metric] for i in singles], 0) for metric in MARGINS}
    write_values(run, CHANGES, means, test, _shared(settings, data))
    matched = [
        usage_to_match(network, macs, sae, selection, profile, target)
        for profile, target in zip(profiles, targets, strict=True)
    ]
    usage = mean(matched[i] for i in singles)
    for_all = class_agnostic(settings, network, sae, macs, data.train, selection, usage, dial)
    alike = {name: answers(network, test, rival.steer, rival.decide) for name, rival in for_all.items()}
    slices = []
    rivals = rivals_of(run, settings.profiles, network, macs, sae, selection, profiles, targets, matched, settings.seed)
    for index in tqdm(range(len(profiles)), desc="evaluate: rivals", unit="profile", dynamic_ncols=True):
        others = [under[other] for other in singles if other != index]
        measured = rivals(index, Slice.of(test, targets[index], neutral, under[index], others, alike))
        entries[index]["rivals"] = {name: rival.effect.to_json() for name, rival in measured.items()}
        slices.append(measured)
    of_classes = [entries[index] for index in singles]
    _adjust(of_classes)
    whole = {"ungated": ungated, "neutral": neutral}
    if len(singles) == len(data.labels):
        whole["by_predicted_class"] = each_under(neutral.predicted, [under[index] for index in singles])
    return {
        "split": "test",
        "images": len(test),
        **({} if test.clusters is None else {"clusters": len(np.unique(test.clusters))}),
        "most_common_label": soundness.most_common(test.classes),
        "labels": list(data.labels),
        "seed": settings.seed,
        "gated_blocks": list(model.gated_blocks),
        "macs": macs.to_json(),
        **{name: _whole(outcome, test, macs) for name, outcome in whole.items()},
        "diagnostics": gate_diagnostics(neutral, test.classes),
        "profiles": entries,
        "mean_change": {
            key: round(mean(e["after"][key] - e["before"][key] for e in of_classes), 5)
            for key in of_classes[0]["before"]
        },
        "mean_after": {key: round(mean(e["after"][key] for e in of_classes), 5) for key in of_classes[0]["after"]},
        "rivals": compare([slices[index] for index in singles]),
        "class_agnostic": class_knowledge(test, {targets[i]: under[i] for i in singles}, alike, macs),
        "success": criteria(of_classes),
        "pattern": [_pattern(entry) for entry in of_classes if _shows_pattern(entry)],
        "pattern_definition": PATTERN.format(units="units (by their MACs)" if macs.mlp_groups else "heads"),
    }


def _profile_entry(
    profile: SteeringProfile,
    target: Target,
    neutral: Outcome,
    under: Outcome,
    values: Mapping[str, Values],
    test: Split,
    macs: Macs,
) -> dict[str, Any]:
    classes, clusters = test.classes, test.clusters
    own = torch.isin(classes, torch.tensor(target))
    right = [(outcome.predicted == classes).numpy() for outcome in (neutral, under)]
    before, after = (of_images[own.numpy()] for of_images in right)
    of_own = None if clusters is None else clusters[own.numpy()]
    p_values = {
        **{metric: significance.not_below(values[metric], margin, clusters) for metric, margin in MARGINS.items()},
        "recall": significance.non_inferiority(before, after, MARGINS["recall"], of_own),
        "overall_accuracy": significance.non_inferiority(right[0], right[1], MARGINS["overall_accuracy"], clusters),
    }
    recall, precision = prior_bias(neutral, classes, target, effect(under, classes, target, macs).precision)
    return {
        "name": profile.name,
        "classes": list(profile.classes),
        "strategy": profile.strategy,
        "digest": digest(profile.terms),
        "terms": sum(map(len, profile.terms.values())),
        "images": int(own.sum()),
        "before": effect(neutral, classes, target, macs).to_json(),
        "after": effect(under, classes, target, macs).to_json(),
        "recall_interval_before": _pair(significance.wilson(before, of_own)),
        "recall_interval_after": _pair(significance.wilson(after, of_own)),
        "recall_change_interval": _pair(significance.change_interval(before, after, of_own)),
        "overall_change_interval": _pair(significance.change_interval(right[0], right[1], clusters)),
        "recall_p": significance.paired(before, after, of_own),
        "non_inferiority": p_values,
        "power": _power(before, after, of_own),
        "prior_bias": {"recall": round(recall, 5), "precision": round(precision, 5)},
        **_label_masking(neutral.take(own), under.take(own), classes[own], target),
        **_per_unit(neutral.take(own), "before"),
        **_per_unit(under.take(own), "after"),
    }


def _label_masking(neutral: Outcome, under: Outcome, classes: Tensor, target: Target) -> dict[str, Any]:
    """The accuracy of a context's images when only its labels are allowed as answers, which needs no steering."""
    if len(target) == 1:
        return {}
    members = torch.tensor(target)

    def accuracy(outcome: Outcome) -> float:
        predicted = members[outcome.logits[:, members].argmax(1)]
        return round((predicted == classes).double().mean().item(), 5)

    return {"label_masking": {"before": accuracy(neutral), "after": accuracy(under)}}


def _per_unit(outcome: Outcome, when: str) -> dict[str, Any]:
    """Share of the images for which each head (G, H) is open, and each MLP group (G, M) if there are any."""
    found = {f"head_usage_{when}": rounded(outcome.head_gate.double().mean(0))}
    if outcome.mlp_gate.shape[2]:
        found[f"mlp_usage_{when}"] = rounded(outcome.mlp_gate.double().mean(0))
    return found


def _power(before: significance.Right, after: significance.Right, clusters: np.ndarray | None) -> dict[str, float]:
    """The power of the non-inferiority test of recall at this number of images and changed answers, if nothing
    changed."""
    discordance = float((before != after).mean())
    images = significance.effective_images(after.astype(np.float64) - before, clusters)
    return {
        "discordance": round(discordance, 5),
        "power": round(significance.power(images, discordance, MARGINS["recall"], LEVEL), 5),
        "detectable": round(significance.detectable(images, discordance, LEVEL), 5),
    }


def _adjust(entries: Sequence[dict[str, Any]]) -> None:
    """Adjust the p-values by Benjamini-Hochberg over the classes, in place."""
    for entry, p in zip(entries, significance.benjamini_hochberg([e["recall_p"] for e in entries]), strict=True):
        entry["recall_p_adjusted"] = p


def _shows_pattern(entry: dict[str, Any]) -> bool:
    gained = entry["after"]["recall"] - entry["before"]["recall"]
    shown: bool = usage_of(entry["after"]) <= 0.36 and gained >= 0.02 and entry["recall_p_adjusted"] < 0.05
    return shown


def _pattern(entry: dict[str, Any]) -> dict[str, Any]:
    before, after = entry["before"], entry["after"]
    return {
        "name": entry["name"],
        "usage": [usage_of(before), usage_of(after)],
        "recall": [before["recall"], after["recall"]],
        "precision": [before["precision"], after["precision"]],
        "p": entry["recall_p"],
        "p_adjusted": entry["recall_p_adjusted"],
        "prior_bias_recall": entry["prior_bias"]["recall"],
    }


def _shared(settings: Settings, data: Data) -> str | None:
    """The digest of the test images if all seeds share them."""
    return None if settings.data.max_test else data.digests.get("test images")


def _control(name: str, control: Control, data: Data, dense: int, along: Along | None) -> tuple[dict[str, Any], Values]:
    """The measurements of a control, with how the run's dial, `along`, compares with it; and the difference of each
    test image, empty if they cannot be compared.

    compute_fraction: of the MACs of the run's own model with every unit open, which are `dense`.
    """
    model = load_vit(control.run)
    gated = control.settings.vit.gate_epochs + control.settings.vit.joint_epochs > 0
    outcome = answers(model, data.test) if gated else answers(model, data.test, decide=keep_all)
    macs, classes = count(model), data.test.classes
    effects = [effect(outcome, classes, (label,), macs) for label in range(len(data.labels))]
    whole = _whole(outcome, data.test, macs)
    compute = whole["compute_fraction"] * macs.dense / dense
    found = {
        "what": control.what,
        **whole,
        "compute_fraction": round(compute, 5),
        "recall": [round(e.recall, 5) for e in effects],
        "precision": [round(e.precision, 5) for e in effects],
    }
    differences = np.empty(0)
    if along is not None and control.settings.vit.dial:
        network, entered = _from_the_gates(control.settings, model, data)
        unsteered = measure_unsteered(_knots(control.run), network, entered, macs, control.settings.seed)
        found["dial"] = unsteered.tested
        found["area"], differences = compare_areas(along, unsteered.along)
    elif along is not None and name in MARGINS_OF_DIAL and along.spent[0] <= compute <= along.spent[-1]:
        right = (outcome.predicted == classes).numpy()
        found["dial_at_its_compute"], differences = compare_at(compute, along, right, MARGINS_OF_DIAL[name])
    return found, differences


def _knots(run: Run) -> Dial:
    return Dial.from_json(run.info("vit")["result"]["dial"])


def _last_block(control: Control, data: Data) -> dict[str, Any]:
    """The same protocol for the model with only the last block gated, and the oracle over all sets of its heads."""
    model = load_vit(control.run)
    network, entered = _from_the_gates(control.settings, model, data)
    sae, profiles = load_sae(control.run), load_profiles(control.run)
    results = _protocol(control.settings, entered, control.run, model, network, sae, profiles, None)
    if model.leaving == 1:
        cache = store(model, data.test)
        results["oracle"] = {
            label: best_subsets(cache, data.test.classes, index) for index, label in enumerate(data.labels)
        }
    return results


def _whole(outcome: Outcome, split: Split, macs: Macs) -> dict[str, Any]:
    right = (outcome.predicted == split.classes).numpy()
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": _pair(significance.wilson(right, split.clusters)),
        **{name: round(usage, 5) for name, usage in usages(outcome, macs).items()},
        "compute_fraction": round(outcome.compute_fraction(macs).mean().item(), 5),
    }


def _pair(values: tuple[float, float]) -> list[float]:
    return [round(value, 5) for value in values]
