"""The real server process with the committed bundle, over real channels."""

import re
import socket
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from numpy.typing import NDArray
from processes import MODELS, ROOT, ServerProcess, run_module, start_server, stop_server, until

from export.bundle import Bundle
from service.client import Client
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from training.steering import SteeringTerm


def images_of(request: pb.PredictRequest, count: int = 1) -> pb.PredictRequest:
    for _ in range(count):
        request.images.add(pixels=bytes(28 * 28))
    return request


def test_a_profile_changes_which_heads_run_and_the_receipt_says_what_ran(
    client: Client, bundle: Bundle, samples: dict[str, list[bytes]]
) -> None:
    plain, steered = client.predict(samples["Shirt"]), client.predict(samples["Shirt"], profile="Shirt")
    usage = [np.mean([p.head_usage for p in answer.predictions]) for answer in (plain, steered)]
    assert usage[1] < usage[0]
    for answer in (plain, steered):
        assert len(answer.predictions) == 10
        for prediction in answer.predictions:
            mask = np.array([list(block.kept) for block in prediction.head_mask])
            assert [block.block for block in prediction.head_mask] == list(bundle.manifest.gated_blocks)
            assert prediction.head_usage == pytest.approx(mask.mean())
            closed = (~mask).sum(1) @ np.array(bundle.manifest.macs.per_head)
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


def test_neutral_steering_of_every_kind_equals_none_exactly(client: Client, samples: dict[str, list[bytes]]) -> None:
    files = samples["Coat"]
    plain = client.predict(files, top_k=10)
    terms = {0: (SteeringTerm(4), SteeringTerm(1)), 2: (SteeringTerm(7),)}
    for neutral in (
        client.predict(files, profile="Shirt", strength=0.0, top_k=10),
        client.predict(files, "", terms, top_k=10),
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


BAD = {
    "no images": (lambda r: r, "INVALID_ARGUMENT", "images has 0 entries; allowed: 1 to 256"),
    "too many images": (lambda r: images_of(r, 257), "INVALID_ARGUMENT", "images has 257 entries; allowed: 1 to 256"),
    "an empty image": (lambda r: (r.images.add(), r)[1], "INVALID_ARGUMENT", "images[0] is empty; allowed: encoded or"),
    "an unreadable image": (
        lambda r: (images_of(r).images.add(encoded=b"GIF89a nonsense"), r)[1],
        "INVALID_ARGUMENT",
        "images[1].encoded is not a readable image (15 bytes",
    ),
    "pixels of the wrong shape": (
        lambda r: (r.images.add(pixels=bytes(783)), r)[1],
        "INVALID_ARGUMENT",
        "images[0].pixels has 783 bytes; allowed: 784 (uint8, 28 x 28 x 1)",
    ),
    "an unknown model": (
        lambda r: images_of(pb.PredictRequest(model="resnet")),
        "NOT_FOUND",
        "model is 'resnet'; allowed: 'fashion_mnist'",
    ),
    "an unknown version": (lambda r: images_of(pb.PredictRequest(version="99")), "NOT_FOUND", "is '99'; allowed: '"),
    "an unknown profile": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(profile="Shoe"))),
        "NOT_FOUND",
        "steering.profile is 'Shoe'; allowed: 'Ankle boot', 'Bag'",
    ),
    "a latent out of range": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(terms=[pb.SteeringTerm(site=1, latent=512)]))),
        "INVALID_ARGUMENT",
        "steering.terms: latent is 512 at site 1; allowed: 0 to 511",
    ),
    "a negative latent": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(terms=[pb.SteeringTerm(latent=-1)]))),
        "INVALID_ARGUMENT",
        "steering.terms[0]: latent is -1; allowed: 0 or more",
    ),
    "a site that is not there": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(terms=[pb.SteeringTerm(site=5)]))),
        "INVALID_ARGUMENT",
        "site is 5; allowed: 0 to 4",
    ),
    "a latent given twice": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(terms=[pb.SteeringTerm(), pb.SteeringTerm()]))),
        "INVALID_ARGUMENT",
        "latent 0 at site 0 is given twice; allowed: once",
    ),
    "an infinite scale": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(terms=[pb.SteeringTerm(scale=float("inf"))]))),
        "INVALID_ARGUMENT",
        "steering.terms[0]: scale is inf; allowed: a finite number",
    ),
    "a strength that is no number": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(profile="Shirt", strength=float("nan")))),
        "INVALID_ARGUMENT",
        "steering.strength is nan; allowed: -100 to 100",
    ),
    "a profile and terms": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(profile="Shirt", terms=[pb.SteeringTerm()]))),
        "INVALID_ARGUMENT",
        "steering.profile is 'Shirt' and steering.terms are given too; allowed: one of them",
    ),
    "too many terms": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(terms=[pb.SteeringTerm()] * 513))),
        "INVALID_ARGUMENT",
        "steering.terms has 513 entries; allowed: 512",
    ),
    "terms made for other weights": (
        lambda r: images_of(pb.PredictRequest(steering=pb.Steering(gates_sae_digest="0123"))),
        "FAILED_PRECONDITION",
        "steering.gates_sae_digest is '0123'; allowed: '",
    ),
    "a negative top_k": (
        lambda r: images_of(pb.PredictRequest(top_k=-1)),
        "INVALID_ARGUMENT",
        "top_k is -1; allowed: 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_other_rows_are_unharmed(
    case: str, client: Client, server: ServerProcess, samples: dict[str, list[bytes]]
) -> None:
    make, code, message = BAD[case]
    expected = client.predict(samples["Bag"], profile="Bag", top_k=10)
    stub = SteeringServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    request = pb.PredictRequest(top_k=10)
    request.steering.profile = "Bag"
    for file in samples["Bag"]:
        request.images.add(encoded=file)
    good = [stub.Predict.future(request, timeout=30) for _ in range(3)]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(make(pb.PredictRequest()), timeout=30)
    assert caught.value.code().name == code
    assert message in caught.value.details()
    for call in good:
        for found, wanted in zip(call.result().predictions, expected.predictions, strict=True):
            assert [c.label for c in found.classes[:1]] == [c.label for c in wanted.classes[:1]]
            assert [c.probability for c in found.classes] == pytest.approx(
                [c.probability for c in wanted.classes], abs=1e-4
            )


def test_counts_on_the_metrics_page_equal_what_was_sent(samples: dict[str, list[bytes]], bundle: Bundle) -> None:
    server = start_server(MODELS)
    try:
        page = server.page()
        assert 'steervit_images_total{model="fashion_mnist",profile="Shirt"' in page, "known series start at 0"
        kept = np.zeros((len(bundle.manifest.gated_blocks), bundle.manifest.heads))
        with Client(server.address) as client:
            for label, files in samples.items():
                for prediction in client.predict(files, profile=label).predictions:
                    if label == "Shirt":
                        kept += [list(block.kept) for block in prediction.head_mask]
            client.predict(samples["Bag"][:3])
            client.predict(samples["Bag"][:2], terms={0: (SteeringTerm(1, 2.0),)})
            with pytest.raises(grpc.RpcError):
                client.predict([b"broken"])
        for label in samples:
            assert server.count("steervit_images_total", profile=label) == 10
        assert server.count("steervit_images_total", profile="none") == 3
        assert server.count("steervit_images_total", profile="custom") == 2
        for index, block in enumerate(bundle.manifest.gated_blocks):
            for head in range(bundle.manifest.heads):
                labels = {"profile": "Shirt", "block": str(block), "head": str(head)}
                assert server.count("steervit_heads_kept_total", **labels) == kept[index, head]
        closed = (10 - kept).sum(1) @ np.array(bundle.manifest.macs.per_head)
        assert server.count("steervit_macs_dense_total", profile="Shirt") == 10 * bundle.manifest.macs.dense
        assert server.count("steervit_macs_spent_total", profile="Shirt") == 10 * bundle.manifest.macs.dense - closed
        method = {"method": "/steering.v1.SteeringService/Predict"}
        assert server.count("steervit_requests_total", code="OK", **method) == 12
        assert server.count("steervit_requests_total", code="INVALID_ARGUMENT", **method) == 1
        assert server.count("steervit_request_duration_seconds_count", **method) == 13
        assert server.count("steervit_requests_in_flight") == 0
        assert server.count("steervit_batch_size_images_sum") == 105
        assert server.count("steervit_queue_duration_seconds_count") == 12
        assert server.count("steervit_inference_duration_seconds_count") >= 12
    finally:
        assert stop_server(server) == 0


def test_health_reflection_and_pages(server: ServerProcess) -> None:
    channel = grpc.insecure_channel(server.address)
    for service in ("", "steering.v1.SteeringService"):
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert "steering.v1.SteeringService" in ProtoReflectionDescriptorDatabase(channel).get_services()
    assert server.page("livez") == server.page("readyz") == "OK\n"


def test_a_stopping_server_answers_what_it_accepted(samples: dict[str, list[bytes]]) -> None:
    server = start_server(MODELS, "--max-batch", "2", "--threads", "1")
    stub = SteeringServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    request = pb.PredictRequest()
    for file in [file for files in samples.values() for file in files] * 2:
        request.images.add(encoded=file)
    calls = [stub.Predict.future(request, timeout=60) for _ in range(4)]
    deadline = time.monotonic() + 30
    while server.count("steervit_batch_size_images_count") == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    until(lambda: server.count("steervit_requests_in_flight") == 4)
    assert not any(call.done() for call in calls)
    assert stop_server(server) == 0
    assert [len(call.result().predictions) for call in calls] == [200] * 4


def test_an_overloaded_server_says_when_to_try_again(samples: dict[str, list[bytes]]) -> None:
    server = start_server(MODELS, "--max-queue", "64", "--max-batch", "1", "--threads", "1")
    try:
        stub = SteeringServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
        request = pb.PredictRequest()
        for file in samples["Bag"] * 6:
            request.images.add(encoded=file)
        calls = [stub.Predict.future(request, timeout=60) for _ in range(5)]
        codes = [call.code().name for call in calls]
        assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
        refused = next(call for call in calls if call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert re.search(r"\d+ images wait already and 60 are given; allowed: 64 together", refused.details())
        trailers = dict(refused.trailing_metadata())
        assert int(trailers["grpc-retry-pushback-ms"]) > 0
        assert b"google.rpc.RetryInfo" in trailers["grpc-status-details-bin"]
        assert server.count("steervit_images_dropped_total", reason="queue_full") == 60 * codes.count(
            "RESOURCE_EXHAUSTED"
        )
    finally:
        assert stop_server(server) == 0


def test_a_single_bundle_folder_is_served_and_settings_come_from_the_environment(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, samples: dict[str, list[bytes]]
) -> None:
    monkeypatch.setenv("STEERVIT_MAX_IMAGES", "2")
    server = start_server(bundle.folder)
    try:
        with Client(server.address) as client:
            assert len(client.predict(samples["Bag"][:2]).predictions) == 2
            with pytest.raises(grpc.RpcError, match="images has 3 entries; allowed: 1 to 2"):
                client.predict(samples["Bag"][:3])
    finally:
        assert stop_server(server) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repository", "nowhere"], "repository is nowhere, which is not a folder"),
        (["--repository", "deploy/samples"], "allowed: a bundle, or folders <model>/<version>/ with bundles"),
        (["--repository", str(MODELS), "--provider", "cuda"], "provider 'cuda' was asked for but"),
        (["--repository", str(MODELS), "--port", "70000"], "--port is '70000'"),
        (["--repository", str(MODELS), "--log-level", "loud"], "loud"),
        ([], "--repository"),
    ],
)
def test_a_server_that_cannot_start_says_why(flags: list[str], message: str) -> None:
    done = run_module("service", "--metrics-port", "0", *([] if "--port" in flags else ["--port", "0"]), *flags)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_module("service", "--repository", str(MODELS), "--port", port, "--metrics-port", "0")
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_client_prints_tables(server: ServerProcess, bundle: Bundle) -> None:
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "deploy/samples/Shirt").glob("*.png"))[:3]]
    done = run_module("service.client", "predict", "--address", server.address, "--profile", "Shirt", *files)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["image", "class", "p", "then", "heads", "usage", "compute"]
    assert [line.split()[0] for line in lines[2:5]] == files
    assert "profile Shirt" in done.stdout
    done = run_module("service.client", "profiles", "--address", server.address)
    assert len(done.stdout.splitlines()) == len(bundle.profiles) + 2
    done = run_module("service.client", "predict", "--address", server.address, "--profile", "Shoe", *files)
    assert done.returncode == 1
    assert done.stderr.startswith("NOT_FOUND: steering.profile is 'Shoe'; allowed: 'Ankle boot'")
    done = run_module("service.client", "predict", "--address", server.address, "no-such-file.png")
    assert done.stderr == "no-such-file.png: No such file or directory\n"
