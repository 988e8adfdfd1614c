"""Chooses the profiles of a model that have their own series: those with the most recent images.

The weight of an image halves after each HALF_LIFE. A profile replaces another one only if it has clearly more images,
so that series do not alternate between equals. Counts are never moved between a profile's own series, which are
retained for a while and then removed, and `other`. So no counter ever falls.
"""

import math
import threading
from collections.abc import Collection, Mapping, Sequence

from service.counting import Key

HALF_LIFE = 3600.0
"""Seconds."""
REVIEW_SECONDS = 120.0
"""The shortest time between two reviews. It is at least the time for which series are retained: places change once in
that time, so a model has series of at most twice as many profiles as there are places."""
TIMES, MORE = 2.0, 10.0
"""A profile replaces another one if it has more than TIMES times its images plus MORE."""


class Traffic:
    """Recent images by profile. `review` is for one thread at a time."""

    def __init__(self) -> None:
        self.images: Mapping[Key, float] = {}
        """Recent images at the last review."""
        self._new: dict[Key, int] = {}
        self._reviewed = -math.inf
        self._lock = threading.Lock()

    def count(self, profile: Key, images: int) -> None:
        """Count images. Thread-safe."""
        with self._lock:
            self._new[profile] = self._new.get(profile, 0) + images

    def review(self, now: float) -> bool:
        """Update `images`, unless the last update was less than REVIEW_SECONDS ago. Returns whether it was updated."""
        if now - self._reviewed < REVIEW_SECONDS:
            return False
        with self._lock:
            new, self._new = self._new, {}
        left = 0.5 ** ((now - self._reviewed) / HALF_LIFE)
        faded = {profile: images * left for profile, images in self.images.items() if images * left > 0.01}
        self.images = {profile: faded.get(profile, 0.0) + new.get(profile, 0) for profile in {**faded, **new}}
        self._reviewed = now
        return True


def busiest(profiles: Sequence[Key], before: Collection[Key], images: Mapping[Key, float], places: int) -> set[Key]:
    """The profiles that have a place now. profiles: all profiles; at equal traffic, earlier ones are preferred. before:
    those that had a place, which they keep until another one clearly has more images."""
    ranked = sorted(profiles, key=lambda profile: -images.get(profile, 0.0))
    inside = [profile for profile in ranked if profile in before][:places]
    held = set(inside)
    outside = [profile for profile in ranked if profile not in held]
    free = places - len(inside)
    inside, outside = inside + outside[:free], outside[free:]
    inside.sort(key=lambda profile: -images.get(profile, 0.0))
    inside.reverse()  # among equals, the last one leaves first
    for place, other in enumerate(outside[: len(inside)]):
        if images.get(other, 0.0) <= TIMES * images.get(inside[place], 0.0) + MORE:
            break
        inside[place] = other
    return set(inside)
