"""From the steering tensors of a request to a `Steering`, all images at once.

The rules are those of training/steering.py, which checks and names terms one by one; tests/test_steering_tensors.py
compares the two.
"""

import hashlib
import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from service.errors import InvalidRequest
from service.steering import Steering
from training.steering import SteeringArrays, SteeringError, SteeringTerm, at_strength, check

MAX_VALUE = 1e6
"""Of a scale or shift, as in SteeringTerm."""


def from_tensors(bundle: Bundle, arrays: SteeringArrays, strength: float = 1.0) -> Steering:
    """Terms of each image (B, S, T), filled up with neutral ones (any latent, scale 1, shift 0).

    Raises InvalidRequest naming the image, the site and what is wrong with a term.
    """
    latents = bundle.manifest.latents
    if arrays.latent.shape[1] != len(latents) or arrays.latent.shape[2] < 1:
        raise InvalidRequest(
            f"steering_latent has the shape {list(arrays.latent.shape)}; allowed: [images, {len(latents)}, 1 or more]"
        )
    terms = (arrays.scale != 1) | (arrays.shift != 0)  # NaN too
    scale, shift = arrays.scale.astype(np.float64), arrays.shift.astype(np.float64)
    invalid = terms & (_outside(scale) | _outside(shift))
    if strength != 1:  # as SteeringTerm.at: 1 + (scale - 1) is not scale for every float
        with np.errstate(over="ignore", invalid="ignore"):
            scale, shift = 1 + strength * (scale - 1), strength * shift
        invalid |= terms & (_outside(scale) | _outside(shift))
    invalid |= terms & ((arrays.latent < 0) | (arrays.latent >= np.array(latents)[:, None]))
    each = np.sort(np.where(terms, arrays.latent, -1 - np.arange(terms.shape[2])), 2)  # no two of the others are equal
    invalid_rows = invalid.any((1, 2)) | (each[:, :, 1:] == each[:, :, :-1]).any((1, 2))
    if not math.isfinite(strength):
        invalid_rows[0] = True
    if invalid_rows.any():
        raise _invalid_row(bundle, arrays, int(invalid_rows.argmax()), strength)
    applied = _ordered(
        SteeringArrays(arrays.latent, scale.astype(np.float32) + 0.0, shift.astype(np.float32) + 0.0), terms, ~terms
    )  # + 0.0: no -0.0, as in SteeringTerm
    changes = (applied.scale != 1) | (applied.shift != 0)
    by_latent = _ordered(applied, changes, np.where(changes, applied.latent, np.iinfo(np.int64).max))
    same = all((array == array[:1]).all() for array in _parts(by_latent))
    rows = slice(0, 1) if same else slice(None)
    digests = _digests(*(array[rows] for array in _parts(by_latent)))
    name = digests[0] if same else _hash("".join(digests))
    return Steering(SteeringArrays(*(array[rows] for array in _parts(applied))), "", bool(terms.any()), name)


def _outside(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a scale or shift is not allowed (training/steering.py: SteeringTerm)."""
    return ~(np.abs(values) <= MAX_VALUE)


def _invalid_row(bundle: Bundle, arrays: SteeringArrays, index: int, strength: float) -> InvalidRequest:
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
