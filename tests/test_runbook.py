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
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from processes import MODELS, ROOT, ServerProcess, start_server, stop_server, until
from prometheus import ALERTS, alerts, promtool, running

from export.bundle import Bundle
from service.client import Client
from training.steering import SteeringProfile, SteeringTerm, profiles_to_json

RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()
CAUSED = {
    "SteervitTargetDown", "SteervitAllTargetsDown", "SteervitNotReady", "SteervitNoneReady",
    "SteervitErrorBudgetBurnsFast", "SteervitErrorBudgetBurnsSlowly", "SteervitSlow", "SteervitQueueSaturated",
    "SteervitImagesDropped", "SteervitImagesExpired", "SteervitNoTraffic", "SteervitModelNotLoaded",
    "SteervitProfilesNotRead", "SteervitHeadUsageDrifts", "SteervitShadowAgreementLow",
}  # fmt: skip
"""By test_faults_raise_their_alerts. The others need hardware or days: tests.yaml alone tries them."""


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
    promtool("test", "rules", str(ALERTS / "tests.yaml"))
    tried = yaml.safe_load((ALERTS / "tests.yaml").read_text())["tests"]
    said = " ".join(sample["labels"] for t in tried for case in t["promql_expr_test"] for sample in case["exp_samples"])
    assert set(re.findall(r'alertname="(\w+)"', said)) == set(alerts())


@contextmanager
def load(server: ServerProcess, images: NDArray[np.uint8], calls: int) -> Iterator[None]:
    """The images in so many calls at a time, refused or not; every other one has a second to be answered in."""
    done = threading.Event()

    def ask(number: int) -> None:
        with Client(server.address, timeout=1 if number % 2 else 30) as client:
            while not done.is_set():
                try:
                    client.predict(list(images))
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
            )  # fmt: skip
            try:
                targets = {"steervit-ill": ill, "steervit-idle": idle}
                addresses = {job: urlsplit(server.metrics_url).netloc for job, server in targets.items()}
                watched = {"steervit-dead": dead, **addresses}
                prometheus.watch(watched)
                # what the load is averaged with begins here
                until(lambda: bool(prometheus.query('up{job="steervit-ill"} == 1')), 40)
                dead_alone = {job: "SteervitAllTargetsDown" in prometheus.raised(job=job) for job in watched}
                assert dead_alone == {"steervit-dead": True, "steervit-ill": False, "steervit-idle": False}

                version = repository / "fashion_mnist" / "4"  # a version that does not work
                shutil.copytree(bundle.folder, version)
                (version / "dispatch.fp32.onnx").write_bytes(b"")
                (profiles / "wrong.json").write_text("{")  # a profile folder that is wrong
                with Client(ill.address) as client:
                    for _ in range(12):  # another head usage than the evaluation says
                        client.predict(samples["Bag"], profile="elsewhere")
                    every = [file for files in samples.values() for file in files]
                    changed = [
                        file
                        for file, found in zip(every, client.compare(every, profile="tops").comparisons, strict=True)
                        if not found.same_label
                    ]
                    assert changed
                    for _ in range(25):  # images whose label the profile changes
                        client.predict((changed * 10)[:10], profile="tops")
                down = {"SteervitTargetDown"}  # a busy machine can be late for a scrape, so it does not count here
                with load(ill, sample_pixels, calls=16):  # more than it can run
                    expected = CAUSED - down - {"SteervitAllTargetsDown"} - of_idle
                    until(lambda: prometheus.raised(job="steervit-ill") - down == expected, 60)
                for alert in prometheus.get("alerts")["alerts"]:
                    assert not re.search("<no value>|<error|%!", " ".join(alert["annotations"].values())), alert
                assert prometheus.raised(job="steervit-idle") - down == of_idle | {"SteervitProfilesNotRead"}
            finally:
                assert stop_server(ill) == 0
                assert stop_server(idle) == 0
