"""The dashboard `heads`: which heads and MLP groups run under which profile, what that saves, and whether it is still
right."""

from deploy.dashboards.panels import (
    coloured,
    columns,
    dashboard,
    limits,
    lines,
    matrix,
    merged,
    number,
    over_time,
    override,
    rows,
    stacked,
    variable,
)

MODEL = 'job=~"$job", model="$model", version=~"$version"'
PROFILE = f'{MODEL}, profile="$profile"'
STEERED = f'{MODEL}, profile!="none"'
STEP, RANGE = "[$__rate_interval]", "[$__range]"
TO_MODEL = "on (job, instance, model, version) group_left ()"


def ratio(of: str, to: str, labels: str, window: str, by: str = "") -> str:
    """The ratio of two counters, summed before the division; no data where nothing was counted."""
    return (
        f"sum{by}(rate(steervit_{of}_total{{{labels}}}{window}))"
        f" / (sum{by}(rate(steervit_{to}_total{{{labels}}}{window})) > 0)"
    )


def usage(labels: str, window: str, by: str = "") -> str:
    """Head usage: heads that ran / (images x heads with a gate)."""
    return (
        f"sum{by}(rate(steervit_heads_kept_total{{{labels}}}{window}))"
        f" / (sum{by}(rate(steervit_images_total{{{labels}}}{window}) * {TO_MODEL} steervit_gated_heads) > 0)"
    )


def usage_of_units(labels: str) -> str:
    """The share of the images in the time range for which each unit ran, by block and unit (h0, m0). place: position in
    the matrix."""

    def of(kind: str, label: str, letter: str, first: str) -> str:
        kept = f"increase(steervit_{kind}_kept_total{{{labels}}}{RANGE})"
        for name, before in (("unit", letter), ("place", first)):
            kept = f'label_join(label_replace({kept}, "before", "{before}", "", ""), "{name}", "", "before", "{label}")'
        return f"sum by (block, unit, place) ({kept})"

    heads, groups = of("heads", "head", "h", "0"), of("mlp_groups", "group", "m", "1000")
    return f"({heads} or {groups}) / on () group_left () (sum(increase(steervit_images_total{{{labels}}}{RANGE})) > 0)"


def near_threshold(window: str, by: str = "") -> str:
    """Gates near their threshold / (images x units)."""
    units = "(steervit_gated_heads + steervit_gated_mlp_groups)"
    return (
        f"sum{by}(rate(steervit_gates_near_threshold_total{{{MODEL}}}{window}))"
        f" / (sum{by}(rate(steervit_images_total{{{MODEL}}}{window}) * {TO_MODEL} {units}) > 0)"
    )


BY = " by (profile) "
EXPECTED = f"max by (profile) (steervit_profile_expected_head_usage{{{MODEL}}})"
SHADOW_HEADS = (
    f"sum by (steering) (rate(steervit_shadow_heads_kept_total{{{PROFILE}}}{STEP})) / on () group_left () "
    f"(sum(rate(steervit_shadow_images_total{{{PROFILE}}}{STEP}) * {TO_MODEL} steervit_gated_heads) > 0)"
)

VARIABLES = [
    variable("job", "Job", "label_values(steervit_build_info, job)", "Scrape jobs, such as one a deployment."),
    variable(
        "model", "Model", 'label_values(steervit_model_info{job=~"$job"}, model)', "One served model.", every=False
    ),
    variable(
        "version", "Version", 'label_values(steervit_images_total{job=~"$job", model="$model"}, version)',
        "Versions of the model, unloaded ones included.",
    ),
    variable(
        "profile", "Profile", f"label_values(steervit_images_total{{{MODEL}}}, profile)",
        "The profile of the row `Chosen profile`. none: images without steering; custom: with terms of their own; "
        "other: under profiles past --max-profile-series; profile:none: under a profile that is named none.",
        every=False,
    ),
]  # fmt: skip

OVERVIEW = [
    (4, number(
        "Head usage", "Share of the heads with a gate that ran, over all images of the time range.", "percentunit",
        usage(MODEL, RANGE),
    )),
    (4, number(
        "Compute saved",
        "Multiply-accumulates that closed heads and MLP groups saved, as a share of the whole model's with all of them "
        "on. Wall time saved depends on the graph: see the README.", "percentunit",
        "1 - " + ratio("macs_spent", "macs_dense", MODEL, RANGE),
        ((None, "green"),),
    )),
    (4, number(
        "Images steered", "Share of the images that came with a profile or with terms of their own.", "percentunit",
        f"sum(rate(steervit_images_total{{{STEERED}}}{RANGE}))"
        f" / (sum(rate(steervit_images_total{{{MODEL}}}{RANGE})) > 0)",
    )),
    (4, number(
        "Images", "Images answered: mean of the time range.", "cps",
        f"sum(rate(steervit_images_total{{{MODEL}}}{RANGE}))",
    )),
    (4, number(
        "Shadow agreement",
        "Of the steered images that were run unsteered as well (--shadow-fraction), the share that got the same label.",
        "percentunit", ratio("shadow_agreed", "shadow_images", MODEL, RANGE),
        ((None, "red"), (0.9, "orange"), (0.95, "green")),
    )),
    (4, number(
        "Gates near the threshold", "Share of the gates whose logit is so near 0 that rounding could flip them.",
        "percentunit", near_threshold(RANGE),
    )),
]  # fmt: skip

CHOSEN = [
    (9, matrix(
        "Units that ran: $profile",
        "Block x unit: for which share of the images under the chosen profile a head (h) or MLP group (m) ran, over "
        "the time range. Blocks without gates are left out: their units always run.", usage_of_units(PROFILE),
    )),
    (9, matrix(
        "Units that ran: no steering", "The same for the images that came without steering, to compare with.",
        usage_of_units(f'{MODEL}, profile="none"'),
    )),
    (6, lines(
        "Steered and unsteered: $profile",
        "Head usage of the same images with and without the chosen profile (--shadow-fraction): what steering does.",
        "percentunit", (SHADOW_HEADS, "{{steering}}"),
    ).max(1)),
]  # fmt: skip

COUNTS = f"sum by (profile) (increase(steervit_images_total{{{MODEL}}}{RANGE})) > 0"
AGAINST = rows(
    "Head usage against its expectation",
    "Over the time range. Expected: what the profile's evaluation measured on the images of its classes. Off by more "
    "than 10 points: other images come than it was made for, or at another strength.", "percentunit",
    (
        usage(MODEL, RANGE, BY),
        f"{EXPECTED} and on (profile) {COUNTS}",
        f"{usage(MODEL, RANGE, BY)} - {EXPECTED}",
        "1 - " + ratio("macs_spent", "macs_dense", MODEL, RANGE, BY),
        COUNTS,
    ),
    merged(),
    columns({
        "profile": "profile", "Value #A": "head usage", "Value #B": "expected", "Value #C": "difference",
        "Value #D": "compute saved", "Value #E": "images",
    }),
)  # fmt: skip
coloured(AGAINST, "difference", ((None, "red"), (-0.1, "green"), (0.1, "red")))
override(AGAINST, "images", {"unit": "short", "decimals": 0})

PROFILES = [
    (12, AGAINST),
    (12, lines(
        "Head usage by profile", "Share of the heads with a gate that ran.", "percentunit",
        (usage(MODEL, STEP, BY), "{{profile}}"),
    ).max(1)),
    (12, stacked(lines(
        "Images by profile", "Images answered a second.", "cps",
        (f"sum by (profile) (rate(steervit_images_total{{{MODEL}}}{STEP})) > 0", "{{profile}}"),
    ))),
    (12, lines(
        "Compute saved by profile",
        "Share of the whole model's multiply-accumulates that closed heads and MLP groups saved.",
        "percentunit", ("1 - " + ratio("macs_spent", "macs_dense", MODEL, STEP, BY), "{{profile}}"),
    )),
]  # fmt: skip

STILL_RIGHT = [
    (8, limits(lines(
        "Drift of head usage",
        "Head usage less its expectation, by profile. Lines: the alert's thresholds. Few images make it jump, and "
        "budgets move it by design.",
        "percentunit", (f"{usage(MODEL, STEP, BY)} - {EXPECTED}", "{{profile}}"), lowest=None,
    ), (None, "red"), (-0.1, "transparent"), (0.1, "red"))),
    (8, limits(lines(
        "Shadow agreement",
        "Of the images under a profile that were run unsteered as well, the share that got the same label. Line: the "
        "alert's threshold. Nothing here: --shadow-fraction is 0.", "percentunit",
        (ratio("shadow_agreed", "shadow_images", STEERED, STEP, BY), "{{profile}}"),
    ), (None, "red"), (0.9, "transparent")).max(1)),
    (8, lines(
        "Gates near the threshold",
        "Share of the gates with a logit so near 0 that rounding could turn them: where the same image may get another "
        "mask on other hardware.", "percentunit", (near_threshold(STEP, BY), "{{profile}}"),
    )),
]  # fmt: skip

BUDGETS = [
    (12, over_time(
        "Budgets", "Images by requested budget. Images without a budget are left out.", "percentunit",
        f"sum by (le) (increase(steervit_budget_bucket{{{MODEL}}}{STEP}))",
    )),
    (12, lines(
        "Compute spent", "Share of the whole model's multiply-accumulates, over all images, with or without a budget.",
        "percentunit", (ratio("macs_spent", "macs_dense", MODEL, STEP), "spent"),
    ).max(1)),
    (6, limits(lines(
        "Brownout",
        "How far budgets are lowered under load (--target-latency-ms), those of the calls that are lowered most: 100% "
        "is to their floors. Line: the alert's threshold, if it lasts.", "percentunit",
        (f"steervit_brownout_level{{{MODEL}}}", "{{instance}} {{model}} {{version}}"),
    ), (None, "transparent"), (0.1, "red")).max(1)),
    (6, lines(
        "Images at a lowered budget", "Share of the images of each profile that were answered at a lowered budget.",
        "percentunit", (ratio("brownout_images", "images", MODEL, STEP, BY), "{{profile}}"),
    ).max(1)),
    (6, lines(
        "Compute saved by brownout", "Of the whole model's multiply-accumulates, over all images: estimated.",
        "percentunit", (ratio("brownout_macs_saved", "macs_dense", MODEL, STEP), "saved"),
    ).max(1)),
    (6, lines(
        "Agreement under brownout",
        "Of the images at a lowered budget that were run at their own as well, after the brownout, the share that got "
        "the same label. Nothing here: no brownout has ended, or --shadow-fraction is 0.", "percentunit",
        (ratio("brownout_shadow_agreed", "brownout_shadow_images", MODEL, STEP, BY), "{{profile}}"),
    ).max(1)),
]  # fmt: skip

BOARD = dashboard(
    "steervit: heads", "steervit-heads",
    "Which attention heads and MLP groups run under which profile, what that saves, and whether it is still right.",
    VARIABLES,
    [
        ("Over the time range", 4, OVERVIEW),
        ("Profiles", 9, PROFILES),
        ("Chosen profile: $profile", 9, CHOSEN),
        ("Compute", 8, BUDGETS),
        ("Still right?", 8, STILL_RIGHT),
    ],
)  # fmt: skip
