"""Any message of either protocol gets a documented status and a sentence, and the server stays alive and right."""

import re
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import CALLS, INFER, PREDICT, Live
from messages import messages, mutated
from processes import COMMITTED, SAMPLES, ServerProcess
from refusals import refusal

from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb

BAG = next((SAMPLES / "Bag").glob("*.png"))
FILE = BAG.read_bytes()
IMAGES = [pb.Image(encoded=FILE), pb.Image(pixels=bytes(784), shape=[28, 28, 1])]
TERMS = [pb.SteeringTerm(site=1, latent=7, scale=0.5, shift=2.0), pb.SteeringTerm(site=4, latent=511)]
FORCED = pb.Steering(
    profile="Bag",
    open=[pb.Unit(block=2, head=5), pb.Unit(block=3, mlp_group=0)],
    closed=[pb.Unit(block=4, head=1)],
)
VALID: dict[str, list[pb.PredictRequest | pb.CompareRequest | pb.ExplainRequest | oi.ModelInferRequest]] = {
    PREDICT: [
        pb.PredictRequest(images=IMAGES, steering=pb.Steering(profile="Shirt", strength=0.5), top_k=3),
        pb.PredictRequest(
            model="fashion_mnist", version=COMMITTED.name, images=IMAGES, steering=pb.Steering(terms=TERMS)
        ),
        pb.PredictRequest(images=IMAGES, steering=FORCED, budget=0.6, min_budget=0.5),
    ],
    "/steering.v1.SteeringService/Compare": [
        pb.CompareRequest(images=IMAGES, steering=pb.Steering(terms=TERMS)),
        pb.CompareRequest(images=IMAGES, steering=FORCED, budget=1.0),
    ],
    "/steering.v1.SteeringService/Explain": [
        pb.ExplainRequest(images=IMAGES, steering=pb.Steering(terms=TERMS), latents=3),
        pb.ExplainRequest(images=IMAGES, steering=FORCED, budget=0.6),
    ],
}


def infer(**inputs: tuple[str, list[int], bytes]) -> oi.ModelInferRequest:
    request = oi.ModelInferRequest(model_name="fashion_mnist", outputs=[{"name": "logits"}, {"name": "residual"}])
    for name, (datatype, shape, content) in inputs.items():
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(content)
    return request


STEERED = {
    "steering_latent": ("INT64", [2, 5, 3], bytes(2 * 5 * 3 * 8)),
    "steering_scale": ("FP32", [2, 5, 3], struct.pack("<30f", *[1.0] * 30)),
    "steering_shift": ("FP32", [2, 5, 3], bytes(2 * 5 * 3 * 4)),
}
BIASED = infer(
    image=("UINT8", [2, 28, 28, 1], bytes(2 * 784)), gate_bias=("FP32", [2, 5, 10], struct.pack("<100f", *range(100)))
)
for name, value in {"budget": 0.6, "min_budget": 0.5}.items():
    BIASED.parameters[name].double_param = value
TYPED = oi.ModelInferRequest(
    model_name="fashion_mnist",
    inputs=[{"name": "image", "datatype": "UINT8", "shape": [1, 28, 28, 1], "contents": {"uint_contents": [0] * 784}}],
    parameters={"profile": oi.InferParameter(string_param="Bag"), "strength": oi.InferParameter(double_param=0.5)},
)
VALID[INFER] = [
    infer(image=("UINT8", [2, 28, 28, 1], bytes(2 * 784)), **STEERED),
    infer(encoded_image=("BYTES", [1], struct.pack("<I", len(FILE)) + FILE)),
    BIASED,
    TYPED,
]


@pytest.fixture(scope="module")
def live(server: ServerProcess) -> Iterator[Live]:
    live = Live(server.address, BAG)
    yield live
    assert server.count("steervit_requests_total", code="INTERNAL") == 0
    assert server.page("readyz") == "OK\n"


@pytest.mark.parametrize("call", VALID)
def test_the_requests_that_near_misses_are_made_of_are_answered(live: Live, call: str) -> None:
    for valid in VALID[call]:
        assert live.send(call, valid).status == "OK"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_message_of_any_call_gets_a_status_and_a_sentence(live: Live, data: st.DataObject) -> None:
    call = data.draw(st.sampled_from(sorted(CALLS)))
    live.send(call, data.draw(messages(CALLS[call])))


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_near_miss_gets_a_status_and_a_sentence(live: Live, data: st.DataObject) -> None:
    call = data.draw(st.sampled_from(sorted(VALID)))
    live.send(call, data.draw(mutated(data.draw(st.sampled_from(VALID[call])))))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_in_place_of_a_message_get_a_status_and_a_sentence(live: Live, data: st.DataObject) -> None:
    call = data.draw(st.sampled_from(sorted(VALID)))
    content = bytearray(data.draw(st.sampled_from(VALID[call])).SerializeToString())
    cut = data.draw(st.integers(0, len(content)))
    content[cut : cut + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=40))
    live.send(call, bytes(content))


@pytest.mark.parametrize("call", sorted(CALLS))
def test_what_is_no_message_is_said_to_be_none(live: Live, call: str) -> None:
    said = live.send(call, b"\x0a\x02\xff\xff\xff")
    assert said.status == "INVALID_ARGUMENT"
    assert re.fullmatch(r"the request is not a [\w.]+ message \(5 bytes .*\); allowed: its binary form", said.sentence)


@settings(max_examples=50, deadline=None)
@given(
    name=st.text(st.characters(codec="ascii", exclude_characters="/ \t\r\n\0", exclude_categories=["Cc"]), max_size=40)
)
def test_a_call_that_is_not_there_is_not_served(live: Live, name: str) -> None:
    for service in ("steering.v1.SteeringService", "inference.GRPCInferenceService"):
        call = f"/{service}/{name}"
        if call not in CALLS:
            assert live.send(call, b"").status == "UNIMPLEMENTED"


def test_metadata_of_any_size_is_refused_or_passed_over(live: Live) -> None:
    request = VALID[PREDICT][0].SerializeToString()
    call = live.channel.unary_unary(PREDICT)
    call(request, timeout=10, metadata=(("x-note", "y" * 4_000),))
    assert refusal(call, request, timeout=10, metadata=(("x-note", "y" * 100_000),))[0] == "RESOURCE_EXHAUSTED"
    live.send(PREDICT, request)
