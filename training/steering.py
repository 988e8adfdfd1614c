"""Steering terms and profiles: what a caller may ask of the gates, and the file that profiles are kept in.

A term changes one latent of one site: z' = scale * z + shift. What is added to the gate's input is
((scale - 1) * z + shift) * decoder row, so the neutral term (scale 1, shift 0) adds exactly nothing. A profile may also
have gate biases of its own, which are added to the gate logits.

Standard library, numpy and pydantic only: the server imports this module.
"""

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from training.fields import Number, checked_as, read, read_as

SCHEMA_VERSION: Final = 2
GATE_BOUND = 4.0
"""A gate logit is GATE_BOUND * tanh(linear / GATE_BOUND)."""
GATE_EPSILON = 1e-5
"""Of the layer norm of gates."""
MAX_NAME = 200
"""Characters of a profile's or label's name."""


class SteeringError(ValueError):
    """A term or profile that is not allowed; the message names the field, the value and what is allowed."""


@dataclass(frozen=True)
class SteeringTerm:
    """A change of one latent: z' = scale * z + shift. Raises SteeringError on a value that is not allowed."""

    latent: int
    """Index of the latent within its site, from 0."""
    scale: float = 1.0
    """1 is neutral."""
    shift: float = 0.0
    """In units of the latent's activation; 0 is neutral. Like scale, kept as the float32 that the graph reads."""

    def __post_init__(self) -> None:
        if self.latent < 0:
            raise SteeringError(f"latent is {self.latent}; allowed: 0 or more")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if not -1e6 <= value <= 1e6:  # NaN too
                raise SteeringError(f"{name} is {value}; allowed: a finite number from -1e6 to 1e6")
            object.__setattr__(self, name, float(np.float32(value)) + 0.0)  # no -0.0: equal terms look alike

    def at(self, strength: float) -> "SteeringTerm":
        """scale -> 1 + strength (scale - 1), shift -> strength * shift."""
        if strength == 1:
            return self
        return SteeringTerm(self.latent, 1 + strength * (self.scale - 1), strength * self.shift)


def canonical(name: str) -> str:
    """The form that names are kept and compared in (Unicode's NFC): an accent is part of its letter, not a character of
    its own, as file systems and keyboards may have it."""
    return unicodedata.normalize("NFC", name)


def check_name(name: str) -> str:
    """A name that every file, message and metric can carry, in its canonical form. Raises SteeringError."""
    name = canonical(name)
    if not 0 < len(name) <= MAX_NAME:
        raise SteeringError(f"name is {name[:MAX_NAME]!r}; allowed: a string of 1 to {MAX_NAME} characters")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise SteeringError(
            f"name is {name!a}; allowed: no control characters, no line separators, no halves of surrogate pairs"
        )
    if not name.strip():
        raise SteeringError(f"name is {name!r}; allowed: at least one character that is no space")
    return name


@dataclass(frozen=True)
class TermEntry:
    """A term in a file, where no field is left out: z' = scale * z + shift."""

    latent: Annotated[int, Field(strict=True, ge=0)]
    scale: Number
    shift: Number

    def term(self) -> SteeringTerm:
        """Raises SteeringError on a value that is not allowed."""
        return SteeringTerm(self.latent, self.scale, self.shift)


Name = Annotated[str, AfterValidator(check_name)]
SiteIndex = Annotated[int, read_as(Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$"), AfterValidator(int)])]
BlockIndex = SiteIndex
"""Of a transformer block, as in Manifest.gated_blocks; not its place among the gated ones."""
Term = Annotated[SteeringTerm, read_as(Annotated[TermEntry, AfterValidator(TermEntry.term)])]
Terms = Mapping[SiteIndex, tuple[Term, ...]]
"""The terms of one image, by site index. Sites without terms are left out."""
NEUTRAL: Terms = {}
GateBias = Mapping[BlockIndex, tuple[Number, ...]]
"""Gate biases of one image, by gated block: one for each of its units, heads first. Blocks without are left out."""
UNBIASED: GateBias = {}
MAX_BIAS = 1e6
Kind = Literal["class", "context", "selective"]
"""What a profile is for: images of one label, of several, or all traffic, of which a selective one steers images of its
classes and leaves the others alone."""


@dataclass(frozen=True)
class Measured:
    """What is read of a profile's evaluation; there may be more in it."""

    images: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    before: Mapping[str, Number] = field(default_factory=dict)
    after: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class SteeringProfile:
    """Terms under a name, and what they do to the images of its classes."""

    name: Name
    """A class profile bears its label's name."""
    classes: tuple[Name, ...]
    """The set of labels that it was made for."""
    strategy: Name
    """How its terms were found."""
    terms: Terms
    evaluation: Annotated[Mapping[str, Any], checked_as(Measured)] = field(default_factory=dict)
    """Its measured effect, before and after."""
    gate_bias: GateBias = field(default_factory=dict)
    """Biases of its own, added to the gate logits; not in version 1."""
    kind: Kind | None = None
    """Absent in a file: class, or context where there are several classes."""

    def __post_init__(self) -> None:
        if self.kind is None:
            object.__setattr__(self, "kind", "class" if len(self.classes) == 1 else "context")


@dataclass(frozen=True)
class ProfileFile:
    """The content of profiles.json."""

    schema_version: Literal[1, 2]
    profiles: tuple[SteeringProfile, ...] = ()


@dataclass(frozen=True)
class SteeringArrays:
    """The steering inputs of the graph for B images, S sites and T terms, padded with the neutral term."""

    latent: NDArray[np.int64]
    """(B, S, T)"""
    scale: NDArray[np.float32]
    """(B, S, T)"""
    shift: NDArray[np.float32]
    """(B, S, T)"""
    gate_bias: NDArray[np.float32] | None = None
    """(B, G, U) for G gated blocks and U units of each; None: no biases."""


def at_strength(terms: Terms, strength: float) -> Terms:
    """The terms at a strength: 0 is neutral, 1 is as given. Raises SteeringError unless it is finite."""
    if not math.isfinite(strength):
        raise SteeringError(f"strength is {strength}; allowed: a finite number")
    return {site: tuple(term.at(strength) for term in of_site) for site, of_site in terms.items()}


def check(terms: Terms, latents: Sequence[int], where: str = "terms") -> None:
    """Raise SteeringError unless every term names a site and a latent that exist, at most once.

    latents: number of latents of each site.
    """
    for site, of_site in terms.items():
        if not 0 <= site < len(latents):
            raise SteeringError(f"{where}: site is {site}; allowed: 0 to {len(latents) - 1}")
        seen = set()
        for term in of_site:
            if term.latent >= latents[site]:
                allowed = f"0 to {latents[site] - 1}"
                raise SteeringError(f"{where}: latent is {term.latent} at site {site}; allowed: {allowed}")
            if term.latent in seen:
                raise SteeringError(f"{where}: latent {term.latent} at site {site} is given twice; allowed: once")
            seen.add(term.latent)


def check_gate_bias(gate_bias: GateBias, blocks: Sequence[int], units: int, where: str = "gate_bias") -> None:
    """Raise SteeringError unless the biases are of gated blocks, one for each unit. blocks: the gated ones."""
    for block, of_block in gate_bias.items():
        if block not in blocks:
            allowed = ", ".join(map(str, blocks))
            raise SteeringError(f"{where}: block is {block}; allowed: a gated one, {allowed}")
        if len(of_block) != units:
            raise SteeringError(f"{where}: block {block} has {len(of_block)} biases; allowed: {units}, one a unit")
        if outside := [bias for bias in of_block if not abs(bias) <= MAX_BIAS]:
            raise SteeringError(f"{where}: a bias of block {block} is {outside[0]}; allowed: -1e6 to 1e6")


def to_arrays(rows: Sequence[Terms], sites: int) -> SteeringArrays:
    """Terms of B images as arrays (B, sites, T), T the most terms that any image has at a site (at least 1)."""
    count = max((len(of_site) for row in rows for of_site in row.values()), default=0)
    shape = (len(rows), sites, max(count, 1))
    latent, scale, shift = np.zeros(shape, np.int64), np.ones(shape, np.float32), np.zeros(shape, np.float32)
    for index, row in enumerate(rows):
        for site, of_site in row.items():
            width = len(of_site)
            latent[index, site, :width] = [term.latent for term in of_site]
            scale[index, site, :width] = [term.scale for term in of_site]
            shift[index, site, :width] = [term.shift for term in of_site]
    return SteeringArrays(latent, scale, shift)


def digest(terms: Terms, gate_bias: GateBias = UNBIASED) -> str:
    """A short name for what the terms and biases do: 16 hexadecimal digits. Neutral ones do not count, nor does the
    order."""
    entries = sorted(
        (site, term.latent, term.scale, term.shift)
        for site, of_site in terms.items()
        for term in of_site
        if (term.scale, term.shift) != (1, 0)
    )
    return biased_digest(hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16], gate_bias)


def biased_digest(of_terms: str, gate_bias: GateBias) -> str:
    """The digest of terms with such a digest and of these biases."""
    entries = sorted(
        (block, unit, float(np.float32(bias)))
        for block, of_block in gate_bias.items()
        for unit, bias in enumerate(of_block)
        if bias
    )
    return hashlib.sha256(f"{of_terms} {json.dumps(entries)}".encode()).hexdigest()[:16] if entries else of_terms


def terms_to_json(terms: Terms) -> dict[str, Any]:
    """The terms by site, which terms_from_json reads. Numbers are the shortest that give the same float32."""
    return {
        str(site): [{"latent": t.latent, "scale": _short(t.scale), "shift": _short(t.shift)} for t in of_site]
        for site, of_site in sorted(terms.items())
    }


def terms_from_json(value: Any) -> Terms:
    """What terms_to_json wrote. Raises SteeringError, naming the field."""
    return read(Terms, value, SteeringError)  # type: ignore[type-abstract]


def profiles_to_json(profiles: Iterable[SteeringProfile]) -> dict[str, Any]:
    """The value of profiles.json, which profiles_from_json reads."""
    return {"schema_version": SCHEMA_VERSION, "profiles": [_profile_to_json(profile) for profile in profiles]}


def profiles_from_json(value: Any) -> tuple[SteeringProfile, ...]:
    """Profiles of a profiles.json, whatever it holds. Raises SteeringError, naming the field."""
    profiles = read(ProfileFile, value, SteeringError).profiles
    counts = Counter(profile.name for profile in profiles)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise SteeringError(f"profile {twice[0]!r} is given twice; allowed: once")
    return profiles


def _profile_to_json(profile: SteeringProfile) -> dict[str, Any]:
    value = {**vars(profile), "terms": terms_to_json(profile.terms)}
    biases = {str(block): list(map(_short, of_block)) for block, of_block in sorted(profile.gate_bias.items())}
    return {**value, "gate_bias": biases} if biases else {k: v for k, v in value.items() if k != "gate_bias"}


def _short(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))
