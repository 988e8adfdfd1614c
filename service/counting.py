"""Counters in plain numbers and arrays. Every method is thread-safe."""

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from service.engine import Outputs
from training.steering import Kind

SECONDS = (
    0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0,
)  # fmt: skip
"""Each bound is at most twice the previous one, so that buckets are useful for models of 5 ms and of 5 s."""
BYTES = tuple(4.0**power for power in range(4, 15))
"""256 to 2^28: from a request with one small image to the largest message that can be allowed."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DROP_REASONS = ("cancelled", "deadline", "queue_full")
OUTCOMES = ("admitted", "model", "rate", "calls", "images")
"""Outcomes of calls under limits by client: admitted, or the limit that refused it."""
RETAIN_SECONDS = 120.0
"""How long the series of an unloaded profile or model are retained, so that their last values are scraped."""
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class NoProfile(Enum):
    """The keys of counts without a profile. Their values are values of the label `profile`.

    They are not strings, so that no profile's name can equal one of them.
    """

    NONE = "none"
    """Without steering."""
    CUSTOM = "custom"
    """With inline terms of the request."""
    OTHER = "other"
    """Under profiles beyond the cap."""
    __hash__ = object.__hash__  # members are singletons; Enum's own hash would be a Python call in every lookup


NONE, CUSTOM, OTHER = NoProfile
Key = str | NoProfile
"""A profile's name, or a key for images without one."""
GROUPS = (NONE.value, CUSTOM.value, *get_args(Kind))
"""Groups of calls with images: without steering, with inline terms, or by the kind of their profile."""


class Tally:
    """A counter."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def inc(self, amount: int = 1) -> None:
        """Add `amount`, which may be negative."""
        with self._lock:
            self.value += amount

    def dec(self) -> None:
        """Subtract 1."""
        self.inc(-1)


class Exemplar(NamedTuple):
    """A value counted by a histogram, and the span of its call."""

    value: float
    trace_id: str
    span_id: str
    time: float
    """Unix time."""


@dataclass(frozen=True)
class Buckets:
    """A histogram at one moment."""

    bounds: tuple[float, ...]
    """The largest value of each bucket except the last, which is unbounded."""
    cumulative: tuple[int, ...]
    """Number of values in each bucket and the ones before it."""
    total: float
    """The sum of all values."""
    exemplars: Mapping[int, Exemplar]
    """The last exemplar of each bucket that has one."""


class Histogram:
    """Counts of values by bucket, and their sum. bounds: as in Buckets, rising."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._exemplars: dict[int, Exemplar] = {}
        self._lock = threading.Lock()

    def observe(self, *values: float) -> None:
        """Count the values, atomically: a read sees all of them or none."""
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
                self._total += value

    def exemplify(self, value: float, trace_id: str, span_id: str) -> None:
        """Record the span of a counted value as an exemplar."""
        with self._lock:
            bucket = bisect_left(self._bounds, value)
            self._exemplars[bucket] = Exemplar(value, trace_id, span_id, time.time())

    def read(self) -> Buckets:
        """The counts at this moment."""
        with self._lock:
            return Buckets(self._bounds, tuple(accumulate(self._counts)), self._total, self._exemplars.copy())


class ProfileTotals(NamedTuple):
    """The counts of a profile at one moment."""

    images: int
    heads_kept: list[int]
    """By gated block and head; the heads of a block are adjacent."""
    mlp_groups_kept: list[int]
    """By gated block and MLP group; the groups of a block are adjacent."""
    macs_spent: int
    macs_dense: int
    lowered_images: int
    macs_saved: int
    near_threshold: int
    shadow_images: int
    shadow_agreed: int
    shadow_heads: tuple[int, int]
    """Heads that ran steered and unsteered."""
    lowered_shadow_images: int
    lowered_shadow_agreed: int


class ProfileCounts:
    """The counts of one profile of a model."""

    def __init__(self, blocks: tuple[int, ...], heads: int, mlp_groups: int, by_head: bool):
        """blocks: the gated blocks; heads, mlp_groups: per block; by_head: a series for each head and MLP group instead
        of one for all."""
        self.layout, self.by_head = (blocks, heads, mlp_groups), by_head
        self._lock = threading.Lock()
        self._mlp_groups: NDArray[np.int64] = np.zeros((len(blocks), mlp_groups), np.int64)
        self._heads: NDArray[np.int64] = np.zeros((len(blocks), heads), np.int64)
        self._images = self._macs_spent = self._macs_dense = self._near_threshold = 0
        self._lowered_images = self._macs_saved = 0
        self._shadow_images = self._shadow_agreed = self._shadow_steered = self._shadow_unsteered = 0
        self._lowered_shadow_images = self._lowered_shadow_agreed = 0

    def answered(self, outputs: Outputs, dense: int) -> None:
        """Count answered images. dense: multiply-accumulates of an image with every unit open."""
        gates, of_mlps = outputs.head_gate, outputs.mlp_gate
        count = len(gates)
        kept = gates[0] if count == 1 else gates.sum(0)  # (G, H)
        groups = of_mlps[0] if count == 1 else of_mlps.sum(0)  # (G, M)
        spent, near = sum(outputs.macs.tolist()), sum(outputs.near_threshold.tolist())
        with self._lock:
            self._images += count
            self._heads += kept
            self._mlp_groups += groups
            self._macs_spent += spent
            self._macs_dense += dense * count
            self._near_threshold += near

    def lowered(self, outputs: Outputs, own: float) -> None:
        """Count images at a lowered budget. own: multiply-accumulates that each would have spent at its own budget."""
        count = len(outputs.macs)
        saved = max(0, round(own * count) - sum(outputs.macs.tolist()))
        with self._lock:
            self._lowered_images += count
            self._macs_saved += saved

    def shadowed(self, steered: Outputs, unsteered: Outputs) -> None:
        """Count images that ran both with and without steering."""
        agreed = int((steered.logits.argmax(1) == unsteered.logits.argmax(1)).sum())
        kept = int(np.count_nonzero(steered.head_gate)), int(np.count_nonzero(unsteered.head_gate))
        with self._lock:
            self._shadow_images += len(steered.logits)
            self._shadow_agreed += agreed
            self._shadow_steered += kept[0]
            self._shadow_unsteered += kept[1]

    def shadowed_lowered(self, agreed: bool) -> None:
        """Count an image that ran both at a lowered budget and at its own. agreed: whether the labels are the same."""
        with self._lock:
            self._lowered_shadow_images += 1
            self._lowered_shadow_agreed += agreed

    def read(self) -> ProfileTotals:
        """The counts at this moment."""
        with self._lock:
            return ProfileTotals(
                self._images, self._heads.ravel().tolist(), self._mlp_groups.ravel().tolist(), self._macs_spent,
                self._macs_dense, self._lowered_images, self._macs_saved, self._near_threshold, self._shadow_images,
                self._shadow_agreed, (self._shadow_steered, self._shadow_unsteered), self._lowered_shadow_images,
                self._lowered_shadow_agreed,
            )  # fmt: skip


class RequestCounts:
    """Calls by method and status, and their durations by method."""

    def __init__(self, methods: Iterable[str] = (), codes: Iterable[str] = ()) -> None:
        """methods, codes: their counts start at 0 instead of with the first call."""
        self.by_code: dict[tuple[str, str], Tally] = {}
        self.seconds: dict[str, Histogram] = {}
        self.start(methods, codes)

    def start(self, methods: Iterable[str], codes: Iterable[str]) -> None:
        """Start the counts of these at 0."""
        for method in methods:
            self.seconds.setdefault(method, Histogram(SECONDS))
            for code in codes:
                self.by_code.setdefault((method, code), Tally())

    def add(self, method: str, code: str, seconds: float) -> None:
        """Count a call. seconds: its duration."""
        if (method, code) not in self.by_code or method not in self.seconds:
            self.start([method], [code])
        self.by_code[method, code].inc()
        self.seconds[method].observe(seconds)


class VersionCounts:
    """The counts of a version, over all profiles."""

    def __init__(self, requests: RequestCounts) -> None:
        self.requests = requests
        self.batch_size, self.budget = Histogram(SIZES), Histogram(BUDGETS)
        self.inference, self.queue, self.decode = Histogram(SECONDS), Histogram(SECONDS), Histogram(SECONDS)
        self.request_size, self.response_size = Histogram(BYTES), Histogram(BYTES)
        self.by_group = defaultdict(partial(Histogram, SECONDS), {group: Histogram(SECONDS) for group in GROUPS})
        """Durations of calls with images; OTHER: the profile was removed during the call."""
        self.dropped = {reason: Tally() for reason in DROP_REASONS}
        self.specialised = Tally()
        """Images that ran on the graph specialised for their profile."""


class ClientCounts:
    """The counts of a client with limits."""

    def __init__(self) -> None:
        self.calls = {outcome: Tally() for outcome in OUTCOMES}
        self.images = Tally()
        """Admitted images."""


class Retained(Generic[K, V]):
    """Values by key. Unused ones are retained for some time, so that their last counts are scraped. Not thread-safe."""

    def __init__(self) -> None:
        self.values: dict[K, V] = {}
        self._unused: dict[K, float] = {}
        """The time when each unused key was last used."""

    def sweep(self, used: Collection[K], now: float) -> None:
        """Remove values that have been unused for RETAIN_SECONDS. used: the keys in use now."""
        for key in self.values.keys() - used:
            if now - self._unused.setdefault(key, now) >= RETAIN_SECONDS:
                del self.values[key], self._unused[key]
        for key in self._unused.keys() & used:
            del self._unused[key]
