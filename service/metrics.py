"""Stats -> Prometheus. The only file that knows Prometheus; the registry is passed in."""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib.metadata import version as package_version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from export.bundle import Bundle
from service.batcher import BatchStats
from service.engine import Outputs
from training.steering import SteeringProfile

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NONE, CUSTOM, OTHER = "none", "custom", "other"
"""Values of the label `profile` for images that nothing steers, with inline terms, and under profiles past the cap."""
DROP_REASONS = ("cancelled", "deadline", "queue_full")
CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "PERMISSION_DENIED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
)  # fmt: skip
"""Status codes that this server answers with."""
disable_created_metrics()  # type: ignore[no-untyped-call]


LINGER_SECONDS = 120.0
"""How long the series of a profile or model that is served no more stay, so that their last counts are scraped."""
Series = tuple[Any, tuple[str, ...]]
"""A metric and the values of its labels."""


class Metrics:
    """Counters and histograms of the process."""

    def __init__(self, registry: CollectorRegistry, max_profile_series: int):
        self.max_profile_series = max_profile_series
        model = ("model", "version")
        profile = (*model, "profile")
        self.requests = Counter("steervit_requests", "RPCs answered.", ("method", "code"), registry=registry)
        self.request_seconds = Histogram(
            "steervit_request_duration_seconds", "From the start of an RPC to its answer.", ("method",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("steervit_requests_in_flight", "RPCs that are being answered.", registry=registry)
        self.images = Counter("steervit_images", "Images answered.", profile, registry=registry)
        self.heads_kept = Counter(
            "steervit_heads_kept",
            "Images for which a head ran. Head usage: rate of this / rate of steervit_images_total.",
            (*profile, "block", "head"), registry=registry,
        )  # fmt: skip
        self.macs_spent = Counter(
            "steervit_macs_spent",
            "Multiply-accumulates of the heads that ran and of all else.",
            profile,
            registry=registry,
        )
        self.macs_dense = Counter(
            "steervit_macs_dense", "Multiply-accumulates with every head on.", profile, registry=registry
        )
        self.near_threshold = Counter(
            "steervit_gates_near_threshold", "Gates that rounding could decide.", profile, registry=registry
        )
        self.expected_usage = Gauge(
            "steervit_profile_expected_head_usage",
            "Head usage that the evaluation measured, on the images of the profile's classes; `none`: on all images.",
            profile, registry=registry,
        )  # fmt: skip
        self.gated_heads = Gauge("steervit_gated_heads", "Heads with a gate, in all blocks.", model, registry=registry)
        self.shadow_images = Counter(
            "steervit_shadow_images", "Steered images that were also run unsteered.", profile, registry=registry
        )
        self.shadow_agreed = Counter(
            "steervit_shadow_agreed", "Those of them that got the same label.", profile, registry=registry
        )
        self.shadow_heads = Counter(
            "steervit_shadow_heads_kept", "Heads that ran for them, in all blocks, steered and unsteered.",
            (*profile, "steering"), registry=registry,
        )  # fmt: skip
        self.dropped = Counter(
            "steervit_images_dropped", "Images that were not run.", (*model, "reason"), registry=registry
        )
        self.batch_size = Histogram(
            "steervit_batch_size_images", "Images in a batch.", model, buckets=SIZES, registry=registry
        )
        self.inference_seconds = Histogram(
            "steervit_inference_duration_seconds", "Inference of a batch.", model, buckets=SECONDS, registry=registry
        )
        self.queue_seconds = Histogram(
            "steervit_queue_duration_seconds", "Wait of a call's images for their batch.", model,
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.decode_seconds = Histogram(
            "steervit_decode_duration_seconds",
            "Decoding of a call's images.",
            model,
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_images = Gauge("steervit_queue_images", "Images that wait.", model, registry=registry)
        self.queue_limit = Gauge("steervit_queue_limit_images", "Images that may wait.", model, registry=registry)
        self.model_info = Gauge(
            "steervit_model_info", "1 for each model that is served.",
            (*model, "digest", "gates_sae_digest", "graph", "provider"), registry=registry,
        )  # fmt: skip
        self.profiles = Gauge("steervit_profiles", "Profiles that a model is served with.", model, registry=registry)
        self.profile_reads = Counter(
            "steervit_profile_reads", "Times that the changed profile folder was read.", ("result",), registry=registry
        )
        for result in ("ok", "failed"):
            self.profile_reads.labels(result)
        self.profiles_right = Gauge(
            "steervit_profiles_last_read_successful",
            "0 while the profile folder is wrong and its last right state is served; else 1.",
            registry=registry,
        )
        self.profiles_right.set(1)
        self.load_failures = Counter(
            "steervit_model_load_failures", "Attempts to load a version that failed.", model, registry=registry
        )
        self.load_failed_now = Gauge(
            "steervit_model_load_failed", "1 for each version that is there and could not be loaded.", model,
            registry=registry,
        )  # fmt: skip
        self.build_info = Gauge("steervit_build_info", "1; the program's version.", ("version",), registry=registry)
        self.build_info.labels(package_version("steervit")).set(1)
        self.serving: dict[tuple[str, str], ModelMetrics] = {}
        """By model and version: whose gauges there are."""
        self._gone: deque[tuple[float, tuple[str, ...], list[Series]]] = deque()
        """Since when, which model, version and profile, and what there is of it."""
        self.failed: dict[str, set[str]] = {}
        """By model: the versions of load_failed_now."""

    def request(self, method: str, code: str, seconds: float) -> None:
        self.requests.labels(method, code).inc()
        self.request_seconds.labels(method).observe(seconds)

    def known_methods(self, methods: Sequence[str]) -> None:
        """Start the series of methods at 0."""
        for method in methods:
            self.request_seconds.labels(method)
            for code in CODES:
                self.requests.labels(method, code)

    def profiles_read(self, ok: bool) -> None:
        self.profile_reads.labels("ok" if ok else "failed").inc()
        self.profiles_right.set(ok)

    def load_failed(self, name: str, version: int) -> None:
        self.load_failures.labels(name, str(version)).inc()

    def failed_versions(self, name: str, versions: Collection[int]) -> None:
        """The versions of a model that are not loaded now because they do not work."""
        failed = {str(version) for version in versions}
        for version in self.failed.pop(name, set()) - failed:
            self.load_failed_now.remove(name, version)
        for version in failed:
            self.load_failed_now.labels(name, version).set(1)
            self.failed[name] = failed

    def leave(self, names: tuple[str, ...], series: list[Series]) -> None:
        """names: model and version, and a profile, that are served no more."""
        now = time.monotonic()
        before = [gone for gone in self._gone if gone[1] == names]  # it has come back since
        for gone in before:
            self._gone.remove(gone)
            series = [*series, *gone[2]]
        self._gone.append((now, names, series))
        while self._gone[0][0] < now - LINGER_SECONDS:
            _, names, series = self._gone.popleft()
            model = self.serving.get(names[:2])  # type: ignore[arg-type]
            if model and (len(names) == 2 or model.has(names[2])):
                continue  # it has come back
            for metric, labels in series:
                metric.remove(*labels)

    def for_model(self, bundle: Bundle, graph: str, provider: str) -> "ModelMetrics":
        manifest = bundle.manifest
        names = (manifest.name, str(manifest.version))
        info = (*names, bundle.digest, manifest.gates_sae_digest, graph, provider)
        self.model_info.labels(*info).set(1)
        self.gated_heads.labels(*names).set(len(manifest.gated_blocks) * manifest.heads)
        self.serving[names] = ModelMetrics(self, bundle, info)
        return self.serving[names]


class ModelMetrics:
    """The series of one model, their children bound once."""

    def __init__(self, metrics: Metrics, bundle: Bundle, info: tuple[str, ...]):
        self._metrics, self._manifest, self._info = metrics, bundle.manifest, info
        self._expected: set[str] = set()
        """Profiles with an expected head usage."""
        self._names = (bundle.manifest.name, str(bundle.manifest.version))
        self._series: list[Series] = []
        self._batch_size, self._inference, self._queue, self._decode = (
            _child(self._series, metric, *self._names)
            for metric in (metrics.batch_size, metrics.inference_seconds, metrics.queue_seconds, metrics.decode_seconds)
        )
        _child(self._series, metrics.load_failures, *self._names)
        self._dropped = {reason: _child(self._series, metrics.dropped, *self._names, reason) for reason in DROP_REASONS}
        self._profiles: dict[str, _ProfileChildren] = {}
        self.use(bundle.profiles)

    def follow_queue(self, queued: Callable[[], int], limit: int) -> None:
        """queued: how many images wait; called at every look at the metrics until the model retires."""
        self._metrics.queue_images.labels(*self._names).set_function(queued)
        self._metrics.queue_limit.labels(*self._names).set(limit)

    def use(self, profiles: Mapping[str, SteeringProfile]) -> None:
        """The profiles that the model is served with: those that have series of their own start at 0."""
        own = sorted(profiles)[: self._metrics.max_profile_series]
        labels = (NONE, CUSTOM, *own, *[OTHER] * (len(own) < len(profiles)))
        manifest, before = self._manifest, self._profiles
        self._profiles = {
            label: before.get(label)
            or _ProfileChildren(self._metrics, (*self._names, label), manifest.gated_blocks, manifest.heads)
            for label in labels
        }
        for label in before.keys() - self._profiles.keys():
            self._metrics.leave((*self._names, label), before[label].series)
        expected = {NONE: manifest.evaluation, **{name: profiles[name].evaluation.get("after") for name in own}}
        told = {label: value["head_usage"] for label, value in expected.items() if value and "head_usage" in value}
        for label in self._expected - set(told):
            self._metrics.expected_usage.remove(*self._names, label)
        for label, usage in told.items():
            self._metrics.expected_usage.labels(*self._names, label).set(usage)
        self._expected = set(told)
        self._metrics.profiles.labels(*self._names).set(len(profiles))

    def has(self, profile: str) -> bool:
        """Whether it has series of its own."""
        return profile in self._profiles

    def retire(self) -> None:
        """Take away what describes the model; what it counted stays for LINGER_SECONDS."""
        metrics = self._metrics
        metrics.model_info.remove(*self._info)
        successor = metrics.serving.get(self._names)
        if successor and successor is not self:  # another model of that name and version has taken over
            for label in self._expected - successor._expected:
                metrics.expected_usage.remove(*self._names, label)
            for label in self._profiles.keys() - successor._profiles.keys():
                metrics.leave((*self._names, label), self._profiles[label].series)
            return
        del metrics.serving[self._names]
        for gauge in (metrics.queue_images, metrics.queue_limit, metrics.gated_heads, metrics.profiles):
            gauge.remove(*self._names)
        for label in self._expected:
            metrics.expected_usage.remove(*self._names, label)
        for label, children in self._profiles.items():
            metrics.leave((*self._names, label), children.series)
        metrics.leave(self._names, self._series)

    def batch(self, stats: BatchStats) -> None:
        self._batch_size.observe(stats.images)
        self._inference.observe(stats.seconds)
        for seconds in stats.queue_seconds:
            self._queue.observe(seconds)

    def decoded(self, seconds: float) -> None:
        self._decode.observe(seconds)

    def dropped(self, reason: str, images: int) -> None:
        """reason: one of DROP_REASONS."""
        self._dropped[reason].inc(images)

    def answered(self, profile: str, outputs: Outputs) -> None:
        """Images answered under a profile, or NONE, or CUSTOM."""
        children, count = self._of(profile), len(outputs.logits)
        children.images.inc(count)
        kept = outputs.head_gate[0] if count == 1 else outputs.head_gate.sum(0)  # (G, H)
        for child, images in zip(children.heads, kept.ravel().tolist(), strict=True):
            if images:
                child.inc(images)
        children.macs_spent.inc(sum(outputs.macs.tolist()))
        children.macs_dense.inc(self._manifest.macs.dense * count)
        near = sum(outputs.near_threshold.tolist())
        if near:
            children.near_threshold.inc(near)

    def shadowed(self, profile: str, steered: Outputs, unsteered: Outputs) -> None:
        """The same images with and without steering."""
        children = self._of(profile)
        agreed = int((steered.logits.argmax(1) == unsteered.logits.argmax(1)).sum())
        children.shadow_images.inc(len(steered.logits))
        children.shadow_agreed.inc(agreed)
        children.shadow_steered.inc(int(steered.head_gate.sum()))
        children.shadow_unsteered.inc(int(unsteered.head_gate.sum()))

    def _of(self, profile: str) -> "_ProfileChildren":
        """A profile without series: past the cap, or taken away while its call was under way."""
        if profile not in self._profiles and OTHER not in self._profiles:
            names, manifest = (*self._names, OTHER), self._manifest
            self._profiles[OTHER] = _ProfileChildren(self._metrics, names, manifest.gated_blocks, manifest.heads)
        return self._profiles[profile if profile in self._profiles else OTHER]


def _child(series: list[Series], metric: Any, *labels: str) -> Any:
    """The metric's child of those labels, noted in `series`."""
    series.append((metric, labels))
    return metric.labels(*labels)


class _ProfileChildren:
    def __init__(self, metrics: Metrics, names: tuple[str, str, str], blocks: tuple[int, ...], heads: int):
        self.series: list[Series] = []
        child = partial(_child, self.series)
        self.images = child(metrics.images, *names)
        self.macs_spent = child(metrics.macs_spent, *names)
        self.macs_dense = child(metrics.macs_dense, *names)
        self.near_threshold = child(metrics.near_threshold, *names)
        self.shadow_images = child(metrics.shadow_images, *names)
        self.shadow_agreed = child(metrics.shadow_agreed, *names)
        self.shadow_steered = child(metrics.shadow_heads, *names, "steered")
        self.shadow_unsteered = child(metrics.shadow_heads, *names, "unsteered")
        self.heads = [child(metrics.heads_kept, *names, str(b), str(h)) for b in blocks for h in range(heads)]
