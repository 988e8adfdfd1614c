"""Small ViTs of every kind that timm makes, with random weights and gates, and inputs for their graphs."""

import copy
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from export.graph import SteeredVit
from export.session import Arrays, inputs_of
from training.image_spec import ImageSpec
from training.model.gated_vit import GatedVit
from training.model.sae import Sae
from training.steering import SteeringTerm, Terms

SPEC = ImageSpec(16, 16, 3, 16, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
STEERED: Terms = {0: (SteeringTerm(1, -2.0, 3.0), SteeringTerm(7, 0.0, -4.0)), 1: (SteeringTerm(2, 3.0, 0.5),)}
small = partial(VisionTransformer, img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5)


def with_mlp(mlp: nn.Module, **options: float) -> VisionTransformer:
    """In its last block: the exporter takes a second for each."""
    vit = small(**options)
    vit.blocks[-1].mlp = mlp
    return vit


KINDS: dict[str, Callable[[], VisionTransformer]] = {
    "plain": small,
    "distilled": lambda: VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5
    ),
    "registers and layer scale": lambda: small(reg_tokens=2, init_values=0.3, no_embed_class=True),
    "normed queries and keys": lambda: small(qk_norm=True),
    "no biases": lambda: small(qkv_bias=False, proj_bias=False),
    "gated MLP": lambda: with_mlp(SwiGLU(24, 96), init_values=0.5),
    "pre-norm": lambda: small(pre_norm=True, act_layer=partial(nn.GELU, approximate="tanh")),
}


def model_of(vit: VisionTransformer, gated_blocks: tuple[int, ...] = (1, 2), mlp_groups: int = 0) -> SteeredVit:
    """Random weights, biases and gates: about half of the units are closed."""
    torch.manual_seed(1)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
    model = GatedVit(vit, gated_blocks, SPEC, mlp_groups)
    for gate in model.gates:
        nn.init.normal_(gate.linear.weight)
        nn.init.zeros_(gate.linear.bias)
    sae = Sae(len(gated_blocks), 12, 24)
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.5)
    return SteeredVit(model, sae).eval().requires_grad_(False)


@cache
def of_kind(kind: str) -> SteeredVit:
    """One model a kind, whose parts go through PyTorch's exporter once for all tests. Not to be changed."""
    return model_of(KINDS[kind]())


def with_other_gates(model: GatedVit) -> GatedVit:
    """The same model, with gates of its own that may be changed; what else it is made of is shared."""
    return copy.deepcopy(model, {id(model.vit): model.vit})


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SPEC.shape), np.uint8)


def rows(count: int, seed: int = 0) -> Arrays:
    return inputs_of(images(count, seed), [STEERED if row % 2 else {} for row in range(count)], 2)


def assert_same(found: Arrays, expected: Arrays) -> None:
    """The same to float rounding, in every row."""
    np.testing.assert_array_equal(found["head_gate"], expected["head_gate"])
    for name in ("logits", "gate_logit", "residual"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5, err_msg=name)
