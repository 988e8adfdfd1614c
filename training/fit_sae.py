"""Stage `sae`: BatchTopK (arXiv:2412.06410) or TopK (arXiv:2406.04093) autoencoders, saved as JumpReLU.

Letters: B images, S sites, L latents, D residual width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from training.checkpoint import Run
from training.config import SaeSettings, Settings
from training.data import Data, Split
from training.gated_vit import GatedVit
from training.sae import Sae, from_tensors

NEAR = 0.1
"""|gate logit| below which a gate counts as near its threshold, in reports."""


def fit_sae(settings: Settings, data: Data, run: Run, model: GatedVit) -> Sae:
    """Fit, or load, the autoencoders of a run."""
    if run.finished("sae", settings.fingerprint("sae")):
        return load_sae(run)
    torch.manual_seed(settings.seed + 1)
    train, held_out = residuals(model, data.train, "sae: residuals"), residuals(model, data.selection, "sae: held out")
    fitting = Fitting(train, settings.sae)
    curve = fitting.fit(settings.seed)
    sae = fitting.folded(held_out)
    quality = fidelity(sae, model, held_out)
    for site, measured in enumerate(quality):
        print(
            f"sae: site {site} (block {model.gated_blocks[site]}): "
            + ", ".join(f"{k} {v:.4g}" for k, v in measured.items())
        )
    run.write_tensors("sae", sae.state_dict())
    result = {"sites": list(model.gated_blocks), "latents": sae.latents, "fidelity": quality, "curve": curve}
    run.finish("sae", settings.fingerprint("sae"), result)
    return sae


def load_sae(run: Run) -> Sae:
    """The finished autoencoders. Raises RunError when the stage is not finished."""
    run.info("sae")
    tensors = run.read_tensors("sae")
    assert tensors is not None
    return from_tensors(tensors[0])


@torch.no_grad()
def residuals(model: GatedVit, split: Split, what: str, size: int = 500) -> Tensor:
    """float32 (S, B, D): what the gates read, without augmentation."""
    found = []
    for start in tqdm(range(0, len(split), size), desc=what, unit="batch", mininterval=5, dynamic_ncols=True):
        found.append(model(split.images[start : start + size])[1]["residual"])
    return torch.cat(found).transpose(0, 1).contiguous()


class Fitting(nn.Module):
    """Autoencoders in normalised coordinates (x - mean) / scale, one scale a site."""

    def __init__(self, train: Tensor, settings: SaeSettings):
        super().__init__()
        self.settings = settings
        self.mean = train.mean(1, keepdim=True)  # (S, 1, D)
        self.scale = (train - self.mean).pow(2).mean((1, 2), keepdim=True).sqrt()  # (S, 1, 1)
        self.train_residuals = (train - self.mean) / self.scale
        sites, _, dim = train.shape
        rows = F.normalize(torch.randn(sites, settings.latents, dim), dim=-1)
        self.decoder = nn.Parameter(rows)
        self.encoder = nn.Parameter(rows.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(sites, 1, settings.latents))
        self.decoder_bias = nn.Parameter(self.train_residuals.median(1, keepdim=True).values)

    def activations(self, x: Tensor) -> Tensor:
        """(S, B, D) -> ReLU pre-activations (S, B, L), before any top-k."""
        return F.relu((x - self.decoder_bias) @ self.encoder.transpose(1, 2) + self.encoder_bias)

    def fit(self, seed: int) -> list[dict[str, float]]:
        """Train in place; returns the curve."""
        s = self.settings
        count = self.train_residuals.shape[1]
        size = min(s.batch_size, count)
        per_epoch = count // size
        total = max(1, round(s.epochs * per_epoch))
        optimizer = torch.optim.Adam(self.parameters(), lr=s.learning_rate, betas=(0.9, 0.999))
        silent = torch.zeros(self.encoder_bias.shape[0], s.latents, dtype=torch.long)  # steps since last active
        generator = torch.Generator().manual_seed(seed)
        curve = []
        progress = tqdm(range(total), desc="sae: fit", unit="step", mininterval=5, dynamic_ncols=True)
        for step in progress:
            if step % per_epoch == 0:
                order = torch.randperm(count, generator=generator)
            offset = step % per_epoch * size
            x = self.train_residuals[:, order[offset : offset + size]]
            warm, decay = min(1.0, (step + 1) / (0.05 * total + 1)), min(1.0, (total - step) / (0.2 * total))
            optimizer.param_groups[0]["lr"] = s.learning_rate * warm * decay
            raw = self.activations(x)
            z = batch_top_k(raw, s.k * size) if s.kind == "batch-topk" else top_k(raw, s.k)
            error = x - (z @ self.decoder + self.decoder_bias)
            loss = error.pow(2).mean((1, 2)) / x.var((1, 2))  # (S,)
            active = (z > 0).any(1)
            silent = torch.where(active, 0, silent + 1)
            dead = silent > s.dead_epochs * per_epoch  # (S, L)
            if s.aux_weight and dead.any():
                spare = batch_top_k(raw * dead[:, None], s.k * size)
                loss = loss + s.aux_weight * (error.detach() - spare @ self.decoder).pow(2).mean((1, 2)) / x.var((1, 2))
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            self._remove_parallel_gradient()
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                self.decoder.copy_(F.normalize(self.decoder, dim=-1))
            if step % 50 == 0 or step == total - 1:
                point = {"fvu": error.pow(2).mean().item(), "dead": dead.float().mean().item()}
                curve.append({"step": step, **{k: round(v, 5) for k, v in point.items()}})
                progress.set_postfix({k: f"{v:.4f}" for k, v in point.items()}, refresh=False)
        return curve

    def _remove_parallel_gradient(self) -> None:
        """Decoder rows have unit norm: drop the part of the gradient that would only change it."""
        gradient = self.decoder.grad
        assert gradient is not None
        gradient -= (gradient * self.decoder.data).sum(-1, keepdim=True) * self.decoder.data

    @torch.no_grad()
    def folded(self, held_out: Tensor) -> Sae:
        """As JumpReLU on raw residuals. One threshold a site, so that k latents are active on average on `held_out`.

        With x_n = (x - mean) / scale, z = scale * z_n: the encoder and the unit decoder rows stay, biases and
        thresholds are multiplied by the scale, b_dec = mean + scale * b_dec_n.
        """
        sites, latents, dim = self.encoder.shape
        raw = self.activations((held_out - self.mean) / self.scale)  # (S, B, L)
        keep = self.settings.k * raw.shape[1]
        sae = Sae(sites, latents, dim)
        for site in range(sites):
            threshold = raw[site].flatten().kthvalue(max(1, raw[site].numel() - keep)).values
            sae.threshold[site] = threshold * self.scale[site, 0]
        sae.encoder.copy_(self.encoder)
        sae.decoder.copy_(self.decoder)
        sae.encoder_bias.copy_(self.encoder_bias[:, 0] * self.scale[:, 0])
        sae.decoder_bias.copy_((self.mean + self.scale * self.decoder_bias)[:, 0])
        return sae.eval().requires_grad_(False)


def batch_top_k(values: Tensor, count: int) -> Tensor:
    """Keep the `count` largest of each site's (B, L) values (>= 0), zero the rest."""
    flat = values.flatten(1)
    count = min(count, flat.shape[1])
    threshold = flat.detach().kthvalue(flat.shape[1] - count + 1, dim=1).values  # (S,)
    return values * (values >= threshold[:, None, None])


def top_k(values: Tensor, k: int) -> Tensor:
    """Keep the k largest of each image's latents (S, B, L) (>= 0), zero the rest."""
    best = values.topk(min(k, values.shape[-1]), dim=-1)
    return torch.zeros_like(values).scatter(-1, best.indices, best.values)


@torch.no_grad()
def fidelity(sae: Sae, model: GatedVit, held_out: Tensor) -> list[dict[str, float]]:
    """Per site, on residuals (S, B, D).

    l0: active latents an image. fvu: fraction of variance unexplained (sums over all images and dimensions about the
    per-dimension mean). dead: share of latents never active. gate_agreement: share of gates that decide alike when they
    read the reconstruction; gate_agreement_clear: of those with |logit| above NEAR.
    """
    quality: list[dict[str, Any]] = []
    for site in range(sae.sites):
        x = held_out[site]
        z = sae.encode(site, x)
        rebuilt = sae.decode(site, z)
        logit, logit_rebuilt = model.gates[site](x), model.gates[site](rebuilt)
        agree = (logit > 0) == (logit_rebuilt > 0)
        clear = logit.abs() > NEAR
        quality.append({
            "l0": (z > 0).float().sum(1).mean().item(),
            "fvu": ((x - rebuilt).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(),
            "cosine": F.cosine_similarity(x, rebuilt).mean().item(),
            "dead": (z > 0).any(0).logical_not().float().mean().item(),
            "gate_agreement": agree.float().mean().item(),
            "gate_agreement_clear": agree[clear].float().mean().item() if clear.any() else 1.0,
        })  # fmt: skip
    return quality
