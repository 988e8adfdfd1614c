"""The ungated backbone: a VisionTransformer of timm, or the small one with a convolutional stem.

Letters: B images, N tokens, D residual width.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import create_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from training import processes
from training.config import Settings, VitSettings
from training.image_spec import ImageSpec
from training.model.gated_vit import UnsupportedModel, check_supported
from training.model.weights import load_weights
from training.presets import PRESETS

OF_CONV_STEM = ("dim", "depth", "heads", "patch", "unpadded", "mlp_ratio")
"""The settings of VitSettings that apply to conv_stem only; timm models define them themselves."""


class ConvStem(nn.Module):
    """3x3 convolutions down to one vector per token (arXiv:2106.14881), with timm's `embed_layer` interface.

    First one of stride 1, then some of stride 2 down to the patch size, then `unpadded` ones without padding.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        unpadded: int,
        **_: object,
    ):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        widths = [
            max(embed_dim * 2**i // (3 * 2 ** (halvings - 1)), 8) for i in range(halvings + 1)
        ]  # 32, 64, 128 for width 192
        side, before, layers = img_size, in_chans, []
        steps = [(1, 1), *[(2, 1)] * halvings, *[(1, 0)] * unpadded]
        for (stride, padding), after in zip(steps, [*widths, *[embed_dim] * unpadded], strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, padding, bias=False), nn.BatchNorm2d(after), nn.GELU()]
            side, before = (side + 2 * padding - 3) // stride + 1, after
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(before, embed_dim, 1))
        self.img_size = (img_size, img_size)
        self.grid_size = (side, side)
        self.num_patches = side * side

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, channels, height, width). Returns tokens (B, N, D), without class token and positions."""
        tokens: Tensor = self.convolutions(image).flatten(2).transpose(1, 2)  # (B, N, D)
        return tokens


def create_vit(settings: VitSettings, spec: ImageSpec, classes: int) -> VisionTransformer:
    """The ungated backbone. Raises UnsupportedModel when timm has no such model or it cannot be gated."""
    if settings.model == "conv_stem":
        _check_conv_stem(settings, spec)
        vit = VisionTransformer(
            img_size=spec.height,
            patch_size=settings.patch,
            in_chans=spec.channels,
            num_classes=classes,
            embed_dim=settings.dim,
            depth=settings.depth,
            num_heads=settings.heads,
            mlp_ratio=settings.mlp_ratio,
            embed_layer=partial(ConvStem, unpadded=settings.unpadded),
        )
        positions = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), settings.dim)  # (N - 1, D)
        assert vit.pos_embed is not None
        vit.pos_embed.data = torch.cat([torch.zeros(1, settings.dim), positions])[None]
        vit.pos_embed.requires_grad_(False)
        return vit
    try:
        created = create_model(
            settings.model,
            pretrained=settings.pretrained and settings.weights is None,
            num_classes=classes,
            in_chans=spec.channels,
            img_size=spec.height,
        )
    except (AssertionError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise UnsupportedModel(f"vit.model is {settings.model!r}: {error}") from error
    check_supported(created)
    vit = cast(VisionTransformer, created)
    _start(vit, settings, classes)
    return vit


def _start(vit: VisionTransformer, settings: VitSettings, classes: int) -> None:
    """Load vit.weights, if given. Prints which classifier a model with weights starts from."""
    if settings.weights is not None:
        random, sentences = load_weights(vit, settings.weights, settings.model)
    elif settings.pretrained:
        there = cast(Mapping[str, Any], vit.pretrained_cfg)["num_classes"]
        random = ["head"] if there != classes else []
        kept = "starts from random numbers" if random else "is kept; its classes must be in the order of the labels"
        sentences = [f"pretrained weights: the classifier {kept} ({there} classes in the file, {classes} labels)"]
    else:
        return
    if random and settings.backbone_epochs == 0:
        sentences.append("warning: vit.backbone_epochs is 0, so the random classifier is the teacher of the gates")
    if processes.is_main():
        print("\n".join(f"vit: {sentence}" for sentence in sentences), flush=True)


def check_given(settings: Settings) -> None:
    """Raise UnsupportedModel when a setting that only conv_stem has was changed from the preset for another model."""
    preset = VitSettings(**PRESETS[settings.preset].get("vit", {}))
    for name in OF_CONV_STEM if settings.vit.model != "conv_stem" else ():
        value = getattr(settings.vit, name)
        if value != getattr(preset, name):
            raise UnsupportedModel(
                f"vit.{name} is {value} with vit.model {settings.vit.model!r}, which has its own; allowed: conv_stem"
            )


def _check_conv_stem(settings: VitSettings, spec: ImageSpec) -> None:
    for name in ("weights", "pretrained"):
        if getattr(settings, name):
            raise UnsupportedModel(
                f"vit.{name} is {getattr(settings, name)} with vit.model 'conv_stem'; allowed: a timm model"
            )
    step = math.lcm(4, settings.heads)  # four numbers per sin-cos position, and the same width for every head
    if settings.dim % step:
        raise UnsupportedModel(f"vit.dim is {settings.dim} with {settings.heads} heads; allowed: a multiple of {step}")
    side = -(-spec.height // settings.patch) - 2 * settings.unpadded
    if side < 1:
        raise UnsupportedModel(
            f"vit.patch is {settings.patch} and vit.unpadded {settings.unpadded}, which leave no token of "
            f"{spec.height} pixels; allowed: smaller ones"
        )
