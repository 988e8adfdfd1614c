"""Strategies that choose steering terms for a set of classes in closed form. All have the same signature:

    strategy(stats, target, count) -> Terms of at most `count` latents per site

STRATEGIES lists them by name. At strength 1 a strategy is as written here; the selection slice decides among its
strengths. learned.py finds terms by gradient instead.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training.profiles.statistics import SiteStatistics
from training.steering import SteeringTerm, Terms

Target = tuple[int, ...]
"""Class indices."""
Strategy = Callable[[SiteStatistics, Target, int], Terms]
Strengths = tuple[float, ...]
"""The strengths to try. A negative one turns an amplification into a suppression."""


def amplify_all(stats: SiteStatistics, target: Target, count: int) -> Terms:
    """Double every latent that is active on the target, as VS2 (arXiv:2506.01247) does. `count` is ignored."""
    return scaled(stats.of(target, "frequency"), stats.mean.shape[-1], 2.0)


def class_mean(stats: SiteStatistics, target: Target, count: int) -> Terms:
    """Double the latents that are most active on the target on average: the paper's likely form (arXiv:2603.26743)."""
    return scaled(stats.of(target, "mean"), count, 2.0)


def selectivity(stats: SiteStatistics, target: Target, count: int) -> Terms:
    """Double the latents that separate the target best from the rest, by AUROC above 0.5."""
    return scaled(stats.of(target, "auroc") - 0.5, count, 2.0)


def attribution(stats: SiteStatistics, target: Target, count: int) -> Terms:
    """Double the latents that raise the class logit and lower usage when they grow, by gradient x activation."""
    return scaled(stats.of(target, "attribution"), count, 2.0)


def causal(stats: SiteStatistics, target: Target, count: int) -> Terms:
    """Shift the latents that change the gates most per unit of their own activity, each towards closing units."""
    effect = stats.of(target, "effect").sum(-1)  # (S, L): summed over units
    reach = stats.of(target, "mean") + stats.of(target, "deviation")
    terms = {}
    for site, score in enumerate((effect * reach).abs()):
        chosen = _top(score, count)
        terms[site] = tuple(SteeringTerm(k, 1.0, -float(torch.sign(effect[site, k]) * reach[site, k])) for k in chosen)
    return _without_empty(terms)


def clamp(stats: SiteStatistics, target: Target, count: int) -> Terms:
    """Set the latents that separate the target best to their mean on the target, for every image."""
    terms = {}
    for site, score in enumerate(stats.of(target, "auroc") - 0.5):
        mean = stats.of(target, "mean")[site]
        terms[site] = tuple(SteeringTerm(k, 0.0, float(mean[k])) for k in _top(score, count))
    return _without_empty(terms)


def suppress(stats: SiteStatistics, target: Target, count: int) -> Terms:
    """Silence the latents of other classes: those most active on the rest relative to the target."""
    return scaled(stats.of(target, "rest") - stats.of(target, "mean"), count, 0.0)


def random_matched(seed: int) -> Strategy:
    """The control of class_mean: random latents of similar frequency and magnitude on the target, as many."""

    def strategy(stats: SiteStatistics, target: Target, count: int) -> Terms:
        generator = torch.Generator().manual_seed(seed)
        frequency, mean = stats.of(target, "frequency"), stats.of(target, "mean")
        terms = {}
        for site, of_site in class_mean(stats, target, count).items():
            taken: list[int] = []
            for term in of_site:
                distance = (frequency[site] - frequency[site, term.latent]).abs()
                distance = distance + (mean[site] / mean[site, term.latent].clamp_min(1e-6)).clamp(1e-6).log().abs()
                distance[[*taken, term.latent]] = torch.inf
                nearest = distance.topk(min(4, int(distance.isfinite().sum())), largest=False).indices
                if len(nearest):
                    taken.append(int(nearest[torch.randint(len(nearest), (1,), generator=generator)]))
            terms[site] = tuple(SteeringTerm(k, 2.0) for k in taken)
        return terms

    return strategy


STRATEGIES: dict[str, tuple[Strategy, Strengths]] = {
    "amplify-all": (amplify_all, (-0.5, 1.0, 3.0)),
    "class-mean": (class_mean, (-0.5, 1.0, 3.0)),
    "selectivity": (selectivity, (-0.5, 1.0, 3.0)),
    "attribution": (attribution, (0.5, 1.0, 3.0)),
    "causal": (causal, (0.25, 0.5, 1.0)),
    "clamp": (clamp, (0.5, 1.0, 2.0)),
    "suppress": (suppress, (0.5, 1.0)),
    "random": (random_matched(0), (-0.5, 1.0, 3.0)),
}


def scaled(score: Tensor, count: int, scale: float) -> Terms:
    """Terms with this scale for the `count` latents per site with the highest score (S, L) above 0."""
    return _without_empty({
        site: tuple(SteeringTerm(k, scale) for k in _top(of_site, count)) for site, of_site in enumerate(score)
    })  # fmt: skip


def _top(score: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest scores above 0."""
    best = score.topk(min(count, len(score)))
    return [int(k) for k, value in zip(best.indices, best.values, strict=True) if value > 0]


def _without_empty(terms: dict[int, tuple[SteeringTerm, ...]]) -> Terms:
    return {site: of_site for site, of_site in terms.items() if of_site}
