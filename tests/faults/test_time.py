"""Queues, deadlines, clients that disconnect, and clients that do not read: no other client waits for them."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.bundle import Bundle
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from tests.faults.conftest import Undisturbed
from tests.faults.listed import STEERING, fault
from tests.faults.protocols import UNLIMITED, V1, Protocol, both
from tests.photos import encoded
from tests.processes import MODELS, ROOT, ServerProcess, serving, until
from training.steering import SteeringTerm

BATCH = 32
FLAGS = ("--max-batch", str(BATCH), "--threads=1", "--max-images=300", "--max-queue=4096", "--max-message-mb=4")


@pytest.fixture(scope="module")
def slow() -> Iterator[ServerProcess]:
    """A server on one core: a call of 300 images takes about 0.3 s."""
    with serving(MODELS, *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def short() -> Iterator[ServerProcess]:
    """A server with a queue of 64 images that runs one at a time."""
    with serving(MODELS, "--max-queue", "64", "--max-batch", "1", "--threads", "1") as running:
        yield running


@pytest.fixture
def channel(slow: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(slow.address, UNLIMITED) as channel:
        yield channel
    until(lambda: waiting(slow) == 0)


@pytest.fixture(scope="module")
def many(sample_pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(sample_pixels, 3, 0)


def waiting(server: ServerProcess) -> float:
    return server.count("steervit_queue_images")


def dropped(server: ServerProcess, *reasons: str) -> float:
    return sum(server.count("steervit_images_dropped_total", reason=reason) for reason in reasons)


@both("time: deadline shorter than the queue", "DEADLINE_EXCEEDED; what still waited is not run")
def test_a_deadline_that_passes_in_the_queue_costs_no_inference(
    protocol: Protocol,
    slow: ServerProcess,
    channel: grpc.Channel,
    many: NDArray[np.uint8],
    bundle: Bundle,
    undisturbed: Undisturbed,
) -> None:
    before, call = dropped(slow, "deadline", "cancelled"), protocol.call(channel)

    def late() -> float:
        """Counted under either status: on a busy machine the client's deadline may pass before the server's."""
        codes = ("DEADLINE_EXCEEDED", "CANCELLED")
        return sum(slow.count("steervit_requests_total", code=code, method=protocol.path) for code in codes)

    counted = late()
    with undisturbed(slow):
        patient = [call.future(protocol.request(many), timeout=60) for _ in range(6)]
        until(lambda: waiting(slow) > 600)
        hasty = call.future(protocol.request(many), timeout=0.7)
        assert hasty.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: dropped(slow, "deadline", "cancelled") > before)
        until(lambda: late() == counted + 1)
        assert [len(protocol.read(each.result(), bundle).mask) for each in patient] == [300] * 6


@both("time: cancel in queue", "CANCELLED; what still waited is not run")
def test_a_call_that_is_cancelled_in_the_queue_costs_no_inference(
    protocol: Protocol,
    slow: ServerProcess,
    channel: grpc.Channel,
    many: NDArray[np.uint8],
    bundle: Bundle,
    undisturbed: Undisturbed,
) -> None:
    before, call = dropped(slow, "cancelled"), protocol.call(channel)
    with undisturbed(slow):
        patient = call.future(protocol.request(many), timeout=60)
        gone = [call.future(protocol.request(many), timeout=60) for _ in range(6)]
        until(lambda: waiting(slow) > 1000)
        for each in gone:
            each.cancel()
        until(lambda: waiting(slow) <= 300)
        assert dropped(slow, "cancelled") - before > 300
        assert len(protocol.read(patient.result(), bundle).mask) == 300
        with pytest.raises(grpc.FutureCancelledError):
            gone[0].result()


@both("time: cancel in flight", "CANCELLED; the batch is finished and its other images are answered")
def test_a_call_that_is_cancelled_in_flight_leaves_its_batch_to_the_others(
    protocol: Protocol,
    slow: ServerProcess,
    channel: grpc.Channel,
    many: NDArray[np.uint8],
    undisturbed: Undisturbed,
) -> None:
    call, path = protocol.call(channel), {"method": protocol.path}
    with undisturbed(slow) as other:
        before = slow.count("steervit_requests_total", code="CANCELLED", **path)
        for _ in range(30):
            each = call.future(protocol.request(many[:BATCH]), timeout=60)
            time.sleep(0.01)
            each.cancel()
        until(lambda: slow.count("steervit_requests_total", code="CANCELLED", **path) > before)
        other.check()


@both(
    "time: queue full",
    "RESOURCE_EXHAUSTED: `queue full: ... queued + 60 new > limit 64. Try again later`, RetryInfo, "
    "`grpc-retry-pushback-ms`; INVALID_ARGUMENT: `65 images ... exceed the queue limit of 64` to a "
    "call that never fits",
)
def test_a_full_queue_says_when_to_try_again(
    protocol: Protocol, short: ServerProcess, many: NDArray[np.uint8], undisturbed: Undisturbed
) -> None:
    before = dropped(short, "queue_full")
    with undisturbed(short, ("RESOURCE_EXHAUSTED",)), grpc.insecure_channel(short.address) as channel:
        call = protocol.call(channel)
        calls = [call.future(protocol.request(many[:60]), timeout=60) for _ in range(5)]
        codes = [each.code().name for each in calls]
        assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
        refused = next(each for each in calls if each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert refused.details().endswith("queued + 60 new > limit 64. Try again later")
        trailers = dict(refused.trailing_metadata())
        assert int(trailers["grpc-retry-pushback-ms"]) > 0
        assert b"google.rpc.RetryInfo" in trailers["grpc-status-details-bin"]
        assert dropped(short, "queue_full") - before >= 60 * codes.count("RESOURCE_EXHAUSTED")
        never = call.future(protocol.request(many[:65]), timeout=60)
        assert never.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert never.details().startswith("65 images at full budget (in Compare")


@fault("time: queue full", "the same of Compare, which runs each image twice", STEERING)
def test_images_that_are_run_twice_count_twice(
    short: ServerProcess, many: NDArray[np.uint8], undisturbed: Undisturbed
) -> None:
    with grpc.insecure_channel(short.address) as channel:
        compare = SteeringServiceStub(channel).Compare  # type: ignore[no-untyped-call]
        request = pb.CompareRequest(images=V1.request(many[:33]).images)
        with undisturbed(short):
            never = compare.future(request, timeout=60)
            assert never.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert never.details().startswith("66 images at full budget (in Compare each counts twice) exceed")
        del request.images[32]
        before = dropped(short, "queue_full")
        calls = [compare.future(request, timeout=60) for _ in range(5)]
        refused = [each.code().name for each in calls].count("RESOURCE_EXHAUSTED")
        assert refused > 0
        assert dropped(short, "queue_full") - before == 64 * refused


@fault(
    "time: priority inversion",
    "a call of one image waits for one batch of each large call before it at most, not for all of their images",
)
def test_large_calls_do_not_hold_up_small_ones(
    slow: ServerProcess, channel: grpc.Channel, many: NDArray[np.uint8], undisturbed: Undisturbed
) -> None:
    call, large = V1.call(channel), 4
    with undisturbed(slow):
        start = time.monotonic()
        calls = [call.future(V1.request(many), timeout=60) for _ in range(large)]
        until(lambda: waiting(slow) > 600)
        waits = []
        while waiting(slow) > 300:
            waits.append(call(V1.request(many[:1]), timeout=30).receipt.queue_seconds)
        assert [len(each.result().predictions) for each in calls] == [300] * large
        batch = (time.monotonic() - start) / (large * 300 / BATCH)
    assert len(waits) >= 3
    assert max(waits) < 3 * (large + 1) * batch, "a batch of each and the running one, thrice for a noisy machine"


@fault("time: priority inversion", "a call of one file waits for one image of each large call to be decoded at most")
def test_large_photographs_do_not_hold_up_small_files(
    slow: ServerProcess, channel: grpc.Channel, undisturbed: Undisturbed, samples: dict[str, list[bytes]]
) -> None:
    photograph = encoded(Image.new("RGB", (4000, 3000)), "JPEG")
    call, large, photographs = V1.call(channel), 4, 10
    with undisturbed(slow):
        start = time.monotonic()
        calls = [call.future(V1.request([photograph] * photographs), timeout=60) for _ in range(large)]
        waits = []
        while not any(each.done() for each in calls):
            asked = time.monotonic()
            call(V1.request(samples["Bag"][:1]), timeout=30)
            waits.append(time.monotonic() - asked)
        assert [len(each.result().predictions) for each in calls] == [photographs] * large
        one = (time.monotonic() - start) / (large * photographs)
    assert len(waits) >= 3
    assert max(waits) < 3 * (large + 1) * one, "one of each and the running ones, thrice for a noisy machine"


@fault(
    "time: priority inversion", "a call that is small waits for a piece of each large answer that is made, not for all"
)
def test_large_answers_do_not_hold_up_small_calls(slow: ServerProcess, many: NDArray[np.uint8]) -> None:
    """Small calls without images, which need only the event loop."""
    terms = {site: tuple(SteeringTerm(latent, 0.5) for latent in range(100)) for site in range(5)}
    plain = V1.request(many, terms=terms)
    request = pb.ExplainRequest(images=plain.images, steering=plain.steering, latents=100)
    with grpc.insecure_channel(slow.address, UNLIMITED) as channel, grpc.insecure_channel(slow.address) as other:
        explain = channel.unary_unary("/steering.v1.SteeringService/Explain", pb.ExplainRequest.SerializeToString)
        get = SteeringServiceStub(other).GetProfile  # type: ignore[no-untyped-call]
        start, waits = time.monotonic(), []
        large = explain.future(request, timeout=60)
        while not large.done():
            asked = time.monotonic()
            get(pb.GetProfileRequest(name="Bag"), timeout=30)
            waits.append(time.monotonic() - asked)
        seconds = time.monotonic() - start
    found = pb.ExplainResponse.FromString(large.result())
    assert found.ByteSize() > 4 * 2**20, "what a message may have at most limits requests only"
    assert [len(e.sites[0].latents) >= 100 for e in found.explanations] == [True] * 300
    assert found.receipt.model == "fashion_mnist"
    assert max(waits) < seconds / 10


def holding(server: ServerProcess, calls: int, images: int) -> "subprocess.Popen[str]":
    """A client process with calls in progress."""
    script = Path("tests") / "clients" / "holding.py"
    command = [sys.executable, str(script), server.address, str(calls), str(images)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert started.stdout is not None
    assert started.stdout.readline() == "sent\n"
    return started


@fault("time: client killed", "nothing; what still waited is not run")
def test_a_killed_client_leaves_no_work_behind(slow: ServerProcess, undisturbed: Undisturbed) -> None:
    before = dropped(slow, "cancelled")
    with undisturbed(slow):
        client = holding(slow, 6, 300)
        try:
            until(lambda: waiting(slow) > 1000)
        finally:
            client.kill()
            client.communicate()
        until(lambda: waiting(slow) < 100)
        assert dropped(slow, "cancelled") - before > 300


@fault("time: slow reader", "its answers, when it reads them")
def test_a_client_that_does_not_read_holds_up_nobody(slow: ServerProcess, undisturbed: Undisturbed) -> None:
    begun = slow.count("steervit_batch_size_images_sum")
    client = holding(slow, 8, 300)
    try:
        until(lambda: slow.count("steervit_batch_size_images_sum") - begun + waiting(slow) >= 2400)
        client.send_signal(signal.SIGSTOP)
        with undisturbed(slow) as other:
            until(lambda: waiting(slow) == 0, 60)
            other.check()
        client.send_signal(signal.SIGCONT)
        answered, _ = client.communicate(timeout=60)
        assert answered == "2400\n"
    finally:
        client.kill()
        client.communicate()
