"""The dashboard `service`: whether calls are answered, how fast, and what is about to run out."""

from deploy import slo
from deploy.dashboards.panels import (
    columns,
    dashboard,
    limits,
    lines,
    merged,
    number,
    over_time,
    rows,
    stacked,
    variable,
)

JOB = 'job=~"$job", instance=~"$instance"'
MODEL = f'{JOB}, model=~"$model"'
IMAGES = f'{JOB}, {slo.IMAGES}, model=~"$model"'
"""Calls with images."""
PROMISED = slo.read()
BUDGET = round(1 - PROMISED.availability.objective / 100, 9)
"""The share of the calls that may fail."""
LATE = PROMISED.latency.seconds
OF_SLO = 'job=~"$job", model=~"$model"'
STEP = "[$__rate_interval]"


def failed(window: str) -> str:
    every = f"sum(rate(steervit_requests_total{{{IMAGES}}}{window}))"
    return f"sum(rate(steervit_requests_total{{{IMAGES}, {slo.FAILED}}}{window})) / ({every} > 0)"


def quantile(share: float, metric: str, labels: str, window: str = STEP) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{labels}}}{window})))"


def quantiles(title: str, description: str, metric: str, labels: str):
    shares = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    return lines(title, description, "s", *((quantile(share, metric, labels), name) for share, name in shares))


VARIABLES = [
    variable("job", "Job", "label_values(steervit_build_info, job)", "Scrape jobs, such as one a deployment."),
    variable(
        "instance", "Server", 'label_values(steervit_build_info{job=~"$job"}, instance)',
        "Servers of the jobs, to select one.",
    ),
    variable(
        "model", "Model", "label_values(steervit_model_info{" + JOB + "}, model)",
        "Served models. Calls for an unknown model are counted in `All` only.",
    ),
]  # fmt: skip

OVERVIEW = [
    (4, number(
        "Calls", "Calls with images that were answered, whatever their status: mean of the time range.", "reqps",
        f"sum(rate(steervit_requests_total{{{IMAGES}}}[$__range]))",
    )),
    (4, number(
        "Failed calls",
        "Share of the calls with images that the server should have answered and did not. The service level allows "
        f"{BUDGET:.1%}.",
        "percentunit", failed("[$__range]"), ((None, "green"), (BUDGET, "orange"), (6 * BUDGET, "red")),
    )),
    (4, number(
        "p99 latency", "99% of the calls with images took at most this long, over the time range.", "s",
        quantile(0.99, "steervit_request_duration_seconds", IMAGES, "[$__range]"), ((None, "green"), (LATE, "red")),
    )),
    (4, number(
        "Images", "Images answered: mean of the time range.", "cps",
        f"sum(rate(steervit_images_total{{{MODEL}}}[$__range]))",
    )),
    (4, number(
        "Servers up", "Servers that Prometheus can scrape now.", "none", f"sum(up{{{JOB}}})",
        ((None, "red"), (1, "green")),
    )),
    (4, number(
        "Versions not loaded", "Versions in the repository that cannot be loaded, now, over all servers.", "none",
        f"count(steervit_model_load_failed{{{MODEL}}}) or vector(0)", ((None, "green"), (1, "red")),
    )),
]  # fmt: skip

SERVICE_LEVEL = [
    (8, limits(lines(
        "Error budget left",
        f"Error budget left of {PROMISED.days} days, by objective and model. Below 0 the objective is not met. "
        "While Prometheus has less history, it covers that.", "percentunit",
        (f"slo:period_error_budget_remaining:ratio{{{OF_SLO}}}", "{{job}} {{sloth_slo}} {{model}}"), lowest=None,
    ), (None, "red"), (0, "transparent"))),
    (8, limits(lines(
        "Burn rate",
        "How fast the budget is spent: at 1 it lasts for its whole period. Lines: where alerts begin, if it lasts for "
        + ", ".join(f"{window} ({factor:g})" for factor, window, _ in reversed(slo.FAST + slo.SLOW)) + ".", "none",
        (f"slo:current_burn_rate:ratio{{{OF_SLO}}}", "{{job}} {{sloth_slo}} {{model}}"),
    ), (None, "transparent"), *((factor, "orange") for factor, *_ in reversed(slo.SLOW)),
        *((factor, "red") for factor, *_ in reversed(slo.FAST)))),
    (8, rows(
        "Promises",
        "Objectives of deploy/slo.yaml, share of good calls, and error budget left.", "percentunit",
        (
            f"sum by (job, model, sloth_slo) (slo:objective:ratio{{{OF_SLO}}})",
            f"1 - sum by (job, model, sloth_slo) (slo:sli_error:ratio_rate{PROMISED.days}d{{{OF_SLO}}})",
            f"sum by (job, model, sloth_slo) (slo:period_error_budget_remaining:ratio{{{OF_SLO}}})",
        ),
        merged(),
        columns({
            "job": "job", "model": "model", "sloth_slo": "promise", "Value #A": "objective",
            "Value #B": f"{PROMISED.days} days", "Value #C": "budget left",
        }),
    ).decimals(2)),
]  # fmt: skip

TRAFFIC = [
    (8, stacked(lines(
        "Calls by method", "Calls a second, all methods that were used.", "reqps",
        (f"sum by (method) (rate(steervit_requests_total{{{JOB}}}{STEP})) > 0", "{{method}}"),
    ))),
    (8, stacked(lines(
        "Calls by status", "Calls with images a second, by gRPC status.", "reqps",
        (f"sum by (code) (rate(steervit_requests_total{{{IMAGES}}}{STEP})) > 0", "{{code}}"),
    ))),
    (8, limits(lines(
        "Failed calls",
        "Share of the calls with images with a status that is the server's failure. Lines: the service level "
        f"({BUDGET:.1%}), and where a month's budget is gone in 2 days ({14.4 * BUDGET:.1%}).",
        "percentunit", (failed(STEP), "failed"),
    ), (None, "transparent"), (BUDGET, "orange"), (14.4 * BUDGET, "red"))),
]  # fmt: skip

LATENCY = [
    (6, limits(quantiles(
        "Latency of calls with images",
        "From the start of a call in the server to its answer. Read from histogram buckets, so between their bounds it "
        f"is a guess. Line: {LATE:g} s, in which {PROMISED.latency.objective:g}% are to be answered.",
        "steervit_request_duration_seconds", IMAGES,
    ), (None, "transparent"), (LATE, "red"))),
    (6, quantiles(
        "Time in the queue",
        "From the arrival of a call's images to the start of their batch.",
        "steervit_queue_duration_seconds", MODEL,
    )),
    (6, lines(
        "p95 latency by kind of profile",
        "Of calls with images: without steering (none), with terms of their own (custom), or with a profile of a "
        "class, of a context or a selective one.", "s",
        ("histogram_quantile(0.95, sum by (profile_group, le) "
         f"(rate(steervit_profile_request_duration_seconds_bucket{{{MODEL}}}{STEP})))", "{{profile_group}}"),
    )),
    (6, lines(
        "Parts of a call", "Means: decoding and queue of a call, inference of a batch.", "s",
        *(
            (
                f"sum(rate(steervit_{part}_duration_seconds_sum{{{MODEL}}}{STEP}))"
                f" / (sum(rate(steervit_{part}_duration_seconds_count{{{MODEL}}}{STEP})) > 0)",
                part,
            )
            for part in ("decode", "queue", "inference")
        ),
    )),
]  # fmt: skip

BATCHES = [
    (8, stacked(lines(
        "Images by model", "Images answered a second, by each server.", "cps",
        (f"sum by (instance, model, version) (rate(steervit_images_total{{{MODEL}}}{STEP}))",
         "{{instance}} {{model}} {{version}}"),
    ))),
    (8, over_time(
        "Batch size", "How many batches had how many images. Full batches: a load that --max-batch limits.", "short",
        f"sum by (le) (increase(steervit_batch_size_images_bucket{{{MODEL}}}{STEP}))",
    )),
    (8, quantiles(
        "Inference of a batch", "Wall time of one batch.", "steervit_inference_duration_seconds", MODEL,
    )),
]  # fmt: skip

SATURATION = [
    (6, limits(lines(
        "Inference busy",
        "Share of the time in which a model's instances ran batches. Near 100% the queue grows. "
        "More servers, or fewer heads.", "percentunit",
        (f"sum by (instance, model, version) (rate(steervit_inference_duration_seconds_sum{{{MODEL}}}{STEP}))"
         " / sum by (instance, model, version) (steervit_instances)",
         "{{instance}} {{model}} {{version}}"),
    ), (None, "transparent"), (0.9, "orange")).max(1)),
    (6, limits(lines(
        "Queue",
        "Images at full budget that wait, as a share of --max-queue, when Prometheus looked. At 100% they are refused: "
        "RESOURCE_EXHAUSTED. Line: the alert's threshold.", "percentunit",
        (f"steervit_queue_work_images{{{MODEL}}} / steervit_queue_limit_images", "{{instance}} {{model}} {{version}}"),
    ), (None, "transparent"), (0.5, "red")).max(1)),
    (6, stacked(lines(
        "Images dropped",
        "Images a second that were not run. queue_full: refused at once. deadline: waited too long. cancelled: the "
        "client left.", "cps",
        (f"sum by (reason) (rate(steervit_images_dropped_total{{{MODEL}}}{STEP}))", "{{reason}}"),
    ))),
    (6, lines(
        "Calls being answered", "Accepted and not answered yet. The autoscaler follows it.", "none",
        (f"sum by (instance) (steervit_requests_in_flight{{{JOB}}})", "{{instance}}"),
    )),
]  # fmt: skip

CLIENTS = [
    (6, stacked(lines(
        "Calls refused by a limit of their client",
        "Calls a second that --client-limits refuses, by client (`other`: those that the file does not name) and "
        "limit: its models, images a second (rate), calls or images in flight.", "reqps",
        (f'sum by (client, outcome) (rate(steervit_client_requests_total{{{JOB}, outcome!="admitted"}}{STEP}))',
         "{{client}} {{outcome}}"),
    ))),
    (6, stacked(lines(
        "Images by client", "Images a second that were admitted, with --client-limits.", "cps",
        (f"sum by (client) (rate(steervit_client_images_total{{{JOB}}}{STEP}))", "{{client}}"),
    ))),
    (6, lines(
        "Calls that reach no handler",
        "Calls a second of methods that do not exist (unknown_method), or with a message over --max-message-mb "
        "(oversized). They are in no other panel.", "reqps",
        (f"sum by (reason) (rate(steervit_calls_unserved_total{{{JOB}}}{STEP}))", "{{reason}}"),
    )),
    (6, lines(
        "Message sizes", "95% of the calls with images had messages of at most this size.", "bytes",
        (quantile(0.95, "steervit_request_size_bytes", MODEL), "requests"),
        (quantile(0.95, "steervit_response_size_bytes", MODEL), "answers"),
    )),
]  # fmt: skip

PROCESS = [
    (8, lines(
        "Memory", "Resident memory of each server.", "bytes",
        (f"sum by (instance) (process_resident_memory_bytes{{{JOB}}})", "{{instance}}"),
    )),
    (8, lines(
        "CPU", "CPUs that each server uses, with decoding and answering beside inference.", "none",
        (f"sum by (instance) (rate(process_cpu_seconds_total{{{JOB}}}{STEP}))", "{{instance}}"),
    )),
    (8, lines(
        "File descriptors", "Open ones as a share of what the server may have: mostly connections.", "percentunit",
        (f"sum by (instance) (process_open_fds{{{JOB}}} / process_max_fds)", "{{instance}}"),
    ).max(1)),
]  # fmt: skip

MODELS = [
    (14, rows(
        "Models",
        "What each server serves now. Servers of one job should differ here only during a rollout.", "none",
        (
            "sum by (job, instance, model, version, graph, provider, digest, profiles_digest) ("
            f"steervit_model_info{{{MODEL}}} * on (job, instance, model, version) group_left (profiles_digest) ("
            "steervit_profiles * on (job, instance, model, version) group_left (profiles_digest) "
            "steervit_profiles_info))",
        ),
        columns({
            "job": "job", "instance": "server", "model": "model", "version": "version", "graph": "graph",
            "provider": "provider", "digest": "bundle", "profiles_digest": "digest of profiles", "Value": "profiles",
        }),
    )),
    (10, lines(
        "Loads that failed",
        "Failed attempts to load a version or to read the profile folder, in 5 minutes.",
        "none",
        (f"sum by (model) (increase(steervit_model_load_failures_total{{{MODEL}}}[5m]))", "{{model}}"),
        (f'sum(increase(steervit_profile_reads_total{{{JOB}, result="failed"}}[5m]))', "profile folder"),
    )),
]  # fmt: skip

BOARD = dashboard(
    "steervit: service", "steervit-service",
    "Whether calls are answered, how fast, and what is about to run out. Alerts: deploy/RUNBOOK.md.", VARIABLES,
    [
        ("Over the time range", 4, OVERVIEW),
        ("Service level", 8, SERVICE_LEVEL),
        ("Calls", 8, TRAFFIC),
        ("Latency", 8, LATENCY),
        ("Batches", 8, BATCHES),
        ("Saturation", 8, SATURATION),
        ("Clients and their calls", 7, CLIENTS),
        ("Process", 7, PROCESS),
        ("Models", 7, MODELS),
    ],
)  # fmt: skip
