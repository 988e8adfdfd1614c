"""Steering terms and profiles: what a caller may ask of the gates, and the file that profiles are kept in.

A term changes one latent of one site: z' = scale * z + shift. What is added to the gate's input is
((scale - 1) * z + shift) * decoder row, so the neutral term (scale 1, shift 0) adds exactly nothing.

Standard library and numpy only: the server imports this module.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1


class SteeringError(ValueError):
    """A term or profile that is not allowed; the message names the field, the value and what is allowed."""


@dataclass(frozen=True)
class SteeringTerm:
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
            if not math.isfinite(value) or abs(value) > 1e6:
                raise SteeringError(f"{name} is {value}; allowed: a finite number from -1e6 to 1e6")
            object.__setattr__(self, name, float(np.float32(value)) + 0.0)  # no -0.0: equal terms look alike

    def at(self, strength: float) -> "SteeringTerm":
        """scale -> 1 + strength (scale - 1), shift -> strength * shift."""
        if strength == 1:
            return self
        return SteeringTerm(self.latent, 1 + strength * (self.scale - 1), strength * self.shift)


Terms = Mapping[int, tuple[SteeringTerm, ...]]
"""The terms of one image, by site index. Sites without terms are left out."""

NEUTRAL: Terms = {}


@dataclass(frozen=True)
class SteeringProfile:
    name: str
    """A class profile bears its label's name."""
    classes: tuple[str, ...]
    """The set of labels that it was made for."""
    strategy: str
    """How its terms were found."""
    terms: Terms
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Its measured effect, before and after."""


@dataclass(frozen=True)
class SteeringArrays:
    """The steering inputs of the graph for B images, S sites and T terms, padded with the neutral term."""

    latent: NDArray[np.int64]
    """(B, S, T)"""
    scale: NDArray[np.float32]
    """(B, S, T)"""
    shift: NDArray[np.float32]
    """(B, S, T)"""


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


def digest(terms: Terms) -> str:
    """A short name for what the terms do: 16 hexadecimal digits. Neutral terms do not count, nor does the order."""
    entries = sorted(
        (site, term.latent, term.scale, term.shift)
        for site, of_site in terms.items()
        for term in of_site
        if (term.scale, term.shift) != (1, 0)
    )
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def terms_to_json(terms: Terms) -> dict[str, Any]:
    return {
        str(site): [{"latent": t.latent, "scale": _short(t.scale), "shift": _short(t.shift)} for t in of_site]
        for site, of_site in sorted(terms.items())
    }


def terms_from_json(value: Any) -> Terms:
    """Raises SteeringError on a term that is not allowed; KeyError, TypeError or ValueError on another structure."""
    return {
        int(site): tuple(SteeringTerm(int(t["latent"]), float(t["scale"]), float(t["shift"])) for t in of_site)
        for site, of_site in value.items()
    }


def profiles_to_json(profiles: Iterable[SteeringProfile]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "profiles": [
            {
                "name": profile.name,
                "classes": list(profile.classes),
                "strategy": profile.strategy,
                "terms": terms_to_json(profile.terms),
                "evaluation": dict(profile.evaluation),
            }
            for profile in profiles
        ],
    }


def _short(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))


def profiles_from_json(value: Any) -> tuple[SteeringProfile, ...]:
    """Profiles of a profiles.json. Raises SteeringError, naming the profile and the field."""
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        found = value.get("schema_version") if isinstance(value, dict) else type(value).__name__
        raise SteeringError(f"profiles: schema_version is {found}; allowed: {SCHEMA_VERSION}")
    profiles: list[SteeringProfile] = []
    for index, entry in enumerate(value.get("profiles", ())):
        where = f"profiles[{index}]"
        try:
            where = f"profile {entry['name']!r}"
            profile = SteeringProfile(
                str(entry["name"]),
                tuple(entry["classes"]),
                str(entry["strategy"]),
                terms_from_json(entry["terms"]),
                entry.get("evaluation", {}),
            )
        except SteeringError as error:
            raise SteeringError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SteeringError(f"{where}: {type(error).__name__}: {error}") from error
        if any(profile.name == other.name for other in profiles):
            raise SteeringError(f"{where} is there twice; allowed: once")
        profiles.append(profile)
    return tuple(profiles)
