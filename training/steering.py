"""Steering terms and profiles: how a caller changes the gates, and the format of profiles.json.

A term changes one latent of one site: z' = scale * z + shift. It adds ((scale - 1) * z + shift) * decoder row to the
gate's input, so the neutral term (scale 1, shift 0) adds exactly nothing. A profile may also have its own gate biases,
which are added to the gate logits.

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
"""Epsilon of the layer norm of gates."""
MAX_NAME = 200
"""Longest name of a profile or label, in characters."""


class SteeringError(ValueError):
    """A term or profile is invalid; the message names the field, the value and what is allowed."""


@dataclass(frozen=True)
class SteeringTerm:
    """A change of one latent: z' = scale * z + shift. Raises SteeringError on an invalid value."""

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
            if not -1e6 <= value <= 1e6:  # also true for NaN
                raise SteeringError(f"{name} is {value}; allowed: a finite number from -1e6 to 1e6")
            object.__setattr__(self, name, float(np.float32(value)) + 0.0)  # no -0.0: equal terms look alike

    def at(self, strength: float) -> "SteeringTerm":
        """scale -> 1 + strength (scale - 1), shift -> strength * shift."""
        if strength == 1:
            return self
        return SteeringTerm(self.latent, 1 + strength * (self.scale - 1), strength * self.shift)


def canonical(name: str) -> str:
    """The form in which names are stored and compared (Unicode NFC). File systems and keyboards may write an accent as
    a separate character; here it is part of its letter."""
    return unicodedata.normalize("NFC", name)


def check_name(name: str) -> str:
    """The canonical form of a name that is allowed in files, messages and metrics. Raises SteeringError on any
    other."""
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
    """A term in a file, where every field is required: z' = scale * z + shift."""

    latent: Annotated[int, Field(strict=True, ge=0)]
    scale: Number
    shift: Number

    def term(self) -> SteeringTerm:
        """The term. Raises SteeringError on an invalid value."""
        return SteeringTerm(self.latent, self.scale, self.shift)


Name = Annotated[str, AfterValidator(check_name)]
SiteIndex = Annotated[int, read_as(Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$"), AfterValidator(int)])]
BlockIndex = SiteIndex
"""Index of a transformer block, as in Manifest.gated_blocks; not its position among the gated blocks."""
Term = Annotated[SteeringTerm, read_as(Annotated[TermEntry, AfterValidator(TermEntry.term)])]
Terms = Mapping[SiteIndex, tuple[Term, ...]]
"""The terms of one image, by site index. Sites without terms are omitted."""
NEUTRAL: Terms = {}
GateBias = Mapping[BlockIndex, tuple[Number, ...]]
"""Gate biases of one image, by gated block: one for each unit, heads first. Blocks without biases are omitted."""
UNBIASED: GateBias = {}
MAX_BIAS = 1e6
Kind = Literal["class", "context", "selective"]
"""What a profile is for: images of one label, images of several labels, or all traffic. A selective profile steers only
the images of its classes."""


@dataclass(frozen=True)
class Measured:
    """The fields of a profile's evaluation that are read; it may have more."""

    images: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    before: Mapping[str, Number] = field(default_factory=dict)
    after: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class SteeringProfile:
    """A named set of terms, and its measured effect on the images of its classes."""

    name: Name
    """The name of a class profile is its label."""
    classes: tuple[Name, ...]
    """The labels that the profile is for."""
    strategy: Name
    """The strategy that found its terms."""
    terms: Terms
    evaluation: Annotated[Mapping[str, Any], checked_as(Measured)] = field(default_factory=dict)
    """Its measured effect: metrics before and after steering."""
    gate_bias: GateBias = field(default_factory=dict)
    """Its own biases, added to the gate logits; not in schema version 1."""
    kind: Kind | None = None
    """If a file omits it: class, or context if there are several classes."""

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
    """The steering inputs of a graph for B images, S sites and T terms, padded with neutral terms."""

    latent: NDArray[np.int64]
    """(B, S, T)"""
    scale: NDArray[np.float32]
    """(B, S, T)"""
    shift: NDArray[np.float32]
    """(B, S, T)"""
    gate_bias: NDArray[np.float32] | None = None
    """(B, G, U) for G gated blocks of U units each; None: no biases."""


def at_strength(terms: Terms, strength: float) -> Terms:
    """The terms at a strength: 0 is neutral, 1 leaves them unchanged. Raises SteeringError unless the strength is
    finite."""
    if not math.isfinite(strength):
        raise SteeringError(f"strength is {strength}; allowed: a finite number")
    return {site: tuple(term.at(strength) for term in of_site) for site, of_site in terms.items()}


def check(terms: Terms, latents: Sequence[int], where: str = "terms") -> None:
    """Raise SteeringError unless every term names an existing site and latent, and none is named twice.

    latents: the number of latents at each site.
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
    """Raise SteeringError unless all biases belong to gated blocks, one for each unit. blocks: the gated blocks."""
    for block, of_block in gate_bias.items():
        if block not in blocks:
            allowed = ", ".join(map(str, blocks))
            raise SteeringError(f"{where}: block is {block}; allowed: a gated one, {allowed}")
        if len(of_block) != units:
            raise SteeringError(f"{where}: block {block} has {len(of_block)} biases; allowed: {units}, one a unit")
        if outside := [bias for bias in of_block if not abs(bias) <= MAX_BIAS]:
            raise SteeringError(f"{where}: a bias of block {block} is {outside[0]}; allowed: -1e6 to 1e6")


def bias_array(gate_bias: GateBias, blocks: Sequence[int], units: int) -> NDArray[np.float64]:
    """float64 (G, U): the biases of every gated block, 0 where there are none. blocks: the gated blocks."""
    return np.array([gate_bias.get(block, [0.0] * units) for block in blocks], np.float64)


def to_arrays(rows: Sequence[Terms], sites: int) -> SteeringArrays:
    """Terms of B images as arrays (B, sites, T). T: the largest number of terms of an image at a site, at least 1."""
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
    """A digest of terms and biases: 16 hexadecimal digits. It ignores neutral terms and biases, and their order."""
    entries = sorted(
        (site, term.latent, term.scale, term.shift)
        for site, of_site in terms.items()
        for term in of_site
        if (term.scale, term.shift) != (1, 0)
    )
    return biased_digest(hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16], gate_bias)


def biased_digest(of_terms: str, gate_bias: GateBias) -> str:
    """The digest of these biases with terms that have the digest `of_terms`."""
    entries = sorted(
        (block, unit, float(np.float32(bias)))
        for block, of_block in gate_bias.items()
        for unit, bias in enumerate(of_block)
        if bias
    )
    return hashlib.sha256(f"{of_terms} {json.dumps(entries)}".encode()).hexdigest()[:16] if entries else of_terms


def terms_to_json(terms: Terms) -> dict[str, Any]:
    """The terms by site, for terms_from_json. Each number is the shortest decimal of its float32."""
    return {
        str(site): [{"latent": t.latent, "scale": _short(t.scale), "shift": _short(t.shift)} for t in of_site]
        for site, of_site in sorted(terms.items())
    }


def terms_from_json(value: Any) -> Terms:
    """The terms that terms_to_json wrote. Raises SteeringError, naming the field."""
    return read(Terms, value, SteeringError)  # type: ignore[type-abstract]


def profiles_to_json(profiles: Iterable[SteeringProfile]) -> dict[str, Any]:
    """The JSON value of profiles.json, for profiles_from_json."""
    return {"schema_version": SCHEMA_VERSION, "profiles": [_profile_to_json(profile) for profile in profiles]}


def profiles_from_json(value: Any) -> tuple[SteeringProfile, ...]:
    """The profiles in the JSON value of a profiles.json. Raises SteeringError on an invalid value, naming the field."""
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
    """The shortest decimal with the same float32."""
    return float(str(np.float32(value)))
