"""The dashboards' files: up to date with the Python that writes them, complete, and with existing metrics only."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import FENCED, text
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from processes import ROOT
from prometheus import ALERTS, DASHBOARDS, dashboard, panels

from service.exposition import FAMILIES, Family

NAMES = ("service", "heads")


def test_the_json_is_what_the_python_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "deploy.dashboards", str(tmp_path)], cwd=ROOT, check=True)
    for name in NAMES:
        written = (tmp_path / f"{name}.json").read_text()
        assert written == (DASHBOARDS / f"{name}.json").read_text(), f"{name}.json is stale: make dashboards"


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_is_whole(name: str) -> None:
    for panel in panels(name):
        assert panel["title"]
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["expr"] and target["refId"] for target in panel["targets"]), panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, "the one that was chosen"
        if panel["type"] == "timeseries":
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_panels_lie_on_the_grid_beside_each_other(name: str) -> None:
    every = dashboard(name)["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells: set[tuple[int, int]] = set()
    for panel in every:
        at = panel["gridPos"]
        own = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert at["x"] + at["w"] <= 24
        assert not cells & own, panel["title"]
        cells |= own
    assert len(cells) == 24 * (max(y for _, y in cells) + 1), "no holes"


@pytest.mark.parametrize("name", NAMES)
def test_variables_are_declared_and_used(name: str) -> None:
    board = dashboard(name)
    declared = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(?!__)(\w+)", str(board)))
    assert used == declared >= {"datasource", "model"}
    assert name == "service" or "profile" in declared
    register_default_plugins()
    assert Dashboard.from_json(board).uid == board["uid"] == f"steervit-{name}"


def test_the_runbook_names_panels_and_variables_that_there_are() -> None:
    titles = {panel["title"].partition(":")[0] for name in NAMES for panel in panels(name)}
    labels = {variable["label"] for name in NAMES for variable in dashboard(name)["templating"]["list"]}
    named = set(re.findall(r"(?<![*\w])\*([^*]+)\*(?!\*)", FENCED.sub("", text("deploy/RUNBOOK.md"))))
    assert len(named) > 10
    assert named <= titles | labels | {"no steering"}


def metrics_asked_for(text: str) -> set[str]:
    return set(re.findall(r"(?<![:\w])steervit_\w+", text))


def in_panels() -> set[str]:
    exprs = [target["expr"] for name in NAMES for panel in panels(name) for target in panel["targets"]]
    return metrics_asked_for(" ".join(exprs))


def in_rules(*files: str) -> set[str]:
    lines = [line for file in files for line in (ALERTS / file).read_text().splitlines()]
    return metrics_asked_for("\n".join(line for line in lines if not line.strip().startswith("#")))


def series_of(family: Family) -> set[str]:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.kind, [""])
    return {family.name + suffix for suffix in suffixes}


def test_only_metrics_that_the_server_has_are_asked_for() -> None:
    queries = [variable.get("query", "") for name in NAMES for variable in dashboard(name)["templating"]["list"]]
    asked = in_panels() | metrics_asked_for(" ".join(map(str, queries)))
    asked |= in_rules("recording.yaml", "slo.yaml", "alerts.yaml", "tests.yaml", "tests_of_days.yaml")
    assert len(asked) > 20
    assert asked <= {series for family in FAMILIES for series in series_of(family)}


NOT_WATCHED = {
    "steervit_tuning_info": "a choice made at the start: docs/serving.md",
    "steervit_specialised_images": "for planning: deploy/CAPACITY.md",
    "steervit_cuda_graphs": "for planning, on a GPU alone: deploy/CAPACITY.md",
    "steervit_gpu_memory_bytes": "for planning, on a GPU alone: deploy/CAPACITY.md",
    "steervit_gpu_memory_used_bytes": "for planning, on a GPU alone: deploy/CAPACITY.md",
    "steervit_queue_images": "steervit_queue_work_images fills the queue",
    "steervit_build_info": "the dashboards list jobs and servers by it",
}
"""Families in no panel and no rule, with the reason."""


def test_every_metric_is_in_a_panel_or_a_rule_or_exempt() -> None:
    watched = in_panels() | in_rules("recording.yaml", "slo.yaml", "alerts.yaml")
    assert {family.name for family in FAMILIES if not series_of(family) & watched} == NOT_WATCHED.keys()
