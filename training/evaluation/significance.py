"""How sure a difference is: exact McNemar, paired bootstrap, Wilson intervals, Benjamini-Hochberg. From scipy.

Every function takes, per image and on the same images, whether it was right before, and after.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, false_discovery_control, permutation_test

Right = NDArray[np.bool_]
"""(B,)"""
Rightness = NDArray[np.float64]
"""(B,): 0 or 1, or between them the share of several draws in which the image was right."""


def mcnemar(before: Right, after: Right) -> float:
    """Two-sided p of the exact test: of the images whose answer changed, as many got right as got wrong."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def mcnemar_below(before: Right, after: Right, margin: float) -> float:
    """One-sided p that the change is not below -margin (a share): small means significantly worse than that.

    Exact given the number of changed images n: gained ~ Binomial(n, 1/2 - margin * B / (2 n)) at the boundary.
    """
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    changed = gained + lost
    if not changed:
        return 1.0
    share = min(max(0.5 - margin * len(before) / (2 * changed), 0.0), 1.0)
    return float(binomtest(gained, changed, share, alternative="less").pvalue)


def paired(before: Rightness, after: Rightness, seed: int = 0) -> float:
    """Two-sided p that the mean does not change. McNemar's, or where draws were averaged what that is a case of: in
    how many of 9,999 random choices of the images' signs is the mean change as large?"""
    change = after - before
    if not (change % 1).any():
        return mcnemar(change < 0, change > 0)  # only images whose answer changed count
    return float(
        permutation_test(
            (change[change != 0],), np.mean, permutation_type="samples", n_resamples=9999, batch=1000,
            rng=np.random.default_rng(seed), vectorized=True,
        ).pvalue
    )  # fmt: skip


def change_interval(
    before: Right | Rightness, after: Right | Rightness, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(after) - mean(before), images drawn in pairs."""
    change = after.astype(np.float64) - before.astype(np.float64)
    if not change.any():
        return 0.0, 0.0
    found = bootstrap(
        (change,), np.mean, n_resamples=2000, batch=100, confidence_level=level, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def wilson(right: Right, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(level, "wilson")
    return float(interval.low), float(interval.high)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p: what is below q is a set with an expected share of false discoveries of at most q."""
    return [float(p) for p in false_discovery_control(np.asarray(p_values), method="bh")] if p_values else []


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN of no values."""
    return float(np.mean(list(values)))
