"""Steering terms as a client gives them. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Term(Protocol):
    """A change of one latent: z' = scale * z + shift. SteeringTerm is one; so is any object with these attributes."""

    @property
    def latent(self) -> int:
        """Index of the latent within its site, from 0."""

    @property
    def scale(self) -> float:
        """1 is neutral."""

    @property
    def shift(self) -> float:
        """In units of the latent's activation; 0 is neutral."""


@dataclass(frozen=True)
class SteeringTerm:
    """A change of one latent: z' = scale * z + shift. The server checks the values, and names one that is wrong."""

    latent: int
    """Index of the latent within its site, from 0."""
    scale: float = 1.0
    """1 is neutral."""
    shift: float = 0.0
    """In units of the latent's activation; 0 is neutral."""


Terms = Mapping[int, Sequence[Term]]
"""The terms of one image, by site index. Sites without terms are left out."""
