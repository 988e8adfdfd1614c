"""Steering terms and profiles: what a caller may ask of the gates, and the file that profiles are kept in.

A term changes one latent of one site: z' = scale * z + shift. What is added to the gate's input is
((scale - 1) * z + shift) * decoder row, so the neutral term (scale 1, shift 0) adds exactly nothing.

Standard library and numpy only: the server imports this module.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1
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
            if not math.isfinite(value) or abs(value) > 1e6:
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


def check_name(name: object) -> str:
    """A name that every file, message and metric can carry, in its canonical form. Raises SteeringError."""
    name = canonical(name) if isinstance(name, str) else name
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise SteeringError(f"name is {str(name)[:MAX_NAME]!r}; allowed: a string of 1 to {MAX_NAME} characters")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise SteeringError(
            f"name is {name!a}; allowed: no control characters, no line separators, no halves of surrogate pairs"
        )
    if not name.strip():
        raise SteeringError(f"name is {name!r}; allowed: at least one character that is no space")
    return name


Terms = Mapping[int, tuple[SteeringTerm, ...]]
"""The terms of one image, by site index. Sites without terms are left out."""

NEUTRAL: Terms = {}
SITE = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class SteeringProfile:
    """Terms under a name, and what they do to the images of its classes."""

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
    """The terms by site, which terms_from_json reads. Numbers are the shortest that give the same float32."""
    return {
        str(site): [{"latent": t.latent, "scale": _short(t.scale), "shift": _short(t.shift)} for t in of_site]
        for site, of_site in sorted(terms.items())
    }


def terms_from_json(value: Any) -> Terms:
    """Raises SteeringError on a term that is not allowed; KeyError, TypeError or ValueError on another structure."""
    terms = {}
    for site, of_site in value.items():
        if not SITE.fullmatch(site):
            raise SteeringError(f"site is {site!r}; allowed: a number from 0")
        terms[int(site)] = tuple(
            SteeringTerm(_whole(t["latent"], "latent"), _number(t["scale"], "scale"), _number(t["shift"], "shift"))
            for t in of_site
        )
    return terms


def profiles_to_json(profiles: Iterable[SteeringProfile]) -> dict[str, Any]:
    """The value of profiles.json, which profiles_from_json reads."""
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
    """Profiles of a profiles.json, whatever it holds. Raises SteeringError, naming the profile and the field."""
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        found = value.get("schema_version") if isinstance(value, dict) else type(value).__name__
        raise SteeringError(f"profiles: schema_version is {found}; allowed: {SCHEMA_VERSION}")
    profiles: dict[str, SteeringProfile] = {}
    entries = value.get("profiles", [])
    if not isinstance(entries, list):
        raise SteeringError(f"profiles: is a {type(entries).__name__}; allowed: a list")
    for index, entry in enumerate(entries):
        where = f"profiles[{index}]"
        try:
            name = check_name(entry["name"])
            where = f"profile {name!r}"
            profile = SteeringProfile(
                name,
                tuple(map(check_name, _instance(entry["classes"], list, "classes"))),
                check_name(entry["strategy"]),
                terms_from_json(entry["terms"]),
                _evaluation(entry.get("evaluation", {})),
            )
        except SteeringError as error:
            raise SteeringError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SteeringError(f"{where}: {type(error).__name__}: {error}") from error
        if name in profiles:
            raise SteeringError(f"{where} is there twice; allowed: once")
        profiles[name] = profile
    return tuple(profiles.values())


def _evaluation(value: Any) -> Mapping[str, Any]:
    """What is read of it has the type that it is read as."""
    evaluation: dict[str, Any] = _instance(value, dict, "evaluation")
    if not 0 <= _whole(evaluation.get("images", 0), "evaluation.images") < 2**32:
        raise SteeringError(f"evaluation.images is {evaluation['images']}; allowed: 0 to {2**32 - 1}")
    for part in ("before", "after"):
        for name, number in _instance(evaluation.get(part, {}), dict, f"evaluation.{part}").items():
            _number(number, f"evaluation.{part}.{name}")
    return evaluation


def _whole(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise SteeringError(f"{field} is {_shown(value)}; allowed: a whole number")
    return value


def _number(value: Any, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise SteeringError(f"{field} is {_shown(value)}; allowed: a finite number")
    return float(value)


def _instance(value: Any, kind: type, field: str) -> Any:
    if not isinstance(value, kind):
        raise SteeringError(f"{field} is {_shown(value)}; allowed: a JSON {'object' if kind is dict else 'array'}")
    return value


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
