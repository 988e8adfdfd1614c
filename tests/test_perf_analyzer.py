"""perf_analyzer, NVIDIA's load generator, against the server, as users run it."""

import csv
import os
import subprocess
from pathlib import Path

import pytest
from processes import ServerProcess

from tests.perf import peer_tools


@pytest.fixture(scope="module")
def command() -> list[str]:
    try:
        return peer_tools.perf_analyzer()
    except peer_tools.Unavailable as reason:
        pytest.skip(str(reason))


def run(command: list[str], server: ServerProcess, *flags: str) -> "subprocess.CompletedProcess[str]":
    asked = ["-m", "fashion_mnist", "-u", server.address, "-i", "grpc", "-p", "200", "-s", "999", *flags]
    return subprocess.run([*command, *asked], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("flags", "images", "profile"),
    [
        ((), 1, "none"),
        (("-b", "16"), 16, "none"),
        (("--request-parameter", "profile:Shirt:string", "--async"), 1, "Shirt"),
    ],
    ids=["one image", "16 images", "a profile"],
)
def test_perf_analyzer_measures_one_and_eight_calls_at_a_time(
    command: list[str], server: ServerProcess, tmp_path: Path, flags: tuple[str, ...], images: int, profile: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = server.count("steervit_images_total", profile=profile)
    report = tmp_path / "report.csv"
    done = run(command, server, "--concurrency-range", "1:8:7", "-f", str(report), *flags)
    if os.environ.get("CI"):
        with capsys.disabled():
            print(f"\nperf_analyzer {' '.join(flags)}\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
    with report.open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["Concurrency"] for row in rows) == ["1", "8"]
    for row in rows:
        infer, rest = (float(row[f"Server Compute {part}"]) for part in ("Infer", "Output"))
        assert 0 < infer < 1000 * float(row["p99 latency"])
        assert rest > 0
        assert float(row["Server Compute Input"]) < infer  # raw pixels: nothing to decode
    counts = [int(line.split(":")[1]) for line in done.stdout.splitlines() if "Request count:" in line]
    assert len(counts) == 2
    assert server.count("steervit_images_total", profile=profile) - before >= images * sum(counts)


def test_perf_analyzer_shows_what_is_wrong(command: list[str], server: ServerProcess) -> None:
    done = run(command, server, "--request-parameter", "profile:Shoe:string")
    assert done.returncode != 0
    assert "steering.profile is 'Shoe'; allowed: 'Ankle boot', 'Bag'" in done.stdout + done.stderr
