"""Step `report`: writes results.json and the measurements of the stages as one self-contained page, report.html.

No model is needed. Parts that results.json lacks are omitted from the page and from its table of contents.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from training.checkpoint import Run
from training.evaluation.criteria import MARGINS, TITLES
from training.evaluation.rivals import SLICE
from training.evaluation.seeds import table
from training.model.inference import usage_of
from training.report import dial_figures, figures, gate_figures
from training.vit.phases import annealed

TEMPLATES = Path(__file__).parent
MOST_DESCRIBED = 16
"""Number of profiles whose latents are shown; those of the others are in results.json."""


def write_report(run: Run, others: Sequence[Run] = ()) -> None:
    """Read results.json, vit.json and sae.json of a run, and write report.html and the pictures as PNG files next to
    them.

    others: runs of other seeds, for the table of seeds. Raises RunError when a run is not evaluated, and as `table`
    does.
    """
    results = run.results()
    if others:
        of_seeds = table([run, *others])
        results |= {key: of_seeds[key] for key in ("seeds", "intervals", "dial_intervals", "dial_seeds")}
    vit, sae = run.info("vit"), run.info("sae")["result"]
    points = vit["result"]["curves"]
    if not results.get("dial"):
        points = with_targets(points, vit["settings"]["vit"]["usage_target"])
    encoded = {}
    usage = "usage" if vit["settings"]["vit"].get("mlp_groups") else "head usage"
    for name, figure in pictures(results, points, usage).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight", facecolor="white")
        run.write(f"{name}.png", buffer.getvalue())
        encoded[name] = base64.b64encode(buffer.getvalue()).decode()
    run.write("report.html", page(results, sae, vit["settings"], encoded).encode())
    print(f"report: {run.folder / 'report.html'}", flush=True)


def pictures(results: Mapping[str, Any], points: Sequence[dict[str, Any]], usage: str) -> dict[str, Figure]:
    """The pictures by file name. points: the training curves (phase, step, accuracy, usage, maybe target). usage: the
    name of their usage."""
    drawn = {"dial": dial_figures.frontier(results)} if results.get("dial") else {}
    drawn |= {
        "effects": figures.arrows(results),
        "precision": figures.precision(results),
        "frontier": figures.frontier(results),
        "heads": gate_figures.heads(results),
        "usage": gate_figures.usage_per_block(results),
    }
    if results.get("diagnostics"):
        drawn["gates"] = gate_figures.gates(results)
    if results.get("last_block", {}).get("oracle"):
        drawn["last_block"] = figures.last_block(results)
    if results.get("latents"):
        drawn["latents"] = gate_figures.latents(results["latents"][:MOST_DESCRIBED], gate_figures.unit_names(results))
    if points:
        drawn["curves"] = gate_figures.curves(points, usage)
    return drawn


def page(
    results: Mapping[str, Any], sae: Mapping[str, Any], settings: Mapping[str, Any], encoded: Mapping[str, str]
) -> str:
    """The HTML of the report. encoded: pictures by name, PNG as base64; sae: the result of that stage."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["usage"] = usage_of
    singles = figures.single_classes(results["profiles"])
    described = results.get("latents", [])[:MOST_DESCRIBED]
    top = max((abs(v) for profile in described for term in profile["terms"] for v in term["effect"]), default=1.0)
    return environment.get_template("report.html.jinja").render(
        r=results,
        sae=sae,
        settings=settings,
        pictures=encoded,
        singles=singles,
        described=described,
        kind=lambda name: figures.KINDS[figures.kind_of(name)][2],
        mean=mean,
        spread=standard_deviation,
        oracle_at=oracle_at,
        slice=SLICE,
        shade=lambda value: shade(value, top),
        usage_name=figures.usage_name(results),
        class_adds=class_adds,
        always_higher=always_higher(results.get("class_agnostic", {})),
        units=gate_figures.unit_names(results),
    )


def class_adds(adds: Mapping[str, Any]) -> str:
    """The advantage of class profiles over a rival that does not know the class, in words, by the 95% intervals of the
    differences."""
    found: dict[str, list[str]] = {"higher": [], "lower": [], "no shown difference in": []}
    for metric in MARGINS:
        low, high = adds[metric]["interval"]
        kind = "higher" if low > 0 else "lower" if high < 0 else "no shown difference in"
        change, *ends = (f"{100 * value:+.2f}" for value in (adds[metric]["change"], low, high))
        found[kind].append(
            f"{TITLES.get(metric, metric)} ({change} [{', '.join(ends)}])".replace("-", "\N{MINUS SIGN}")
        )
    return "; ".join(f"{kind} {', '.join(metrics)}" for kind, metrics in found.items() if metrics)


def always_higher(rivals: Mapping[str, Any]) -> list[str]:
    """The metrics in which class profiles are shown to be above all these rivals."""
    return [
        TITLES.get(metric, metric)
        for metric in MARGINS
        if rivals and all(rival["adds"][metric]["interval"][0] > 0 for rival in rivals.values())
    ]


def with_targets(points: Sequence[dict[str, Any]], usage_target: float) -> list[dict[str, Any]]:
    """The points, with the requested usage added to those of the joint phase that lack it."""
    last = max((point["step"] for point in points if point["phase"] == "joint"), default=0) + 1
    return [
        {"target": annealed(usage_target, point["step"] / last), **point} if point["phase"] == "joint" else point
        for point in points
    ]


def oracle_at(best: Sequence[dict[str, Any]], usage: float) -> dict[str, Any]:
    """The smallest of the best subsets of each size that keeps at least `usage` of the heads."""
    return min(
        (subset for subset in best if subset["head_usage"] >= usage - 1e-9), key=lambda subset: subset["head_usage"]
    )


def shade(value: float, top: float) -> tuple[str, str]:
    """The (background, text) colours of a signed value: white at 0, orange below, purple above."""
    colour = matplotlib.colormaps["PuOr"](0.5 + 0.42 * max(-1.0, min(1.0, value / max(top, 1e-9))))
    luminance = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]
    return to_hex(colour), "#ffffff" if luminance < 0.4 else "#222222"


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; 0 of no values."""
    listed = list(values)
    return sum(listed) / max(len(listed), 1)


def standard_deviation(values: Iterable[float]) -> float:
    """The standard deviation of a sample (n - 1); 0 for a single value."""
    listed = list(values)
    centre = mean(listed)
    return math.sqrt(sum((value - centre) ** 2 for value in listed) / max(len(listed) - 1, 1))
