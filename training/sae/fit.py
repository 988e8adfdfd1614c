"""Stage `sae`: BatchTopK (arXiv:2412.06410) or TopK (arXiv:2406.04093) autoencoders, saved as JumpReLU.

Letters: B images, S sites, L latents, D residual width.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from training import processes, soundness
from training.checkpoint import Run, RunError, Stored, optimizer_tensors, part, restore_optimizer
from training.config import SaeSettings, Settings
from training.data.splits import Data
from training.model.gated_vit import GatedVit
from training.model.sae import Sae, batch_top_k, from_tensors, thresholds, top_k
from training.sae.activations import moments, residuals
from training.sae.fidelity import measure, stability

SAMPLE = 20_000
"""Largest number of residuals for the starting point and the thresholds."""


def fit_sae(settings: Settings, data: Data, run: Run, model: GatedVit) -> Sae:
    """Fit, resume fitting, or load the autoencoders of a run. Process 0 fits; the others wait."""
    finished = run.finished("sae", settings.fingerprint("sae"))
    if processes.is_main() and not finished:
        _fit_all(settings, data, run, model)
    processes.wait()
    return load_sae(run)


def _fit_all(settings: Settings, data: Data, run: Run, model: GatedVit) -> None:
    """Fit the autoencoders, and those of further seeds to measure stability.

    One half of the held-out residuals sets the thresholds, the other half measures the fidelity.
    """
    made_with, memory = settings.fingerprint("sae"), settings.sae.memory_limit
    state = run.read_state("sae", made_with)
    first: int = state.meta["fit"] if state else 0
    result: dict[str, Any] = state.meta["result"] if state else {}
    train = residuals(model, data.train, "sae: residuals", folder=run.folder, memory=memory)
    held_out = residuals(model, data.selection, "sae: held out", folder=run.folder, memory=memory)
    measured_on = data.selection.take(torch.arange(1, len(data.selection), 2))
    for index in range(first, 1 + settings.sae.stability_seeds):
        torch.manual_seed(settings.seed + 1 + 1000 * index)
        fitting = Fitting(train, settings.sae, model.device)
        save = partial(_save, run, made_with, index, result)
        unfinished = state if state and state.tensors else None
        curve = fitting.fit(settings.seed + index, settings.bf16, unfinished, save, settings.save_every)
        state = None
        sae = fitting.folded(held_out[:, ::2])
        if index == 0:
            run.write_tensors("sae", sae.state_dict())
            measured = measure(
                fitting.reconstruct, sae, model, train, held_out[:, 1::2], measured_on, settings.sae.batch_size
            )
            result = {"sites": list(model.gated_blocks), "latents": sae.latents, **measured, "curve": curve}
            result["stability"] = []
        else:
            result["stability"].append(stability(_stored(run), sae))
        _save(run, made_with, index + 1, result, {}, {})
    run.finish("sae", made_with, result)
    soundness.show("sae", soundness.of_sae(run.info("sae")))


def _save(
    run: Run, made_with: dict[str, Any], index: int, result: dict[str, Any], tensors: dict[str, Tensor], meta: Any
) -> None:
    run.write_state("sae", made_with, tensors, {"fit": index, "result": result, **meta})


def load_sae(run: Run) -> Sae:
    """The finished autoencoders, on this process's device. Raises RunError when the stage is not finished."""
    run.info("sae")
    return _stored(run).to(processes.device())


def _stored(run: Run) -> Sae:
    return from_tensors(run.tensors("sae"))


class Fitting(nn.Module):
    """Autoencoders in normalised coordinates (x - mean) / scale, with one scale per site."""

    mean: Tensor
    scale: Tensor
    silent: Tensor

    def __init__(self, train: Tensor, settings: SaeSettings, device: torch.device | str = "cpu"):
        """train (S, B, D): raw residuals on the CPU, in memory or mapped; the parameters live on `device`.

        The rows start as residuals about the median: residuals vary along few directions, which random rows miss, so
        that a fifth of the latents or more would end up dead.
        """
        super().__init__()
        self.settings = settings
        self.train_residuals = train
        sites, count, dim = train.shape
        mean, scale = moments(train)
        self.register_buffer("mean", mean)  # (S, 1, D)
        self.register_buffer("scale", scale)  # (S, 1, 1)
        self.register_buffer("silent", torch.zeros(sites, settings.latents, dtype=torch.long))  # steps since last use
        sample = (train[:, :: -(-count // SAMPLE)].float() - mean) / scale
        centre = sample.median(1, keepdim=True).values
        rows = torch.randn(sites, settings.latents, dim)
        chosen = torch.randperm(sample.shape[1])[: settings.latents]
        rows[:, : len(chosen)] = sample[:, chosen] - centre
        self.decoder = nn.Parameter(F.normalize(rows, dim=-1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(sites, 1, settings.latents))
        self.decoder_bias = nn.Parameter(centre)
        self.to(device)

    def raw(self, x: Tensor, sites: slice = slice(None)) -> Tensor:
        """Normalised residuals (S, B, D) -> pre-activations (S, B, L): W_enc (x - b_dec) + b_enc."""
        weight = self.encoder[sites].transpose(1, 2)  # (S, D, L)
        return torch.baddbmm(self.encoder_bias[sites] - self.decoder_bias[sites] @ weight, x, weight)

    def sparse(self, raw: Tensor) -> Tensor:
        """Pre-activations (S, B, L) -> latents, as the kind of autoencoder defines."""
        k = self.settings.k
        return batch_top_k(raw, k * raw.shape[1]) if self.settings.kind == "batch-topk" else top_k(raw, k)

    @torch.no_grad()
    def reconstruct(self, site: int, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction before the conversion: residual (B, D) -> latents (B, L), reconstruction (B, D), both in
        raw units."""
        only = slice(site, site + 1)
        z = self.sparse(self.raw((residual - self.mean[only]) / self.scale[only], only))
        rebuilt = (z @ self.decoder[only] + self.decoder_bias[only]) * self.scale[only] + self.mean[only]
        return (z * self.scale[only])[0], rebuilt[0]

    def fit(
        self,
        seed: int,
        bf16: bool = False,
        state: Stored | None = None,
        save: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None,
        save_every: float = 60,
    ) -> list[dict[str, float]]:
        """Train in place, from `state` if given. Returns the training curve.

        save: called with a state every `save_every` seconds.
        bf16: matrix products in bfloat16. A resumed fit equals an uninterrupted one, to the bit. Raises RunError when
        the fit diverges.
        """
        s = self.settings
        count = self.train_residuals.shape[1]
        size = min(s.batch_size, count)
        per_epoch = count // size
        total = max(1, round(s.epochs * per_epoch))
        optimizer = torch.optim.Adam(self.parameters(), lr=s.learning_rate, fused=True)
        start, curve = 0, []
        if state:
            self.load_state_dict(part(state.tensors, "fit"))
            restore_optimizer(optimizer, state.tensors)
            start, curve = state.meta["step"], list(state.meta["curve"])
        saved = time.monotonic()
        progress = tqdm(
            range(start, total), "sae: fit", total, initial=start, unit="step", mininterval=5, dynamic_ncols=True
        )
        for step in progress:
            if save and time.monotonic() - saved > save_every:
                tensors = self.state_dict(prefix="fit.") | optimizer_tensors(optimizer)
                save(tensors, {"step": step, "curve": curve})
                saved = time.monotonic()
            epoch, offset = divmod(step, per_epoch)
            if offset == 0 or step == start:
                order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
            rows = order[offset * size : (offset + 1) * size]
            warm, decay = min(1.0, (step + 1) / (0.05 * total + 1)), min(1.0, (total - step) / (0.2 * total))
            optimizer.param_groups[0]["lr"] = s.learning_rate * warm * decay
            loss, error, dead = self._loss(rows, s.dead_epochs * per_epoch, bf16)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._remove_parallel_gradient()
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                self.decoder.copy_(F.normalize(self.decoder, dim=-1))
            if step % 50 == 0 or step == total - 1:
                point = {"fvu": error.pow(2).mean().item(), "dead": dead.float().mean().item()}
                if not math.isfinite(point["fvu"]):
                    raise RunError(
                        f"the variance unexplained by the autoencoders is {point['fvu']} at step {step}; allowed: a "
                        "finite number. Lower --sae.learning-rate"
                    )
                curve.append({"step": step, **{k: round(v, 5) for k, v in point.items()}})
                progress.set_postfix({k: f"{v:.4f}" for k, v in point.items()}, refresh=False)
        return curve

    def _loss(self, rows: Tensor, patience: float, bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
        """For these rows of the residuals: the loss, the errors (S, B, D), and which latents are dead (S, L).

        Updates the count of silent steps. patience: the number of steps after which a silent latent is dead.
        """
        x = (self.train_residuals[:, rows].to(self.mean.device).float() - self.mean) / self.scale
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            z = self.sparse(self.raw(x))
            rebuilt = torch.baddbmm(self.decoder_bias, z, self.decoder)
        error = x - rebuilt
        loss = error.pow(2).mean((1, 2))  # (S,): the variance is 1
        self.silent = torch.where(z.detach().amax(1) > 0, 0, self.silent + 1)
        dead = self.silent > patience
        if self.settings.aux_weight and dead.any():
            loss = loss + self.settings.aux_weight * self._auxiliary(x, error.detach(), dead)
        return loss.sum(), error.detach(), dead

    def _auxiliary(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """The AuxK loss (S,) (arXiv:2406.04093): the error that the dead latents (S, L) leave. Computes only their
        rows."""
        width = int(dead.sum(1).max())
        index = dead.to(torch.uint8).topk(width, dim=1).indices  # (S, A); a site with fewer is padded with live ones
        sites = torch.arange(len(dead), device=dead.device)[:, None]
        raw = (x - self.decoder_bias) @ self.encoder[sites, index].transpose(1, 2)  # (S, B, A)
        raw = F.relu(raw + self.encoder_bias[sites, 0, index][:, None]) * dead[sites, index][:, None]
        spare = batch_top_k(raw, self.settings.k * x.shape[1])
        return (error - spare @ self.decoder[sites, index]).pow(2).mean((1, 2))

    def _remove_parallel_gradient(self) -> None:
        """Remove the part of the gradient that would only change the norm of decoder rows, which is 1."""
        gradient = self.decoder.grad
        assert gradient is not None
        gradient -= (gradient * self.decoder.data).sum(-1, keepdim=True) * self.decoder.data

    @torch.no_grad()
    def folded(self, held_out: Tensor) -> Sae:
        """The autoencoders as JumpReLU on raw residuals, with thresholds that keep k latents active on average on
        `held_out`.

        With x_n = (x - mean) / scale, z = scale * z_n: the encoder and the unit decoder rows are unchanged, biases and
        thresholds are multiplied by the scale, b_dec = mean + scale * b_dec_n.
        """
        sites, latents, dim = self.encoder.shape
        sae = Sae(sites, latents, dim)
        sample = held_out[:, :: -(-held_out.shape[1] // SAMPLE)]
        for site in range(sites):
            only = slice(site, site + 1)
            x = (sample[only].float().to(self.mean.device) - self.mean[only]) / self.scale[only]
            threshold = thresholds(self.raw(x, only)[0], self.settings.k, self.settings.kind)
            sae.threshold[site] = (threshold * self.scale[site, 0]).cpu()
        sae.encoder.copy_(self.encoder)
        sae.decoder.copy_(self.decoder)
        sae.encoder_bias.copy_(self.encoder_bias[:, 0] * self.scale[:, 0])
        sae.decoder_bias.copy_((self.mean + self.scale * self.decoder_bias)[:, 0])
        return sae.eval().requires_grad_(False)
