"""From the steering tensors of a request to a `Steering`, all images at once.

The rules are those of training/steering.py, which checks and names terms one by one; tests/test_steering_tensors.py
compares the two.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from service.dial import as_gate_bias, budget_bias, require_biases
from service.errors import InvalidRequest
from service.steering import Steering, check_strength, with_bias
from training.steering import (
    MAX_BIAS,
    SteeringArrays,
    SteeringError,
    SteeringTerm,
    at_strength,
    biased_digest,
    check,
)

MAX_VALUE = 1e6
"""Limit of a scale or shift, as in SteeringTerm."""


def from_tensors(
    bundle: Bundle, arrays: SteeringArrays, strength: float = 1.0, budget: float | None = None
) -> Steering:
    """The steering of tensors (B, S, T): terms of each image, padded with neutral ones (any latent, scale 1, shift 0).

    Raises InvalidRequest, which names the image, the site and what is wrong with a term, and what budget_bias raises.
    """
    check_strength(strength)
    latents = bundle.manifest.latents
    if arrays.latent.shape[1] != len(latents) or arrays.latent.shape[2] < 1:
        raise InvalidRequest(
            f"steering_latent has the shape {list(arrays.latent.shape)}; allowed: [images, {len(latents)}, 1 or more]"
        )
    terms = (arrays.scale != 1) | (arrays.shift != 0)  # NaN too
    scale, shift = _at_strength(arrays, strength)
    invalid = _invalid(arrays, terms, latents) | (terms & (_outside(scale) | _outside(shift)))
    if invalid.any():
        raise _error(bundle, arrays, int(invalid.any((1, 2)).argmax()), strength)
    applied = _ordered(
        SteeringArrays(arrays.latent, scale.astype(np.float32) + 0.0, shift.astype(np.float32) + 0.0), terms, ~terms
    )  # + 0.0: no -0.0, as in SteeringTerm
    changes = (applied.scale != 1) | (applied.shift != 0)
    by_latent = _ordered(applied, changes, np.where(changes, applied.latent, np.iinfo(np.int64).max))
    same = all((array == array[:1]).all() for array in _parts(by_latent))
    rows = slice(0, 1) if same else slice(None)
    digests = _digests(*(array[rows] for array in _parts(by_latent)))
    name = digests[0] if same else _hash("".join(digests))
    own = SteeringArrays(*(array[rows] for array in _parts(applied)))
    own = with_bias(own, budget_bias(bundle, budget, ""))
    return Steering(own, "", bool(terms.any()), name, off=not strength, budget=budget)


def with_biases(bundle: Bundle, steering: Steering, gate_bias: NDArray[np.float32], strength: float) -> Steering:
    """The steering with gate biases (B, G, U) of each image added, at the strength.

    Raises Lacking when the model takes none, and InvalidRequest for a value that is not allowed.
    """
    require_biases(bundle, "input 'gate_bias' is given")
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = gate_bias.astype(np.float64) * strength
    if (invalid := ~((np.abs(gate_bias) <= MAX_BIAS) & (np.abs(scaled) <= MAX_BIAS))).any():  # NaN too
        image, *_ = np.argwhere(invalid)[0].tolist()
        raise InvalidRequest(
            f"input 'gate_bias' of image {image} has the value {gate_bias[invalid][0]:g} at strength {strength:g}; "
            "allowed: -1e6 to 1e6"
        )
    own = scaled.astype(np.float32)
    if not own.any():
        return steering
    rows = own[:1] if (own == own[:1]).all() else own
    digests = [biased_digest(steering.digest, as_gate_bias(bundle.manifest, row)) for row in rows]
    arrays = SteeringArrays(*(np.repeat(a, len(rows), 0) if len(a) < len(rows) else a for a in _parts(steering.arrays)))
    there = steering.arrays.gate_bias
    bias = np.broadcast_to(rows if there is None else rows + there, (len(arrays.latent), *own.shape[1:]))
    name = digests[0] if len(rows) == 1 else _hash("".join(digests))
    return replace(
        steering,
        arrays=replace(arrays, gate_bias=np.ascontiguousarray(bias)),
        custom=not steering.profile,
        digest=name,
        off=False,
    )


def _at_strength(arrays: SteeringArrays, strength: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and shift, as by SteeringTerm.at."""
    scale, shift = arrays.scale.astype(np.float64), arrays.shift.astype(np.float64)
    if strength == 1:  # 1 + (scale - 1) is not scale for every float
        return scale, shift
    with np.errstate(over="ignore", invalid="ignore"):
        return 1 + strength * (scale - 1), strength * shift


def _invalid(arrays: SteeringArrays, terms: NDArray[np.bool_], latents: Sequence[int]) -> NDArray[np.bool_]:
    """(B, S, T): terms that SteeringTerm or check refuses. terms: where terms are not neutral."""
    missing = (arrays.latent < 0) | (arrays.latent >= np.array(latents)[:, None])
    invalid: NDArray[np.bool_] = terms & (missing | _outside(arrays.scale) | _outside(arrays.shift))
    distinct = np.where(terms, arrays.latent, -1 - np.arange(terms.shape[2]))  # so that neutral terms repeat no latent
    ordered = np.sort(distinct, 2)
    invalid[:, :, 1:] |= ordered[:, :, 1:] == ordered[:, :, :-1]  # at some term of the image
    return invalid


def _outside(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each scale or shift is out of bounds."""
    outside: NDArray[np.bool_] = ~(np.abs(values) <= MAX_VALUE)
    return outside


def _error(bundle: Bundle, arrays: SteeringArrays, index: int, strength: float) -> InvalidRequest:
    """The error of the first image with an invalid term."""
    latent, scale, shift = (array[index] for array in _parts(arrays))
    try:
        terms = {
            site: tuple(
                SteeringTerm(int(latent[site, i]), float(scale[site, i]), float(shift[site, i]))
                for i in np.flatnonzero((scale[site] != 1) | (shift[site] != 0))
            )
            for site in range(len(latent))
        }
        check(terms, bundle.manifest.latents, "terms")
        at_strength(terms, strength)
    except SteeringError as error:
        return InvalidRequest(f"steering of image {index}: {str(error).removeprefix('terms: ')}")
    raise AssertionError(f"the steering of image {index} is valid")


def _ordered(arrays: SteeringArrays, terms: NDArray[np.bool_], keys: NDArray[Any]) -> SteeringArrays:
    """The terms (B, S, T) of each site in the order of their keys, and neutral ones in place of the others."""
    order = np.argsort(keys, 2, kind="stable")[:, :, : max(1, int(terms.sum(2).max()))]
    parts = zip(_parts(arrays), (0, 1, 0), strict=True)
    return SteeringArrays(
        *(np.take_along_axis(np.where(terms, array, array.dtype.type(fill)), order, 2) for array, fill in parts)
    )


def _digests(latent: NDArray[np.int64], scale: NDArray[np.float32], shift: NDArray[np.float32]) -> list[str]:
    """training.steering.digest of each image; (B, S, T) each, the terms of a site by latent."""
    image, site, term = np.nonzero((scale != 1) | (shift != 0))
    columns = site, *(values[image, site, term] for values in (latent, scale, shift))
    entries = list(zip(*(column.tolist() for column in columns), strict=True))
    ends = np.searchsorted(image, np.arange(len(latent) + 1)).tolist()
    return [_hash(json.dumps(entries[first:end])) for first, end in pairwise(ends)]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parts(arrays: SteeringArrays) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return arrays.latent, arrays.scale, arrays.shift
