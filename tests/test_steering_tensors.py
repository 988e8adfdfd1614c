"""Steering tensors are checked, and their errors named, like the steering terms they represent."""

import hashlib
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from export.bundle import Bundle
from service.errors import InvalidRequest
from service.steering import MAX_STRENGTH, resolve
from service.steering_tensors import from_tensors
from training.steering import SteeringArrays, SteeringError, SteeringTerm, Terms, at_strength, check, digest, to_arrays

LATENTS = (24, 22)
BUNDLE = cast(Bundle, SimpleNamespace(manifest=SimpleNamespace(latents=LATENTS, sites=LATENTS, gates_sae_digest="")))
USUAL = [
    1.0,
    1.0,
    0.0,
    -0.0,
    0.5,
    -2.0,
    float(np.float32(1e-30)),
    float(np.float32(0.1)),
    1e6,
    float(np.nextafter(np.float32(1), np.float32(2))),
]
UNUSUAL = [float("nan"), float("inf"), -float("inf"), float(np.float32(1.1e6)), -(2.0**100)]
Result = str | tuple[Mapping[str, Any], str, bool]


def terms_of(latent: NDArray[np.int64], scale: NDArray[np.float32], shift: NDArray[np.float32]) -> Terms:
    """(S, T) each. Raises SteeringError."""
    return {
        site: tuple(
            SteeringTerm(int(latent[site, i]), float(scale[site, i]), float(shift[site, i]))
            for i in range(latent.shape[1])
            if not (scale[site, i] == 1 and shift[site, i] == 0)
        )
        for site in range(len(latent))
    }


def term_by_term(tensors: SteeringArrays, strength: float) -> Result:
    """The error, or the arrays, their digest and whether there are terms, from one SteeringTerm after the other."""
    if not abs(strength) <= MAX_STRENGTH:
        return f"steering.strength is {strength}; allowed: -100 to 100"
    rows: list[Terms] = []
    for index, (latent, scale, shift) in enumerate(zip(tensors.latent, tensors.scale, tensors.shift, strict=True)):
        try:
            terms = terms_of(latent, scale, shift)
            check(terms, LATENTS)
            rows.append(at_strength(terms, strength))
        except SteeringError as error:
            return f"steering of image {index}: {str(error).removeprefix('terms: ')}"
    digests = [digest(row) for row in rows]
    alike = len(set(digests)) == 1
    name = digests[0] if alike else hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    return vars(to_arrays(rows[:1] if alike else rows, len(LATENTS))), name, any(any(row.values()) for row in rows)


@st.composite
def tensors(draw: st.DrawFn) -> SteeringArrays:
    """Mostly valid tensors; images often differ only in the order of their terms."""
    shape = draw(st.tuples(st.integers(1, 3), st.just(2), st.sampled_from([1, 2, 3, 4, 20])))
    reals = st.sampled_from(USUAL + UNUSUAL * draw(st.booleans()))
    latents = st.integers(-1, 25) if draw(st.booleans()) else st.integers(0, 21)
    made = SteeringArrays(
        draw(arrays(np.int64, shape, elements=latents)),
        draw(arrays(np.float32, shape, elements=reals)),
        draw(arrays(np.float32, shape, elements=reals)),
    )
    if draw(st.booleans()):  # distinct latents
        made.latent[:] = draw(st.permutations(range(22)))[: shape[2]]
    if draw(st.booleans()):  # an image without terms
        made.scale[0], made.shift[0] = 1, 0
    if draw(st.booleans()):  # the same terms for every image, each in an order of its own
        orders: list[NDArray[np.int64]] = [np.array(draw(st.permutations(range(shape[2])))) for _ in range(shape[0])]
        for values in (made.latent, made.scale, made.shift):
            values[:] = np.stack([values[0][:, order] for order in orders])
    return made


@settings(max_examples=500, deadline=None)
@given(tensors=tensors(), strength=st.sampled_from([1.0, 1.0, 0.5, 0.25, 0.0, -3.0, 100.0, 100.1, float("inf")]))
def test_tensors_are_steering_like_their_terms_one_by_one(tensors: SteeringArrays, strength: float) -> None:
    expected = term_by_term(tensors, strength)
    if isinstance(expected, str):
        with pytest.raises(InvalidRequest, match=f"^{re.escape(expected)}$"):
            from_tensors(BUNDLE, tensors, strength)
        return
    steering = from_tensors(BUNDLE, tensors, strength)
    padded, name, custom = expected
    assert (steering.digest, steering.custom, steering.profile, steering.off) == (name, custom, "", not strength)
    assert padded.pop("gate_bias") is steering.arrays.gate_bias is None
    for field, values in padded.items():
        array = getattr(steering.arrays, field)
        wider = array.shape[2] - values.shape[2]  # alike at strength 0, whatever the images' terms
        values = np.pad(values, ((0, 0), (0, 0), (0, wider)), constant_values=int(field == "scale"))
        assert (array.dtype, array.shape, array.tobytes()) == (values.dtype, values.shape, values.tobytes()), field
    first = SteeringArrays(*(values[:1] for values in (tensors.latent, tensors.scale, tensors.shift)))
    inline, own = (
        resolve(BUNDLE, "", terms_of(first.latent[0], first.scale[0], first.shift[0]), strength),
        from_tensors(BUNDLE, first, strength),
    )
    assert (own.digest, own.off) == (inline.digest, inline.off), "as in the typed API"
