"""The runbook tried: faults caused on real servers, and the alerts that a real Prometheus then raises."""

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from processes import MODELS, ROOT, ServerProcess, start_server, stop_server, until
from prometheus import ALERTS, alerts, promtool, running

from deploy import slo
from export.bundle import Bundle
from service.client import Asked, Client
from service.engine import Engine
from service.steering import resolve, stack
from training.steering import NEUTRAL, SteeringProfile, SteeringTerm, profiles_to_json

RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()
CAUSED = {
    "SteervitTargetDown", "SteervitAllTargetsDown", "SteervitNotReady", "SteervitNoneReady",
    "SteervitErrorBudgetBurnsFast", "SteervitErrorBudgetBurnsSlowly", "SteervitLatencyBudgetBurnsSlowly",
    "SteervitQueueSaturated", "SteervitBrownout",
    "SteervitImagesDropped", "SteervitImagesExpired", "SteervitNoTraffic", "SteervitModelNotLoaded",
    "SteervitClientRefused", "SteervitClientLimitsNotRead",
    "SteervitRepositoryNotRead", "SteervitProfilesNotRead", "SteervitHeadUsageDrifts", "SteervitShadowAgreementLow",
}  # fmt: skip
"""Caused by test_faults_raise_their_alerts. The others need hardware or days: only tests.yaml tries them."""


def test_every_alert_tells_what_it_is_and_the_runbook_what_to_do() -> None:
    headings = {line.removeprefix("### ").lower() for line in RUNBOOK.splitlines() if line.startswith("### ")}
    assert headings == {name.lower() for name in alerts()}
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"deploy/RUNBOOK.md#{name.lower()}"
        entry = RUNBOOK.split(f"### {name}\n")[1].split("\n### ")[0]
        for part in ("**Means**", "**Look at**", "**Do**"):
            assert part in entry, f"{name}: {part}"


def test_the_runbooks_table_says_which_alerts_were_caused() -> None:
    rows = dict(re.findall(r"^\| (Steervit\w+) \| (.+?) \|", RUNBOOK, re.MULTILINE))
    assert set(rows) == set(alerts())
    assert {name for name, how in rows.items() if how != "no"} == CAUSED


def test_rules_fire_and_do_not_fire_in_made_up_histories() -> None:
    files = [ALERTS / "tests.yaml", ALERTS / "tests_of_days.yaml"]
    promtool("test", "rules", *map(str, files))
    tried = [test for file in files for test in yaml.safe_load(file.read_text())["tests"]]
    said = " ".join(sample["labels"] for t in tried for case in t["promql_expr_test"] for sample in case["exp_samples"])
    assert set(re.findall(r'alertname="(\w+)"', said)) == set(alerts())


def test_the_rules_keep_what_the_slo_promises() -> None:
    assert slo.WRITTEN.read_text() == slo.rules(slo.read()), "make manifests"


def test_a_model_may_promise_something_else(tmp_path: Path) -> None:
    """2% of the calls fail and 2% take 1 to 2 s: too many for one model, none too many for the other."""
    large = "models: {large.1: {availability: {objective: 90}, latency: {objective: 99, seconds: 2}}}"
    (tmp_path / "slo.yaml").write_text(slo.SOURCE.read_text().replace("models: {}", large))
    (tmp_path / "rules.yaml").write_text(slo.rules(slo.read(tmp_path / "slo.yaml")))
    of = 'job="steervit", instance="a", method="/steering.v1.SteeringService/Predict"'
    series = {}
    for model in ("large.1", "small"):
        for code, calls in (("OK", 980), ("INTERNAL", 20)):
            series[f'steervit_requests_total{{{of}, model="{model}", code="{code}"}}'] = calls
        for le, calls in (("0.5", 980), ("2.0", 1000)):
            series[f'steervit_request_duration_seconds_bucket{{{of}, model="{model}", le="{le}"}}'] = calls
        series[f'steervit_request_duration_seconds_count{{{of}, model="{model}"}}'] = 1000
    slowly = ("SteervitErrorBudgetBurnsSlowly", "SteervitLatencyBudgetBurnsSlowly")
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"0+{calls}x60"} for name, calls in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname, model) (ALERTS{alertstate="firing"})',
                "eval_time": "50m",
                "exp_samples": [{"labels": f'{{alertname="{name}", model="small"}}', "value": 1} for name in slowly],
            }
        ],
    }
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "5m", "tests": [case]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    promtool("test", "rules", str(tmp_path / "tests.yaml"))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("seconds: 0.5", "seconds: 0.4", "latency.seconds: 0.4 is no bound of a bucket; allowed: 0.001, "),
        ("objective: 99.5", "objective: 100", "availability.objective is 100; allowed: "),
        ("models: {}", "models: {m: {latencies: {}}}", "models.m.latencies is {}; allowed: no such field"),
    ],
)
def test_a_wrong_promise_is_named(right: str, wrong: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "slo.yaml").write_text(slo.SOURCE.read_text().replace(right, wrong))
    with pytest.raises(ValueError, match=re.escape(said)):
        slo.read(tmp_path / "slo.yaml")


@contextmanager
def load(server: ServerProcess, images: NDArray[np.uint8], calls: int, **asked: Unpack[Asked]) -> Iterator[None]:
    """Send the images in this many concurrent calls, refused or not; every other call has a deadline of a second."""
    done = threading.Event()

    def ask(number: int) -> None:
        with Client(server.address, timeout=1 if number % 2 else 30) as client:
            while not done.is_set():
                try:
                    client.predict(list(images), **asked)
                except grpc.RpcError:
                    time.sleep(0.1)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(calls)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def label_changed(bundle: Bundle, images: NDArray[np.uint8]) -> tuple[str, NDArray[np.uint8]]:
    """A profile, and an image whose label it changes."""
    engine = Engine(bundle, "cpu", 1)

    def labels(profile: str) -> NDArray[np.int64]:
        steering = resolve(bundle, profile, NEUTRAL, 1.0)
        return engine.run(images, stack([steering], [len(images)])).logits.argmax(1)

    unsteered = labels("")
    return next((name, images[row]) for name in bundle.profiles for row in np.flatnonzero(labels(name) != unsteered))


@pytest.mark.slow
def test_faults_raise_their_alerts(
    bundle: Bundle, samples: dict[str, list[bytes]], sample_pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    repository, profiles, wrong = tmp_path / "models", tmp_path / "profiles", tmp_path / "wrong"
    shutil.copytree(MODELS, repository)
    profiles.mkdir()
    wrong.mkdir()
    (wrong / "wrong.json").write_text("{")
    terms, evaluation = {0: (SteeringTerm(7, 0.0, 40.0),)}, {"after": {"head_usage": 0.95}}
    elsewhere = SteeringProfile("elsewhere", ("Bag",), "by hand", terms, evaluation)
    made_for = {"gates_sae_digest": bundle.manifest.gates_sae_digest}
    (profiles / "elsewhere.json").write_text(json.dumps(profiles_to_json((elsewhere,)) | made_for))
    (tmp_path / "limits").write_text('{"clients": {"greedy": {"images_per_second": 0.001}}}')
    profile, changed = label_changed(bundle, sample_pixels)
    with socket.socket() as taken:  # a port that nobody answers on
        taken.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{taken.getsockname()[1]}"
        with running(tmp_path, {"steervit-dead": dead}) as prometheus:
            until(lambda: prometheus.raised() == {"SteervitTargetDown", "SteervitAllTargetsDown"}, 40)
            idle = start_server(MODELS, "--profiles-dir", str(wrong))
            prometheus.watch({"steervit-dead": dead, "steervit-idle": urlsplit(idle.metrics_url).netloc})
            of_idle = {"SteervitNoTraffic", "SteervitNotReady", "SteervitNoneReady"}
            until(lambda: of_idle <= prometheus.raised(job="steervit-idle"), 40)
            ill = start_server(
                repository, "--model-control", "poll", "--poll-seconds", "0.2", "--profiles-dir", str(profiles),
                "--shadow-fraction", "1", "--max-queue", "1024", "--max-batch", "1", "--threads", "1",
                "--client-limits", str(tmp_path / "limits"),
            )  # fmt: skip
            tired = start_server(MODELS, "--target-latency-ms", "20", "--threads", "1")
            try:
                targets = {"steervit-ill": ill, "steervit-idle": idle, "steervit-tired": tired}
                addresses = {job: urlsplit(server.metrics_url).netloc for job, server in targets.items()}
                watched = {"steervit-dead": dead, **addresses}
                prometheus.watch(watched)
                # the averages over the load begin here
                until(lambda: bool(prometheus.query('up{job="steervit-ill"} == 1')), 40)
                dead_alone = {job: "SteervitAllTargetsDown" in prometheus.raised(job=job) for job in watched}
                assert dead_alone == {job: job == "steervit-dead" for job in watched}

                # a version that does not work
                version = repository / "fashion_mnist" / f"{bundle.manifest.version + 1}"
                shutil.copytree(bundle.folder, version)
                (version / "dispatch.fp32.onnx").write_bytes(b"")
                (repository / "fashion_mnist" / "labels.json").write_text('{"stable": 0}')
                (profiles / "wrong.json").write_text("{")  # a profile folder that is wrong
                with Client(ill.address, attempts=1, name="greedy") as client:
                    client.predict(samples["Bag"][:1])
                    until(lambda: bool(prometheus.query('steervit_client_requests_total{client="greedy"} > 0')), 40)
                    for _ in range(20):
                        with pytest.raises(grpc.RpcError, match=r"over the limit of 0\.001 images a second"):
                            client.predict(samples["Bag"][:1])
                (tmp_path / "limits").write_text("{")
                with Client(ill.address) as client:
                    for _ in range(12):  # another head usage than the evaluation says
                        client.predict(samples["Bag"], profile="elsewhere")
                    for _ in range(25):  # an image whose label the profile changes
                        client.predict([changed] * 10, profile=profile)
                # a busy machine can be late for a scrape, and slow, so these do not count here
                down = {"SteervitTargetDown", "SteervitLatencyBudgetBurnsFast"}
                with load(ill, sample_pixels, calls=16):  # more than it can run
                    expected = CAUSED - down - {"SteervitAllTargetsDown", "SteervitBrownout"} - of_idle

                    def unexpected() -> set[str]:
                        """Alerts that are missing, or should be."""
                        return expected ^ (prometheus.raised(job="steervit-ill") - down)

                    until(lambda: not unexpected(), 90, unexpected)
                with load(tired, sample_pixels[:8], calls=8, min_budget=0.5):  # likewise, but they may cost less
                    until(lambda: "SteervitBrownout" in prometheus.raised(job="steervit-tired"), 40)
                for alert in prometheus.get("alerts")["alerts"]:
                    assert not re.search("<no value>|<error|%!", " ".join(alert["annotations"].values())), alert
                assert prometheus.raised(job="steervit-idle") - down == of_idle | {"SteervitProfilesNotRead"}
            finally:
                for server in (ill, tired, idle):
                    stop_server(server)
