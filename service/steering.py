"""From the steering of a request to padded arrays: one `Steering` a request, one `SteeringArrays` a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from export.bundle import Bundle
from service.dial import FREE, Bias, Forced, as_gate_bias, budget_bias, steering_bias, total
from service.errors import DigestMismatch, InvalidRequest, NotFound
from training.steering import (
    NEUTRAL,
    UNBIASED,
    SteeringArrays,
    SteeringError,
    SteeringProfile,
    Terms,
    at_strength,
    canonical,
    check,
    digest,
    to_arrays,
)

MAX_STRENGTH = 100.0


@dataclass(frozen=True)
class Permission:
    """Permission to lower the budget of a call's images under load."""

    floor: float
    """The lowest budget."""
    without: SteeringArrays
    """The call's arrays without a budget."""
    bias: Callable[[float], Bias | None]
    """The dial's gate biases (G, U) for a budget."""

    def at(self, budget: float) -> SteeringArrays:
        """The call's arrays at a budget."""
        own, bias = self.without.gate_bias, self.bias(budget)
        assert bias is not None
        if own is None:
            return with_bias(self.without, bias)
        return replace(self.without, gate_bias=own + bias)


@dataclass(frozen=True)
class Steering:
    """The steering of a call, checked against the bundle that serves it."""

    arrays: SteeringArrays
    """(1, S, T), the same for all images of the call, or (B, S, T)."""
    profile: str
    """"" for inline terms or none."""
    custom: bool
    """Whether the terms are inline."""
    digest: str
    """Digest of the terms, strength included."""
    off: bool = False
    """Whether the strength is 0: nothing is steered."""
    budget: float | None = None
    """The compute fraction that each image may cost on average; None: no budget, the gates decide."""
    permission: Permission | None = None
    """None: brownout never lowers the budget."""

    def at(self, budget: float, arrays: SteeringArrays) -> "Steering":
        """The steering at another budget, with the arrays for it."""
        return replace(self, budget=budget, arrays=arrays)

    def rows(self, part: slice) -> "Steering":
        """The steering of some images of the call."""
        if len(self.arrays.latent) == 1:
            return self
        arrays = self.arrays
        bias = None if arrays.gate_bias is None else arrays.gate_bias[part]
        return replace(self, arrays=SteeringArrays(arrays.latent[part], arrays.scale[part], arrays.shift[part], bias))


def resolve(
    bundle: Bundle,
    profile: str,
    terms: Terms,
    strength: float,
    made_for: str = "",
    budget: float | None = None,
    forced: Forced = FREE,
) -> Steering:
    """The steering of a request. made_for: the gates_sae_digest that its terms were made for, or "". budget: of each
    image; None: no budget. forced: units, whatever the strength.

    Raises InvalidRequest, NotFound, DigestMismatch or Lacking.
    """
    if profile and terms:
        raise InvalidRequest(f"steering.profile is {profile!r} and steering.terms are given too; allowed: one of them")
    served = bundle.manifest.gates_sae_digest
    if made_for and made_for != served:
        raise DigestMismatch(
            f"steering.gates_sae_digest is {made_for!r}; allowed: {served!r}, which is served, or none"
        )
    check_strength(strength)
    own = UNBIASED
    if profile:
        entry = named(bundle, profile, "steering.profile")
        profile, terms, own = entry.name, entry.terms, entry.gate_bias
    try:
        if not profile:
            check(terms, bundle.manifest.latents, "steering.terms")
    except SteeringError as error:
        raise InvalidRequest(str(error)) from error
    try:
        applied = at_strength(terms, strength) if strength else NEUTRAL
    except SteeringError as error:
        raise InvalidRequest(f"steering.terms at steering.strength {strength:g}: {error}") from error
    bias = steering_bias(bundle, own, strength, forced)
    of_budget = budget_bias(bundle, budget, profile if strength else "")
    arrays = with_bias(to_arrays([applied], len(bundle.manifest.sites)), total(bias, of_budget))
    return Steering(
        arrays,
        profile,
        custom=bool(terms or forced) and not profile,
        digest=digest(applied, as_gate_bias(bundle.manifest, bias)),
        off=not strength and not forced,
        budget=budget,
    )


def check_strength(strength: float) -> None:
    """Raise InvalidRequest for a strength that is not allowed."""
    if not abs(strength) <= MAX_STRENGTH:  # false for NaN too
        raise InvalidRequest(f"steering.strength is {strength}; allowed: {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")


def with_bias(arrays: SteeringArrays, bias: Bias | None) -> SteeringArrays:
    """The arrays with these gate biases (G, U) for every image."""
    if bias is None:
        return arrays
    return replace(arrays, gate_bias=np.repeat(bias[None], len(arrays.latent), 0))


def named(bundle: Bundle, name: str, field: str) -> SteeringProfile:
    """The profile with this name. Raises NotFound, which names the field and the existing profiles, first those that
    differ only in case and spaces."""
    profile = bundle.profiles.get(canonical(name))
    if profile is None:
        nearest = sorted(bundle.profiles, key=lambda other: (_folded(other) != _folded(name), other))
        raise NotFound(f"{field} is {name!r}; allowed: {_some(nearest)}")
    return profile


def _folded(name: str) -> str:
    return "".join(canonical(name).casefold().split())


def joined(parts: Sequence[tuple[Steering, int]]) -> Steering:
    """One steering without a name for consecutive groups of images: (steering, images) each, all at one budget."""
    arrays = stack([part for part, _ in parts], [count for _, count in parts])
    return Steering(arrays, "", True, "", budget=parts[0][0].budget)


def stack(steerings: Sequence[Steering], counts: Sequence[int]) -> SteeringArrays:
    """The arrays of a batch with counts[i] rows of steering i. Terms are padded with the neutral one; if any row has
    gate biases, rows without them get 0."""
    first = steerings[0].arrays
    if len(steerings) == 1 and len(first.latent) == counts[0]:
        return first
    if all(steering.arrays is first for steering in steerings) and len(first.latent) == 1:
        count = sum(counts)
        return SteeringArrays(
            np.repeat(first.latent, count, 0),
            np.repeat(first.scale, count, 0),
            np.repeat(first.shift, count, 0),
            None if first.gate_bias is None else np.repeat(first.gate_bias, count, 0),
        )
    sites = first.latent.shape[1]
    width = max(steering.arrays.latent.shape[2] for steering in steerings)
    shape = (sum(counts), sites, width)
    biases = [of.arrays.gate_bias for of in steerings if of.arrays.gate_bias is not None]
    batch = SteeringArrays(
        np.zeros(shape, np.int64),
        np.ones(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros((shape[0], *biases[0].shape[1:]), np.float32) if biases else None,
    )
    start = 0
    for steering, count in zip(steerings, counts, strict=True):
        rows, terms = slice(start, start + count), slice(0, steering.arrays.latent.shape[2])
        if batch.gate_bias is not None and steering.arrays.gate_bias is not None:
            batch.gate_bias[rows] = steering.arrays.gate_bias
        batch.latent[rows, :, terms] = steering.arrays.latent
        batch.scale[rows, :, terms] = steering.arrays.scale
        batch.shift[rows, :, terms] = steering.arrays.shift
        start += count
    return batch


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20])
    return (
        f"{shown} and {len(names) - 20} more (ListProfiles)"
        if len(names) > 20
        else shown or "none: the model has no profiles"
    )
