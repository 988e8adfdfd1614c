"""Strategies with statistics that are small enough for mental arithmetic."""

import pytest
import torch
from small_models import images, model_of, small
from torch import Tensor

from training.config import ProfileSettings
from training.data.splits import Split
from training.model.inference import answers
from training.model.macs import count
from training.profiles.learned import Search, gate_bias
from training.profiles.statistics import SiteStatistics, auroc, measure
from training.profiles.strategies import (
    STRATEGIES,
    amplify_all,
    attribution,
    causal,
    clamp,
    class_mean,
    random_matched,
    selectivity,
    suppress,
)
from training.sae.activations import residuals
from training.steering import SteeringTerm


def row(*values: float) -> Tensor:
    """One site, one class."""
    return torch.tensor([[values]])


STATS = SiteStatistics(
    # latent:    0    1    2    3
    mean=row(4.0, 1.0, 0.0, 2.0),
    deviation=row(1.0, 1.0, 0.0, 2.0),
    frequency=row(0.9, 0.5, 0.0, 0.1),
    rest=row(4.5, 0.2, 3.0, 0.0),
    auroc=row(0.45, 0.80, 0.10, 0.95),
    effect=torch.tensor([[[[0.1, 0.0], [-1.0, -1.0], [9.0, 9.0], [0.5, -0.1]]]]),  # two heads
    attribution=row(-3.0, 2.0, 0.0, 0.5),
)


def latents(terms: dict[int, tuple[SteeringTerm, ...]]) -> list[int]:
    return [term.latent for term in terms[0]]


def test_amplify_all_takes_every_latent_that_is_ever_active() -> None:
    assert sorted(latents(amplify_all(STATS, (0,), 1))) == [0, 1, 3]


def test_class_mean_takes_the_most_active() -> None:
    assert class_mean(STATS, (0,), 2) == {0: (SteeringTerm(0, 2.0), SteeringTerm(3, 2.0))}


def test_selectivity_takes_latents_of_the_class_and_none_of_its_absence() -> None:
    assert latents(selectivity(STATS, (0,), 4)) == [3, 1]


def test_attribution_takes_what_helps_and_nothing_that_harms() -> None:
    assert latents(attribution(STATS, (0,), 4)) == [1, 3]


def test_causal_shifts_each_latent_towards_closing_heads() -> None:
    # effect summed over heads x (mean + deviation): 0.1 * 5, -2 * 2, 18 * 0, 0.4 * 4
    assert causal(STATS, (0,), 2) == {0: (SteeringTerm(1, 1.0, 2.0), SteeringTerm(3, 1.0, -4.0))}


def test_clamp_sets_the_mean_of_the_class() -> None:
    assert clamp(STATS, (0,), 1) == {0: (SteeringTerm(3, 0.0, 2.0),)}


def test_suppress_silences_what_belongs_to_others() -> None:
    # rest - mean: 0.5, -0.8, 3.0, -2.0
    assert suppress(STATS, (0,), 4) == {0: (SteeringTerm(2, 0.0), SteeringTerm(0, 0.0))}


def test_random_takes_as_many_others_and_the_same_each_time() -> None:
    first = latents(random_matched(0)(STATS, (0,), 2))
    assert first == latents(random_matched(0)(STATS, (0,), 2))
    assert len(set(first)) == 2


def test_a_target_of_two_classes_averages_them() -> None:
    two = SiteStatistics(**{name: torch.cat([value, value.flip(2)], 1) for name, value in vars(STATS).items()})
    # means of both: (4 + 2) / 2, (1 + 0) / 2, (0 + 1) / 2, (2 + 4) / 2
    assert two.of((0, 1), "mean").tolist() == [[3.0, 0.5, 0.5, 3.0]]
    assert sorted(latents(class_mean(two, (0, 1), 2))) == [0, 3]


@pytest.mark.parametrize("groups", [0, 4])
def test_effects_are_those_of_finite_differences(groups: int) -> None:
    """For every gate logit, of heads and of MLP groups."""
    steered = model_of(small(), mlp_groups=groups)
    split = Split(torch.from_numpy(images(24)), torch.arange(24) % 2)
    read = residuals(steered.model, split, "test")
    stats = measure(steered.model, steered.sae, count(steered.model), read, split, sample=5)
    assert stats.effect.shape == (2, 2, 12, 3 + groups)
    assert stats.attribution.abs().sum() > 0
    for site, gate in enumerate(steered.model.gates):
        x = read[site, split.classes == 1][:5].double()[:, None]  # (5, 1, D)
        step = 1e-4 * steered.sae.decoder[site].double()  # (L, D)
        slope = (gate.double()(x + step) - gate(x - step)) / 2e-4
        torch.testing.assert_close(stats.effect[site, 1], slope.mean(0).float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [0, 4])
def test_a_search_lowers_the_unit_usage_of_its_class(groups: int) -> None:
    steered = model_of(small(), mlp_groups=groups)
    for gate in steered.model.gates:
        gate.linear.bias.fill_(2.0)
    split = Split(torch.from_numpy(images(40)), torch.arange(40) % 5)
    unsteered, macs = answers(steered.model, split), count(steered.model)
    options = ProfileSettings(steps=40, rows=8, usage_target=0.3, learning_rate=0.2)
    search = Search(steered.model, macs, split, unsteered.logits.log_softmax(-1), options, 0, False)
    (bias,) = gate_bias(search, [(1,)])
    assert bias.shape == (2, 3 + groups)
    own = split.take(torch.nonzero(split.classes == 1).flatten())
    after = answers(steered.model, own, gate_bias=bias)
    assert after.usage(macs) < answers(steered.model, own).usage(macs) - 0.2


def test_auroc_by_hand() -> None:
    z = torch.tensor([[3.0], [1.0], [2.0], [1.0]])
    # class 0 is {3, 1}, class 1 is {2, 1}: of the 4 pairs 3>2, 3>1, 1<2, 1=1 -> 2.5 / 4
    found = auroc(z, [torch.tensor([0, 1]), torch.tensor([2, 3])])
    assert found.tolist() == [[0.625], [0.375]]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_names_each_latent_once_and_has_strengths(name: str) -> None:
    strategy, strengths = STRATEGIES[name]
    terms = strategy(STATS, (0,), 4)
    assert len(set(latents(terms))) == len(latents(terms)) > 0
    assert strengths
