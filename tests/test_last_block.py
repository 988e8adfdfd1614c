"""The exact last-block cache against the full forward pass."""

import pytest
import torch
from torch import nn

from training.config import VitSettings
from training.data import Split
from training.gated_vit import GatedVit, create_vit
from training.image_spec import ImageSpec
from training.last_block import best_subsets, store, subsets

SPEC = ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,))


@pytest.mark.parametrize("gated", [(3,), (1, 3), (1, 2)])
def test_the_cache_gives_the_logits_of_the_full_forward(gated: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = GatedVit(create_vit(VitSettings(dim=32, depth=4, heads=4), SPEC, 5), gated, SPEC)
    for gate in model.gates:
        nn.init.normal_(gate.linear.weight)
        nn.init.zeros_(gate.linear.bias)
    model.eval().requires_grad_(False)
    split = Split(torch.randint(256, (40, 28, 28, 1), dtype=torch.uint8), torch.randint(5, (40,)))
    cache = store(model, split, size=16)
    for kept in (torch.ones(4), torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 1.0])):

        def decide(site: int, logit: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            last = gated[site] == 3
            return kept.expand_as(logit) if last else (logit > 0).to(logit.dtype)

        expected, out = model(split.images, None, decide)
        if gated[-1] == 3:
            torch.testing.assert_close(cache.logits(kept.expand(40, 4)), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(cache.residual, out["residual"][:, -1], rtol=1e-4, atol=1e-5)
        elif kept.all():  # the last block is not gated: all its heads run
            torch.testing.assert_close(cache.logits(kept.expand(40, 4)), expected, rtol=1e-4, atol=1e-5)


def test_the_oracle_is_the_best_of_all_subsets() -> None:
    torch.manual_seed(1)
    model = (
        GatedVit(create_vit(VitSettings(dim=32, depth=2, heads=4), SPEC, 3), (1,), SPEC).eval().requires_grad_(False)
    )
    split = Split(torch.randint(256, (60, 28, 28, 1), dtype=torch.uint8), torch.arange(60) % 3)
    cache = store(model, split)
    oracle = best_subsets(cache, split.classes, 1)
    assert [entry["head_usage"] for entry in oracle] == [0.0, 0.25, 0.5, 0.75, 1.0]
    own = split.classes == 1
    for subset in subsets(4):
        recall = (cache.logits(subset.expand(60, 4))[own].argmax(-1) == 1).double().mean().item()
        assert recall <= float(oracle[int(subset.sum())]["recall"]) + 1e-5
    assert subsets(6).shape == (64, 6)
