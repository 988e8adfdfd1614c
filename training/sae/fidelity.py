"""The fidelity of autoencoders: to the residuals, to the decisions of the gates, and to the whole model.

Letters: B images, S sites, L latents, D residual width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.data.splits import Split
from training.model.gated_vit import GatedVit
from training.model.inference import NEAR, answers
from training.model.sae import Sae
from training.sae.activations import chunks, moments

DENSE = 0.5
"""A latent that is active on more than this share of the images is dense."""

Reconstruct = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(site, residual (B, D)) -> latents (B, L) and the reconstruction (B, D)."""


def reconstruction(sae: Sae) -> Reconstruct:
    """The reconstruction of autoencoders in their saved form."""

    def reconstruct(site: int, residual: Tensor) -> tuple[Tensor, Tensor]:
        latents = sae.encode(site, residual)
        return latents, sae.decode(site, latents)

    return reconstruct


def measure(
    before: Reconstruct, sae: Sae, model: GatedVit, train: Tensor, held_out: Tensor, split: Split, size: int
) -> dict[str, Any]:
    """Fidelity of autoencoders before (`size` images at a time) and after the conversion to JumpReLU, as JSON.

    train (S, N, D): the residuals of the fit. held_out (S, B, D): the residuals of the images of the split.
    dead_training: share of latents that are active on no training image, after the conversion.
    """
    after = reconstruction(sae.to(model.device))
    quality_before = fidelity(before, model, held_out, "sae: before", size)
    quality = fidelity(after, model, held_out, "sae: after")
    whole = recovered(after, model, held_out, split)
    for site, measured in enumerate(quality):
        measured["dead_training"] = silent(after, train[site : site + 1], site, model.device)
        print(f"sae: site {site} (block {model.gated_blocks[site]}): {_listed(measured)}")
    print(f"sae: whole model: {_listed(whole)}", flush=True)
    return {"fidelity": quality, "fidelity_before": quality_before, "recovered": whole, "images": len(split)}


def _listed(measured: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measured.items() if value is not None)


@torch.no_grad()
def fidelity(
    reconstruct: Reconstruct, model: GatedVit, held_out: Tensor, what: str, size: int = 1024
) -> list[dict[str, float]]:
    """Per site, on residuals (S, B, D), `size` images at a time on the model's device.

    l0: active latents an image. fvu: fraction of variance unexplained (sums over all images and dimensions about the
    per-dimension mean). cosine: of a residual and its reconstruction, mean over images. dead, dense: share of latents
    that are never active, and that are active on more than half of the images. gate_agreement: share of gates that
    decide alike on the reconstruction; gate_agreement_clear: the same among gates with |logit| above NEAR (1 when there
    are none).
    """
    device, count = model.device, held_out.shape[1]
    scale = moments(held_out)[1]
    variance = scale.double().pow(2).flatten() * (count * held_out.shape[2])  # (S,): sum over images and dimensions
    quality: list[dict[str, float]] = []
    for site in tqdm(range(len(held_out)), desc=what, unit="site", mininterval=5, dynamic_ncols=True):
        sums: dict[str, float] = {"error": 0.0, "cosine": 0.0, "agree": 0.0, "agree_clear": 0.0, "clear": 0.0}
        uses: Tensor | int = 0
        for piece in chunks(held_out[site : site + 1], size):
            x = piece[0].to(device)
            z, rebuilt = reconstruct(site, x)
            logit, logit_rebuilt = model.gates[site](x), model.gates[site](rebuilt)
            agree, clear = (logit > 0) == (logit_rebuilt > 0), logit.abs() > NEAR
            uses = uses + (z > 0).sum(0)
            sums["error"] += (x - rebuilt).double().pow(2).sum().item()
            sums["cosine"] += F.cosine_similarity(x, rebuilt).double().sum().item()
            sums["agree"] += agree.sum().item()
            sums["agree_clear"] += (agree & clear).sum().item()
            sums["clear"] += clear.sum().item()
        assert isinstance(uses, Tensor)
        quality.append({
            "l0": uses.sum().item() / count,
            "fvu": sums["error"] / variance[site].item(),
            "cosine": sums["cosine"] / count,
            "dead": (uses == 0).double().mean().item(),
            "dense": (uses > DENSE * count).double().mean().item(),
            "gate_agreement": sums["agree"] / (count * (model.heads + model.mlp_groups)),
            "gate_agreement_clear": sums["agree_clear"] / sums["clear"] if sums["clear"] else 1.0,
        })  # fmt: skip
    return quality


@torch.no_grad()
def silent(reconstruct: Reconstruct, residual: Tensor, site: int, device: torch.device) -> float:
    """Share of a site's latents that are active on none of the residuals (1, B, D)."""
    uses = [(reconstruct(site, piece[0].to(device))[0] > 0).any(0) for piece in chunks(residual)]
    return 1 - torch.stack(uses).any(0).double().mean().item()


@torch.no_grad()
def recovered(reconstruct: Reconstruct, model: GatedVit, held_out: Tensor, split: Split) -> dict[str, float | None]:
    """The loss of the whole model when every gate reads the reconstruction of its residual.

    held_out (S, B, D): the residuals of the split's images; the ablation replaces them by their mean. ce_recovered =
    (ce_mean - ce_reconstructed) / (ce_mean - ce): 1 when nothing is lost, 0 when the reconstruction is no better than
    the mean, None when the mean does no harm. A model with MLP groups also has head usage and MLP usage. (The loss
    recovered of https://transformer-circuits.pub/2023/monosemantic-features, with the mean in place of 0.)
    """
    mean = moments(held_out)[0].to(model.device)  # (S, 1, D)

    def ablated(site: int, x: Tensor) -> Tensor:
        return mean[site].expand_as(x)

    whole, rebuilt, of_mean = (
        answers(model, split, steer) for steer in (None, lambda site, x: reconstruct(site, x)[1], ablated)
    )
    accuracy, accuracy_rebuilt = ((o.predicted == split.classes).double().mean().item() for o in (whole, rebuilt))
    ce, ce_rebuilt, ce_mean = (
        F.cross_entropy(outcome.logits.double(), split.classes).item() for outcome in (whole, rebuilt, of_mean)
    )
    found = {
        "accuracy": accuracy,
        "accuracy_reconstructed": accuracy_rebuilt,
        "ce": ce,
        "ce_reconstructed": ce_rebuilt,
        "ce_mean": ce_mean,
        "ce_recovered": (ce_mean - ce_rebuilt) / (ce_mean - ce) if ce_mean > ce else None,
    }
    if model.mlp_groups:
        for name, outcome in (("", whole), ("_reconstructed", rebuilt)):
            found[f"head_usage{name}"] = outcome.head_gate.double().mean().item()
            found[f"mlp_usage{name}"] = outcome.mlp_gate.double().mean().item()
    return found


def stability(a: Sae, b: Sae) -> list[float]:
    """For each site, the mean over the latents of `a` of the highest cosine of their decoder row with a row of `b`.

    This is the mean max cosine similarity of arXiv:2309.08600, for two seeds; 1 if every latent reappears.
    """
    return [
        (F.normalize(rows, dim=-1) @ F.normalize(others, dim=-1).T).amax(1).mean().item()
        for rows, others in zip(a.decoder.detach(), b.decoder.detach(), strict=True)
    ]
