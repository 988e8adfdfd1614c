"""Both dashboards and every rule, evaluated by a real Prometheus that watched a real run."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
from documented import queries
from numpy.typing import NDArray
from processes import MODELS, ServerProcess, start_server, stop_server, until
from prometheus import JOB, RULE_FILES, Prometheus, alerts, dashboard, filled_in, panels, promtool, running

from export.bundle import Bundle
from service.client import Client
from service.pb import steering_pb2 as pb
from training.steering import SteeringTerm, profiles_to_json

pytestmark = pytest.mark.slow
SECONDS = 8.0
"""Duration of the load."""
MAY_BE_RAISED = {
    "SteervitLatencyBudgetBurnsFast": "a busy machine is slow",
    "SteervitLatencyBudgetBurnsSlowly": "likewise",
    "SteervitTargetDown": "and late for a scrape",
    "SteervitShadowAgreementLow": "ten images of a class again and again: two that change their label are a fifth",
}
"""All other alerts are empty, because the server is healthy; tests/test_runbook.py makes it ill."""
MAY_BE_EMPTY = {"Agreement under brownout": "needs a model with a dial: tests/test_brownout_server.py"}
"""Panels."""


@dataclass
class Received:
    """What the clients of the run received."""

    masks: dict[str, list[NDArray[np.bool_]]] = field(default_factory=lambda: defaultdict(list))
    """Masks by profile, each (gated blocks, units)."""
    rejected: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, profile: str, predictions: list[pb.Prediction]) -> None:
        with self.lock:
            for p in predictions:
                heads, groups = (np.array([list(b.kept) for b in of], bool) for of in (p.head_mask, p.mlp_mask))
                self.masks[profile].append(np.concatenate([heads, groups.reshape(len(heads), -1)], 1))


@dataclass(frozen=True)
class Run:
    prometheus: Prometheus
    server: ServerProcess
    received: Received
    begun: float

    @property
    def seconds(self) -> float:
        """Time since before the first scrape."""
        return time.time() - self.begun


def ask(server: ServerProcess, samples: dict[str, list[bytes]], received: Received, end: float) -> None:
    """Every kind of call, again and again: each class under its profile, unsteered, own terms, bad input."""
    footwear = [file for label in ("Sandal", "Sneaker", "Ankle boot") for file in samples[label]]
    with Client(server.address) as client:
        while time.monotonic() < end:
            for label, files in samples.items():
                received.add(label, client.predict(files, profile=label).predictions)
                received.add("none", client.predict(files).predictions)
            received.add("custom", client.predict(samples["Bag"], terms={0: (SteeringTerm(1, 2.0),)}).predictions)
            compared = client.compare(footwear, profile="footwear").comparisons
            received.add("none", [found.unsteered for found in compared])
            received.add("footwear", [found.steered for found in compared])
            odd = client.predict(samples["Bag"], profile="none").predictions
            received.add("profile:none", odd)
            explained = client.explain(samples["Coat"][:2], profile="Coat").explanations
            received.add("Coat", [found.prediction for found in explained])
            with pytest.raises(grpc.RpcError, match="is not a readable image"):
                client.predict([b"broken"])
            with received.lock:
                received.rejected += 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, list[bytes]], bundle: Bundle) -> Iterator[Run]:
    """One of the profiles is named `none`."""
    begun = time.time()
    folder = tmp_path_factory.mktemp("profiles")
    odd = profiles_to_json([replace(bundle.profiles["Bag"], name="none")])
    (folder / "odd.json").write_text(json.dumps({**odd, "gates_sae_digest": bundle.manifest.gates_sae_digest}))
    limits = folder / "limits"
    limits.write_text('{"clients": {"anonymous": {}}}')
    flags = ("--profiles-dir", str(folder), "--client-limits", str(limits))
    server = start_server(MODELS, "--shadow-fraction", "0.5", *flags)
    target = {JOB: urlsplit(server.metrics_url).netloc}
    with running(tmp_path_factory.mktemp("prometheus"), target) as prometheus:
        until(lambda: bool(prometheus.query("steervit_images_total")))
        received = Received()
        clients = [
            threading.Thread(target=ask, args=(server, samples, received, time.monotonic() + SECONDS)) for _ in range(2)
        ]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        sent = sum(map(len, received.masks.values()))
        until(lambda: list(prometheus.query("sum(steervit_images_total)").values()) == [sent])
        yield Run(prometheus, server, received, begun)
    stop_server(server)


def by_unit(found: dict[frozenset[tuple[str, str]], float], bundle: Bundle) -> NDArray[np.float64]:
    """Series with the labels block and unit -> (gated blocks, units)."""
    blocks = bundle.manifest.gated_blocks
    values = np.full((len(blocks), bundle.manifest.units), np.nan)
    for labels, value in found.items():
        of = dict(labels)
        kind, number = of["unit"][0], int(of["unit"][1:])
        values[blocks.index(int(of["block"])), number + bundle.manifest.heads * (kind == "m")] = value
    return values


def test_the_matrix_of_units_is_the_sum_of_the_masks_that_clients_received(run: Run, bundle: Bundle) -> None:
    assert set(run.received.masks) >= {"none", "profile:none", "custom", "footwear", "Shirt", "Bag"}
    of_chosen, of_none = (panel for panel in panels("heads") if panel["title"].startswith("Units that ran"))
    for profile, masks in run.received.masks.items():
        asked = filled_in(of_chosen["targets"][0]["expr"], profile, run.seconds)
        np.testing.assert_allclose(by_unit(run.prometheus.query(asked), bundle), np.mean(masks, 0), atol=1e-9)
    asked = filled_in(of_none["targets"][0]["expr"], "Shirt", run.seconds)
    np.testing.assert_allclose(
        by_unit(run.prometheus.query(asked), bundle), np.mean(run.received.masks["none"], 0), atol=1e-9
    )


def test_the_table_of_profiles_says_what_clients_received(run: Run, bundle: Bundle) -> None:
    (table,) = (panel for panel in panels("heads") if panel["title"] == "Head usage against its expectation")
    columns = [run.prometheus.query(filled_in(t["expr"], "", run.seconds)) for t in table["targets"]]
    usage, expected, difference, saved, _ = ({dict(of)["profile"]: v for of, v in c.items()} for c in columns)
    assert set(usage) == set(run.received.masks)
    macs = bundle.manifest.macs
    for profile, masks in run.received.masks.items():
        heads, groups = np.split(np.array(masks), [bundle.manifest.heads], 2)
        assert usage[profile] == pytest.approx(heads.mean())
        closed = (~heads).sum(2) @ macs.per_head + (~groups).sum(2) @ macs.per_mlp_group  # MACs of each image
        assert saved[profile] == pytest.approx(closed.mean() / macs.dense)
        if profile not in ("none", "custom"):
            evaluation = bundle.profiles["Bag" if profile == "profile:none" else profile].evaluation
            assert expected[profile] == evaluation["after"]["head_usage"]
            assert difference[profile] == pytest.approx(usage[profile] - expected[profile])
    assert expected["none"] == bundle.manifest.evaluation["head_usage"]


def test_the_share_of_steered_images_is_that_of_the_clients(run: Run) -> None:
    (panel,) = (panel for panel in panels("heads") if panel["title"] == "Images steered")
    (share,) = run.prometheus.query(filled_in(panel["targets"][0]["expr"], "", run.seconds)).values()
    images = {label: len(masks) for label, masks in run.received.masks.items()}
    assert share == pytest.approx(1 - images["none"] / sum(images.values()))


@pytest.mark.parametrize("name", ["service", "heads"])
def test_every_panel_is_answered_with_data(name: str, run: Run) -> None:
    asked = 0
    for panel in panels(name):
        for target in panel["targets"]:
            expr = filled_in(target["expr"], "Shirt", run.seconds)
            found = run.prometheus.query(expr) if target["instant"] else run.prometheus.series(expr, run.seconds)
            assert found or panel["title"] in MAY_BE_EMPTY, f"{panel['title']}: {expr}"
            asked += 1
    assert asked >= 18


@pytest.mark.parametrize("name", ["service", "heads"])
def test_every_variable_has_values_to_choose_from(name: str, run: Run) -> None:
    variables = [v for v in dashboard(name)["templating"]["list"] if v["type"] == "query"]
    found = {}
    for variable in variables:
        metric, _, label = variable["query"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
        match = filled_in(metric, "Shirt", run.seconds)
        found[variable["name"]] = run.prometheus.get(f"label/{label}/values", **{"match[]": match})
    assert found["job"] == [JOB]
    assert found["model"] == ["fashion_mnist"]
    if name == "heads":
        assert set(found["profile"]) >= {"none", "profile:none", "custom", "Shirt", "footwear"}


def test_every_rule_is_evaluated_and_a_healthy_server_raises_no_alert(run: Run) -> None:
    until(lambda: all(rule["health"] != "unknown" for rule in rules(run)))
    for rule in rules(run):
        assert rule["health"] == "ok", f"{rule['name']}: {rule.get('lastError')}"
        if rule["type"] == "recording":
            assert run.prometheus.query(rule["name"]), rule["name"]
    assert {rule["name"] for rule in rules(run) if rule["type"] == "alerting"} == set(alerts())
    assert run.prometheus.raised() <= set(MAY_BE_RAISED)
    assert run.received.rejected > 0, "and what clients did wrong is not taken for the server's failure"


def test_panels_tell_servers_apart_where_the_runbook_compares_them(run: Run, bundle: Bundle) -> None:
    found = {}
    for panel in panels("service"):
        if panel["title"] in ("Models", "Images by model"):
            (target,) = panel["targets"]
            ((labels, value),) = run.prometheus.query(filled_in(target["expr"], "", run.seconds)).items()
            found[panel["title"]] = dict(labels), value
            assert dict(labels)["instance"] == urlsplit(run.server.metrics_url).netloc
    served, profiles = found["Models"]
    assert (served["job"], served["provider"], profiles) == (JOB, "cpu", len(bundle.profiles) + 1)


def test_the_documented_query_tells_models_and_versions_apart(run: Run) -> None:
    (expr,) = queries("docs/serving.md")
    found = run.prometheus.query(expr)
    wanted = {"model", "version", "profile", "block", "head"}
    assert {frozenset(dict(labels)) for labels in found} == {frozenset(wanted)}


EMPTY = ("brownout", "load_failed", "certificate", "images_dropped")
"""Parts of queries that a healthy server without TLS, and with a model without a dial, has no data for."""


def test_the_queries_of_the_runbook_are_answered_with_data(run: Run) -> None:
    for expr in queries("deploy/RUNBOOK.md"):
        assert run.prometheus.query(expr) or any(part in expr for part in EMPTY), expr


def rules(run: Run) -> list[dict[str, str]]:
    return [rule for group in run.prometheus.get("rules")["groups"] for rule in group["rules"]]


def test_promtool_finds_nothing_in_metrics_rules_and_configuration(run: Run) -> None:
    promtool("check", "metrics", given=run.server.page())
    promtool("check", "rules", *map(str, RULE_FILES))
    promtool("check", "config", str(run.prometheus.config))
