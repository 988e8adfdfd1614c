"""The metrics of the server: what is counted, with which labels, and for how long. Counters: counting.py; the metrics
page: exposition.py."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from importlib.metadata import version as package_version
from typing import Literal

from prometheus_client import CollectorRegistry

from export.bundle import Bundle
from service import cuda
from service.access_log import Course, Record
from service.batcher import BatchStats
from service.counting import (
    CUSTOM,
    NONE,
    OTHER,
    ClientCounts,
    Key,
    ProfileCounts,
    RequestCounts,
    Retained,
    Tally,
    VersionCounts,
)
from service.engine import Outputs
from service.exposition import (
    FAMILIES,
    Page,
    Row,
    Rows,
    Version,
    add_profile,
    add_requests,
    add_version,
    in_slices,
    profile_label,
)
from service.traffic import Traffic, busiest
from service.tuning import Plan
from training.steering import SteeringProfile, digest

CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "PERMISSION_DENIED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
)  # fmt: skip
"""The status codes that this server returns."""
OF_NO_MODEL: Version = "", ""
WITH_IMAGES = re.compile(".+/(Predict|Compare|Explain|ModelInfer)")
"""Methods whose series start at 0 for every model."""
TOP = 10
"""Number of profiles per version with series for each head, if only the busiest ones have them."""


class Metrics:
    """The counts of the process. Thread-safe; models are added and removed by one thread at a time."""

    def __init__(
        self,
        registry: CollectorRegistry,
        max_profile_series: int,
        revision: str = "unknown",
        head_series: Literal["all", "top", "none"] = "all",
    ):
        """revision: of the source; head_series: as in Settings."""
        self.max_profile_series, self._head_series = max_profile_series, head_series
        self._program = package_version("steervit"), revision
        self.in_flight = Tally()
        self.unserved = {"oversized": Tally(), "unknown_method": Tally()}
        self._requests = RequestCounts()
        """Calls for a model that is not served, or for no model."""
        self._with_images: list[str] = []
        self._profile_reads: dict[Literal["ok", "failed"], Tally] = {"ok": Tally(), "failed": Tally()}
        self._profiles_right = True
        self.ready: Callable[[], bool] = lambda: False
        """Whether the server is ready; called at every scrape, as are the next two."""
        self.certificates: Callable[[], Mapping[str, float]] = dict
        """The expiry of certificates by file, in Unix time."""
        self.unused_profiles: Callable[[], int] = lambda: 0
        """The number of profiles in the profile folder that match no served model."""
        self._clients: dict[str, ClientCounts] = {}
        """By client with its own limits, and one entry for all others. Replaced as a whole."""
        self.limits_right = True
        """Whether the limits by client are those in their current file."""
        self.repository_right = True
        """Whether the repository folder and its labels were valid when they were last read."""
        self._lock = threading.Lock()
        """Guards the fields below."""
        self._failed: dict[str, list[str]] = {}
        """Versions that could not be loaded, by model."""
        self._load_failures: Retained[Version, Tally] = Retained()
        self._versions: Retained[Version, VersionCounts] = Retained()
        self._profiles: Retained[tuple[str, str, Key], ProfileCounts] = Retained()
        self._traffic: Retained[str, Traffic] = Retained()
        """By model."""
        self._models: list[ModelMetrics] = []
        """Loaded models, oldest first. A version has two while one replaces the other."""
        self.page = Page(self.rows)
        registry.register(self.page)

    def request(self, method: str, code: str, seconds: float, version: Version = OF_NO_MODEL) -> None:
        """Count an RPC. method: its path; code: the name of its status; seconds: its duration; version: the model and
        version that it names, if any."""
        counts = self._versions.values.get(version)
        (counts.requests if counts else self._requests).add(method, code, seconds)

    def with_images(self, record: Record, seconds: float, received: int, sent: int) -> None:
        """Count the additional metrics of a call with images, after `request`. received, sent: bytes; 0: no answer."""
        if counts := self._versions.values.get((record.model, record.version)):
            counts.by_group[record.group].observe(seconds)
            counts.request_size.observe(received)
            if sent:
                counts.response_size.observe(sent)

    def traced(self, method: str, seconds: float, record: Record, course: Course) -> None:
        """Record the span of a counted call, if it has one, as an exemplar of its duration. seconds: as counted."""
        if not course.span_id:
            return
        counts = self._versions.values.get((record.model, record.version))
        seen = [((counts.requests if counts else self._requests).seconds[method], seconds)]
        if counts:
            seen += [(counts.decode, course.decoding[1])] if course.decoding else []
            seen += [(counts.queue, record.queue_seconds)] if record.queue_seconds is not None else []
            seen += [(counts.inference, ran.seconds) for ran in course.batches]
        for histogram, value in seen:
            histogram.exemplify(value, course.trace_id, course.span_id)

    def known_methods(self, methods: Sequence[str]) -> None:
        """Start the series of methods at 0; for those with images, also by model."""
        self._requests.start(methods, CODES)
        with self._lock:
            self._with_images += filter(WITH_IMAGES.fullmatch, methods)
            for counts in self._versions.values.values():
                counts.requests.start(self._with_images, CODES)

    def profiles_read(self, ok: bool) -> None:
        """Count a read of the changed profile folder. ok: whether its profiles are valid and now served."""
        self._profile_reads["ok" if ok else "failed"].inc()
        self._profiles_right = ok

    def use_clients(self, names: Iterable[str]) -> None:
        """Set the clients with their own limits, as in the file. The series of new ones start at 0."""
        labels = [*names, OTHER.value]
        self._clients = {label: self._clients.get(label) or ClientCounts() for label in labels}
        self.limits_right = True

    def of_client(self, name: str) -> ClientCounts:
        """The counts of a client. All clients without their own limits share one."""
        return self._clients.get(name) or self._clients[OTHER.value]

    def load_failed(self, name: str, version: int) -> None:
        """Count a failed attempt to load a version."""
        with self._lock:
            self._load_failures.values.setdefault((name, str(version)), Tally()).inc()

    def failed_versions(self, name: str, versions: Collection[int]) -> None:
        """Set the versions of a model that could not be loaded."""
        with self._lock:
            self._failed.pop(name, None)
            if versions:
                self._failed[name] = sorted(map(str, versions))
            self._sweep()

    def for_model(
        self, bundle: Bundle, graph: str, provider: str, plan: Plan, gpu: tuple[int, int] | None = None
    ) -> "ModelMetrics":
        """Add a model. gpu: the index of the device and the number of batch sizes with CUDA graphs; None on the CPU."""
        return ModelMetrics(self, bundle, graph, provider, plan, gpu)

    def rows(self) -> Rows:
        """All series at this moment."""
        with self._lock:
            for name, traffic in self._traffic.values.items():
                if traffic.review(time.monotonic()):
                    for model in {m.names: m for m in self._models if m.names[0] == name}.values():  # the newest ones
                        self._assign(model)
            self._sweep()
            models, failed = self._models.copy(), self._failed.copy()
            failures, versions = self._load_failures.values.copy(), self._versions.values.copy()
            profiles = self._profiles.values.copy()
        rows: dict[str, list[Row]] = {family.name: [] for family in FAMILIES}
        add_requests(rows, OF_NO_MODEL, self._requests)
        rows["steervit_calls_unserved"] += (((why,), calls.value) for why, calls in self.unserved.items())
        rows["steervit_requests_in_flight"].append(((), self.in_flight.value))
        for result, reads in self._profile_reads.items():
            rows["steervit_profile_reads"].append(((result,), reads.value))
        rows["steervit_ready"].append(((), int(self.ready())))
        rows["steervit_certificate_expiry_timestamp_seconds"] += (((f,), end) for f, end in self.certificates().items())
        rows["steervit_profiles_unused"].append(((), self.unused_profiles()))
        rows["steervit_profiles_last_read_successful"].append(((), int(self._profiles_right)))
        for client, counted_calls in self._clients.items():
            rows["steervit_client_images"].append(((client,), counted_calls.images.value))
            rows["steervit_client_requests"] += (
                ((client, outcome), calls.value) for outcome, calls in counted_calls.calls.items()
            )
        if self._clients:
            rows["steervit_client_limits_last_read_successful"].append(((), int(self.limits_right)))
        rows["steervit_repository_last_read_successful"].append(((), int(self.repository_right)))
        rows["steervit_build_info"].append((self._program, 1))
        for names, failures_of in failures.items():
            rows["steervit_model_load_failures"].append((names, failures_of.value))
        for name, numbers in failed.items():
            rows["steervit_model_load_failed"] += (((name, number), 1) for number in numbers)
        for names, counts in versions.items():
            add_version(rows, names, counts)
        for key, counted in in_slices(profiles.items()):
            add_profile(rows, key[:2], key[2], counted)
        for model in {model.names: model for model in models}.values():  # the newest of each version
            model.add_gauges(rows)
        rows["steervit_model_info"] += ((info, 1) for info in dict.fromkeys(model.info for model in models))
        return rows

    def add(self, model: "ModelMetrics") -> "VersionCounts":
        """Add a loaded model. Returns the counts of its version: the retained ones if it was loaded before."""
        with self._lock:
            self._sweep()
            self._load_failures.values.setdefault(model.names, Tally())
            self._models.append(model)
            if model.names not in self._versions.values:
                self._versions.values[model.names] = VersionCounts(RequestCounts(self._with_images, CODES))
            return self._versions.values[model.names]

    def remove(self, model: "ModelMetrics") -> None:
        """Remove an unloaded model. Its counts are retained for RETAIN_SECONDS."""
        with self._lock:
            self._models.remove(model)
            self._sweep()

    def use(self, model: "ModelMetrics", profiles: Sequence[str]) -> None:
        """Set the profiles of a model, by name."""
        with self._lock:
            model.served = profiles
            self._assign(model)
            self._sweep()

    def traffic(self, name: str) -> Traffic:
        """The traffic of a model, over all its versions."""
        with self._lock:
            return self._traffic.values.setdefault(name, Traffic())

    def other(self, model: "ModelMetrics") -> ProfileCounts:
        """The counts of the model's images under profiles without their own series."""
        with self._lock:
            if OTHER not in model.profiles:
                model.profiles = {**model.profiles, OTHER: self._profile_counts(model, OTHER)}
            return model.profiles[OTHER]

    def _assign(self, model: "ModelMetrics") -> None:
        """Choose the profiles of a model that get their own series: those with the most images. With head_series `top`,
        the TOP of them get series for each head."""
        images = self._traffic.values[model.names[0]].images
        own = busiest(model.served, model.profiles, images, self.max_profile_series)
        keys: list[Key] = [NONE, CUSTOM, *(name for name in model.served if name in own)]
        if OTHER in model.profiles or len(own) < len(model.served):
            keys.append(OTHER)
        model.profiles = {key: self._profile_counts(model, key) for key in keys}
        if self._head_series == "top":
            before = [key for key, counts in model.profiles.items() if counts.by_head]
            top = busiest(keys, before, images, TOP)
            for key, counts in model.profiles.items():
                counts.by_head = key in top

    def _profile_counts(self, model: "ModelMetrics", profile: Key) -> ProfileCounts:
        """The existing counts if they have the same blocks and units, otherwise new ones."""
        counts, key = self._profiles.values, (*model.names, profile)
        if key not in counts or counts[key].layout != model.layout:
            counts[key] = ProfileCounts(*model.layout, by_head=self._head_series == "all")
        return counts[key]

    def _sweep(self) -> None:
        """Remove the counts that have been unused for RETAIN_SECONDS."""
        now = time.monotonic()
        versions = {model.names for model in self._models}
        failed = {(name, version) for name, of_model in self._failed.items() for version in of_model}
        self._versions.sweep(versions, now)
        self._load_failures.sweep(versions | failed, now)
        profiles = {(*model.names, profile) for model in self._models for profile in model.profiles}
        self._profiles.sweep(profiles, now)
        self._traffic.sweep({model.names[0] for model in self._models}, now)


class ModelMetrics:
    """The counts of one model."""

    def __init__(
        self, metrics: Metrics, bundle: Bundle, graph: str, provider: str, plan: Plan, gpu: tuple[int, int] | None
    ):
        manifest = bundle.manifest
        self._plan, self._gpu = plan, gpu
        self.names = manifest.name, str(manifest.version)
        self.info = (*self.names, bundle.digest, manifest.gates_sae_digest, graph, provider)
        self.layout = manifest.gated_blocks, manifest.heads, manifest.mlp_groups
        self.served: Sequence[str] = ()
        """The names of its profiles, sorted."""
        self.profiles: dict[Key, ProfileCounts] = {}
        """By profile with its own series. Replaced as a whole."""
        self._metrics, self._evaluation, self._dense = metrics, manifest.evaluation, manifest.macs.dense
        self._expected: dict[Key, float] = {}
        """Head usage by profile."""
        self._served = _Served({})
        self._queue: tuple[Callable[[], tuple[int, float, float]], int] | None = None
        self._counts = metrics.add(self)
        self._traffic = metrics.traffic(manifest.name)
        self.use(bundle.profiles)

    def follow_queue(self, queue: Callable[[], tuple[int, float, float]], limit: int) -> None:
        """Show a queue in the gauges until the model retires. queue: called at every scrape; returns the queued images,
        the queued images at full budget, and the brownout level."""
        self._queue = queue, limit

    def use(self, profiles: Mapping[str, SteeringProfile]) -> None:
        """Set the model's profiles. The series of new ones start at 0."""
        evaluations: dict[Key, Mapping[str, float] | None] = {
            NONE: self._evaluation,
            **{name: profile.evaluation.get("after") for name, profile in profiles.items()},
        }
        self._expected = {key: of["head_usage"] for key, of in evaluations.items() if of and "head_usage" in of}
        self._served = _Served(profiles)
        self._metrics.use(self, sorted(profiles))

    def retire(self) -> None:
        """Remove the gauges of the model. Its counts are retained for RETAIN_SECONDS."""
        self._queue = None
        self._metrics.remove(self)

    def batch(self, stats: BatchStats) -> None:
        """Count a batch, and the queue time of the calls that it completes."""
        self._counts.batch_size.observe(stats.images)
        self._counts.inference.observe(stats.seconds)
        self._counts.queue.observe(*stats.queue_seconds)
        if stats.specialised:
            self._counts.specialised.inc(stats.images)

    def decoded(self, seconds: float) -> None:
        """Count the decoding of a call's images. seconds: its duration."""
        self._counts.decode.observe(seconds)

    def dropped(self, reason: str, images: int) -> None:
        """Count dropped images. reason: one of DROP_REASONS."""
        self._counts.dropped[reason].inc(images)

    def answered(self, profile: Key, outputs: Outputs, budget: float | None = None) -> None:
        """Count answered images under a profile, NONE or CUSTOM. budget: of the images, if they have one."""
        self._counts_of(profile).answered(outputs, self._dense)
        self._traffic.count(profile, len(outputs.logits))
        if budget is not None:
            self._counts.budget.observe(*[budget] * len(outputs.logits))

    def lowered(self, profile: Key, outputs: Outputs, own: float) -> None:
        """Count images at a lowered budget. own: the compute fraction that each would have spent at its own budget."""
        self._counts_of(profile).lowered(outputs, own * self._dense)

    def shadowed(self, profile: Key, steered: Outputs, unsteered: Outputs) -> None:
        """Count images that ran both with and without steering."""
        self._counts_of(profile).shadowed(steered, unsteered)

    def shadowed_lowered(self, profile: Key, agreed: bool) -> None:
        """Count an image that ran both at a lowered budget and at its own. agreed: whether the labels are the same."""
        self._counts_of(profile).shadowed_lowered(agreed)

    def add_gauges(self, rows: Mapping[str, list[Row]]) -> None:
        """Add the series that describe the current state of the model. rows: has a list for every family."""
        blocks, heads, mlp_groups = self.layout
        rows["steervit_gated_heads"].append((self.names, len(blocks) * heads))
        rows["steervit_gated_mlp_groups"].append((self.names, len(blocks) * mlp_groups))
        rows["steervit_instances"].append((self.names, self._plan.instances))
        plan = (str(value).lower() for value in astuple(self._plan))
        rows["steervit_tuning_info"].append(((*self.names, *plan), 1))
        if self._gpu:
            device, captured = self._gpu
            used, total = cuda.memory(device)
            rows["steervit_cuda_graphs"].append((self.names, captured))
            rows["steervit_gpu_memory_bytes"][:] = [((str(device),), total)]  # once, not for each model
            rows["steervit_gpu_memory_used_bytes"][:] = [((str(device),), used)]
        served = self._served
        rows["steervit_profiles"].append((self.names, len(served.profiles)))
        rows["steervit_profiles_info"].append(((*self.names, served.digest), 1))
        for profile in self.profiles.keys() & self._expected.keys():
            usage = self._expected[profile]
            rows["steervit_profile_expected_head_usage"].append(((*self.names, profile_label(profile)), usage))
        if queue := self._queue:
            follow, limit = queue
            queued, work, level = follow()
            rows["steervit_brownout_level"].append((self.names, level))
            rows["steervit_queue_images"].append((self.names, queued))
            rows["steervit_queue_work_images"].append((self.names, work))
            rows["steervit_queue_limit_images"].append((self.names, limit))

    def _counts_of(self, profile: Key) -> ProfileCounts:
        """The counts of a profile, or OTHER for one without series: beyond the cap, or removed during its call."""
        return self.profiles.get(profile) or self._metrics.other(self)


class _Served:
    """The profiles of a model. Their digest is computed on first access, by the accessing thread."""

    def __init__(self, profiles: Mapping[str, SteeringProfile]):
        self.profiles = profiles

    @cached_property
    def digest(self) -> str:
        """A digest of the names and effects of the profiles."""
        entries = sorted((name, digest(profile.terms, profile.gate_bias)) for name, profile in self.profiles.items())
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]
