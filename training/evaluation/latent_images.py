"""What the latents of a profile respond to: the images that activate them most, and each term's effect on the gates.

Letters: B images, U units (heads, then MLP groups), D residual width.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.data.pixels import as_picture
from training.data.splits import Split
from training.model.gated_vit import GatedVit
from training.model.sae import Sae
from training.sae.activations import residuals
from training.steering import SteeringProfile, SteeringTerm

THUMBNAIL = 64
"""Largest length of the longer side, in pixels."""


@torch.no_grad()
def describe_latents(
    model: GatedVit,
    sae: Sae,
    profiles: Sequence[SteeringProfile],
    split: Split,
    labels: Sequence[str],
    per_profile: int = 6,
    images: int = 8,
) -> list[dict[str, Any]]:
    """The `per_profile` terms of each profile with the largest effect on the gates. Use the selection split, never
    test.

    effect (U): mean change of each unit's gate logit on the target's images when only this term is applied. Terms are
    ranked by the sum of |effect| over the units. mean and active: mean activation, and share of images on which the
    latent is active, on the target's images and on the rest. images: those of the whole split with the highest
    activation, as base64 PNG. Profiles without terms, or whose target has no image in the split, are left out.
    """
    read = residuals(model, split, "latents: residuals")  # (S, B, D)
    described = []
    for profile in tqdm(profiles, desc="latents: describe", unit="profile", dynamic_ncols=True):
        own = torch.isin(split.classes, torch.tensor([labels.index(label) for label in profile.classes]))
        placed = [(site, term) for site, of_site in profile.terms.items() for term in of_site]
        if not placed or not own.any():
            continue
        effects = [term_effect(model, sae, site, term, read[site, own]) for site, term in placed]
        order = sorted(range(len(placed)), key=lambda index: -float(effects[index].abs().sum()))
        described.append({
            "name": profile.name,
            "classes": list(profile.classes),
            "images": int(own.sum()),
            "terms_in_all": len(placed),
            "terms": [
                {
                    "site": placed[index][0],
                    "block": model.gated_blocks[placed[index][0]],
                    "latent": placed[index][1].latent,
                    "scale": round(placed[index][1].scale, 4),
                    "shift": round(placed[index][1].shift, 4),
                    "effect": [round(value, 4) for value in effects[index].tolist()],
                    **_activity(sae, *placed[index], read[placed[index][0]], own, split, labels, images),
                }
                for index in order[:per_profile]
            ],
        })  # fmt: skip
    return described


def term_effect(model: GatedVit, sae: Sae, site: int, term: SteeringTerm, residual: Tensor) -> Tensor:
    """(U,): gate logits with only this term minus those without steering, mean over residuals (B, D) of a site."""
    device, gate = sae.encoder.device, model.gates[site]
    x = residual.float().to(device)
    latent, scale, shift = (torch.tensor([[value]], device=device) for value in (term.latent, term.scale, term.shift))
    effect: Tensor = (gate(sae.steer(site, x, latent, scale, shift)) - gate(x)).mean(0).cpu()
    return effect


def _activity(
    sae: Sae,
    site: int,
    term: SteeringTerm,
    residual: Tensor,
    own: Tensor,
    split: Split,
    labels: Sequence[str],
    images: int,
) -> dict[str, Any]:
    z = sae.encode(site, residual.float().to(sae.encoder.device))[:, term.latent].cpu()  # (B,)
    best = z.topk(min(images, len(z)))
    return {
        "mean": {"target": _mean(z[own]), "rest": _mean(z[~own])},
        "active": {"target": _mean((z[own] > 0).float()), "rest": _mean((z[~own] > 0).float())},
        "images": [
            {
                "png": thumbnail(split.images[index]),
                "label": labels[int(split.classes[index])],
                "activation": round(float(value), 4),
            }
            for value, index in zip(best.values, best.indices, strict=True)
            if value > 0
        ],
    }


def thumbnail(pixels: Tensor) -> str:
    """uint8 (height, width, channels) -> a PNG of at most THUMBNAIL x THUMBNAIL pixels, as base64."""
    image = as_picture(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _mean(values: Tensor) -> float:
    return round(values.double().mean().item(), 4) if len(values) else 0.0
