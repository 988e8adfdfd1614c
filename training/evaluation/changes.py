"""Changes of metrics as means over images, so that one test and one bootstrap work for all metrics.

Each image has a value; the mean of the values is exactly the change of the metric, and their deviation / sqrt(B) is its
standard error. Recall and precision are ratios of means, so their values are linearised; the values of AUROC are the
placement values of DeLong et al. (1988, https://doi.org/10.2307/2531595).

Letters: B images.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from training.checkpoint import Run
from training.data.pixels import Split
from training.model.inference import Outcome

CHANGES = "changes"
"""Name of the tensors in a run folder: for each metric the values of all test images, mean over the class profiles."""
DIFFERENCES = "differences"
"""Name of the tensors in a run folder: for each control that the dial is compared with, the differences of all test
images."""
CLUSTERS = "clusters"
"""Among these tensors: Split.clusters of the images, if they are not independent."""
Values = NDArray[np.float64]
"""(B,)"""


def write_values(run: Run, name: str, values: Mapping[str, Values], split: Split, images: str | None) -> None:
    """Write CHANGES or DIFFERENCES of the images of a split. images: their digest if all seeds share them."""
    clusters = {} if split.clusters is None else {CLUSTERS: torch.from_numpy(split.clusters)}
    tensors = {key: torch.from_numpy(of_images) for key, of_images in values.items()}
    run.write_tensors(name, tensors | clusters, {"images": images})


def changes(before: Outcome, after: Outcome, classes: Tensor, target: Sequence[int]) -> dict[str, Values]:
    """The values of the metrics of criteria.MARGINS, which Effect defines, by name. classes (B,): the true ones."""
    first, second = (_values(outcome, classes, torch.tensor(list(target))) for outcome in (before, after))
    return {metric: second[metric] - first[metric] for metric in first}


def _values(outcome: Outcome, classes: Tensor, target: Tensor) -> dict[str, Values]:
    own, claimed, right = (
        mask.double().numpy()
        for mask in (
            torch.isin(classes, target), torch.isin(outcome.predicted, target), outcome.predicted == classes
        )
    )  # fmt: skip
    score = outcome.logits.softmax(-1)[:, target].sum(1).double().numpy()
    return {
        "recall": ratio(right * own, own),
        "precision": ratio(right * claimed, claimed),
        "auroc": placements(score, own > 0),
        "overall_accuracy": right,
    }


def ratio(part: Values, whole: Values) -> Values:
    """Values whose mean is sum(part) / sum(whole)."""
    share = part.sum() / max(whole.sum(), 1)
    return np.asarray(share + (part - share * whole) / max(whole.mean(), 1 / len(whole)))


def placements(score: Values, own: NDArray[np.bool_]) -> Values:
    """Values whose mean is the AUROC: the share of images of the other kind that an image is ranked correctly
    against."""
    ranks, values = rankdata(score), np.empty(len(score))
    for kind in (own, ~own):
        below = (ranks[kind] - rankdata(score[kind])) / max((~kind).sum(), 1)  # share of the other kind below
        values[kind] = below if kind is own else 1 - below
    area = values[own].mean()
    weight = np.where(own, own.mean(), 1 - own.mean())
    return np.asarray(area + (values - area) / weight)
