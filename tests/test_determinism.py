"""The same request gives the same answer: again, after a restart, under load, and in any batch.

Equal to the bit in the same batch; in another batch within the manifest's tolerance, since sums may be made in another
order. Only gates so near their threshold that this decides them may flip: those are counted and reported.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from live import INFER
from masks import unit_mask
from numpy.typing import NDArray
from processes import MODELS, ServerProcess, serving

from export.bundle import Bundle
from service.client import Client
from service.engine import NEAR_THRESHOLD, Engine, Outputs
from service.pb import open_inference_pb2 as oi
from service.steering import Steering, resolve, stack
from training.steering import NEUTRAL

LABELS = ("Shirt", "Coat", "Bag")


def infer(images: NDArray[np.uint8], profile: str) -> oi.ModelInferRequest:
    request = oi.ModelInferRequest(model_name="fashion_mnist")
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    request.raw_input_contents.append(images.tobytes())
    request.parameters["profile"].string_param = profile
    return request


def raw(address: str, requests: list[oi.ModelInferRequest]) -> list[list[bytes]]:
    """The raw outputs of each request."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(INFER, oi.ModelInferRequest.SerializeToString, oi.ModelInferResponse.FromString)
        return [list(call(request, timeout=30).raw_output_contents) for request in requests]


def test_the_same_request_gets_the_same_answer_again_and_from_another_process(
    server: ServerProcess, sample_pixels: NDArray[np.uint8]
) -> None:
    requests = [infer(sample_pixels[:count], profile) for count in (1, 5, 64) for profile in ("", "Shirt")]
    with serving(MODELS) as other:
        answers = [raw(address, requests) for address in (server.address, other.address) for _ in range(4)]
    assert all(answer == answers[0] for answer in answers)


def test_answers_under_load_are_those_of_the_same_requests_alone(
    server: ServerProcess, bundle: Bundle, sample_pixels: NDArray[np.uint8]
) -> None:
    tolerance = bundle.manifest.graphs[0].certificate["logit_tolerance"]
    requests = [infer(sample_pixels[start : start + 3], label) for start in range(0, 90, 10) for label in LABELS]
    alone = raw(server.address, requests)
    done, found = threading.Event(), []

    def others() -> None:
        with Client(server.address) as client:
            while not done.is_set():
                client.predict(list(sample_pixels[::9]), profile="Sandal")

    load = [threading.Thread(target=others) for _ in range(3)]
    for thread in load:
        thread.start()
    try:
        found = raw(server.address, requests)
    finally:
        done.set()
        for thread in load:
            thread.join()
    for one, other in zip(alone, found, strict=True):
        logits, margins = ([np.frombuffer(answer[output], "<f4") for answer in (one, other)] for output in (0, 2))
        far = np.abs(margins[0]) > NEAR_THRESHOLD
        np.testing.assert_array_equal(margins[0][far] > 0, margins[1][far] > 0)
        if far.all():
            np.testing.assert_allclose(logits[0], logits[1], atol=tolerance)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Engine:
    return Engine(bundle, "cpu", 1)


@dataclass(frozen=True)
class Row:
    image: NDArray[np.uint8]
    steering: Steering


def run(engine: Engine, rows: list[Row]) -> Outputs:
    return engine.run(np.stack([row.image for row in rows]), stack([row.steering for row in rows], [1] * len(rows)))


def on_the_edge(engine: Engine, bundle: Bundle, image: NDArray[np.uint8]) -> Row | None:
    """The image with a strength at which a gate is as near its threshold as bisection gets, if any gate changes."""

    def at(strength: float) -> tuple[Row, NDArray[np.float32]]:
        row = Row(image, resolve(bundle, "Shirt", NEUTRAL, strength))
        return row, run(engine, [row]).gate_logit[0]

    low, high = 0.0, 1.0
    changed = np.argwhere((at(low)[1] > 0) != (at(high)[1] > 0))
    if not len(changed):
        return None
    gate = tuple(changed[0])
    opened = at(low)[1][gate] > 0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if (at(middle)[1][gate] > 0) == opened else (low, middle)
    row, logits = at(low)
    return row if abs(logits[gate]) < NEAR_THRESHOLD else None


def test_rows_do_not_depend_on_their_neighbours_and_borderline_gates_are_counted(
    engine: Engine, bundle: Bundle, sample_pixels: NDArray[np.uint8], record_property: Callable[[str, object], None]
) -> None:
    """Half of the rows have a gate at its threshold, which chance would hardly find; their neighbours are extreme."""
    graph = bundle.manifest.graphs[0]
    tolerance, margin = graph.certificate["logit_tolerance"], graph.certificate["gate_margin"]
    usual = [Row(image, resolve(bundle, "Shirt", NEUTRAL, 1.0)) for image in sample_pixels[::10]]
    edge = [on_the_edge(engine, bundle, image) for image in sample_pixels[::10]]
    rows = [*usual, *(row for row in edge if row)]
    assert len(rows) > 15
    alone = [run(engine, [row]) for row in rows]
    extreme = [Row(np.full_like(sample_pixels[0], 255), resolve(bundle, "Bag", NEUTRAL, 100.0))]
    draw = np.random.default_rng(7)
    counts = {"rows": 0, "near": 0, "flipped": 0}
    for size in (2, 7, 32, 64):
        for _ in range(12):
            picked = draw.integers(len(rows), size=size).tolist()
            together = run(engine, [*(rows[index] for index in picked), *extreme])
            for place, index in enumerate(picked):
                before, after = alone[index].gate_logit[0], together.gate_logit[place]
                near = np.abs(before) <= margin
                flipped = (before > 0) != (after > 0)
                counts["rows"] += 1
                counts["near"] += int(near.sum())
                counts["flipped"] += int(flipped.sum())
                assert not (flipped & ~near).any(), "a gate away from its threshold has flipped"
                if not flipped.any():
                    np.testing.assert_allclose(together.logits[place], alone[index].logits[0], atol=tolerance)
    print(f"neighbours: {json.dumps(counts)}")
    record_property("neighbours", counts)
    assert counts["near"] > 100, "rows on the edge are among them"


def test_borderline_gates_are_reported_in_the_answer_and_the_metrics(
    server: ServerProcess, engine: Engine, bundle: Bundle, sample_pixels: NDArray[np.uint8]
) -> None:
    def counted() -> float:
        return server.count("steervit_gates_near_threshold_total", profile="Shirt")

    def kept(image: NDArray[np.uint8], client: Client, strength: float) -> NDArray[np.bool_]:
        return unit_mask(client.predict([image], profile="Shirt", strength=strength).predictions)[0]

    def bisected(image: NDArray[np.uint8], client: Client) -> tuple[int, int]:
        """The numbers of gates that an answer and its receipt report as near."""
        low, high = 0.0, 1.0
        first = kept(image, client, low)
        unit = tuple(np.argwhere(first != kept(image, client, high))[0])  # one that the profile changes
        for _ in range(25):
            middle = (low + high) / 2
            answer = client.predict([image], profile="Shirt", strength=middle)
            same = unit_mask(answer.predictions)[0][unit] == first[unit]
            low, high = (middle, high) if same else (low, middle)
        answer = client.predict([image], profile="Shirt", strength=low)
        return answer.predictions[0].gates_near_threshold, answer.receipt.gates_near_threshold

    before, told = counted(), []
    with Client(server.address) as client:
        for image in sample_pixels[60:70]:
            told.append(bisected(image, client))
    assert all(one == other for one, other in told)
    assert sum(one for one, _ in told) > 0, "bisection has found an edge"
    assert counted() - before >= sum(one for one, _ in told)
