"""A real Prometheus for the tests, with the rules of deploy/alerts; the dashboards' panels as Grafana asks for them."""

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from altered import write
from processes import ROOT, until

ALERTS = ROOT / "deploy" / "alerts"
DASHBOARDS = ROOT / "deploy" / "dashboards"
RULE_FILES = [ALERTS / f"{name}.yaml" for name in ("recording", "slo", "alerts")]
JOB = "prod/steervit"
"""The job label that the PodMonitor of deploy/kubernetes gives in the namespace `prod`."""
Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Prometheus:
    url: str
    config: Path

    def get(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer of the HTTP API. An error fails the test with Prometheus's message."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def query(self, expr: str) -> dict[Labels, float]:
        """An instant query: values by labels, without NaN."""
        result = self.get("query", query=expr)
        samples = [result["result"]] if result["resultType"] == "scalar" else [s["value"] for s in result["result"]]
        labels = [{}] if result["resultType"] == "scalar" else [s["metric"] for s in result["result"]]
        values = [float(value) for _, value in samples]
        return {frozenset(of.items()): v for of, v in zip(labels, values, strict=True) if v == v}

    def series(self, expr: str, seconds: float) -> dict[Labels, list[float]]:
        """A range query up to now."""
        now = time.time()
        result = self.get("query_range", query=expr, start=now - seconds, end=now, step=1)["result"]
        found = {frozenset(s["metric"].items()): [float(v) for _, v in s["values"]] for s in result}
        return {labels: kept for labels, values in found.items() if (kept := [v for v in values if v == v])}

    def raised(self, **labels: str) -> set[str]:
        """Alerts with these labels whose expression had data when it was last evaluated, whatever their `for`."""
        found = [alert["labels"] for alert in self.get("alerts")["alerts"]]
        return {of["alertname"] for of in found if labels.items() <= of.items()}

    def watch(self, targets: Mapping[str, str]) -> None:
        """Scrape these targets: job -> host:port. (Prometheus takes up to 5 seconds to notice.)"""
        content = [{"targets": [address], "labels": {"job": job}} for job, address in targets.items()]
        write(self.config.with_name("targets.json"), json.dumps(content))


@contextmanager
def running(folder: Path, targets: Mapping[str, str], *flags: str) -> Iterator[Prometheus]:
    """A Prometheus that scrapes and evaluates every second and keeps its data in the folder."""
    config = folder / "prometheus.yml"
    scraped = {"job_name": "none", "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}]}
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(path) for path in RULE_FILES],
                "scrape_configs": [scraped],
            }
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    prometheus = Prometheus(f"http://{address}", config)
    prometheus.watch(targets)
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address={address}", "--log.level=warn", *flags],
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            until(lambda: _ready(prometheus.url))
            yield prometheus
        finally:
            process.terminate()
            process.wait(timeout=30)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return True
    except OSError:
        return False


def promtool(*arguments: str, given: str | None = None) -> None:
    """Run promtool, which must find no problem."""
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> dict[str, Mapping[str, Any]]:
    """The alerts of deploy/alerts, by name."""
    groups = [group for file in RULE_FILES for group in yaml.safe_load(file.read_text())["groups"]]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def dashboard(name: str) -> Any:
    return json.loads((DASHBOARDS / f"{name}.json").read_text())


def panels(name: str) -> list[Any]:
    """The panels with queries."""
    return [panel for panel in dashboard(name)["panels"] if panel["type"] != "row"]


def filled_in(expr: str, profile: str, seconds: float) -> str:
    """An expression with its variables filled in as by Grafana: a job, a profile, a time range, and `All` for the
    rest."""
    values = {
        "__range": f"{seconds:.0f}s", "__rate_interval": "4s",
        "job": JOB, "instance": ".*", "model": "fashion_mnist", "version": ".*", "profile": profile,
    }  # fmt: skip
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expr)
