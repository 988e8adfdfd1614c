"""python -m tests.faults.table: writes tests/README.md, the table of faults, from the marks of the tests (listed.py).

Fails when a fault has no test.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.listed import FAULTS

TESTS = Path(__file__).parents[1]
README = TESTS / "README.md"
HEAD = """# The tests

Real parts throughout: server processes on free ports (processes.py), the committed bundle, a run that is trained here
(conftest.py), a Prometheus (prometheus.py), a Chromium (browser.py). `make test` runs all but deploy/, `make test-fast`
those that take seconds.

- **Journeys**, images to answers: test_journeys.py, test_reproduce.py, test_rolling_restart.py, deploy/test_image.py
- **Properties**, whatever comes: test_property_requests.py, test_property_images.py, test_property_files.py,
  test_steering_tensors.py
- **Hand-worked numbers**: test_gated_vit.py, test_sae.py, test_strategies.py, test_evaluation.py, test_last_block.py,
  test_dial.py
- **Faults**, what a client sees of each: faults/, listed below; with brownout on by
  `STEERVIT_TARGET_LATENCY_MS=60000 python -m pytest tests/faults`. **Kills and soaks**: test_crash_safety.py,
  faults/sigterm.py, perf/soak.py. **Benches**: perf/; what they rest on: test_perf.py
- **The project itself**, generated files in step and who imports whom: test_project.py, test_dashboards.py;
  what the documentation tells people to type: test_documented.py

| module | its tests |
|---|---|
| training/: what is read | test_data.py, test_folders.py, test_typefaces.py, test_weights.py |
| training/ | the numbers above, test_training.py, test_steering.py, test_selective.py, test_report.py |
| export/ | test_export.py, test_graphs.py, test_fused.py, test_mlp_groups.py, test_bundle.py |
| service/: what it answers | test_service.py, test_open_inference.py, test_images.py, test_compare_explain.py |
| service/: that it answers alike | test_determinism.py, test_batcher.py |
| budgets, from bundle to client | test_budgets.py |
| brownout: the policy alone and simulated; served | test_brownout.py, test_brownout_server.py |
| service/: how it uses the CPUs, and a GPU | test_tuning.py, test_patience.py, test_transport.py, test_buckets.py |
| service/: what it serves | test_repository.py, test_plan.py, test_serving_file.py, test_profiles.py |
| service/delivery/: registries and stores | test_delivery.py |
| service/: who is let in, and how much of it | test_tls.py, test_security.py, test_limits.py |
| service/: who watches | test_metrics.py, test_traffic.py, test_access_log.py, test_tracing.py, test_model.py |
| service/client/, the command steervit | test_client.py, test_cli.py |
| service/playground/, in Chromium | test_playground.py |
| clients of others | test_open_inference.py (tritonclient), test_perf_analyzer.py |
| the machine: network, home, terminals, proxies, users | test_telemetry.py (strace), test_machines.py, test_doctor.py |
| deploy/ | test_monitoring.py, test_runbook.py, test_container.py, deploy/ |

What to touch, tests included, for a new flag, RPC, metric, fault and so on:
[docs/architecture.md](../docs/architecture.md#where-to-change-a-thing).

# What can go wrong, what a client sees, and the test that shows it

Made by `make faults` from the marks of the tests; the list is in [faults/listed.py](faults/listed.py), and a test holds
the two together. Each of these tests talks to a real server process over real channels; beside most of them another
client ([faults/traffic.py](faults/traffic.py)) asks correctly all the time, and every answer that it gets is compared.

A status is followed by the sentence that comes with it, or a part of that. Numbers in it are those of the test.
"""
COLUMNS = "| fault | protocol | what the client sees | test |\n|---|---|---|---|"


@dataclass(frozen=True, order=True)
class Shown:
    fault: str
    protocol: str
    sees: str
    test: str
    """<file>::<function>, from tests/ on."""


class Collector:
    """A plugin that records the marks of the collected tests."""

    def __init__(self) -> None:
        self.shown: set[Shown] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            test = f"{item.path.relative_to(TESTS)}::{getattr(item, 'originalname', item.name)}"
            for mark in item.iter_markers("fault"):
                name, sees, protocol = mark.args
                self.shown.add(Shown(name, protocol, sees, test))


def collected() -> set[Shown]:
    """The marks in all files that have some."""
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "fault(" in path.read_text()]
    collector, output = Collector(), io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(["--collect-only", "-q", *files], plugins=[collector])
    if code:
        raise SystemExit(output.getvalue())
    return collector.shown


def missing(shown: set[Shown]) -> list[str]:
    """Faults, with their protocols, without a test."""
    there = {(entry.fault, entry.protocol) for entry in shown}
    wanted = [(name, protocol) for name, protocols in FAULTS.items() for protocol in protocols]
    return [" ".join(pair).strip() for pair in wanted if pair not in there]


def table(shown: set[Shown]) -> str:
    lines, group = [HEAD], ""
    for entry in sorted(shown, key=lambda entry: (list(FAULTS).index(entry.fault), entry.protocol == "", entry)):
        if entry.fault.split(": ")[0] != group:
            group = entry.fault.split(": ")[0]
            lines += [f"## {group.capitalize()}\n", COLUMNS]
        file, function = entry.test.split("::")
        name, sees = entry.fault.partition(": ")[2], entry.sees.replace("|", "\\|")
        sentence = function.removeprefix("test_").replace("_", " ")
        lines.append(f"| {name} | {entry.protocol} | {sees} | [{sentence}]({file}) |")
    return "\n".join(lines).replace("|\n##", "|\n\n##") + "\n"


def main() -> int:
    shown = collected()
    if without := missing(shown):
        print("no test shows: " + "; ".join(without), file=sys.stderr)
        return 1
    README.write_text(table(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
