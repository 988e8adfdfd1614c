"""The metrics page: its families, and their text formats. The only file that depends on Prometheus."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal, TypeVar

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from service.counting import Buckets, Exemplar, Key, NoProfile, ProfileCounts, RequestCounts, VersionCounts

Row = tuple[tuple[str, ...], float | Buckets] | str
"""The label values of a series and its value; or finished lines, which are the same in both formats."""
Rows = Mapping[str, Iterable[Row]]
"""Rows by the name of their family."""
Lists = Mapping[str, list[Row]]
"""Rows while they are collected."""
Version = tuple[str, str]
"""Names of a model and its version."""
SLICE, PAUSE = 0.0002, 0.002
"""Seconds."""
T = TypeVar("T")
RESERVED = re.compile("(profile:)*({})".format("|".join(key.value for key in NoProfile)))


@dataclass(frozen=True)
class Family:
    """A metric family. The suffixes `_total` of a counter, `_bucket`, `_count` and `_sum` of a histogram are added to
    its name."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()

    def lines(self, rows: Iterable[Row], openmetrics: bool = False) -> list[str]:
        """The family in Prometheus's text format, or in OpenMetrics with exemplars. Prometheus's client library takes
        seven times as long."""
        name = self.sample
        family = self.name if openmetrics else name
        head = [f"# HELP {family} {self.help}", f"# TYPE {family} {self.kind}"]
        if self.kind != "histogram":
            return head + [row if isinstance(row, str) else self.line(*row) for row in rows]
        for row in rows:
            assert not isinstance(row, str)
            values, value = row
            assert isinstance(value, Buckets)
            labels = _labels(self.labels, values)
            bounds = [*map(floatToGoString, value.bounds), "+Inf"]
            exemplars = value.exemplars if openmetrics else {}
            for index, (bound, count) in enumerate(zip(bounds, value.cumulative, strict=True)):
                example = _exemplar(exemplars[index]) if index in exemplars else ""
                head.append(f'{name}_bucket{{{labels},le="{bound}"}} {count}{example}')
            head += (f"{name}_count{{{labels}}} {value.cumulative[-1]}", f"{name}_sum{{{labels}}} {value.total}")
        return head

    @property
    def sample(self) -> str:
        """The name of its samples, except for a histogram."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def line(self, values: tuple[str, ...], value: object) -> str:
        """The line of a series that is not a histogram. values: of its labels."""
        return f"{self.sample}{{{_labels(self.labels, values)}}} {value}"


MODEL = ("model", "version")
PROFILE = (*MODEL, "profile")
FAMILIES = (
    Family(
        "counter", "steervit_requests",
        "RPCs answered, except those over a client's limit. Without a model: RPCs for a model that is not served.",
        ("method", "code", *MODEL),
    ),
    Family(
        "histogram", "steervit_request_duration_seconds", "From the start of an RPC to its answer.",
        ("method", *MODEL),
    ),
    Family(
        "histogram", "steervit_profile_request_duration_seconds",
        "Duration of RPCs with images, by the kind of their profile.", (*MODEL, "profile_group"),
    ),
    Family("histogram", "steervit_request_size_bytes", "Size of requests with images.", MODEL),
    Family("histogram", "steervit_response_size_bytes", "Size of the answers to requests with images.", MODEL),
    Family(
        "counter", "steervit_calls_unserved",
        "RPCs that reach no handler: the method does not exist, or the message is over the size limit.", ("reason",),
    ),
    Family("gauge", "steervit_requests_in_flight", "RPCs that are being answered."),
    Family(
        "counter", "steervit_client_requests",
        "RPCs by client with its own limits, and of all others: admitted, or refused by a limit.",
        ("client", "outcome"),
    ),
    Family("counter", "steervit_client_images", "Images of admitted RPCs, by client.", ("client",)),
    Family(
        "gauge", "steervit_client_limits_last_read_successful",
        "0 while the file of limits by client is invalid and its last valid state is in use; else 1.",
    ),
    Family("gauge", "steervit_ready", "1 while the server accepts calls, like /readyz; else 0."),
    Family(
        "gauge", "steervit_certificate_expiry_timestamp_seconds",
        "Expiry of the server's certificate, or of the first of its clients' authorities to expire.", ("file",),
    ),
    Family("counter", "steervit_images", "Images answered.", PROFILE),
    Family(
        "counter", "steervit_heads_kept",
        "Images for which a head ran. Head usage: rate of this / rate of steervit_images_total.",
        (*PROFILE, "block", "head"),
    ),
    Family(
        "counter", "steervit_mlp_groups_kept",
        "Images for which an MLP group ran. Share: rate of this / rate of steervit_images_total.",
        (*PROFILE, "block", "group"),
    ),
    Family(
        "counter", "steervit_macs_spent", "Multiply-accumulates of the units that ran and of the rest of the model.",
        PROFILE,
    ),
    Family("counter", "steervit_macs_dense", "Multiply-accumulates with every unit open.", PROFILE),
    Family("counter", "steervit_brownout_images", "Images answered at a lowered budget.", PROFILE),
    Family(
        "counter", "steervit_brownout_macs_saved", "Estimated multiply-accumulates saved by lowered budgets.",
        PROFILE,
    ),
    Family(
        "gauge", "steervit_brownout_level",
        "How far brownout lowers budgets, for the calls that it lowers most: 0 not at all, 1 to the lowest.", MODEL,
    ),
    Family(
        "counter", "steervit_brownout_shadow_images",
        "Images answered at a lowered budget that were later also run at their own.", PROFILE,
    ),
    Family(
        "counter", "steervit_brownout_shadow_agreed", "Images run at both budgets that got the same label.",
        PROFILE,
    ),
    Family(
        "counter", "steervit_gates_near_threshold", "Gates whose logit is so near 0 that rounding could decide them.",
        PROFILE,
    ),
    Family(
        "gauge", "steervit_profile_expected_head_usage",
        "Head usage measured by the evaluation on images of the profile's classes; `none`: on all images.",
        PROFILE,
    ),
    Family("gauge", "steervit_gated_heads", "Gated heads, in all blocks.", MODEL),
    Family("gauge", "steervit_gated_mlp_groups", "MLP groups, in all blocks.", MODEL),
    Family("histogram", "steervit_budget", "Budgets of answered images that have one.", MODEL),
    Family("counter", "steervit_shadow_images", "Steered images that were also run unsteered.", PROFILE),
    Family("counter", "steervit_shadow_agreed", "Shadowed images that got the same label both times.", PROFILE),
    Family(
        "counter", "steervit_shadow_heads_kept",
        "Heads that ran for shadowed images, in all blocks, steered and unsteered.",
        (*PROFILE, "steering"),
    ),
    Family("counter", "steervit_images_dropped", "Images dropped without being run.", (*MODEL, "reason")),
    Family("histogram", "steervit_batch_size_images", "Images in a batch.", MODEL),
    Family("histogram", "steervit_inference_duration_seconds", "Inference time of a batch.", MODEL),
    Family("histogram", "steervit_queue_duration_seconds", "Time that a call's images waited in the queue.", MODEL),
    Family("histogram", "steervit_decode_duration_seconds", "Time to decode a call's images.", MODEL),
    Family("gauge", "steervit_queue_images", "Queued images.", MODEL),
    Family(
        "gauge", "steervit_queue_work_images",
        "Queued images at full budget: each counts as its budget, or as the lowest that brownout may apply.", MODEL,
    ),
    Family("gauge", "steervit_queue_limit_images", "Limit of queued images, at full budget.", MODEL),
    Family(
        "gauge", "steervit_model_info", "1 for each served model.",
        (*MODEL, "digest", "gates_sae_digest", "graph", "provider"),
    ),
    Family(
        "gauge", "steervit_tuning_info", "1 for each served model: how its batches use the CPUs.",
        (*MODEL, "instances", "threads", "wide_threads", "spinning", "max_batch", "source"),
    ),
    Family("gauge", "steervit_instances", "Batches of a model that can run at the same time.", MODEL),
    Family(
        "counter", "steervit_specialised_images", "Images that ran on the graph specialised for their profile.",
        MODEL,
    ),
    Family("gauge", "steervit_cuda_graphs", "Batch sizes of a model that run as CUDA graphs.", MODEL),
    Family("gauge", "steervit_gpu_memory_bytes", "Memory of the GPU.", ("device",)),
    Family("gauge", "steervit_gpu_memory_used_bytes", "Memory of the GPU in use, by any process.", ("device",)),
    Family("gauge", "steervit_profiles", "Profiles of a served model.", MODEL),
    Family(
        "gauge", "steervit_profiles_info", "1 for each served model: a digest of its profiles.",
        (*MODEL, "profiles_digest"),
    ),
    Family("gauge", "steervit_profiles_unused", "Profiles of the profile folder that match no served model."),
    Family("counter", "steervit_profile_reads", "Reads of the profile folder after a change.", ("result",)),
    Family(
        "gauge", "steervit_profiles_last_read_successful",
        "0 while the profile folder is invalid and its last valid state is served; else 1.",
    ),
    Family(
        "gauge", "steervit_repository_last_read_successful",
        "0 while the repository folder or a labels.json in it is invalid and its last valid state is served; else 1.",
    ),
    Family("counter", "steervit_model_load_failures", "Failed attempts to load a version.", MODEL),
    Family(
        "gauge", "steervit_model_load_failed", "1 for each version that could not be loaded.", MODEL
    ),
    Family("gauge", "steervit_build_info", "1; labels: the program's version and the revision of its source.",
           ("version", "revision")),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}


def profile_label(key: Key) -> str:
    """The value of the label `profile`. A profile whose name equals a value of NoProfile gets a prefix, as in
    `profile:none`; so does one whose name already has this form."""
    if isinstance(key, NoProfile):
        return str(key.value)
    return f"profile:{key}" if RESERVED.fullmatch(key) else key


def add_requests(rows: Lists, names: Version, counts: RequestCounts) -> None:
    """Add the series of calls. rows: has a list for every family."""
    for (method, code), calls in list(counts.by_code.items()):
        rows["steervit_requests"].append(((method, code, *names), calls.value))
    for method, seconds in list(counts.seconds.items()):
        rows["steervit_request_duration_seconds"].append(((method, *names), seconds.read()))


def add_version(rows: Lists, names: Version, counts: VersionCounts) -> None:
    """Add the series of a version's counts. rows: has a list for every family."""
    add_requests(rows, names, counts.requests)
    for group, durations in list(counts.by_group.items()):
        rows["steervit_profile_request_duration_seconds"].append(((*names, group), durations.read()))
    rows["steervit_request_size_bytes"].append((names, counts.request_size.read()))
    rows["steervit_response_size_bytes"].append((names, counts.response_size.read()))
    for reason, images in counts.dropped.items():
        rows["steervit_images_dropped"].append(((*names, reason), images.value))
    rows["steervit_specialised_images"].append((names, counts.specialised.value))
    rows["steervit_budget"].append((names, counts.budget.read()))
    rows["steervit_batch_size_images"].append((names, counts.batch_size.read()))
    rows["steervit_inference_duration_seconds"].append((names, counts.inference.read()))
    rows["steervit_queue_duration_seconds"].append((names, counts.queue.read()))
    rows["steervit_decode_duration_seconds"].append((names, counts.decode.read()))


def add_profile(rows: Lists, names: Version, profile: Key, counts: ProfileCounts) -> None:
    """Add the series of a profile's counts. rows: has a list for every family."""
    totals, by_head = counts.read(), counts.by_head
    units = totals.heads_kept, totals.mlp_groups_kept
    values: tuple[int | tuple[int, ...], ...] = (
        totals.images, totals.macs_spent, totals.macs_dense, totals.lowered_images, totals.macs_saved,
        totals.near_threshold, totals.shadow_images, totals.shadow_agreed, totals.lowered_shadow_images,
        totals.lowered_shadow_agreed, totals.shadow_heads,
        *(tuple(each) if by_head else (sum(each),) * bool(each) for each in units),
    )  # fmt: skip
    written = _lines((*names, profile_label(profile)), counts.layout, by_head)
    for (name, lines), value in zip(written, values, strict=True):
        if lines:
            rows[name].append(lines % value)


@lru_cache(2**12)
def _lines(labels: tuple[str, ...], layout: tuple[tuple[int, ...], int, int], by_head: bool) -> list[tuple[str, str]]:
    """The lines of a profile by family, in the order of add_profile, with %d for each value. They are most of a large
    page, and filling in values is several times faster than building the lines."""
    blocks, heads, mlp_groups = layout
    series = {f"steervit_{name}": [labels] for name in (
        "images", "macs_spent", "macs_dense", "brownout_images", "brownout_macs_saved", "gates_near_threshold",
        "shadow_images", "shadow_agreed", "brownout_shadow_images", "brownout_shadow_agreed",
    )}  # fmt: skip
    series["steervit_shadow_heads_kept"] = [(*labels, "steered"), (*labels, "unsteered")]
    for name, units in ("steervit_heads_kept", heads), ("steervit_mlp_groups_kept", mlp_groups):
        each = [(*labels, str(block), str(unit)) for block in blocks for unit in range(units)]
        series[name] = each if by_head else [(*labels, "", "")] * bool(each)
    return [
        (name, "\n".join(BY_NAME[name].line(values, "").replace("%", "%%") + "%d" for values in of_family))
        for name, of_family in series.items()
    ]


def in_slices(items: Iterable[T]) -> Iterator[T]:
    """The items, with a pause after each SLICE of work: otherwise calls would wait 5 ms each time that they need the
    interpreter's lock."""
    end = time.perf_counter() + SLICE
    for item in items:
        yield item
        if time.perf_counter() > end:
            time.sleep(PAUSE)
            end = time.perf_counter() + SLICE


@lru_cache(2**12)
def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    """The labels between the braces."""
    escaped = (value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"") for value in values)
    return ",".join(f'{name}="{value}"' for name, value in zip(names, escaped, strict=True))


def _exemplar(of: Exemplar) -> str:
    """The text of an exemplar after its bucket."""
    value: str = floatToGoString(of.value)  # type: ignore[no-untyped-call]
    return f' # {{trace_id="{of.trace_id}",span_id="{of.span_id}"}} {value} {of.time:.3f}'


class Page:
    """All families with their current series; also a collector for Prometheus's client library."""

    def __init__(self, rows: Callable[[], Rows]):
        self._rows = rows

    def text(self, openmetrics: bool = False) -> str:
        """The current page; in OpenMetrics, without the end marker."""
        return _text(self._rows(), openmetrics)

    def describe(self) -> Iterable[Metric]:
        """The families without series, from which a registry gets their names."""
        return text_string_to_metric_families(_text({family.name: () for family in FAMILIES}))

    def collect(self) -> Iterable[Metric]:
        """The families with their current series."""
        return text_string_to_metric_families(self.text())


def _text(rows: Rows, openmetrics: bool = False) -> str:
    lines = chain.from_iterable(family.lines(rows[family.name], openmetrics) for family in FAMILIES)
    return "\n".join([*lines, ""])
