"""The real server process with the committed bundle, over real channels."""

import asyncio
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from masks import unit_mask
from numpy.typing import NDArray
from processes import (
    COMMITTED,
    MODELS,
    ROOT,
    SAMPLES,
    SMALL,
    ServerProcess,
    run_main,
    run_module,
    serving,
    start_server,
    stop_server,
    until,
)

from export.bundle import Bundle
from service import server as module
from service.__main__ import main
from service.client import Client
from service.client.__main__ import main as client_main
from service.config import Settings
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from service.receipt import Measures, Origin
from training.steering import SteeringTerm


def test_a_profile_changes_which_heads_run_and_the_receipt_says_what_ran(
    client: Client, bundle: Bundle, samples: dict[str, list[bytes]]
) -> None:
    plain, steered = client.predict(samples["Shirt"]), client.predict(samples["Shirt"], profile="Shirt")
    usage = [np.mean([p.head_usage for p in answer.predictions]) for answer in (plain, steered)]
    assert usage[1] < usage[0]
    for answer in (plain, steered):
        assert len(answer.predictions) == 10
        for prediction in answer.predictions:
            heads, groups = np.split(unit_mask([prediction])[0], [bundle.manifest.heads], axis=1)
            for blocks in (prediction.head_mask, prediction.mlp_mask):
                assert [block.block for block in blocks] == list(bundle.manifest.gated_blocks)
            assert prediction.head_usage == pytest.approx(heads.mean())
            assert prediction.mlp_usage == pytest.approx(groups.mean())
            macs = bundle.manifest.macs
            closed = (~heads).sum(1) @ np.array(macs.per_head) + (~groups).sum(1) @ np.array(macs.per_mlp_group)
            assert prediction.compute_fraction == pytest.approx(1 - closed / bundle.manifest.macs.dense)
            probabilities = [c.probability for c in prediction.classes]
            assert len(probabilities) == 5
            assert probabilities == sorted(probabilities, reverse=True)
            assert [c.label for c in prediction.classes] == [
                bundle.manifest.labels[c.index] for c in prediction.classes
            ]
    receipt = steered.receipt
    assert (receipt.model, receipt.version) == (bundle.manifest.name, str(bundle.manifest.version))
    assert (receipt.profile, receipt.bundle_digest) == ("Shirt", bundle.digest)
    assert receipt.steering_digest != plain.receipt.steering_digest
    assert receipt.inference_seconds > 0


def test_encoded_images_and_their_pixels_give_the_same_answer(
    client: Client, samples: dict[str, list[bytes]], sample_pixels: NDArray[np.uint8]
) -> None:
    by_file = client.predict([file for files in samples.values() for file in files], top_k=10)
    by_pixels = client.predict(list(sample_pixels), top_k=10)
    assert by_file.predictions == by_pixels.predictions


def test_both_protocols_have_the_same_receipt() -> None:
    assert {*Origin._fields, *Measures._fields} == {field.name for field in pb.Receipt.DESCRIPTOR.fields}


def test_neutral_steering_of_every_kind_equals_none_exactly(client: Client, samples: dict[str, list[bytes]]) -> None:
    files = samples["Coat"]
    plain = client.predict(files, top_k=10)
    terms = {0: (SteeringTerm(4), SteeringTerm(1)), 2: (SteeringTerm(7),)}
    for neutral in (
        client.predict(files, profile="Shirt", strength=0.0, top_k=10),
        client.predict(files, terms=terms, top_k=10),
    ):
        assert neutral.predictions == plain.predictions
        assert neutral.receipt.steering_digest == plain.receipt.steering_digest


def test_inline_terms_do_what_the_profile_of_the_same_terms_does(
    client: Client, bundle: Bundle, samples: dict[str, list[bytes]]
) -> None:
    profile = bundle.profiles["Sneaker"]
    named = client.predict(samples["Sneaker"], profile="Sneaker", strength=0.5)
    inline = client.predict(samples["Sneaker"], terms=profile.terms, strength=0.5)
    assert inline.predictions == named.predictions
    assert inline.receipt.steering_digest == named.receipt.steering_digest


def test_profiles_are_listed_in_pages(client: Client, server: ServerProcess, bundle: Bundle) -> None:
    assert [p.name for p in client.profiles()] == sorted(bundle.profiles)
    stub = SteeringServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    names, token, pages = [], "", 0
    while True:
        page = stub.ListProfiles(pb.ListProfilesRequest(page_size=4, page_token=token), timeout=10)
        names += [p.name for p in page.profiles]
        pages, token = pages + 1, page.next_page_token
        if not token:
            break
    assert names == sorted(bundle.profiles)
    assert pages == -(-len(bundle.profiles) // 4)
    shirt = next(p for p in client.profiles() if p.name == "T-shirt")
    assert shirt.after.recall == pytest.approx(bundle.profiles["T-shirt"].evaluation["after"]["recall"])
    assert shirt.images == 1000


def test_counts_on_the_metrics_page_equal_what_was_sent(samples: dict[str, list[bytes]], bundle: Bundle) -> None:
    with serving(MODELS) as server:
        page = server.page()
        assert f'steervit_images_total{{model="fashion_mnist",version="{COMMITTED.name}",profile="Shirt"' in page
        with Client(server.address) as client:
            for label, files in samples.items():
                predictions = client.predict(files, profile=label).predictions
                if label == "Shirt":
                    kept = unit_mask(predictions).sum(0)
            client.predict(samples["Bag"][:3])
            client.predict(samples["Bag"][:2], terms={0: (SteeringTerm(1, 2.0),)})
            client.predict(samples["Shirt"][:4], profile="Shirt", strength=0.0)
            client.predict(samples["Shirt"][:1], terms={0: (SteeringTerm(1, 2.0),)}, strength=0.0)
            with pytest.raises(grpc.RpcError):
                client.predict([b"broken"])
        for label in samples:
            assert server.count("steervit_images_total", profile=label) == 10
        assert server.count("steervit_images_total", profile="none") == 3 + 4 + 1
        assert server.count("steervit_images_total", profile="custom") == 2
        heads, groups = np.split(kept, [bundle.manifest.heads], axis=1)
        for name, unit, counts in (("heads", "head", heads), ("mlp_groups", "group", groups)):
            for (index, number), count in np.ndenumerate(counts):
                labels = {"block": str(bundle.manifest.gated_blocks[index]), unit: str(number)}
                assert server.count(f"steervit_{name}_kept_total", profile="Shirt", **labels) == count
        macs = bundle.manifest.macs
        closed = (10 - heads).sum(1) @ np.array(macs.per_head) + (10 - groups).sum(1) @ np.array(macs.per_mlp_group)
        assert server.count("steervit_macs_dense_total", profile="Shirt") == 10 * bundle.manifest.macs.dense
        assert server.count("steervit_macs_spent_total", profile="Shirt") == 10 * bundle.manifest.macs.dense - closed
        method = {"method": "/steering.v1.SteeringService/Predict"}
        assert server.count("steervit_requests_total", code="OK", **method) == 14
        assert server.count("steervit_requests_total", code="INVALID_ARGUMENT", **method) == 1
        assert server.count("steervit_request_duration_seconds_count", **method) == 15
        model = {"model": bundle.manifest.name, "version": str(bundle.manifest.version), **method}
        assert server.count("steervit_requests_total", code="OK", **model) == 14
        assert server.count("steervit_request_duration_seconds_count", **model) == 15
        assert server.count("process_resident_memory_bytes") > 1e7
        assert server.count("steervit_requests_in_flight") == 0
        assert server.count("steervit_batch_size_images_sum") == 110
        assert server.count("steervit_queue_duration_seconds_count") == 14
        assert server.count("steervit_inference_duration_seconds_count") >= 12


def test_health_reflection_and_pages(server: ServerProcess) -> None:
    channel = grpc.insecure_channel(server.address)
    for service in ("", "steering.v1.SteeringService"):
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    listed = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=10).statuses
    assert {"", "steering.v1.SteeringService", "inference.GRPCInferenceService"} == set(listed)
    assert {status.status for status in listed.values()} == {health_pb2.HealthCheckResponse.SERVING}
    assert "steering.v1.SteeringService" in ProtoReflectionDescriptorDatabase(channel).get_services()
    assert server.page("livez") == server.page("readyz") == "OK\n"


def test_another_health_client_sees_the_server_start_and_stop() -> None:
    server = start_server(SMALL, "--drain-delay-seconds", "0.5")
    command = [sys.executable, str(ROOT / "tests/clients/health.py"), server.address, "inference.GRPCInferenceService"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdout is not None
        assert [probe.stdout.readline() for _ in range(2)] == ["SERVING\n"] * 2
        stop_server(server)
        assert probe.stdout.read() == "NOT_SERVING\n"


def test_the_metrics_page_tells_how_many_calls_are_being_answered(samples: dict[str, list[bytes]]) -> None:
    server = start_server(MODELS, "--max-batch", "2", "--threads", "1")
    stub = SteeringServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    request = pb.PredictRequest()
    for file in [file for files in samples.values() for file in files] * 2:
        request.images.add(encoded=file)
    calls = [stub.Predict.future(request, timeout=60) for _ in range(4)]
    until(lambda: server.count("steervit_requests_in_flight") == 4)
    assert not any(call.done() for call in calls)
    stop_server(server)
    assert [len(call.result().predictions) for call in calls] == [200] * 4


def test_a_single_bundle_folder_is_served_and_settings_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, samples: dict[str, list[bytes]]
) -> None:
    monkeypatch.setenv("STEERVIT_MAX_IMAGES", "2")
    monkeypatch.setenv("STEERVIT_PROFILES_DIR", "")  # as an empty value in a manifest: none, not the working directory
    with serving(SMALL / "small" / "1") as server, Client(server.address) as client:
        assert server.count("steervit_profile_reads_total") == 0
        assert len(client.predict(samples["Bag"][:2]).predictions) == 2
        with pytest.raises(grpc.RpcError, match="images has 3 entries; allowed: 1 to 2"):
            client.predict(samples["Bag"][:3])


def test_the_server_listens_on_an_address_of_ipv6(samples: dict[str, list[bytes]]) -> None:
    assert Settings(repository=MODELS, host="::1") == Settings(repository=MODELS, host="[::1]")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with serving(SMALL, "--host", "::1") as server, Client(server.address) as client:
        assert server.address.startswith("[::1]:")
        assert server.page("readyz") == "OK\n"
        assert len(client.predict(samples["Bag"][:2]).predictions) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repository", "nowhere"], "repository is nowhere, which is not a folder"),
        (["--repository", "deploy/samples"], "allowed: a bundle, or folders <model>/<version>/ with bundles"),
        (["--repository", str(MODELS), "--provider", "cuda"], "provider is 'cuda', but there is no"),
        (["--repository", str(MODELS), "--port", "70000"], "--port is '70000'"),
        (["--repository", str(MODELS), "--log-level", "loud"], "loud"),
        ([], "--repository is missing: Field required"),
    ],
)
def test_a_server_that_cannot_start_says_why(flags: list[str], message: str) -> None:
    done = run_main(main, "--metrics-port", "0", *([] if "--port" in flags else ["--port", "0"]), *flags)
    assert done.returncode != 0
    assert message in done.stderr


async def test_livez_sees_an_event_loop_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANGS_AFTER", 2.0)
    server = module.Server(Settings(repository=SMALL, port=0, metrics_port=0, drain_delay_seconds=0))
    await server.start()
    url = f"http://127.0.0.1:{server.metrics_port}/livez"

    def later() -> int:
        time.sleep(2.5)
        return status(url)

    try:
        before = await asyncio.to_thread(status, url)
        with ThreadPoolExecutor(1) as pool:
            meanwhile = pool.submit(later)
            time.sleep(3.5)  # blocks the event loop
            hung = meanwhile.result()
        await asyncio.sleep(1.5)
        assert (before, hung, await asyncio.to_thread(status, url)) == (200, 503, 200)
    finally:
        await server.stop()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_mistyped_setting_in_the_environment_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERVIT_MAX_BACTH", "8")
    done = run_main(main, "--repository", str(MODELS), "--port", "0", "--metrics-port", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("STEERVIT_MAX_BACTH in the environment is not a setting; allowed: STEERVIT_")


def test_the_command_line_client_prints_tables(server: ServerProcess, bundle: Bundle) -> None:
    files = [str(path) for path in sorted((SAMPLES / "Shirt").glob("*.png"))[:3]]
    done = run_main(client_main, "predict", "--address", server.address, "--profile", "Shirt", *files)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["image", "class", "p", "then", "heads", "usage", "MLP", "groups", "usage", "compute"]
    assert [line.split()[0] for line in lines[2:5]] == files
    assert "profile Shirt" in done.stdout
    done = run_main(client_main, "profiles", "--address", server.address)
    assert len(done.stdout.splitlines()) == len(bundle.profiles) + 2
    done = run_module("service.client", "predict", "--address", server.address, "no-such-file.png")
    assert done.stderr == "no-such-file.png: No such file or directory\n"
