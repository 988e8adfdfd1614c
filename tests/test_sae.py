"""The autoencoder and its steering, with numbers that can be checked by hand."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import SaeSettings
from training.fit_sae import Fitting, batch_top_k, top_k
from training.sae import Sae


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


def test_top_k_keeps_the_largest_of_each_image() -> None:
    values = torch.tensor([[[5.0, 1.0, 0.0], [4.0, 3.0, 2.0]]])
    assert top_k(values, 2).tolist() == [[[5.0, 1.0, 0.0], [4.0, 3.0, 0.0]]]


def test_folding_keeps_the_autoencoder_and_meets_k() -> None:
    torch.manual_seed(0)
    basis = torch.randn(1, 12, 6)
    x = (torch.rand(1, 2000, 12) * (torch.rand(1, 2000, 12) < 0.2)) @ basis * 7 + 3
    fitting = Fitting(x, SaeSettings(latents=24, k=3, epochs=20, batch_size=200))
    curve = fitting.fit(0)
    assert curve[-1]["fvu"] < 0.5 * curve[0]["fvu"]
    sae = fitting.folded(x)
    z = sae.encode(0, x[0])
    assert abs((z > 0).float().sum(1).mean().item() - 3) < 0.05
    # the folded form on raw residuals is the fitted form on normalised ones, times the scale
    normal = (x - fitting.mean) / fitting.scale
    raw = fitting.activations(normal)[0] * fitting.scale[0]
    torch.testing.assert_close(z, raw * (raw > sae.threshold[0]), rtol=1e-3, atol=1e-3)
    rebuilt = (z / fitting.scale[0] @ fitting.decoder[0] + fitting.decoder_bias[0]) * fitting.scale[0] + fitting.mean[0]
    torch.testing.assert_close(sae.decode(0, z), rebuilt, rtol=1e-3, atol=1e-3)
    assert torch.allclose(sae.decoder.norm(dim=-1), torch.ones(1, 24), atol=1e-5)
