"""Counts in plain numbers and arrays; every method may be called from any thread."""

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
"""No bound is more than twice the one before: for models of 5 ms and of 5 s alike."""
BYTES = tuple(4.0**power for power in range(4, 15))
"""256 to 2^28: of a request with one small image and of the largest that may be allowed."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DROP_REASONS = ("cancelled", "deadline", "queue_full")
OUTCOMES = ("admitted", "model", "rate", "calls", "images")
"""Of calls under limits by client: admitted, or refused by one of them."""
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class NoProfile(Enum):
    """The keys of counts without a profile; their values are values of the label `profile`.

    They are not strings, so that no profile's name equals one of them.
    """

    NONE = "none"
    """Without steering."""
    CUSTOM = "custom"
    """With inline terms."""
    OTHER = "other"
    """Under a profile past the cap."""
    __hash__ = object.__hash__  # each is one object; Enum's own hash is a call of Python in every lookup


NONE, CUSTOM, OTHER = NoProfile
Key = str | NoProfile
"""A profile's name, or a key for images without one."""
GROUPS = (NONE.value, CUSTOM.value, *get_args(Kind))
"""Of calls with images: without steering, with terms of their own, or with a profile, by its kind."""


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
    """A value that a histogram has counted, and the span of the call that it is from."""

    value: float
    trace_id: str
    span_id: str
    time: float
    """Unix time."""


@dataclass(frozen=True)
class Buckets:
    """A histogram at one moment."""

    bounds: tuple[float, ...]
    """The largest value of each bucket but the last, which has no bound."""
    cumulative: tuple[int, ...]
    """Values in this bucket and those before it."""
    total: float
    """The sum of all values."""
    exemplars: Mapping[int, Exemplar]
    """By bucket: the last of a call that is traced."""


class Histogram:
    """Counts of values by bucket, and their sum. bounds: as of Buckets, rising."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._exemplars: dict[int, Exemplar] = {}
        self._lock = threading.Lock()

    def observe(self, *values: float) -> None:
        """Count the values. A read sees all of them or none."""
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
                self._total += value

    def exemplify(self, value: float, trace_id: str, span_id: str) -> None:
        """Name the span that a counted value is from."""
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
    """By gated block and head, the heads of a block together."""
    mlp_groups_kept: list[int]
    """Likewise."""
    macs_spent: int
    macs_dense: int
    lowered_images: int
    macs_saved: int
    near_threshold: int
    shadow_images: int
    shadow_agreed: int
    shadow_heads: tuple[int, int]
    """Steered, unsteered."""
    lowered_shadow_images: int
    lowered_shadow_agreed: int


class ProfileCounts:
    """The counts of one profile of a model."""

    def __init__(self, blocks: tuple[int, ...], heads: int, mlp_groups: int, by_head: bool):
        """blocks: those with gates; heads, mlp_groups: of each; by_head: with a series for each head and MLP group,
        rather than one of all."""
        self.layout, self.by_head = (blocks, heads, mlp_groups), by_head
        self._lock = threading.Lock()
        self._mlp_groups: NDArray[np.int64] = np.zeros((len(blocks), mlp_groups), np.int64)
        self._heads: NDArray[np.int64] = np.zeros((len(blocks), heads), np.int64)
        self._images = self._macs_spent = self._macs_dense = self._near_threshold = 0
        self._lowered_images = self._macs_saved = 0
        self._shadow_images = self._shadow_agreed = self._shadow_steered = self._shadow_unsteered = 0
        self._lowered_shadow_images = self._lowered_shadow_agreed = 0

    def answered(self, outputs: Outputs, dense: int) -> None:
        """dense: multiply-accumulates of an image with every unit open."""
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
        """own: multiply-accumulates that each image would have spent at its own budget."""
        count = len(outputs.macs)
        saved = max(0, round(own * count) - sum(outputs.macs.tolist()))
        with self._lock:
            self._lowered_images += count
            self._macs_saved += saved

    def shadowed(self, steered: Outputs, unsteered: Outputs) -> None:
        """The same images with and without steering."""
        agreed = int((steered.logits.argmax(1) == unsteered.logits.argmax(1)).sum())
        kept = int(np.count_nonzero(steered.head_gate)), int(np.count_nonzero(unsteered.head_gate))
        with self._lock:
            self._shadow_images += len(steered.logits)
            self._shadow_agreed += agreed
            self._shadow_steered += kept[0]
            self._shadow_unsteered += kept[1]

    def shadowed_lowered(self, agreed: bool) -> None:
        """An image at a lowered budget and at its own. agreed: with the same label."""
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
        """methods, codes: whose counts start at 0, rather than with their first call."""
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
        """Durations of calls with images; OTHER: their profile was removed meanwhile."""
        self.dropped = {reason: Tally() for reason in DROP_REASONS}
        self.specialised = Tally()
        """Images that a graph for their profile alone has run."""


class ClientCounts:
    """The counts of a client with limits."""

    def __init__(self) -> None:
        self.calls = {outcome: Tally() for outcome in OUTCOMES}
        self.images = Tally()
        """Admitted ones."""


class Retained(Generic[K, V]):
    """Values by key. An unused one is retained for some time, so that its last counts are scraped. Not thread-safe."""

    def __init__(self) -> None:
        self.values: dict[K, V] = {}
        self._unused: dict[K, float] = {}
        """When each unused key was last used."""

    def sweep(self, used: Collection[K], now: float, seconds: float) -> None:
        """Remove values that have been unused for so many seconds. used: the keys in use now."""
        for key in self.values.keys() - used:
            if now - self._unused.setdefault(key, now) >= seconds:
                del self.values[key], self._unused[key]
        for key in self._unused.keys() & used:
            del self._unused[key]
