"""deploy/slo.yaml -> deploy/alerts/slo.yaml: python -m deploy.slo

Names and labels of the recorded series are those of sloth (https://sloth.dev), so that its dashboards show them, with
`job` and `model` beside. Alerts compare two windows each, as in Google's SRE Workbook, "Alerting on SLOs".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from prometheus_client.utils import floatToGoString
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from deploy.kubernetes.prometheus_rules import Dumper
from service.counting import SECONDS
from training import fields

SOURCE = Path(__file__).with_suffix(".yaml")
WRITTEN = Path(__file__).parent / "alerts" / "slo.yaml"
HEAD = "# Written from deploy/slo.yaml by `make manifests`: change the objectives there.\n"
IMAGES = 'method=~".+/(Predict|Compare|Explain|ModelInfer)"'
"""Calls with images."""
FAILED = 'code=~"UNKNOWN|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|UNAVAILABLE"'
"""Statuses that are the server's failure. INVALID_ARGUMENT and the like are the client's, CANCELLED is its choice."""
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
FAST, SLOW = ((14.4, "1h", "5m"), (6, "6h", "30m")), ((3, "1d", "2h"), (1, "3d", "6h"))
"""How many times faster than allowed the budget is spent, over a long window and still in a short one."""
ENOUGH = 10
"""Alerts need more bad calls than this in the long window."""


STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Availability:
    """Objective for the share of calls that do not fail on the server's side."""

    objective: Annotated[float, Field(gt=0, lt=100)]

    def bad(self, model: str, window: str, function: str = "rate") -> str:
        """The calls that count against the budget, by job and model; `total`: all calls."""
        return f"sum by (job, model) ({function}(steervit_requests_total{{{IMAGES}, {FAILED}{model}}}[{window}]))"

    def total(self, model: str, window: str) -> str:
        return f"sum by (job, model) (rate(steervit_requests_total{{{IMAGES}{model}}}[{window}]))"


@dataclass(frozen=True, config=STRICT)
class Latency:
    """Objective for the share of calls that are answered in time. Exact, unlike a quantile, as the limit is a bucket's
    bound."""

    objective: Annotated[float, Field(gt=0, lt=100)]
    seconds: float

    @field_validator("seconds")
    @classmethod
    def _is_a_bound(cls, seconds: float) -> float:
        if seconds not in SECONDS:
            raise ValueError(f"{seconds} is no bound of a bucket; allowed: {', '.join(map(str, SECONDS))}")
        return seconds

    def bad(self, model: str, window: str, function: str = "rate") -> str:
        """As in Availability."""
        le = f'le="{floatToGoString(self.seconds)}"'
        total = self.total(model, window, function)
        duration = "steervit_request_duration_seconds"
        return f"({total} - sum by (job, model) ({function}({duration}_bucket{{{IMAGES}, {le}{model}}}[{window}])))"

    def total(self, model: str, window: str, function: str = "rate") -> str:
        return f"sum by (job, model) ({function}(steervit_request_duration_seconds_count{{{IMAGES}{model}}}[{window}]))"


@dataclass(frozen=True, config=STRICT)
class Instead:
    """The objectives of one model, in place of those of all others."""

    availability: Availability | None = None
    latency: Latency | None = None


@dataclass(frozen=True, config=STRICT)
class Slo:
    """The content of deploy/slo.yaml."""

    days: Annotated[int, Field(gt=0)]
    availability: Availability
    latency: Latency
    models: dict[str, Instead]


def read(path: Path = SOURCE) -> Slo:
    """The objectives in the file. Raises ValueError with what is wrong."""
    return fields.read(Slo, yaml.safe_load(path.read_text()), ValueError, f"{path}: ")


def rules(slo: Slo) -> str:
    """The rule file: for each objective its recording rules, an alert that pages somebody and one that does not."""
    groups = [
        *_groups(
            "availability", "SteervitErrorBudget", slo.availability,
            {name: instead.availability for name, instead in slo.models.items() if instead.availability},
            "fail", slo.days,
        ),
        *_groups(
            "latency", "SteervitLatencyBudget", slo.latency,
            {name: instead.latency for name, instead in slo.models.items() if instead.latency},
            "are late", slo.days,
        ),
    ]  # fmt: skip
    return HEAD + yaml.dump({"groups": groups}, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)


def _groups(
    name: str, alert: str, of_all: Any, of_models: Mapping[str, Any], what: str, days: int
) -> list[dict[str, Any]]:
    labels = {"sloth_id": f"steervit-{name}", "sloth_service": "steervit", "sloth_slo": name}
    selector = f'{{sloth_slo="{name}"}}'
    others = "".join(f', model!="{model}"' for model in of_models)
    promises = {others: of_all, **{f', model="{model}"': promise for model, promise in of_models.items()}}

    def of_each(expr: Any) -> str:
        """The expressions for all objectives, joined."""
        return "\n  or\n".join(expr(matcher, promise) for matcher, promise in promises.items()) + "\n"

    def record(series: str, expr: str, **more: str) -> dict[str, Any]:
        return {"record": f"slo:{series}", "expr": expr, "labels": {**labels, **more}}

    def ratio(window: str) -> dict[str, Any]:
        expr = of_each(lambda m, promise: f"{promise.bad(m, window)}\n  / ({promise.total(m, window)} > 0)")
        return record(f"sli_error:ratio_rate{window}", expr, sloth_window=window)

    def objective(matcher: str, promise: Any) -> str:
        known = f'slo:sli_error:ratio_rate3d{{sloth_slo="{name}"{matcher}}}'
        return f"group without (sloth_window) ({known}) * {round(promise.objective / 100, 9)}"

    period = f"{days}d"
    recorded = [
        *(ratio(window) for window in WINDOWS),
        record(
            f"sli_error:ratio_rate{period}", f"avg_over_time(slo:sli_error:ratio_rate5m{selector}[{period}])",
            sloth_window=period,
        ),
        record("objective:ratio", of_each(objective)),
        record("error_budget:ratio", f"1 - slo:objective:ratio{selector}"),
        record("time_period:days", f"0 * slo:objective:ratio{selector} + {days}"),
        record(
            "current_burn_rate:ratio",
            f"sum without (sloth_window) (slo:sli_error:ratio_rate5m{selector}) / slo:error_budget:ratio{selector}",
        ),
        record(
            "period_burn_rate:ratio",
            f"sum without (sloth_window) (slo:sli_error:ratio_rate{period}{selector})"
            f" / slo:error_budget:ratio{selector}",
        ),
        record("period_error_budget_remaining:ratio", f"1 - slo:period_burn_rate:ratio{selector}"),
    ]  # fmt: skip

    def spent(factor: float, long: str, short: str) -> str:
        """Spent faster than by the factor in both windows, and by more than ENOUGH calls."""
        limit = f"ignoring (sloth_window) ({factor} * slo:error_budget:ratio{selector})"
        enough = " or ".join(promise.bad(matcher, long, "increase") for matcher, promise in promises.items())
        return (
            f"slo:sli_error:ratio_rate{long}{selector} > {limit}\n"
            f"  and ignoring (sloth_window) slo:sli_error:ratio_rate{short}{selector} > {limit}\n"
            f"  and on (job, model) ({enough}) > {ENOUGH}\n"
        )

    def burns(kind: str, severity: str, wait: str, pairs: tuple[tuple[float, str, str], ...]) -> dict[str, Any]:
        rates = " or ".join(f"{factor:g} times (over {long})" for factor, long, _ in pairs)
        share, model = "{{ $value | humanizePercentage }}", "{{ or $labels.model `no model` }}"
        return {
            "alert": f"{alert}Burns{kind}",
            "expr": "or\n".join(spent(*pair) for pair in pairs),
            "for": wait,
            "labels": {"severity": severity},
            "annotations": {
                "summary": f"{share} of the calls for {model} of {{{{ $labels.job }}}} {what}",
                "description": f"{share} of the calls with images {what}, and still do: the budget of {days} days is "
                f"spent more than {rates} too fast.",
                "runbook_url": f"deploy/RUNBOOK.md#{alert.lower()}burns{kind.lower()}",
            },
        }

    alerts = [burns("Fast", "critical", "2m", FAST), burns("Slowly", "warning", "15m", SLOW)]
    return [
        {"name": f"steervit-slo-{name}", "rules": recorded},
        {"name": f"steervit-slo-{name}-alerts", "rules": alerts},
    ]


if __name__ == "__main__":
    WRITTEN.write_text(rules(read()))
