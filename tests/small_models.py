"""Small ViTs of every kind that timm makes, with random weights and gates, and inputs for their graphs."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from export.bundle import GATE_BIAS, MLP_GATE, Knot, Macs
from export.certify import run_torch
from export.graph import SteeredVit
from export.session import Arrays, inputs_of
from export.write import Source
from training.data.splits import Split
from training.dial import Dial, Point
from training.image_spec import ImageSpec
from training.model.gated_vit import GatedVit
from training.model.macs import count
from training.model.sae import Sae
from training.steering import NEUTRAL, UNBIASED, GateBias, SteeringProfile, SteeringTerm, Terms

SPEC = ImageSpec(16, 16, 3, 16, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
STEERED: Terms = {0: (SteeringTerm(1, -2.0, 3.0), SteeringTerm(7, 0.0, -4.0)), 1: (SteeringTerm(2, 3.0, 0.5),)}
small = partial(VisionTransformer, img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5)


def gated_mlp() -> VisionTransformer:
    """A gated MLP in the last block only: the exporter takes a second for each."""
    vit = small(init_values=0.5)
    vit.blocks[-1].mlp = SwiGLU(24, 96)
    return vit


KINDS: dict[str, Callable[[], VisionTransformer]] = {
    "plain": small,
    "distilled": lambda: VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5
    ),
    "registers and layer scale": lambda: small(reg_tokens=2, init_values=0.3, no_embed_class=True),
    "normed queries and keys": lambda: small(qk_norm=True),
    "gated MLP": gated_mlp,
    "pre-norm without biases": lambda: small(
        pre_norm=True, act_layer=partial(nn.GELU, approximate="tanh"), qkv_bias=False, proj_bias=False
    ),
}


def model_of(vit: VisionTransformer, mlp_groups: int = 0) -> SteeredVit:
    """Random weights, biases and gates: about half of the units are closed."""
    torch.manual_seed(1)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
    model = GatedVit(vit, (1, 2), SPEC, mlp_groups)
    for gate in model.gates:
        nn.init.normal_(gate.linear.weight)
        nn.init.zeros_(gate.linear.bias)
    sae = Sae(2, 12, 24)
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.5)
    return SteeredVit(model, sae).eval().requires_grad_(False)


def dial_of(steered: SteeredVit) -> Dial:
    """An invented dial: from budget 0.3 on, one unit after the other opens, the last ones first."""
    shape = len(steered.model.gated_blocks), steered.model.heads + steered.model.mlp_groups
    budget = np.linspace(0.3, 1.0, 8)
    start = np.linspace(0.8, 0.2, math.prod(shape)).reshape(shape)
    return Dial(budget, np.clip(160 * (budget[:, None, None] - start) - 8, -8, 8.0).astype(np.float32))


def curve_of(
    steered: SteeredVit, dial: Dial, images: NDArray[np.uint8], terms: Terms, own: GateBias
) -> tuple[Point, ...]:
    """The dial's curve on the images under the terms and biases, by PyTorch. The accuracies are invented."""
    macs, places = count(steered.model), np.linspace(dial.lowest, 1.0, 15)
    bias = np.zeros(dial.gate_bias.shape[1:], np.float32)
    for block, of_block in own.items():
        bias[steered.model.gated_blocks.index(block)] = of_block
    spent = []
    for place in places:
        inputs = inputs_of(images, [terms] * len(images), steered.sae.sites)
        gates = run_torch(steered, {**inputs, GATE_BIAS: dial.at(np.full(len(images), place)) + bias})
        spent.append(float(macs.fraction(*(torch.from_numpy(gates[name]) for name in ("head_gate", MLP_GATE))).mean()))
    return tuple(
        Point(float(place), float(fraction), float(place) ** 0.1, float(place) ** 0.1)
        for place, fraction in zip(places, np.maximum.accumulate(spent), strict=True)
    )


def source_of(steered: SteeredVit, profiles: Sequence[SteeringProfile], dial: Dial | None = None) -> Source:
    """The source of a bundle of the model (export/write.py), with the dial measured on the model's own images."""
    selection = Split(torch.from_numpy(images(64, 5)), torch.arange(64) % 5)
    macs = count(steered.model)
    knots: tuple[Knot, ...] = ()
    curves = {}
    if dial:
        knots = tuple(Knot(**{**knot, "gate_bias": tuple(map(tuple, knot["gate_bias"]))}) for knot in dial.to_json())
        of_profiles = {"": (NEUTRAL, UNBIASED), **{p.name: (p.terms, p.gate_bias) for p in profiles}}
        pixels = selection.images[:].numpy()
        curves = {name: curve_of(steered, dial, pixels, *does) for name, does in of_profiles.items()}
    measured = Macs(macs.dense, macs.per_head, macs.per_mlp_group)
    return Source(
        SPEC, tuple("abcde"), measured, steered, profiles, {"head_usage": 0.5}, selection, None, knots, curves
    )


@cache
def _vit(kind: str) -> VisionTransformer:
    return KINDS[kind]()


@cache
def of_kind(kind: str, mlp_groups: int = 0) -> SteeredVit:
    """Models of a kind share its ViT: its parts go through PyTorch's exporter once for all tests. Do not change
    them."""
    return model_of(_vit(kind), mlp_groups=mlp_groups)


def with_other_gates(model: GatedVit) -> GatedVit:
    """The same model with gates of its own, which may be changed; everything else is shared."""
    return copy.deepcopy(model, {id(model.vit): model.vit})


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SPEC.shape), np.uint8)


def rows(count: int, seed: int = 0) -> Arrays:
    return inputs_of(images(count, seed), [STEERED if row % 2 else {} for row in range(count)], 2)


def assert_same(found: Arrays, expected: Arrays) -> None:
    """Assert that all rows are equal to within float rounding."""
    np.testing.assert_array_equal(found["head_gate"], expected["head_gate"])
    for name in ("logits", "gate_logit", "residual"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5, err_msg=name)
