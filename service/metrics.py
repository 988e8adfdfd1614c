"""What the server counts, for Prometheus: events come in from any thread, and a scrape reads the totals.

Series of a model or profile that is unloaded are retained for LINGER_SECONDS, so that their last counts are scraped.
The names and texts of all series, and how they are written: exposition.py.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple
from enum import Enum
from importlib.metadata import version as package_version

from prometheus_client import CollectorRegistry

from export.bundle import Bundle
from service.batcher import BatchStats
from service.counting import Histogram, ProfileCounts, Retained, Tally
from service.engine import Outputs
from service.exposition import Page, Row
from service.tuning import Plan
from training.steering import SteeringProfile

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DROP_REASONS = ("cancelled", "deadline", "queue_full")
CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "PERMISSION_DENIED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
)  # fmt: skip
"""Status codes that this server answers with."""
LINGER_SECONDS = 120.0
"""How long the series of a profile or model that is unloaded are retained."""


class Group(Enum):
    """Images that do not count under a profile of their own."""

    NONE = "none"
    """Nothing steers them."""
    CUSTOM = "custom"
    """Inline terms."""
    OTHER = "other"
    """Profiles past the cap."""


Label = str | Group
"""A profile by its name, or a group."""
ESCAPE = "profile:"
"""What the label `profile` puts before the name of a profile that is called like a group."""


def label_value(label: Label) -> str:
    """The value of the label `profile`; no two labels have the same."""
    if isinstance(label, Group):
        return label.value
    ambiguous = label.startswith(ESCAPE) or any(label == group.value for group in Group)
    return ESCAPE + label if ambiguous else label


class _ModelCounts:
    """What a version of a model has counted; it outlives the model by LINGER_SECONDS."""

    def __init__(self) -> None:
        self.histograms = {
            "steervit_batch_size_images": Histogram(SIZES),
            "steervit_inference_duration_seconds": Histogram(SECONDS),
            "steervit_queue_duration_seconds": Histogram(SECONDS),
            "steervit_decode_duration_seconds": Histogram(SECONDS),
        }
        self.dropped = {reason: Tally() for reason in DROP_REASONS}
        self.profiles: Retained[Label, ProfileCounts] = Retained()


class Metrics:
    """Counts of the process."""

    def __init__(self, registry: CollectorRegistry, max_profile_series: int):
        self.max_profile_series = max_profile_series
        self.in_flight = Tally()
        self.lock = threading.Lock()
        """Of what comes and goes; counting needs none."""
        self.serving: dict[tuple[str, str], ModelMetrics] = {}
        """By name and version."""
        self.counts: Retained[tuple[str, str], _ModelCounts] = Retained()
        self._requests: dict[tuple[str, str], int] = defaultdict(int)
        """By method and code; counted by the event loop alone."""
        self._request_seconds: dict[str, Histogram] = defaultdict(lambda: Histogram(SECONDS))
        self._profile_reads = {"ok": 0, "failed": 0}
        self._profiles_right = True
        self._load_failures: dict[tuple[str, str], int] = defaultdict(int)
        self._load_failed_now: dict[str, set[str]] = {}
        """By model: versions."""
        registry.register(Page(self._rows))

    def request(self, method: str, code: str, seconds: float) -> None:
        self._requests[method, code] += 1
        self._request_seconds[method].observe(seconds)

    def known_methods(self, methods: Sequence[str]) -> None:
        """Start the series of methods at 0."""
        for method in methods:
            self._request_seconds[method].observe()
            for code in CODES:
                self._requests[method, code] += 0

    def profiles_read(self, ok: bool) -> None:
        self._profile_reads["ok" if ok else "failed"] += 1
        self._profiles_right = ok

    def load_failed(self, name: str, version: int) -> None:
        with self.lock:
            self._load_failures[name, str(version)] += 1

    def failed_versions(self, name: str, versions: Collection[int]) -> None:
        """The versions of a model that are not loaded now because they do not work."""
        with self.lock:
            self._load_failed_now[name] = set(map(str, versions))

    def for_model(self, bundle: Bundle, graph: str, provider: str, plan: Plan) -> "ModelMetrics":
        names = (bundle.manifest.name, str(bundle.manifest.version))
        with self.lock:
            self._load_failures[names] += 0
            counts = self.counts.values.setdefault(names, _ModelCounts())
            self.serving[names] = ModelMetrics(self, counts, bundle, graph, provider, plan)
        self.serving[names].use(bundle.profiles)
        return self.serving[names]

    def sweep(self) -> None:
        """Forget what has been unloaded for LINGER_SECONDS; with the lock held."""
        now = time.monotonic()
        for names in self.counts.sweep(self.serving.keys(), now, LINGER_SECONDS):
            self._load_failures.pop(names, None)
        for names, model in self.serving.items():
            self.counts.values[names].profiles.sweep(model.labels, now, LINGER_SECONDS)

    def _rows(self) -> dict[str, list[Row]]:
        """The values of all series, by the name of their family."""
        rows: dict[str, list[Row]] = defaultdict(list)
        rows["steervit_requests"] = [(names, count) for names, count in self._requests.copy().items()]
        rows["steervit_request_duration_seconds"] = [
            ((method,), histogram.read()) for method, histogram in self._request_seconds.copy().items()
        ]
        rows["steervit_requests_in_flight"] = [((), self.in_flight.value)]
        rows["steervit_build_info"] = [((package_version("steervit"),), 1)]
        rows["steervit_profile_reads"] = [((result,), count) for result, count in self._profile_reads.items()]
        rows["steervit_profiles_last_read_successful"] = [((), int(self._profiles_right))]
        with self.lock:
            self.sweep()
            rows["steervit_model_load_failures"] = [(names, count) for names, count in self._load_failures.items()]
            rows["steervit_model_load_failed"] = [
                ((name, version), 1) for name, versions in self._load_failed_now.items() for version in sorted(versions)
            ]
            for names, counts in self.counts.values.items():
                for family, row in _counted(names, counts):
                    rows[family].append(row)
            for names, model in self.serving.items():
                for family, row in model.state():
                    rows[family].append(((*names, *row[0]), row[1]))
        return rows


class ModelMetrics:
    """Counts for one model; its methods may be called from any thread."""

    def __init__(self, metrics: Metrics, counts: _ModelCounts, bundle: Bundle, graph: str, provider: str, plan: Plan):
        self._metrics, self._counts, self._manifest, self._plan = metrics, counts, bundle.manifest, plan
        self._info = (bundle.digest, bundle.manifest.gates_sae_digest, graph, provider)
        self._profiles: dict[Label, ProfileCounts] = {}
        self._expected: dict[Label, float] = {}
        self._served = 0
        self._queued: Callable[[], int] = int
        self._queue_limit = 0
        self._batch_size, self._inference, self._queue, self._decode = counts.histograms.values()

    @property
    def labels(self) -> Collection[Label]:
        """Of which there are series."""
        return self._profiles.keys()

    def follow_queue(self, queued: Callable[[], int], limit: int) -> None:
        """queued: how many images wait; called at each scrape until the model is unloaded."""
        self._queued, self._queue_limit = queued, limit

    def use(self, profiles: Mapping[str, SteeringProfile]) -> None:
        """The profiles that the model is served with: those that have series of their own start at 0."""
        own = sorted(profiles)[: self._metrics.max_profile_series]
        labels: list[Label] = [Group.NONE, Group.CUSTOM, *own]
        if len(own) < len(profiles):
            labels.append(Group.OTHER)
        evaluations: dict[Label, Mapping[str, float] | None] = {Group.NONE: self._manifest.evaluation}
        evaluations |= {name: profiles[name].evaluation.get("after") for name in own}
        with self._metrics.lock:
            self._metrics.sweep()
            self._profiles = {label: self._retained(label) for label in labels}
            self._expected = {
                label: value["head_usage"] for label, value in evaluations.items() if value and "head_usage" in value
            }
            self._served = len(profiles)
            self._metrics.sweep()

    def _retained(self, label: Label) -> ProfileCounts:
        """The counts of a label, which go on where they were unless the heads are others now."""
        values, layout = self._counts.profiles.values, (self._manifest.gated_blocks, self._manifest.heads)
        if label not in values or values[label].layout != layout:
            values[label] = ProfileCounts(*layout)
        return values[label]

    def retire(self) -> None:
        """The model is unloaded: what describes it goes, unless another one has taken its name and version."""
        names = (self._manifest.name, str(self._manifest.version))
        with self._metrics.lock:
            if self._metrics.serving.get(names) is self:
                del self._metrics.serving[names]
            self._metrics.sweep()

    def state(self) -> Iterator[tuple[str, Row]]:
        """What describes the model now, by family; without its name and version."""
        plan = (*(str(value).lower() for value in astuple(self._plan)),)
        yield "steervit_model_info", (self._info, 1)
        yield "steervit_tuning_info", (plan, 1)
        yield "steervit_instances", ((), self._plan.instances)
        yield "steervit_gated_heads", ((), len(self._manifest.gated_blocks) * self._manifest.heads)
        yield "steervit_profiles", ((), self._served)
        yield "steervit_queue_images", ((), self._queued())
        yield "steervit_queue_limit_images", ((), self._queue_limit)
        for label, usage in self._expected.items():
            yield "steervit_profile_expected_head_usage", ((label_value(label),), usage)

    def batch(self, stats: BatchStats) -> None:
        self._batch_size.observe(stats.images)
        self._inference.observe(stats.seconds)
        self._queue.observe(*stats.queue_seconds)

    def decoded(self, seconds: float) -> None:
        self._decode.observe(seconds)

    def dropped(self, reason: str, images: int) -> None:
        """reason: one of DROP_REASONS."""
        self._counts.dropped[reason].inc(images)

    def answered(self, label: Label, outputs: Outputs) -> None:
        """Images answered under a profile or as a group."""
        self._of(label).answered(outputs, self._manifest.macs.dense)

    def shadowed(self, label: Label, steered: Outputs, unsteered: Outputs) -> None:
        """The same images with and without steering."""
        self._of(label).shadowed(steered, unsteered)

    def _of(self, label: Label) -> ProfileCounts:
        """A profile without series is past the cap, or was removed while its call was under way."""
        counts = self._profiles.get(label) or self._profiles.get(Group.OTHER)
        if counts is None:
            with self._metrics.lock:
                counts = self._retained(Group.OTHER)
                self._profiles = {**self._profiles, Group.OTHER: counts}
        return counts


def _counted(names: tuple[str, str], counts: _ModelCounts) -> Iterator[tuple[str, Row]]:
    """The counts of a version of a model, by family."""
    for family, histogram in counts.histograms.items():
        yield family, (names, histogram.read())
    for reason, dropped in counts.dropped.items():
        yield "steervit_images_dropped", ((*names, reason), dropped.value)
    for label, profile in counts.profiles.values.items():
        totals, labels = profile.read(), (*names, label_value(label))
        yield "steervit_images", (labels, totals.images)
        yield "steervit_macs_spent", (labels, totals.macs_spent)
        yield "steervit_macs_dense", (labels, totals.macs_dense)
        yield "steervit_gates_near_threshold", (labels, totals.near_threshold)
        yield "steervit_shadow_images", (labels, totals.shadow_images)
        yield "steervit_shadow_agreed", (labels, totals.shadow_agreed)
        for steering, heads in zip(("steered", "unsteered"), totals.shadow_heads, strict=True):
            yield "steervit_shadow_heads_kept", ((*labels, steering), heads)
        blocks, _ = profile.layout
        for block, kept in zip(blocks, totals.heads_kept, strict=True):
            for head, images in enumerate(kept):
                yield "steervit_heads_kept", ((*labels, str(block), str(head)), images)
