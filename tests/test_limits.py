"""Limits by client: by hand, whatever comes, and with real clients of a real server in both protocols."""

import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from processes import MODELS, SAMPLES, SMALL, ServerProcess, run_main, run_module, serving, until
from prometheus_client import CollectorRegistry

from service.client import Client
from service.client.__main__ import main as client_main
from service.errors import InvalidRequest, ModelNotAllowed, OverLimit
from service.limits import Admission, ClientLimits, LimitsError
from service.metrics import Metrics
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb
from tests.faults.listed import fault
from tests.faults.protocols import Protocol, both

PREDICT, COMPARE = "/steering.v1.SteeringService/Predict", "/steering.v1.SteeringService/Compare"
INFER = "/inference.GRPCInferenceService/ModelInfer"
BAG = next((SAMPLES / "Bag").glob("*.png"))
Json = dict[str, Any]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Arrival:
    """What gRPC knows of a call: the metadata of its client and its certificate."""

    def __init__(self, name: str = "", certificate: str = ""):
        self._name, self._certificate = name, certificate

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-client-name", self._name),) if self._name else ()

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_common_name": [self._certificate.encode()]} if self._certificate else {}


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limits(folder: Path, content: Json | str, clock: Clock | None = None) -> ClientLimits:
    path = folder / "limits.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ClientLimits(path, Metrics(CollectorRegistry(), 1), clock or Clock())


def entered(of: ClientLimits, arrival: Arrival) -> Admission:
    admission = of.arrived(arrival)
    admission.enter(True)
    return admission


def sent(of: ClientLimits, arrival: Arrival, images: int) -> Admission:
    admission = entered(of, arrival)
    admission.take(images)
    return admission


def test_a_bucket_by_hand(tmp_path: Path, clock: Clock) -> None:
    """10 images a second, 20 at once."""
    shop, of = Arrival("shop"), limits(tmp_path, {"clients": {"shop": {"images_per_second": 10, "burst": 20}}}, clock)
    for images in (15, 5):
        sent(of, shop, images).leave()
    with pytest.raises(OverLimit, match=r"client 'shop': over the limit of 10 images a second \(burst 20\)") as caught:
        sent(of, shop, 1)
    assert caught.value.retry_after_seconds == pytest.approx(0.5), "of as many images as its last call"
    clock.now = 0.4
    with pytest.raises(OverLimit) as caught:
        sent(of, shop, 6)
    assert caught.value.retry_after_seconds == pytest.approx(0.2), "4 are free, of 6"
    sent(of, shop, 4).leave()
    clock.now = 100
    sent(of, shop, 50).leave()  # of a full bucket, and 30 that are to come
    clock.now = 102.9
    with pytest.raises(OverLimit, match=r"Try again in 2\.1 s"):
        sent(of, shop, 50)
    clock.now = 105
    sent(of, shop, 50)


@given(
    rate=st.floats(0.5, 100),
    burst=st.integers(1, 50),
    calls=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 80)), min_size=1, max_size=60),
)
def test_nobody_sends_more_than_its_rate_and_two_waits_as_told_suffice(
    rate: float, burst: int, calls: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    clock, total = Clock(), 0
    of = limits(tmp_path_factory.getbasetemp(), {"default": {"images_per_second": rate, "burst": burst}}, clock)
    for pause, images in calls:
        clock.now += pause
        for _ in range(3):  # before a message is read, it is taken to have as many images as the last one
            try:
                sent(of, Arrival(), images).leave()
                break
            except OverLimit as error:
                clock.now += error.retry_after_seconds + 1e-6
        else:
            pytest.fail("refused though it waited as it was told")
        total += images
        assert total <= rate * clock.now + max(burst, *(images for _, images in calls)) + 1e-3


def test_calls_and_images_in_flight_by_hand(tmp_path: Path) -> None:
    of = limits(tmp_path, {"clients": {"shop": {"images_in_flight": 8, "calls_in_flight": 2}}})
    shop = Arrival("shop")
    first, second = sent(of, shop, 3), sent(of, shop, 5)
    with pytest.raises(OverLimit, match=r"client 'shop': 2 calls in flight \+ 1 new > limit 2\. Try again in 0\.1 s"):
        entered(of, shop)
    first.leave()
    third = entered(of, shop)
    with pytest.raises(OverLimit, match=r"5 images in flight \+ 4 new > limit 8"):
        third.take(4)
    third.take(3)
    second.leave()
    third.leave()
    with pytest.raises(InvalidRequest, match=r"^9 images .* exceed the limit of 8 images in flight of client 'shop'"):
        sent(of, shop, 9)


def test_who_shares_a_limit_with_whom(tmp_path: Path) -> None:
    """Anybody can make up names, but not certificates."""
    of = limits(
        tmp_path,
        {
            "clients": {"shop": {}, "anonymous": {"models": []}},
            "default": {"calls_in_flight": 1},
            "gateways": ["envoy"],
        },
    )
    for _ in range(3):
        entered(of, Arrival("shop"))
        entered(of, Arrival("", "shop"))
        entered(of, Arrival("shop", "envoy"))
    entered(of, Arrival("made up"))
    with pytest.raises(OverLimit, match="clients without limits of their own, such as 'made up too': 1 calls"):
        entered(of, Arrival("made up too"))
    entered(of, Arrival("shop", "till"))
    with pytest.raises(OverLimit, match="client 'till': 1 calls in flight"):
        entered(of, Arrival("shop", "till"))  # its name is that of its certificate, whatever it says
    entered(of, Arrival("till-7", "envoy"))
    with pytest.raises(OverLimit, match="client 'till-7'"):
        entered(of, Arrival("till-7", "envoy"))
    with pytest.raises(ModelNotAllowed, match="model is 'small', which client 'anonymous' may not call; allowed: none"):
        entered(of, Arrival()).permit("small")


def test_a_client_with_calls_in_flight_is_never_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond MOST_CERTIFICATES only idle clients are dropped: others would have their limits anew."""
    monkeypatch.setattr("service.limits.MOST_CERTIFICATES", 2)
    of = limits(tmp_path, {"default": {"calls_in_flight": 1}})
    entered(of, Arrival("", "busy"))
    for name in ("one", "two", "three"):
        entered(of, Arrival("", name)).leave()
    with pytest.raises(OverLimit, match="client 'busy': 1 calls in flight"):
        entered(of, Arrival("", "busy"))
    assert of._clients.keys() == {"busy", "three"}


async def test_new_limits_apply_and_a_wrong_file_changes_nothing(tmp_path: Path, clock: Clock) -> None:
    of, shop = limits(tmp_path, {"clients": {"shop": {"calls_in_flight": 1}}}, clock), Arrival("shop")
    call = entered(of, shop)
    for content, problem in (
        ("{", "limits.json: Expecting property name"),
        ('{"clients": {"shop": {"calls_in_flight": 0}}}', "clients.shop.calls_in_flight is 0; allowed: 1 or more"),
    ):
        (tmp_path / "limits.json").write_text(content)
        await of.refresh()
        assert problem in of.problem
        with pytest.raises(OverLimit, match="1 calls in flight"):
            entered(of, shop)
    (tmp_path / "limits.json").write_text('{"clients": {"shop": {"calls_in_flight": 2}}}')
    await of.refresh()
    assert not of.problem
    entered(of, shop)
    with pytest.raises(OverLimit, match="2 calls in flight"):  # those from before count
        entered(of, shop)
    call.leave()
    entered(of, shop)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the content is []; allowed: a JSON object"),
        ('{"client": {}}', "client is {}; allowed: no such field"),
        ('{"clients": {"shop": {"rate": 3}}}', "clients.shop.rate is 3; allowed: no such field"),
        ('{"default": {"images_per_second": 0}}', "default.images_per_second is 0; allowed: 0.001 or more"),
        ('{"default": {"images_per_second": "9"}}', "default.images_per_second is '9'; allowed: a valid number"),
        ('{"default": {"images_in_flight": 1.5}}', "default.images_in_flight is 1.5; allowed: a valid integer"),
        ('{"clients": {"shop": {"burst": 3}}}', "clients.shop: burst is 3 without images_per_second; allowed: with it"),
        ('{"default": {"models": "small"}}', "default.models is 'small'; allowed: a JSON array"),
        ('{"clients": {"other": {}}}', "clients: a client is named 'other'; allowed: any other name"),
        ('{"clients": {"": {}}}', "a key of clients is ''; allowed: ^[ -~]{1,128}$"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_reason(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LimitsError) as caught:
        limits(tmp_path, content)
    assert message in str(caught.value)


def test_a_server_does_not_start_without_its_limits(tmp_path: Path) -> None:
    done = run_module("service", "--repository", str(SMALL), "--client-limits", str(tmp_path / "none.json"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"LimitsError: {tmp_path / 'none.json'}: No such file or directory"


LIMITS = {
    "clients": {
        "slow": {"images_per_second": 2, "burst": 4},
        "narrow": {"images_in_flight": 3},
        "steady": {"images_per_second": 10},
        "elsewhere": {"models": ["another"]},
        "free": {},
    },
    "default": {"images_per_second": 1000, "models": []},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "limits.json").write_text(json.dumps(LIMITS))
    return folder


@pytest.fixture(scope="module")
def limited(folder: Path) -> Iterator[ServerProcess]:
    """It waits half a second for images to fill a batch. The one who reads its log: the last test."""
    flags = ("--client-limits", str(folder / "limits.json"), "--poll-seconds", "0.1", "--max-delay-ms", "500")
    with serving(SMALL, *flags) as running:
        yield running


def request(path: str, images: int, shape: tuple[int, ...] = (16, 16, 3)) -> bytes:
    pixels = np.zeros((images, *shape), np.uint8)
    if path == INFER:
        message = oi.ModelInferRequest(model_name="small", raw_input_contents=[pixels.tobytes()])
        message.inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
        return message.SerializeToString()
    kind = pb.CompareRequest if path == COMPARE else pb.PredictRequest
    return kind(images=[pb.Image(pixels=image.tobytes()) for image in pixels]).SerializeToString()


def ask(channel: grpc.Channel, path: str, images: int, name: str = "") -> Any:
    metadata = (("x-client-name", name),) if name else ()
    return channel.unary_unary(path).future(request(path, images), timeout=30, metadata=metadata)


@both(
    "client: over a limit of its own",
    "RESOURCE_EXHAUSTED: `client 'slow': over the limit of 2 images a second (burst 4). Try again in 1.9 s`, `client "
    "'narrow': 2 images in flight + 2 new > limit 3. ...`, RetryInfo, `grpc-retry-pushback-ms`",
)
def test_refusals_say_whose_limit_it_is_and_when_to_try_again(protocol: Protocol, limited: ServerProcess) -> None:
    path = protocol.path
    with grpc.insecure_channel(limited.address, [("grpc.enable_retries", 0)]) as channel:
        assert ask(channel, path, 5, "free").code() is grpc.StatusCode.OK
        until(lambda: ask(channel, path, 4, "slow").code() is grpc.StatusCode.OK, 10)
        over = ask(channel, path, 4, "slow")
        assert over.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert over.details().startswith("client 'slow': over the limit of 2 images a second (burst 4). Try again in ")
        trailers = dict(over.trailing_metadata())
        assert 500 < int(trailers["grpc-retry-pushback-ms"]) <= 2000
        assert b"google.rpc.RetryInfo" in trailers["grpc-status-details-bin"]
        first = ask(channel, path, 2, "narrow")
        until(lambda: limited.count("steervit_queue_images") == 2)
        second = ask(channel, path, 2, "narrow")
        assert second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert second.details().startswith("client 'narrow': 2 images in flight + 2 new > limit 3. Try again in ")
        assert first.code() is grpc.StatusCode.OK


@both(
    "client: a model that it may not call",
    "PERMISSION_DENIED: `model is 'small', which client 'elsewhere' may not call; allowed: 'another'`",
)
def test_a_model_is_closed_to_who_may_not_call_it(protocol: Protocol, limited: ServerProcess) -> None:
    path = protocol.path
    with grpc.insecure_channel(limited.address) as channel:
        for name, who in (("elsewhere", "'elsewhere'"), ("", "'anonymous'")):
            denied = ask(channel, path, 1, name)
            assert denied.code() is grpc.StatusCode.PERMISSION_DENIED
            assert f"{who} may not call; allowed: " in denied.details()


def test_the_command_line_says_who_it_is(limited: ServerProcess) -> None:
    for name, code, output in (("free", 0, ""), ("elsewhere", 1, "PERMISSION_DENIED: model is 'small', which client")):
        done = run_main(client_main, "predict", str(BAG), "--address", limited.address, "--client-name", name)
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith(output)


def test_the_retries_of_grpc_wait_as_they_are_told(limited: ServerProcess) -> None:
    """Three times what may be sent at once is all answered, in 2 s, to a client that does nothing for it."""
    start = time.monotonic()
    with Client(limited.address, name="steady") as client:
        for _ in range(3):
            client.predict([np.zeros((16, 16, 3), np.uint8)] * 10)
    assert 1.9 < time.monotonic() - start < 10


def test_compare_counts_its_images_twice(limited: ServerProcess) -> None:
    with grpc.insecure_channel(limited.address) as channel:
        never = ask(channel, COMPARE, 2, "narrow")
        assert never.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert never.details().startswith("4 images (in Compare each counts twice) exceed the limit of 3 images")
        assert ask(channel, COMPARE, 1, "narrow").code() is grpc.StatusCode.OK


def test_everything_about_a_model_is_closed_to_who_may_not_call_it(limited: ServerProcess) -> None:
    messages = {
        "/steering.v1.SteeringService/GetModel": pb.GetModelRequest(model="small"),
        "/steering.v1.SteeringService/ListProfiles": pb.ListProfilesRequest(),
        "/inference.GRPCInferenceService/ModelMetadata": oi.ModelMetadataRequest(name="small"),
    }
    with grpc.insecure_channel(limited.address) as channel:
        for path, message in messages.items():
            for name, code in (("elsewhere", "PERMISSION_DENIED"), ("free", "OK")):
                call = channel.unary_unary(path).future(
                    message.SerializeToString(), timeout=10, metadata=(("x-client-name", name),)
                )
                assert call.code().name == code
        ready = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")
        answer = ready(oi.ModelReadyRequest(name="small").SerializeToString(), timeout=10)
        assert oi.ModelReadyResponse.FromString(answer).ready, "probes have no limits"


def test_series_are_those_of_the_file_and_refusals_cost_no_error_budget(limited: ServerProcess) -> None:
    def refused(client: str, outcome: str) -> float:
        return limited.count("steervit_client_requests_total", client=client, outcome=outcome)

    with grpc.insecure_channel(limited.address, [("grpc.enable_retries", 0)]) as channel:
        before = refused("slow", "rate"), refused("other", "model"), limited.count("steervit_requests_total")
        while ask(channel, PREDICT, 4, "slow").code() is grpc.StatusCode.OK:
            pass
        for name in ("made up", "", "x" * 500):
            ask(channel, PREDICT, 1, name).code()
    assert refused("slow", "rate") - before[0] == 1
    assert refused("other", "model") - before[1] == 3
    assert limited.count("steervit_requests_total", code="RESOURCE_EXHAUSTED") == 0
    assert limited.count("steervit_requests_total", code="PERMISSION_DENIED") >= 3
    labels = {line.split('"')[1] for line in limited.page().splitlines() if line.startswith("steervit_client_images_")}
    assert labels == {*LIMITS["clients"], "other"}
    assert limited.count("steervit_client_images_total", client="free") > 0


@fault(
    "client: limits that are wrong",
    "the limits from before; `/readyz` and the log name the field, a server does not start with them",
)
def test_a_changed_file_applies_and_a_wrong_one_is_visible(limited: ServerProcess, folder: Path) -> None:
    right = "steervit_client_limits_last_read_successful"
    with grpc.insecure_channel(limited.address) as channel:
        (folder / "limits.json").write_text('{"clients": {"elsewhere": {"models": 3}}}')
        until(lambda: limited.count(right) == 0)
        assert "limits of clients are unchanged" in limited.page("readyz")
        assert "clients.elsewhere.models is 3; allowed: a JSON array" in limited.page("readyz")
        assert ask(channel, PREDICT, 1, "elsewhere").code() is grpc.StatusCode.PERMISSION_DENIED
        (folder / "limits.json").write_text(json.dumps({**LIMITS, "clients": {"elsewhere": {"models": ["small"]}}}))
        until(lambda: limited.count(right) == 1)
        assert limited.page("readyz") == "OK\n"
        assert ask(channel, PREDICT, 1, "elsewhere").code() is grpc.StatusCode.OK


def test_a_certificate_says_who_a_client_is(tmp_path: Path) -> None:
    """A client with one cannot take another's name; the gateway may say for whom it calls."""
    ca, clients = trustme.CA(), trustme.CA()
    own = ca.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(str(tmp_path / "key"))
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "chain"))
    clients.cert_pem.write_to_path(str(tmp_path / "clients"))
    content = {"clients": {"shop": {}}, "default": {"models": []}, "gateways": ["envoy"]}
    (tmp_path / "limits.json").write_text(json.dumps(content))
    flags = {"tls-certificate": "chain", "tls-key": "key", "tls-client-ca": "clients", "client-limits": "limits.json"}
    with ExitStack() as stack:
        running = stack.enter_context(serving(SMALL, *(f"--{flag}={tmp_path / name}" for flag, name in flags.items())))
        for certificate, name, code in (
            ("shop", "", "OK"), ("till", "shop", "PERMISSION_DENIED"), ("envoy", "shop", "OK"),
            ("envoy", "till", "PERMISSION_DENIED"),
        ):  # fmt: skip
            mine = clients.issue_cert(common_name=certificate)
            credentials = grpc.ssl_channel_credentials(
                ca.cert_pem.bytes(), mine.private_key_pem.bytes(), mine.cert_chain_pems[0].bytes()
            )
            channel = stack.enter_context(grpc.secure_channel(running.address, credentials))
            assert ask(channel, PREDICT, 1, name).code().name == code, (certificate, name)


class Noisy:
    """A client that keeps 8 calls of 32 images in flight and does not wait as it is told."""

    def __init__(self, address: str):
        self._address, self._done, self.codes = address, threading.Event(), list[str]()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with grpc.insecure_channel(self._address, [("grpc.enable_retries", 0)]) as channel:
            message, call = request(PREDICT, 32, (28, 28)), channel.unary_unary(PREDICT)
            calls = []
            while not self._done.is_set():
                self.codes += [each.code().name for each in calls if each.done()]
                calls = [each for each in calls if not each.done()]
                calls += [
                    call.future(message, timeout=30, metadata=(("x-client-name", "noisy"),))
                    for _ in range(8 - len(calls))
                ]
                time.sleep(0.005)

    def __enter__(self) -> "Noisy":
        self._thread.start()
        until(lambda: len(self.codes) > 8)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def polite(address: str) -> tuple[list[str], list[float], list[float]]:
    """40 images, one at a time, no retries. Returns statuses, and seconds of answered calls: in all, in the queue."""
    codes, seconds, queued = [], [], []
    with grpc.insecure_channel(address, [("grpc.enable_retries", 0)]) as channel:
        call, message = channel.unary_unary(PREDICT), request(PREDICT, 1, (28, 28))
        for _ in range(40):
            start = time.perf_counter()
            asked = call.future(message, timeout=30, metadata=(("x-client-name", "polite"),))
            codes.append(asked.code().name)
            if codes[-1] == "OK":
                seconds.append(time.perf_counter() - start)
                queued.append(pb.PredictResponse.FromString(asked.result()).receipt.queue_seconds)
            time.sleep(0.01)
    return codes, seconds, queued


@fault("client: a noisy neighbour", "with a limit for that one, answers as soon as without it")
def test_a_noisy_neighbour_starves_nobody(tmp_path: Path) -> None:
    """Without limits, calls beside it are refused or wait; with one for it, all are answered as if it was not there."""
    (tmp_path / "limits.json").write_text('{"clients": {"noisy": {"images_per_second": 64, "images_in_flight": 32}}}')
    small_queue = ("--max-batch", "4", "--threads", "1", "--instances", "1", "--max-queue", "128")
    with serving(MODELS, *small_queue) as running, Noisy(running.address):
        codes, _, starved = polite(running.address)
    assert "RESOURCE_EXHAUSTED" in codes or statistics.median(starved) > 0.01
    with serving(MODELS, *small_queue, "--client-limits", str(tmp_path / "limits.json")) as running:
        _, alone, _ = polite(running.address)
        start = time.monotonic()
        with Noisy(running.address) as noisy:
            codes, beside, queued = polite(running.address)
        seconds = time.monotonic() - start
    assert codes == ["OK"] * 40
    assert statistics.median(beside) < 3 * statistics.median(alone) + 0.01
    assert statistics.median(queued) < statistics.median(starved) / 5
    assert set(noisy.codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert 32 * noisy.codes.count("OK") <= 64 * seconds + 64, "its share"
