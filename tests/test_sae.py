"""The autoencoder, its fit and its steering, with numbers that readers can check by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.checkpoint import Run, RunError
from training.config import DataSettings, SaeSettings, Settings, VitSettings
from training.data.splits import Data, Split, load
from training.model.gated_vit import GatedVit
from training.model.sae import Sae, batch_top_k, kth_largest, thresholds, top_k
from training.sae import fit
from training.sae.activations import moments, residuals
from training.sae.fidelity import fidelity, reconstruction, recovered, stability
from training.sae.fit import Fitting, load_sae
from training.vit.fit import build


def identity_sae(threshold: float = 0.0) -> Sae:
    """One site, three latents that are the three coordinates."""
    sae = Sae(1, 3, 3)
    sae.load_state_dict({
        "encoder": torch.eye(3)[None],
        "encoder_bias": torch.zeros(1, 3),
        "decoder": torch.eye(3)[None],
        "decoder_bias": torch.zeros(1, 3),
        "threshold": torch.full((1, 3), threshold),
    })  # fmt: skip
    return sae.requires_grad_(False)


def test_a_latent_is_zero_up_to_its_threshold_and_whole_above() -> None:
    z = identity_sae(threshold=1.0).encode(0, torch.tensor([[0.5, 1.0, 1.5]]))
    assert z.tolist() == [[0.0, 0.0, 1.5]]


def test_terms_by_hand() -> None:
    x = torch.tensor([[2.0, -1.0, 3.0]])  # latents 2, 0, 3
    latent, scale, shift = torch.tensor([[0, 1, 2]]), torch.tensor([[3.0, 5.0, 0.0]]), torch.tensor([[0.0, 0.5, 1.0]])
    # x + (3 - 1) * 2, x + (5 - 1) * 0 + 0.5, x + (0 - 1) * 3 + 1
    assert identity_sae().steer(0, x, latent, scale, shift).tolist() == [[6.0, -0.5, 1.0]]


def test_steering_sees_a_latent_at_its_threshold_as_zero() -> None:
    x, one = torch.tensor([[1.0, 1.5, 0.0]]), torch.ones(1, 2)
    assert identity_sae(1.0).steer(0, x, torch.tensor([[0, 1]]), 2 * one, 0 * one).tolist() == [[1.0, 3.0, 0.0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000))
def test_neutral_terms_change_nothing_to_the_bit(batch: int, terms: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sae = Sae(2, 16, 8).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.normal_(generator=generator)
    x = 10 * torch.randn(batch, 8, generator=generator)
    latent = torch.randint(16, (batch, terms), generator=generator)
    steered = sae.steer(1, x, latent, torch.ones(batch, terms), torch.zeros(batch, terms))
    assert torch.equal(steered, x)


def test_steering_computes_what_encode_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = Sae(1, 16, 8).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.normal_(generator=generator)
    x = torch.randn(5, 8, generator=generator)
    scale, shift = torch.randn(5, 16, generator=generator), torch.randn(5, 16, generator=generator)
    change = ((scale - 1) * sae.encode(0, x) + shift) @ sae.decoder[0]
    every = torch.arange(16).expand(5, 16)
    torch.testing.assert_close(sae.steer(0, x, every, scale, shift), x + change)


def test_batch_top_k_keeps_the_largest_of_the_whole_batch() -> None:
    values = torch.tensor([[[5.0, 1.0, 0.0], [4.0, 3.0, 2.0]]])  # one site, two images: the first may keep fewer
    assert batch_top_k(values, 3).tolist() == [[[5.0, 0.0, 0.0], [4.0, 3.0, 0.0]]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30_000), st.booleans(), st.booleans())
def test_the_threshold_is_exact_however_the_values_lie(seed: int, count: int, ties: bool, ordered: bool) -> None:
    """Sorted values, or a sample of only the largest ones, make the first guess useless."""
    values = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(seed))
    values = values.bfloat16() if ties else values
    values[0, ::17] += 5
    values = values.sort(dim=1).values if ordered else values
    expected = values.sort(dim=1, descending=True).values[:, min(count, 20_000) - 1]
    assert torch.equal(kth_largest(values, count), expected)


def test_top_k_keeps_the_largest_of_each_image() -> None:
    values = torch.tensor([[[5.0, 1.0, 0.0], [4.0, 3.0, 2.0]]])
    assert top_k(values, 2).tolist() == [[[5.0, 1.0, 0.0], [4.0, 3.0, 0.0]]]


def test_no_top_k_keeps_a_latent_below_zero() -> None:
    values = torch.tensor([[[2.0, -1.0, -3.0], [-4.0, 1.0, -5.0]]])
    kept = [[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    assert (batch_top_k(values, 4) + 0).tolist() == kept
    assert (top_k(values, 2) + 0).tolist() == kept


def test_thresholds_by_hand() -> None:
    """Four images, k = 1. TopK takes latent 0 at 9 and 8, latent 1 at 4 and 3, latent 2 never."""
    raw = torch.tensor([[9.0, 1.0, 0.0], [8.0, 2.0, -1.0], [1.0, 4.0, 0.5], [2.0, 3.0, 1.0]])
    # BatchTopK: the four largest are 9, 8, 4, 3, so 2 must be exceeded
    assert thresholds(raw, 1, "batch-topk").tolist() == [2.0, 2.0, 2.0]
    # two images each: latent 0 must exceed 2, latent 1 must exceed 2, latent 2 the 1 that it was seen at, and the 2
    assert thresholds(raw, 1, "topk").tolist() == [2.0, 2.0, 2.0]
    weak = torch.tensor([[9.0, 1.0], [9.0, 2.0], [9.0, 3.0], [0.0, 0.5]])  # latent 1 is chosen at 0.5 alone
    assert thresholds(weak, 1, "batch-topk").tolist() == [2.0, 2.0]
    assert thresholds(weak, 1, "topk").tolist() == [0.0, 2.0]
    always = torch.tensor([[1.0, 0.5], [2.0, 0.5]])
    assert thresholds(always, 1, "topk").tolist() == [0.0, 0.5]


def few_causes() -> torch.Tensor:
    """(1, 2000, 6): sums of a few of 12 directions, off the origin."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(1, 12, 6, generator=generator)
    strength, on = torch.rand(2, 1, 2000, 12, generator=generator)
    return (strength * (on < 0.2)) @ basis * 7 + 3


@pytest.mark.parametrize("kind", ["batch-topk", "topk"])
def test_a_fit_explains_its_residuals_and_keeps_k_after_the_conversion(kind: str) -> None:
    torch.manual_seed(0)
    x = few_causes()
    fitting = Fitting(x, SaeSettings(kind=kind, latents=24, k=3, epochs=20, batch_size=200))
    curve = fitting.fit(0)
    assert curve[-1]["fvu"] < 0.5 * curve[0]["fvu"]
    sae = fitting.folded(x)
    assert abs((sae.encode(0, x[0]) > 0).float().sum(1).mean().item() - 3) < 0.05
    assert (sae.threshold[0].unique().numel() == 1) == (kind == "batch-topk")
    assert torch.allclose(sae.decoder.norm(dim=-1), torch.ones(1, 24), atol=1e-5)
    z, _ = fitting.reconstruct(0, x[0])
    assert abs((z > 0).float().sum(1).mean().item() - 3) < 0.05


def test_a_fit_that_diverges_stops_there() -> None:
    torch.manual_seed(0)
    fitting = Fitting(few_causes(), SaeSettings(latents=24, k=3, epochs=20, batch_size=200, learning_rate=1e30))
    with pytest.raises(RunError, match=r"autoencoders is (nan|inf) at step \d+; allowed: a finite number"):
        fitting.fit(0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50))
def test_folding_leaves_latents_and_reconstruction_unchanged(seed: int, spread: float, centre: float) -> None:
    """For any folded scale and mean: raw residuals in, the fitted form's answers times the scale out."""
    torch.manual_seed(seed)
    x = spread * torch.randn(2, 40, 6) + centre
    fitting = Fitting(x, SaeSettings(latents=16, k=4))
    with torch.no_grad():
        for parameter in (fitting.encoder, fitting.encoder_bias, fitting.decoder_bias):
            parameter.normal_()
    sae = fitting.folded(x)
    for site, scale in enumerate(fitting.scale.flatten()):
        normal = (x[site : site + 1] - fitting.mean[site]) / scale
        raw = (fitting.raw(normal, slice(site, site + 1))[0] * scale).detach()
        near = (raw - sae.threshold[site]).abs() < 1e-3 * scale * (1 + abs(centre) / spread)
        z = sae.encode(site, x[site])
        tolerance = {"rtol": 1e-3, "atol": 1e-3 * scale.item() * (1 + abs(centre) / spread)}
        torch.testing.assert_close(z[~near], (raw * (raw > sae.threshold[site]))[~near], **tolerance)
        normal_rebuilt = z / scale @ fitting.decoder[site] + fitting.decoder_bias[site]
        torch.testing.assert_close(
            sae.decode(site, z), (normal_rebuilt * scale + fitting.mean[site]).detach(), **tolerance
        )


def test_moments_by_hand() -> None:
    mean, scale = moments(torch.tensor([[[1.0, 10.0], [3.0, 10.0]]]))
    assert mean.tolist() == [[[2.0, 10.0]]]
    assert scale.item() == pytest.approx((2 / 4) ** 0.5)  # squares 1, 0, 1, 0 about a mean per dimension


def test_a_dead_latent_learns_what_the_others_leave() -> None:
    """AuxK by hand: latent 1 is dead and at 1, the error is 2 along its row: (2 - 1)^2 over 2 entries."""
    fitting = Fitting(torch.randn(1, 8, 2), SaeSettings(latents=4, k=1))
    with torch.no_grad():
        fitting.encoder.copy_(torch.tensor([[[1.0, 0], [0, 1], [-1, 0], [0, -1]]]))
        fitting.decoder.copy_(fitting.encoder)
        fitting.decoder_bias.zero_()
    x, error = torch.tensor([[[5.0, 1.0]]]), torch.tensor([[[0.0, 2.0]]])
    lost = fitting._auxiliary(x, error, torch.tensor([[False, True, False, False]]))
    assert lost.item() == pytest.approx(1 / 2)
    lost.backward()
    assert fitting.encoder.grad is not None
    assert fitting.encoder.grad[0].abs().sum(1).gt(0).tolist() == [False, True, False, False]


def small(out: Path, **sae: Any) -> tuple[Settings, Data, GatedVit]:
    """A model of two gated blocks with gates that differ from image to image, and 400 images."""
    chosen = SaeSettings(**{"latents": 24, "k": 4, "epochs": 8, "batch_size": 50, **sae})
    data = DataSettings(max_train=400, max_test=50)
    vit = VitSettings(dim=16, depth=3, heads=2)
    settings = Settings(step="sae", out=out, save_every=0, data=data, vit=vit, sae=chosen)  # type: ignore[call-arg]
    images = load(data, 0)
    torch.manual_seed(0)
    model = build(vit, images.spec, len(images.labels)).eval()
    model.requires_grad_(False)
    for site, gate in enumerate(model.gates):  # each head open for one half of the images
        torch.nn.init.normal_(gate.linear.weight)
        logit = gate.linear(gate.norm(model(images.train.images)[1]["residual"][:, site]))
        gate.linear.bias -= logit.median(0).values
    return settings, images, model


class Interrupted(Exception):
    pass


class Breaking(Run):
    """Interrupted right after the `at`-th state was written."""

    def __init__(self, folder: Path, at: int):
        super().__init__(folder)
        self.left = at

    def write_state(self, *arguments: Any) -> None:
        super().write_state(*arguments)
        self.left -= 1
        if not self.left:
            raise Interrupted


@pytest.mark.slow
def test_an_interrupted_fit_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted within the first fit, after it, and within the fit of the second seed."""
    settings, data, model = small(tmp_path, stability_seeds=1)
    whole = fit.fit_sae(settings, data, Run(tmp_path / "whole"), model).state_dict()
    result = Run(tmp_path / "whole").info("sae")["result"]
    steps = 8 * 7  # of a fit; 360 training images in batches of 50
    for at in (20, steps + 1, steps + 20):
        folder = tmp_path / str(at)
        with pytest.raises(Interrupted):
            fit.fit_sae(settings, data, Breaking(folder, at), model)
        with pytest.raises(RunError, match="run the step 'sae' first"):
            load_sae(Run(folder))
        resumed = fit.fit_sae(settings, data, Run(folder), model).state_dict()
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), (at, name)
        assert Run(folder).info("sae")["result"] == result
        assert sorted(path.name for path in folder.iterdir()) == ["sae.json", "sae.safetensors"]
    assert len(result["stability"][0]) == len(result["fidelity"]) == len(result["fidelity_before"]) == 2
    assert all(0 < value < 1 for value in result["stability"][0])


def test_a_memory_map_gives_what_memory_gives(tmp_path: Path) -> None:
    settings, data, model = small(tmp_path)
    in_memory = residuals(model, data.train, "test", size=64)
    mapped = residuals(model, data.train, "test", size=64, folder=tmp_path, memory=4 * in_memory.numel() - 1)
    assert residuals(model, data.train, "test", 64, tmp_path, 4 * in_memory.numel()).dtype == torch.float32
    assert mapped.dtype == torch.float16
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(mapped, in_memory.half())
    torch.testing.assert_close(in_memory[:, 7], model(data.train.images[7:8])[1]["residual"][0])
    fits = []
    for found in (mapped, in_memory.half().float()):
        torch.manual_seed(0)
        fitting = Fitting(found, settings.sae)
        fits.append((fitting.fit(0), fitting.folded(found).state_dict()))
    assert fits[0][0] == fits[1][0]
    for name, value in fits[0][1].items():
        assert torch.equal(value, fits[1][1][name]), name


def test_residuals_too_large_for_a_file_are_refused(tmp_path: Path) -> None:
    _, data, model = small(tmp_path)
    model.vit.cls_token.data.fill_(1e6)
    with pytest.raises(RunError, match=r"sae\.memory_limit is 0 bytes, and residuals of .* allowed: 46080 or more"):
        residuals(model, data.train, "test", folder=tmp_path, memory=0)


def test_fidelity_by_hand(tmp_path: Path) -> None:
    """Two images (1, 2, 0) and (3, -2, 0), an identity that keeps only what exceeds 1.5: (0, 2, 0) and (3, 0, 0)."""
    _, _, model = small(tmp_path)
    gate = model.gates[0]
    gate.norm, gate.linear = torch.nn.Identity(), torch.nn.Linear(3, 2)
    gate.linear.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    gate.linear.bias.data = torch.tensor([-0.95, 1.0])
    x = torch.tensor([[[1.0, 2.0, 0.0], [3.0, -2.0, 0.0]]])
    (found,) = fidelity(reconstruction(identity_sae(1.5)), model, x, "test", size=1)
    assert found["l0"] == 1.0
    # errors 1^2 and 2^2; variance about the means 2 and 0: 1 + 4 + 1 + 4
    assert found["fvu"] == pytest.approx(5 / 10)
    assert found["cosine"] == pytest.approx((2 / 5**0.5 + 3 / 13**0.5) / 2)
    assert found["dead"] == pytest.approx(1 / 3)
    assert found["dense"] == 0.0  # exactly half of the images is not more than half
    # logits about (0.05, 3), (2.05, -1); from the reconstruction (-0.95, 3), (2.05, 1): two of four flip, one is near 0
    assert found["gate_agreement"] == 2 / 4
    assert found["gate_agreement_clear"] == 2 / 3


def test_the_residual_recovers_everything_and_its_mean_nothing(tmp_path: Path) -> None:
    _, data, model = small(tmp_path)
    model.vit.head.weight *= 1000  # sure of itself, and right: the classes are its own answers
    images = data.selection.images
    split, found = Split(images, model(images)[0].argmax(-1)), residuals(model, data.selection, "test")
    mean = moments(found)[0]
    perfect = recovered(lambda site, x: (x, x), model, found, split)
    useless = recovered(lambda site, x: (x, mean[site].expand_as(x)), model, found, split)
    assert perfect["ce_reconstructed"] == perfect["ce"] < perfect["ce_mean"] == useless["ce_reconstructed"]
    assert (perfect["accuracy"], perfect["accuracy_reconstructed"]) == (1.0, 1.0)
    assert useless["accuracy_reconstructed"] < 1
    assert (perfect["ce_recovered"], useless["ce_recovered"]) == (1.0, 0.0)


def test_stability_by_hand() -> None:
    """The rows (1, 0, 0) and (0, 1, 0) are found again, (0, 0, 1) has no better match than a cosine of 0.6."""
    other = identity_sae()
    other.decoder[0] = torch.tensor([[0.0, 2, 0], [1, 0, 0], [0.8, 0, 0.6]])
    assert stability(identity_sae(), other) == pytest.approx([(1 + 1 + 0.6) / 3])
    assert stability(other, other) == pytest.approx([1.0])
