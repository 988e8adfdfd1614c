"""Significance of differences: exact McNemar, non-inferiority, bootstrap, Wilson intervals, Benjamini-Hochberg.

Most functions take, for each of the same images, whether its label was right before and after.

Letters: B images, S seeds, K clusters.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, false_discovery_control, norm, permutation_test
from scipy.stats import t as student

RESAMPLES = 2000
"""Resamples of a bootstrap."""
CONFIDENCE = 0.95
"""Of every interval."""
Right = NDArray[np.bool_]
"""(B,)"""
Rightness = NDArray[np.float64]
"""(B,): 0 or 1, or the share of several draws in which the image was right."""


def mcnemar(before: Right, after: Right) -> float:
    """Two-sided p of the exact test that, of the images whose answer changed, as many became right as became wrong."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def non_inferiority(before: Right, after: Right, margin: float, clusters: NDArray[np.int64] | None = None) -> float:
    """One-sided p of the score test of the hypothesis that the share of right images falls by `margin` or more.

    Tango 1998 (Statistics in Medicine 17, 891-908), for paired shares: (gained - lost + n margin) over its standard
    deviation at the boundary, where the likelihood is largest. With margin 0 it is McNemar's test without correction.
    With clusters, as in standard_error, the same shares of the effective_images of the change.
    """
    n = effective_images(after.astype(np.float64) - before, clusters)
    gained, lost = (n / len(before) * int(changed.sum()) for changed in (after & ~before, before & ~after))
    # 2 n q^2 - b q + c = 0: the maximum likelihood of P(lost) = q, P(gained) = q - margin
    b, c = gained + lost + margin * (2 * n + lost - gained), lost * margin * (1 + margin)
    q = (b + math.sqrt(max(0.0, b * b - 8 * n * c))) / (4 * n)  # a root of 0 may be rounded to one below it
    return float(norm.sf((gained - lost + n * margin) / math.sqrt(n * (2 * q - margin * (1 + margin)))))


def standard_error(values: Rightness, clusters: NDArray[np.int64] | None = None) -> float:
    """Of the mean of values (B,); infinite with fewer than two images or clusters. clusters (B,): images with the same
    number are not independent, those of different clusters are (Liang & Zeger 1986,
    https://doi.org/10.1093/biomet/73.1.13)."""
    apart = values - values.mean()
    sums = apart if clusters is None else _sums(apart, clusters)  # (K,)
    if len(sums) < 2:
        return math.inf
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1))) / len(values)


def not_below(values: Rightness, margin: float, clusters: NDArray[np.int64] | None = None) -> float:
    """One-sided p of the hypothesis that the mean of the images' values is -margin or less, by the normal
    approximation. Equal values have no error; their p is the probability that none of as many images or clusters is
    lost, if each is with a probability of mean + margin. clusters: as in standard_error."""
    error = standard_error(values, clusters)
    above = float(np.mean(values)) + margin
    if error == 0:
        return math.pow(min(1.0, max(0.0, 1 - above)), effective_images(values, clusters))
    return float(norm.sf(above / error))


def power(images: float, discordance: float, margin: float, level: float) -> float:
    """The power of `non_inferiority` when nothing truly changes on average, by the normal approximation.

    images: the number of independent ones. discordance: share of the images whose answer becomes right or wrong.
    """
    error = math.sqrt(discordance / images)
    return float(norm.cdf(margin / error - norm.isf(level))) if error else 1.0


def effective_images(values: Rightness, clusters: NDArray[np.int64] | None) -> float:
    """The number of independent images whose mean has the standard error of values (B,): 1 to B; if all values are
    equal, the number of clusters. clusters: as in standard_error."""
    images, error = float(len(values)), standard_error(values, clusters)
    if clusters is None:
        return images
    if error == 0:
        return float(len(np.unique(clusters)))
    return min(images, max(1.0, images * (standard_error(values) / error) ** 2))


def detectable(images: float, discordance: float, level: float) -> float:
    """The smallest margin that is shown with a power of 0.8 when nothing truly changes on average."""
    return float(norm.isf(level) + norm.ppf(0.8)) * math.sqrt(discordance / images)


def cluster_interval(values: Rightness, clusters: NDArray[np.int64] | None = None) -> tuple[float, float]:
    """95% percentile interval of the mean of values (B,) of images; those of a cluster are drawn together (Davison &
    Hinkley 1997, section 3.8). clusters: as in standard_error."""
    _, member = np.unique(np.arange(len(values)) if clusters is None else clusters, return_inverse=True)
    count, sums = np.bincount(member), np.bincount(member, values)  # (K,)
    rng, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = np.bincount(rng.integers(len(count), size=len(count)), minlength=len(count))  # (K,)
        means.append(sums @ drawn / (count @ drawn))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def seeds_interval(values: NDArray[np.float64], clusters: NDArray[np.int64] | None = None) -> tuple[float, float]:
    """95% interval of the mean of values (S, B) of S seeds, two or more, on the same B images, for new seeds and new
    images; from -1 to 1 with fewer than two images or clusters. clusters: as in standard_error.

    Seeds and images are crossed: the variance is that of both effects and their interaction in a two-way analysis of
    variance, the quantile that of Student's t with the degrees of freedom of Satterthwaite 1946
    (https://doi.org/10.2307/3002019). A bootstrap over so few seeds covers too little: of three that differ in nothing
    else, 75%, because a percentile interval ends at the lowest and the highest.
    """
    centre = values.mean()
    _, member = np.unique(np.arange(values.shape[1]) if clusters is None else clusters, return_inverse=True)
    apart = np.stack([np.bincount(member, of_seed) for of_seed in values - centre])  # (S, K)
    seeds, images = apart.shape
    if images < 2:
        return -1.0, 1.0
    apart = apart * images / values.shape[1]  # the mean over the clusters is that over the images
    of_seeds, of_images = apart.mean(1, keepdims=True), apart.mean(0)
    free = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    of_both = apart - of_seeds - of_images
    mean_squares = np.array([images * (of_seeds**2).sum(), seeds * (of_images**2).sum(), (of_both**2).sum()]) / free
    between, across, rest = mean_squares
    variance = max(between + across - rest, between, across)
    if variance == 0:
        return float(centre), float(centre)
    freedom = variance**2 / (mean_squares**2 / free).sum()
    reach = float(student.isf((1 - CONFIDENCE) / 2, freedom)) * math.sqrt(variance / (seeds * images))
    return float(centre - reach), float(centre + reach)


def paired(before: Rightness, after: Rightness, clusters: NDArray[np.int64] | None = None) -> float:
    """Two-sided p of the hypothesis that the mean does not change. McNemar's test, or for averaged draws its
    generalisation: the share of 9,999 random choices of the images' signs whose mean change is as large.

    clusters: as in standard_error; the signs of a cluster's images are chosen together.
    """
    change: NDArray[np.float64] = after.astype(np.float64) - before.astype(np.float64)
    if clusters is not None:
        change = _sums(change, clusters)
    elif not (change % 1).any():
        return mcnemar(change < 0, change > 0)  # only changed answers count
    if np.count_nonzero(change) < 2:
        return 1.0  # either sign is as large
    return float(
        permutation_test(
            (change[change != 0],), np.mean, permutation_type="samples", n_resamples=9999, batch=1000,
            rng=np.random.default_rng(0), vectorized=True,
        ).pvalue
    )  # fmt: skip


def change_interval(
    before: Right | Rightness, after: Right | Rightness, clusters: NDArray[np.int64] | None = None
) -> tuple[float, float]:
    """95% percentile interval of mean(after) - mean(before), images (or clusters of them) drawn in pairs; from -1 to 1
    with fewer than two of them."""
    change = after.astype(np.float64) - before.astype(np.float64)
    if math.isinf(standard_error(change, clusters)):
        return -1.0, 1.0
    if not change.any():
        return 0.0, 0.0
    if clusters is not None:
        return cluster_interval(change, clusters)
    result = bootstrap(
        (change,), np.mean, n_resamples=RESAMPLES, batch=100, confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def wilson(right: Right, clusters: NDArray[np.int64] | None = None) -> tuple[float, float]:
    """The 95% Wilson interval of a share.

    clusters: as in standard_error. The images then count as so many independent ones as have the same standard error
    (Dean & Pagano 2015, https://doi.org/10.1093/jssam/smv024); if all are right or all are wrong, as many as there are
    clusters.
    """
    share, n = float(right.mean()), float(len(right))
    if clusters is not None:
        error = standard_error(right.astype(np.float64), clusters)
        n = min(n, max(1.0, share * (1 - share) / error**2) if error else float(len(np.unique(clusters))))
    z = float(norm.isf((1 - CONFIDENCE) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: those below q have an expected share of false discoveries of at most q."""
    return [float(p) for p in false_discovery_control(np.asarray(p_values), method="bh")] if p_values else []


def _sums(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """(K,): the sums of the clusters' values."""
    _, member = np.unique(clusters, return_inverse=True)
    return np.bincount(member, values).astype(np.float64)


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN of no values."""
    return float(np.mean(list(values)))
