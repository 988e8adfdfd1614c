"""Warnings of data that are too few or unbalanced, and of a model, gates or autoencoders that did not train.

They are computed from the files of a run folder, so export shows them for older runs too. None of them stops a run.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SMALL, SMALL_TEST = 20, 10
"""Fewest images of a label in training, and in selection or test, without a warning."""
UNBALANCED = 10
"""Largest ratio of training images between two labels without a warning."""
MOST_UNEXPLAINED = 0.5
"""Largest fraction of variance unexplained of an autoencoder without a warning."""
MOST_DEAD = 0.9
"""Largest share of latents that are active on no training image, without a warning."""
LEAST_AGREEMENT = 0.8
"""Smallest share of gates that decide alike on the residual and on its reconstruction, without a warning."""


def show(step: str, warnings: Iterable[str]) -> None:
    """Print the warnings of a step to standard error."""
    for warning in warnings:
        print(f"{step}: warning: {warning}", file=sys.stderr, flush=True)


def most_common(classes: Tensor) -> float:
    """Accuracy of always answering the most common class."""
    return int(classes.bincount().max()) / len(classes)


def of_data(labels: Sequence[str], classes: Mapping[str, Tensor]) -> list[str]:
    """Warnings about the number of images per label. classes: by split, each (B,)."""
    warnings = []
    for split, of_split in classes.items():
        counts = of_split.bincount(minlength=len(labels))
        least = SMALL if split == "train" else SMALL_TEST
        few = [f"{labels[index]!r}: {counts[index]}" for index in torch.nonzero(counts < least).flatten().tolist()]
        if few:
            more = f" and {len(few) - 5} more labels" if len(few) > 5 else ""
            warnings.append(f"few {split} images of {', '.join(few[:5])}{more}; advised: {least} or more of each label")
        if split == "train" and counts.max() > UNBALANCED * counts.min():
            rare, often = int(counts.argmin()), int(counts.argmax())
            warnings.append(
                f"unbalanced labels: {counts[often]} train images of {labels[often]!r}, {counts[rare]} of "
                f"{labels[rare]!r}; advised: at most {UNBALANCED} times as many"
            )
    return warnings


def of_vit(vit: Mapping[str, Any]) -> list[str]:
    """Warnings about a model, from its measurements on the selection slice. vit: the content of vit.json."""
    result, settings = vit["result"], vit["settings"]["vit"]
    measured = result["selection"]
    chance = measured.get("most_common_label", 1 / len(result["labels"]))
    warnings = []
    for name in ("ungated_accuracy", "accuracy"):
        if _near(measured[name], chance, measured.get("images")):
            what = name.replace("_", " ")
            warnings.append(
                f"{what} is {measured[name]:.4f} on the selection images, near the {chance:.4f} of always answering "
                "the most common label. Train longer (--vit.backbone-epochs, --vit.joint-epochs) or on more images"
            )
            break
    usage, target = measured.get("unit_usage", measured["head_usage"]), settings["usage_target"]
    if settings["gate_epochs"] + settings["joint_epochs"] and usage > (1 + target) / 2:
        name, units = ("unit usage", "units") if "unit_usage" in measured else ("head usage", "heads")
        warnings.append(
            f"{name} is {usage:.4f}, target {target}: the gates did not learn to close {units}. Train longer "
            "(--vit.joint-epochs)"
        )
    return warnings


def of_sae(sae: Mapping[str, Any]) -> list[str]:
    """Warnings about autoencoders, from the worst site of each measure. sae: the content of sae.json."""
    sites, warnings = sae["result"]["fidelity"], []
    for key, what, limit in (
        ("fvu", "leaves a fraction of variance unexplained of", MOST_UNEXPLAINED),
        ("dead_training", "has a share of dead latents of", MOST_DEAD),
    ):
        worst = max(site.get(key, 0.0) for site in sites)
        if not worst <= limit:
            warnings.append(f"an autoencoder {what} {worst:.4f}; advised: at most {limit}")
    agreement = min(site["gate_agreement"] for site in sites)
    if not agreement >= LEAST_AGREEMENT:
        warnings.append(
            f"gates agree behind an autoencoder in a share of {agreement:.4f}; advised: {LEAST_AGREEMENT} or more"
        )
    return [f"{warning}. Train longer (--sae.epochs) or on more images" for warning in warnings]


def of_results(results: Mapping[str, Any]) -> list[str]:
    """Warnings about an evaluation, from its test split. results: the content of results.json."""
    chance = results.get("most_common_label", 1 / len(results["labels"]))
    accuracy = results["neutral"]["accuracy"]
    if not _near(accuracy, chance, results["images"]):
        return []
    return [
        f"accuracy is {accuracy:.4f} on the {results['split']} images, near the {chance:.4f} of always answering the "
        "most common label"
    ]


def _near(accuracy: float, chance: float, images: int | None) -> bool:
    """Whether accuracy is less than a tenth of the way from chance to 1, or within two standard errors of chance."""
    error = math.sqrt(chance * (1 - chance) / images) if images else 0.0
    return not accuracy > chance + max(0.1 * (1 - chance), 2 * error)
