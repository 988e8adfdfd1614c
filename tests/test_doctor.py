"""What support would ask for, of this machine, the committed models and a running server."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from processes import MODELS, ServerProcess, run_main

from export.bundle import Bundle
from service import doctor
from service.client import Client


def test_the_doctor_reports_the_facts_and_the_problems(
    server: ServerProcess,
    client: Client,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEERVIT_REPOSITORY", str(MODELS))
    metrics = ("--metrics-port", str(urlsplit(server.metrics_url).port))
    healthy = run_main(doctor.main, *metrics)
    assert healthy.returncode == 0, healthy.stdout
    manifest = bundle.manifest
    model = f"{manifest.name} {manifest.version}: digest {bundle.digest}, {len(bundle.profiles)} profiles"
    for line in (
        r"steervit \d", r"grpcio \d", r"providers .*CPUExecutionProvider", r"\d+ of \d+ CPUs may be used",
        rf"{model}, dispatch.fp32.onnx",
        "/livez 200 OK", "/readyz 200 OK",
    ):  # fmt: skip
        assert re.search(rf"^  {line}", healthy.stdout, re.MULTILINE), line
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        client.predict([b""], profile="no such profile")
    counted = [line.split() for line in run_main(doctor.main, *metrics).stdout.splitlines() if "  steervit_" in line]
    assert any('code="NOT_FOUND"' in name for name, _ in counted)
    assert all(float(count) > 0 for _, count in counted), "zeros hide the failures"
    (tmp_path / "a.json").write_text("{")
    ill = run_main(doctor.main, "--metrics-port", "1", "--profiles-dir", str(tmp_path), "--default-profile", "x")
    assert ill.returncode == 1
    assert f"\n  ! {tmp_path / 'a.json'}: " in ill.stdout
    assert "no answer from 127.0.0.1 port 1" in ill.stdout
    assert "default_profile x\n" in ill.stdout
    limits = tmp_path / "limits"
    limits.write_text('{"clients": {"shop": {"models": ["resnet"]}}, "default": {"models": ["fashion_mnist"]}}')
    ill = run_main(doctor.main, *metrics, "--client-limits", str(limits))
    assert "! shop may call resnet, which the repository does not have\n  for shop, and a default\n" in ill.stdout
    assert "clients name themselves" in ill.stdout
    limits.write_text('{"clients": {"shop": {"models": 3}}}')
    assert "! " + f"{limits}: clients.shop.models is 3" in run_main(doctor.main, "--client-limits", str(limits)).stdout
    assert run_main(doctor.main, "--port", "many").returncode == 2
