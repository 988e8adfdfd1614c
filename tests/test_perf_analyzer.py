"""perf_analyzer against a real server: it aborts unless the metadata, the statistics and the answers are Triton's."""

import os
import re
import subprocess
from collections.abc import Sequence

import pytest
from perf_analyzer import CannotRun, perf_analyzer
from processes import MODELS, start_server, stop_server

RUNS = {
    "one image": ("-b", "1", "--concurrency-range", "1"),
    "one image, 8 calls at a time": ("-b", "1", "--concurrency-range", "8"),
    "16 images": ("-b", "16", "--concurrency-range", "1"),
    "4 images under a profile, 8 calls at a time": (
        "-b", "4", "--concurrency-range", "8", "--request-parameter", "profile:Shirt:string",
    ),
}  # fmt: skip
"""With other numbers, the commands of README.md."""


@pytest.fixture(scope="module")
def command() -> Sequence[str]:
    try:
        return perf_analyzer()
    except CannotRun as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no perf_analyzer: {error}")


def test_perf_analyzer_measures_the_server(command: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server(MODELS)
    try:
        for name, flags in RUNS.items():
            short = ("--measurement-interval", "500", "--stability-percentage", "999", "--max-trials", "3")
            asked = [*command, "-m", "fashion_mnist", "-u", server.address, "-i", "grpc", *flags, *short]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
            rates = re.findall(r"Throughput: ([\d.]+) infer/sec", done.stdout)
            assert rates, done.stdout + done.stderr
            assert float(rates[-1]) > 10
            assert "Inference count" in done.stdout, "the server's own statistics were read"
            with capsys.disabled():
                print(f"\nperf_analyzer, {name}:\n{done.stdout.strip()}")
        assert server.count("steervit_images_total", profile="Shirt") > 40
    finally:
        assert stop_server(server) == 0
