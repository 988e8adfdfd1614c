"""Stats -> Prometheus. The only file that knows Prometheus; the registry is passed in."""

from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from export.bundle import Bundle
from service.batcher import BatchStats

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NONE, CUSTOM = "none", "custom"
"""Values of the label `profile` for images without steering, and with inline terms."""
DROP_REASONS = ("cancelled", "deadline", "queue_full")
CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
)  # fmt: skip
"""Status codes that this server answers with."""
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Counters and histograms of the process."""

    def __init__(self, registry: CollectorRegistry):
        model = ("model", "version")
        profile = (*model, "profile")
        self.requests = Counter("steervit_requests", "RPCs answered.", ("method", "code"), registry=registry)
        self.request_seconds = Histogram(
            "steervit_request_duration_seconds", "From the start of an RPC to its answer.", ("method",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
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
        self.model_info = Gauge(
            "steervit_model_info", "1 for each model that is served.",
            (*model, "digest", "gates_sae_digest", "graph", "provider"), registry=registry,
        )  # fmt: skip
        self.build_info = Gauge("steervit_build_info", "1; the program's version.", ("version",), registry=registry)
        self.build_info.labels(package_version("steervit")).set(1)

    def request(self, method: str, code: str, seconds: float) -> None:
        self.requests.labels(method, code).inc()
        self.request_seconds.labels(method).observe(seconds)

    def known_methods(self, methods: Sequence[str]) -> None:
        """Start the series of methods at 0."""
        for method in methods:
            self.request_seconds.labels(method)
            for code in CODES:
                self.requests.labels(method, code)

    def for_model(self, bundle: Bundle, graph: str, provider: str, queued: Callable[[], int]) -> "ModelMetrics":
        manifest = bundle.manifest
        names = (manifest.name, str(manifest.version))
        self.model_info.labels(*names, bundle.digest, manifest.gates_sae_digest, graph, provider).set(1)
        self.queue_images.labels(*names).set_function(queued)
        return ModelMetrics(self, bundle)


class ModelMetrics:
    """The series of one model, their children bound once."""

    def __init__(self, metrics: Metrics, bundle: Bundle):
        self._metrics, self._manifest = metrics, bundle.manifest
        self._names = (bundle.manifest.name, str(bundle.manifest.version))
        self._batch_size = metrics.batch_size.labels(*self._names)
        self._inference = metrics.inference_seconds.labels(*self._names)
        self._queue = metrics.queue_seconds.labels(*self._names)
        self._decode = metrics.decode_seconds.labels(*self._names)
        self._dropped = {reason: metrics.dropped.labels(*self._names, reason) for reason in DROP_REASONS}
        self._profiles: dict[str, _ProfileChildren] = {}
        for profile in (NONE, CUSTOM, *bundle.profiles):
            self._children(profile)

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

    def answered(self, profile: str, head_gate: NDArray[np.bool_], near_threshold: int) -> None:
        """Images (B, gated blocks, heads) answered under a profile, or NONE, or CUSTOM."""
        children = self._children(profile)
        children.images.inc(len(head_gate))
        for child, kept in zip(children.heads, head_gate.sum(0).ravel().tolist(), strict=True):
            if kept:
                child.inc(kept)
        children.macs_spent.inc(int(self._manifest.macs.spent(head_gate).sum()))
        children.macs_dense.inc(self._manifest.macs.dense * len(head_gate))
        if near_threshold:
            children.near_threshold.inc(near_threshold)

    def _children(self, profile: str) -> "_ProfileChildren":
        if profile not in self._profiles:
            self._profiles[profile] = _ProfileChildren(
                self._metrics, (*self._names, profile), self._manifest.gated_blocks, self._manifest.heads
            )
        return self._profiles[profile]


class _ProfileChildren:
    def __init__(self, metrics: Metrics, names: tuple[str, str, str], blocks: tuple[int, ...], heads: int):
        self.images = metrics.images.labels(*names)
        self.macs_spent = metrics.macs_spent.labels(*names)
        self.macs_dense = metrics.macs_dense.labels(*names)
        self.near_threshold = metrics.near_threshold.labels(*names)
        self.heads = [metrics.heads_kept.labels(*names, str(b), str(h)) for b in blocks for h in range(heads)]
