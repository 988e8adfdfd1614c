"""The clients and the command line that users have, and what the server logs of their requests."""

import asyncio
import json
import re
import signal
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from processes import COMMITTED, MODELS, SAMPLES, ServerProcess, run_module, serving, start_server, stop_server, until
from refusals import refusal

from service.client import Asked, AsyncClient, Client, filled
from service.client.tables import dial_table, spread
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.pb.steering_pb2_grpc import SteeringServiceStub
from training.steering import SteeringTerm


def test_the_asyncio_client_gets_what_the_blocking_one_gets(
    server: ServerProcess, client: Client, sample_pixels: NDArray[np.uint8]
) -> None:
    images, terms = list(sample_pixels[:3]), {0: (SteeringTerm(7, 0.0, 2.5),)}

    async def ask() -> tuple[list[pb.PredictResponse], pb.CompareResponse, pb.ExplainResponse, list[str]]:
        async with AsyncClient(server.address) as other:
            answers = await asyncio.gather(
                other.predict(images, profile="Shirt", strength=0.5), other.predict(images, top_k=2, terms=terms)
            )
            compared = await other.compare(images, profile="Shirt")
            explained = await other.explain(images, latents=3, top_k=2, profile="Shirt")
            assert await other.models() == client.models()
            return answers, compared, explained, [profile.name async for profile in other.profiles()]

    (half, inline), compared, explained, names = asyncio.run(ask())
    for found, expected in (
        (half, client.predict(images, profile="Shirt", strength=0.5)),
        (inline, client.predict(images, top_k=2, terms=terms)),
    ):
        assert [p.classes[0].label for p in found.predictions] == [p.classes[0].label for p in expected.predictions]
        assert [p.head_mask for p in found.predictions] == [p.head_mask for p in expected.predictions]
        assert found.receipt.steering_digest == expected.receipt.steering_digest
    assert [len(p.classes) for p in inline.predictions] == [2, 2, 2]
    assert len(compared.comparisons) == len(explained.explanations) == 3
    assert explained.explanations[0] == client.explain(images, latents=3, top_k=2, profile="Shirt").explanations[0]
    assert len(explained.explanations[0].prediction.classes) == 2
    assert names == [profile.name for profile in client.profiles()]


def test_wrong_arguments_of_the_client_give_an_error_and_no_plausible_answer(
    client: Client, sample_pixels: NDArray[np.uint8]
) -> None:
    image = sample_pixels[0]
    for error, message, images, asked in (
        (TypeError, "profil is not an argument; allowed: profile, terms", [image], {"profil": "Shirt"}),
        (ValueError, r"images\[1\] is float32 \(28, 28, 1\)", [image, image.astype(np.float32)], {}),
        (ValueError, r"images\[0\] is uint8 \(784,\); allowed: uint8", [image.ravel()], {}),
        (TypeError, "images is a bytes; allowed: a list of images", b"\x89PNG", {}),
        (TypeError, r"images\[0\] is a PosixPath; allowed: bytes", [SAMPLES / "Shirt"], {}),
        (TypeError, "version is 6; allowed: str", [image], {"version": 6}),
        (TypeError, "budget is '0.5'; allowed: float", [image], {"budget": "0.5"}),
        (TypeError, "latent is 1.5; allowed: int", [image], {"terms": {0: [SteeringTerm(1.5)]}}),  # type: ignore[arg-type]
        (ValueError, "site is -1; allowed: a number that fits the field", [image], {"terms": {-1: [SteeringTerm(1)]}}),
        (ValueError, r"profile is '\\udcff'; allowed: Unicode text", [image], {"profile": "\udcff"}),
        (ValueError, "top_k is 4294967296; allowed: a number that fits the field", [image], {"top_k": 2**32}),
        (TypeError, r"units are '2/h5'; allowed: a list, such as \['2/h5'\]", [image], {"open": "2/h5"}),
        (ValueError, "request_id is 'caf\xe9'; allowed: printable ASCII", [image], {"request_id": "caf\xe9"}),
        (grpc.RpcError, r"images\[0\].shape is \[1, 28, 28\]; allowed: \[28, 28, 1\]", [image.transpose(2, 0, 1)], {}),
    ):
        with pytest.raises(error, match=message):
            client.predict(images, **asked)  # type: ignore[arg-type, call-arg]
    with pytest.raises(TypeError, match="version is 6; allowed: str"):
        client.model(version=6)  # type: ignore[arg-type]
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=r"name is 'a\\nb'; allowed: printable ASCII"):
            kind(name="a\nb")


def test_an_option_that_is_none_is_as_good_as_none_at_all(client: Client, sample_pixels: NDArray[np.uint8]) -> None:
    images = [sample_pixels[0]]
    none: Asked = dict.fromkeys(Asked.__annotations__)  # type: ignore[assignment]
    assert filled(pb.PredictRequest(), images, none) == filled(pb.PredictRequest(), images, {})
    answers = client.predict(images, **none), client.predict(images)
    assert answers[0].predictions == answers[1].predictions
    assert answers[0].receipt.steering_digest == answers[1].receipt.steering_digest


def test_terms_are_applied_only_by_the_model_that_they_were_made_for(
    server: ServerProcess, client: Client, samples: dict[str, list[bytes]]
) -> None:
    found = client.profile("Shirt")
    terms: dict[int, tuple[SteeringTerm, ...]] = {}
    for term in found.terms:
        terms[term.site] = (*terms.get(term.site, ()), SteeringTerm(term.latent, term.scale, term.shift))
    images = samples["Shirt"][:2]
    answer = client.predict(images, terms=terms, gates_sae_digest=found.gates_sae_digest)
    assert answer.receipt.steering_digest == client.predict(images, profile="Shirt").receipt.steering_digest
    with pytest.raises(grpc.RpcError, match="gates_sae_digest is '0123'") as caught:
        client.predict(images, terms=terms, gates_sae_digest="0123")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    async def ask() -> pb.GetProfileResponse:
        async with AsyncClient(server.address) as other:
            with pytest.raises(grpc.RpcError, match="gates_sae_digest is '0123'"):
                await other.compare(images, terms=terms, gates_sae_digest="0123")
            return await other.profile("Shirt")

    assert asyncio.run(ask()) == found


def test_each_call_may_have_its_own_timeout_and_name(samples: dict[str, list[bytes]]) -> None:
    """A batch waits a second for more images."""
    server = start_server(MODELS, "--max-delay-ms", "1000", "--log-format", "json", "--log-level", "debug")
    with Client(server.address) as client:
        assert refusal(client.predict, samples["Bag"][:1], timeout=0.2)[0] == "DEADLINE_EXCEEDED"
        client.predict(samples["Bag"][:1], request_id="order-66")
    image = str(next((SAMPLES / "Bag").glob("*.png")))
    done = run_module("service.client", "predict", "--address", server.address, "--timeout", "0.2", image)
    assert (done.returncode, done.stderr[:17]) == (1, "DEADLINE_EXCEEDED")
    said = [json.loads(line) for line in stop_server(server).splitlines()]
    (named,) = (line for line in said if line.get("request_id") == "order-66")
    assert named["code"] == "OK"


@pytest.mark.parametrize("padding", [0, 10_000], ids=["small requests", "requests over 256 KiB"])
def test_a_client_waits_as_long_as_a_full_server_says_and_tries_again(
    samples: dict[str, list[bytes]], padding: int
) -> None:
    """The queue takes 64 images, so of two calls with 60 one is refused at first. padding: bytes after each image."""
    images = [file + bytes(padding) for file in samples["Bag"] * 6]
    with serving(MODELS, "--max-queue", "64", "--max-batch", "1", "--threads", "1") as server:

        async def both(attempts: int) -> list[object]:
            async with AsyncClient(server.address, attempts=attempts) as client:
                calls = (client.predict(images) for _ in range(2))
                return await asyncio.gather(*calls, return_exceptions=True)

        once = asyncio.run(both(1))
        refused = [error.code() for error in once if isinstance(error, grpc.RpcError)]
        assert refused
        assert set(refused) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        answered = asyncio.run(both(5))
        assert all(isinstance(answer, pb.PredictResponse) for answer in answered), answered


@pytest.mark.parametrize("how", [["--concurrency", "4"], ["--rate", "50"]], ids=["concurrency", "rate"])
def test_a_load_from_the_command_line_reports_what_the_server_counted(how: list[str]) -> None:
    with serving(MODELS) as server:
        files = [str(path) for path in sorted((SAMPLES / "Shirt").glob("*.png"))]
        profiles = ["--profile", "Shirt", "--profile", "Coat", "--profile", ""]
        flags = ["--seconds", "2", "--images-per-call", "2", *profiles, "--json", *how]
        done = run_module("service.client", "load", "--address", server.address, *flags, *files)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["errors"] == {}
        assert report["images"] == 2 * report["calls"]
        assert 0 < report["p50_ms"] <= report["p90_ms"] <= report["p99_ms"]
        for profile in ("Shirt", "Coat", "none"):  # one more call: the first one, which is not timed
            counted = server.count("steervit_images_total", profile=profile)
            assert report["images"] / 3 - 2 <= counted <= report["images"] / 3 + 4
        if how[0] == "--rate":
            assert report["calls"] == 100


TIMES = ("duration_ms", "decode_ms", "queue_ms", "inference_ms")


def test_the_access_log_tells_who_asked_for_what_and_how_it_ended(samples: dict[str, list[bytes]]) -> None:
    server = start_server(MODELS, "--log-format", "json", "--access-log", "1")
    with grpc.insecure_channel(server.address) as channel:
        stub = SteeringServiceStub(channel)  # type: ignore[no-untyped-call]
        good, bad = (pb.PredictRequest(images=[pb.Image(encoded=file)]) for file in (samples["Bag"][0], b"no image"))
        good.steering.profile, bad.model = "Bag", "fashion_mnist"
        named = (
            ("x-request-id", "order-66"), ("authorization", "Bearer secret"), ("x-client-name", "till-7"),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        )  # fmt: skip
        answer, call = stub.Predict.with_call(good, metadata=named)
        assert dict(call.trailing_metadata())["x-request-id"] == "order-66"
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(bad, metadata=(("x-request-id", "x" * 200), ("traceparent", f"00-{'0' * 32}-{'1' * 16}-01")))
        with pytest.raises(grpc.RpcError):
            stub.Predict(pb.PredictRequest(model="none"))
        open_inference = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        assert open_inference.ServerReady(oi.ServerReadyRequest()).ready
        HealthStub(channel).Check(HealthCheckRequest())
    errors = stop_server(server)
    lines = [json.loads(line) for line in errors.splitlines()]
    first, second, third = (line for line in lines if line["name"] == "steervit.requests")
    measured = {key: first.pop(key) for key in (*TIMES, "peer", "asctime")}
    assert first == {
        "name": "steervit.requests", "levelname": "INFO", "message": "",
        "method": "/steering.v1.SteeringService/Predict", "code": "OK", "model": "fashion_mnist",
        "version": COMMITTED.name,
        "profile": "Bag", "images": 1, "request_bytes": good.ByteSize(), "response_bytes": answer.ByteSize(),
        "client": "till-7", "request_id": "order-66", "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }  # fmt: skip
    assert measured["queue_ms"] == pytest.approx(1000 * answer.receipt.queue_seconds, abs=1e-3)
    assert measured["inference_ms"] == pytest.approx(1000 * answer.receipt.inference_seconds, abs=1e-3)
    assert measured["duration_ms"] > sum(measured[name] for name in TIMES[1:]) > measured["inference_ms"] > 0
    assert re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", measured["peer"])
    assert (second["code"], second["model"], third["code"]) == ("INVALID_ARGUMENT", "fashion_mnist", "NOT_FOUND")
    assert not {"client", "trace_id", "queue_ms"} & second.keys()
    assert "model" not in third
    assert len(second["request_id"]) == 16
    assert dict(caught.value.trailing_metadata())["x-request-id"] == second["request_id"]
    assert "secret" not in errors
    assert any("grpc on port" in line["message"] for line in lines)


def test_calls_are_accepted_until_clients_know_that_the_server_stops(samples: dict[str, list[bytes]]) -> None:
    """The client follows the health service and would switch to another server; a bare channel keeps calling."""
    server = start_server(MODELS, "--drain-delay-seconds", "3")
    with Client(server.address, attempts=1) as client, grpc.insecure_channel(server.address) as channel:
        client.predict(samples["Bag"])
        stub = SteeringServiceStub(channel)  # type: ignore[no-untyped-call]
        asked = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "503" in _status(server))
        assert len(stub.Predict(pb.PredictRequest(images=[pb.Image(encoded=samples["Bag"][0])])).predictions) == 1
        with pytest.raises(grpc.RpcError, match="backend unhealthy"):
            client.predict(samples["Bag"])
        server.process.communicate(timeout=60)
        assert server.process.returncode == 0
        assert time.monotonic() - asked > 3


MORTAL = """
import ctypes, signal, sys, threading
from service.__main__ import main
def end(*_):
    for thread in threading.enumerate():
        if thread.name.startswith("batcher-"):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
signal.signal(signal.SIGUSR2, end)
sys.exit(main(sys.argv[1:]))
"""
"""The server, with inference threads that end at SIGUSR2, when they next have work."""


def test_clients_hear_that_an_inference_thread_is_gone(samples: dict[str, list[bytes]]) -> None:
    server = start_server(MODELS, program=("-c", MORTAL))
    try:
        with Client(server.address, timeout=1, attempts=1) as client, grpc.insecure_channel(server.address) as channel:
            health, ready = HealthStub(channel), GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            assert health.Check(HealthCheckRequest()).status == HealthCheckResponse.SERVING
            server.process.send_signal(signal.SIGUSR2)
            with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
                client.predict(samples["Bag"])
            until(lambda: health.Check(HealthCheckRequest()).status == HealthCheckResponse.NOT_SERVING)
            assert not ready.ServerReady(oi.ServerReadyRequest()).ready
            assert not ready.ModelReady(oi.ModelReadyRequest(name="fashion_mnist")).ready
            assert "503" in _status(server)
    finally:
        server.process.kill()
        server.process.communicate()


def _status(server: ServerProcess) -> str:
    try:
        return server.page("readyz")
    except OSError as error:  # urllib raises for 503
        return str(error)


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=100).map(sorted), most=st.integers(2, 30))
def test_points_that_stand_for_a_curve_are_nearest_to_even_steps(values: list[float], most: int) -> None:
    chosen = spread(values, most)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= most
    assert len(values) > most or len(chosen) == len(values)
    distances = np.abs(np.array(values) - np.linspace(values[0], values[-1], most)[:, None])
    assert (distances[:, chosen].min(1) == distances.min(1)).all()


def test_the_table_of_a_long_curve_says_what_it_leaves_out() -> None:
    curve = [
        pb.DialPoint(position=c, compute_fraction=c, accuracy=0.9, measured_accuracy=0.9)
        for c in np.linspace(0.5, 1, 101)
    ]
    of_all, of_some = dial_table(curve[:9]).splitlines(), dial_table(curve).splitlines()
    assert len(of_all) == 2 + 9
    assert of_some[-1] == "15 of 101 points; --json has all"
    assert [line.split()[0] for line in of_some[2:-1]][::7] == ["0.500", "0.750", "1.000"]
