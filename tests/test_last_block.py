"""The exact last-block cache against the full forward pass."""

import pytest
import torch
from torch import nn

from training.config import VitSettings
from training.data.splits import Split
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.gated_vit import GatedVit, straight_through
from training.profiles.last_block import LastBlock, best_subsets, shortcut, store, subsets

SPEC = ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,))


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("gated", [(3,), (1, 3), (1, 2)])
def test_the_cache_gives_the_logits_of_the_full_forward(gated: tuple[int, ...], groups: int) -> None:
    torch.manual_seed(0)
    model = GatedVit(create_vit(VitSettings(dim=32, depth=4, heads=4), SPEC, 5), gated, SPEC, groups)
    for gate in model.gates:
        nn.init.normal_(gate.linear.weight)
        nn.init.zeros_(gate.linear.bias)
    model.eval().requires_grad_(False)
    split = Split(torch.randint(256, (40, 28, 28, 1), dtype=torch.uint8), torch.randint(5, (40,)))
    cache = store(model, split, size=16)
    units = 4 + groups
    for kept in (torch.ones(units), torch.zeros(units), torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])[:units]):

        def decide(site: int, logit: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            last = gated[site] == 3
            return kept.expand_as(logit) if last else (logit > 0).to(logit.dtype)

        expected, out = model(split.images, None, decide)
        if gated[-1] == 3:
            torch.testing.assert_close(cache.logits(kept.expand(40, units)), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(cache.residual, out["residual"][:, -1], rtol=1e-4, atol=1e-5)
        elif kept.all():  # the last block is not gated: all its units run
            torch.testing.assert_close(cache.logits(kept.expand(40, units)), expected, rtol=1e-4, atol=1e-5)


def test_the_cache_keeps_no_other_tokens_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GatedVit(create_vit(VitSettings(dim=32, depth=2, heads=4), SPEC, 5), (1,), SPEC).eval()
    cat = torch.cat
    kept: list[torch.Tensor] = []

    def watched(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        if parts[0].ndim == 2:  # vectors of images
            kept.extend(parts)
        return cat(parts, dim)

    monkeypatch.setattr(torch, "cat", watched)
    store(model, Split(torch.zeros(40, 28, 28, 1, dtype=torch.uint8), torch.zeros(40)), size=16)
    assert len(kept) == 6, "three batches of residuals and of heads"
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept)


@pytest.mark.parametrize("groups", [0, 4])
def test_a_last_block_takes_the_place_of_the_model(groups: int) -> None:
    """The same logits, gates and gradients, steered and unsteered, for any rows of several splits."""
    torch.manual_seed(2)
    model = GatedVit(create_vit(VitSettings(dim=32, depth=3, heads=4), SPEC, 5), (2,), SPEC, groups)
    nn.init.normal_(model.gates[0].linear.weight)
    model.eval().requires_grad_(False)
    splits = [Split(torch.randint(256, (n, 28, 28, 1), dtype=torch.uint8), torch.randint(5, (n,))) for n in (30, 20)]
    cache, rows = shortcut(model, splits)
    assert isinstance(cache, LastBlock)
    change = torch.randn(1, 32, requires_grad=True)
    picked, bias = torch.tensor([3, 19, 7]), torch.randn(3, 1, 4 + groups)
    found = []
    for network, split in ((model, splits[1]), (cache, rows[1])):
        steered = network(split.images[picked], lambda _, residual: residual + change, straight_through(2.0), bias)
        logits, out = steered
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), change)
        found.append([logits, gradient, *out.values()])
    for whole, cached in zip(*found, strict=True):
        torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)
    two = GatedVit(create_vit(VitSettings(dim=32, depth=3, heads=4), SPEC, 5), (1, 2), SPEC).eval()
    assert shortcut(two, splits) == (two, splits)


@pytest.mark.parametrize("groups", [0, 2])
def test_the_oracle_is_the_best_of_all_subsets(groups: int) -> None:
    torch.manual_seed(1)
    model = GatedVit(create_vit(VitSettings(dim=32, depth=2, heads=4), SPEC, 3), (1,), SPEC, groups)
    model.eval().requires_grad_(False)
    split = Split(torch.randint(256, (60, 28, 28, 1), dtype=torch.uint8), torch.arange(60) % 3)
    cache = store(model, split)
    oracle = best_subsets(cache, split.classes, 1)
    assert [entry["head_usage"] for entry in oracle] == [0.0, 0.25, 0.5, 0.75, 1.0]
    own = split.classes == 1
    for subset in subsets(4):
        gate = torch.cat([subset, torch.ones(groups)]).expand(60, -1)
        recall = (cache.logits(gate)[own].argmax(-1) == 1).double().mean().item()
        assert recall <= float(oracle[int(subset.sum())]["recall"]) + 1e-5
    assert subsets(6).shape == (64, 6)
