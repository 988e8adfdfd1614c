"""The log of a real load answers who sent the most, who was refused, and what was slow and why: by the runbook's own
commands, from the log alone."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image
from processes import MODELS, ROOT, ServerProcess, serving

from service.access_log import Record, line
from service.client import Client

PREDICT = "/steering.v1.SteeringService/Predict"
LIMITS = {"clients": {"greedy": {"images_per_second": 0.01, "burst": 2}, "stranger": {"models": []}}}
Rows = list[list[str]]


class Arrival:
    """What gRPC knows of a call."""

    def __init__(self, *metadata: tuple[str, str], certificate: str = ""):
        self._metadata, self._certificate = metadata, certificate

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_common_name": [self._certificate.encode()]} if self._certificate else {}

    def peer(self) -> str:
        return "ipv4:10.0.0.7:5000"


def test_a_line_has_every_known_field_and_no_other() -> None:
    record = Record("small", "2", "b", "class", 3, 0.8, 0.5, 0.01, 0.0205, 0.03, "rate")
    arrival = Arrival(("x-client-name", "shop"), ("traceparent", f"00-{5:032x}-{6:016x}-01"), certificate="till")
    known: dict[str, Any] = {
        "method": PREDICT, "code": "OK", "model": "small", "version": "2", "profile": "b", "images": 3, "budget": 0.8,
        "budget_applied": 0.5, "refused": "rate", "duration_ms": 61.5, "decode_ms": 30.0, "queue_ms": 10.0,
        "inference_ms": 20.5, "request_bytes": 700, "response_bytes": 90, "peer": "ipv4:10.0.0.7:5000",
        "client": "shop", "certificate": "till", "request_id": "7", "trace_id": f"{5:032x}",
    }  # fmt: skip
    assert line(record, PREDICT, "OK", 0.0615, "7", (700, 90), arrival) == known
    least = ("method", "code", "duration_ms", "request_bytes", "response_bytes", "peer", "request_id")
    assert line(Record(), PREDICT, "OK", 0.0615, "7", (700, 90), Arrival()) == {name: known[name] for name in least}


def ask(server: ServerProcess, name: str, images: Sequence[bytes], calls: int, profile: str = "") -> None:
    with Client(server.address, attempts=1, name=name) as client:
        for _ in range(calls):
            with contextlib.suppress(grpc.RpcError):
                client.predict(images, profile=profile)


def photo() -> bytes:
    """12 million pixels in 0.2 MB."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((4000, 3000)).save(file, "JPEG")
    return file.getvalue()


def answers(folder: Path) -> Iterator[Rows]:
    """What each command of the runbook prints, after the one that needs a cluster."""
    (chapter,) = re.findall(
        r"## Questions to the access log\n.*?\n## ", (ROOT / "deploy" / "RUNBOOK.md").read_text(), re.S
    )
    commands = re.findall(r"```sh\n(jq .*?)\n```", chapter, re.S)
    assert len(commands) == 4
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        yield [line.split("\t") for line in done.stdout.splitlines()]


def test_the_log_of_a_load_says_who_sent_most_who_was_refused_and_what_was_slow_and_why(
    samples: dict[str, list[bytes]], tmp_path: Path
) -> None:
    if not shutil.which("jq"):
        pytest.skip("jq is not installed")
    (tmp_path / "limits.json").write_text(json.dumps(LIMITS))
    flags = ("--client-limits", str(tmp_path / "limits.json"), "--access-log", "1", "--log-format", "json")
    slow = ("--max-batch", "1", "--instances", "1", "--threads", "1", "--max-message-mb", "24", "--max-queue", "128")
    with (tmp_path / "access.log").open("w") as log, serving(MODELS, *flags, *slow, stderr=log) as server:
        bags, shirts = samples["Bag"], samples["Shirt"]
        night = [threading.Thread(target=ask, args=(server, "nightly", (bags * 10)[:64], 8, "Bag")) for _ in range(3)]
        for thread in night:  # 192 images at a time, of which 128 may wait
            thread.start()
        ask(server, "shop", shirts[:1], 30, "Shirt")
        for thread in night:
            thread.join()
        ask(server, "greedy", shirts[:2], 12)
        ask(server, "stranger", bags[:1], 5)
        ask(server, "careless", [b"no image"], 4)
        ask(server, "photographer", [photo()] * 16, 1)
        with grpc.insecure_channel(server.address) as channel:
            for name, path, message in (("old", f"{PREDICT}ed", b""), ("huge", PREDICT, bytes(25 * 2**20))):
                channel.unary_unary(path).future(message, timeout=30, metadata=(("x-client-name", name),)).code()
        for reason in ("oversized", "unknown_method"):
            assert server.count("steervit_calls_unserved_total", reason=reason) == 1
        grouped = "steervit_profile_request_duration_seconds_count"
        by_group = {group: server.count(grouped, profile_group=group) for group in ("class", "none", "custom")}
        assert by_group == {"class": 24 + 30, "none": 1 + 4 + 1, "custom": 0}, "without what a limit refused"
        assert server.count("steervit_request_size_bytes_bucket", le="65536.0") == sum(by_group.values()) - 1
        assert server.count("steervit_response_size_bytes_count") < sum(by_group.values()) - 4, "not of refusals"

    _, most, refused, slowest = answers(tmp_path)
    assert most[0][0] == "nightly"
    assert {who: int(images) for who, images, *_ in most} == {
        "nightly": 3 * 8 * 64, "shop": 30, "photographer": 16, "careless": 4, "greedy": 2, "stranger": 0, "old": 0,
        "huge": 0,
    }  # fmt: skip
    assert sorted((who, code, why) for _, who, code, why in refused) == [
        ("careless", "INVALID_ARGUMENT", ""), ("greedy", "RESOURCE_EXHAUSTED", "rate"),
        ("huge", "RESOURCE_EXHAUSTED", "oversized"), ("nightly", "RESOURCE_EXHAUSTED", "queue_full"),
        ("old", "UNIMPLEMENTED", "unknown_method"), ("stranger", "PERMISSION_DENIED", "model"),
    ]  # fmt: skip
    assert {who: int(times) for times, who, *_ in refused}.items() >= {"greedy": 11, "stranger": 5}.items()
    assert len(slowest) == 10
    assert {(who, part) for _, who, _, _, part, *_ in slowest} == {("nightly", "queue"), ("photographer", "decode")}
    assert all(float(of_part) > float(took) / 2 for took, *_, of_part, _ in slowest)
