"""The errors for impossible requests, in both protocols, while another client sends valid ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from service.pb import open_inference_pb2 as oip
from service.pb import steering_pb2 as pb
from tests.faults.listed import OPEN_INFERENCE, STEERING, fault
from tests.faults.protocols import OIP, V1, Protocol, both, tensors
from tests.faults.traffic import Traffic
from tests.processes import COMMITTED
from tests.refusals import refusal

IMAGE = np.zeros((1, 28, 28, 1), np.uint8)
NAN, INFINITE = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    fault: str
    make: Callable[[], Any]
    sentence: str
    code: str = "INVALID_ARGUMENT"


def typed(images: int = 1, *terms: pb.SteeringTerm, **steering: Any) -> pb.PredictRequest:
    """A PredictRequest of so many images, with this steering."""
    request = pb.PredictRequest(steering=pb.Steering(terms=terms, **steering))
    for _ in range(images):
        request.images.add(pixels=bytes(28 * 28))
    return request


def named(request: pb.PredictRequest, **fields: Any) -> pb.PredictRequest:
    request.MergeFrom(pb.PredictRequest(**fields))
    return request


def with_image(**source: Any) -> pb.PredictRequest:
    return pb.PredictRequest(images=[pb.Image(**source)])


def tensor(
    shape: tuple[int, ...] = (1, 28, 28, 1),
    *raw: bytes,
    name: str = "image",
    datatype: str = "UINT8",
    model: str = "fashion_mnist",
    version: str = "",
    outputs: tuple[str, ...] = (),
    **contents: Any,
) -> oip.ModelInferRequest:
    """One input, with raw contents or with fields of InferTensorContents."""
    made = oip.ModelInferRequest(model_name=model, model_version=version, raw_input_contents=raw)
    made.inputs.add(name=name, datatype=datatype, shape=shape, contents=oip.InferTensorContents(**contents))
    for output in outputs:
        made.outputs.add(name=output)
    return made


def parameter(name: str, **value: Any) -> oip.ModelInferRequest:
    made = tensor((1, 28, 28, 1), bytes(784))
    made.parameters[name].CopyFrom(oip.InferParameter(**value))
    return made


def of_tensor(kind: str, name: str, **value: Any) -> oip.ModelInferRequest:
    """kind: inputs or outputs, whose only one (image, logits) gets this parameter."""
    made = tensor((1, 28, 28, 1), bytes(784), outputs=("logits",))
    getattr(made, kind)[0].parameters[name].CopyFrom(oip.InferParameter(**value))
    return made


def terms(latents: list[int], scale: float = 1.0, sites: int = 5, profile: str = "") -> oip.ModelInferRequest:
    """Steering tensors of one image: these latents at the first site."""
    shape = (1, sites, len(latents))
    latent, scales, shifts = np.zeros(shape, np.int64), np.ones(shape, np.float32), np.zeros(shape, np.float32)
    latent[0, 0], scales[0, 0], shifts[0, 0] = latents, scale, 1.0
    return tensors(OIP.request(IMAGE, profile), {"latent": latent, "scale": scales, "shift": shifts})


def twice() -> oip.ModelInferRequest:
    made = tensor((1, 28, 28, 1), bytes(784), bytes(784))
    made.inputs.add().CopyFrom(made.inputs[0])
    return made


STEERING_V1 = [
    Case("wrong size", lambda: with_image(pixels=bytes(783)),
         "images[0].pixels has 783 bytes; allowed: 784 (uint8, 28 x 28 x 1)"),
    Case("wrong size", lambda: with_image(pixels=bytes(784), shape=[1, 28, 28]),
         "images[0].shape is [1, 28, 28]; allowed: [28, 28, 1], or none"),
    Case("empty batch", lambda: typed(0), "images has 0 entries; allowed: 1 to 256"),
    Case("batch over the limit", lambda: typed(257), "images has 257 entries; allowed: 1 to 256"),
    Case("unknown model", lambda: named(typed(), model="resnet"), "model is 'resnet'; allowed: 'fashion_mnist'",
         "NOT_FOUND"),
    Case("unknown version", lambda: named(typed(), version="99"),
         f"version of model 'fashion_mnist' is '99'; allowed: '{COMMITTED.name}', or none", "NOT_FOUND"),
    Case("unknown profile", lambda: typed(profile="Shoe"),
         "steering.profile is 'Shoe'; allowed: 'Ankle boot', 'Bag'", "NOT_FOUND"),
    Case("NaN scale", lambda: typed(1, pb.SteeringTerm(scale=NAN)),
         "steering.terms[0]: scale is nan; allowed: a finite number from -1e6 to 1e6"),
    Case("infinite scale", lambda: typed(1, pb.SteeringTerm(scale=INFINITE)),
         "steering.terms[0]: scale is inf; allowed: a finite number from -1e6 to 1e6"),
    Case("infinite scale", lambda: typed(1, pb.SteeringTerm(), pb.SteeringTerm(latent=1, shift=-INFINITE)),
         "steering.terms[1]: shift is -inf; allowed: a finite number from -1e6 to 1e6"),
    Case("strength that is no number", lambda: typed(profile="Shirt", strength=NAN),
         "steering.strength is nan; allowed: -100 to 100"),
    Case("latent out of range", lambda: typed(1, pb.SteeringTerm(site=1, latent=512)),
         "steering.terms: latent is 512 at site 1; allowed: 0 to 511"),
    Case("latent out of range", lambda: typed(1, pb.SteeringTerm(latent=-1)),
         "steering.terms[0]: latent is -1; allowed: 0 or more"),
    Case("site out of range", lambda: typed(1, pb.SteeringTerm(site=5)), "site is 5; allowed: 0 to 4"),
    Case("duplicate latents", lambda: typed(1, pb.SteeringTerm(), pb.SteeringTerm()),
         "latent 0 at site 0 is given twice; allowed: once"),
    Case("too many terms", lambda: typed(1, *[pb.SteeringTerm()] * 513),
         "steering.terms has 513 entries; allowed: 512"),
    Case("conflicting profile and terms", lambda: typed(1, pb.SteeringTerm(), profile="Shirt"),
         "steering.profile is 'Shirt' and steering.terms are given too; allowed: one of them"),
    Case("terms made for other weights", lambda: typed(gates_sae_digest="0123"),
         "steering.gates_sae_digest is '0123'; allowed: '", "FAILED_PRECONDITION"),
    Case("top_k out of range", lambda: named(typed(), top_k=-1), "top_k is -1; allowed: 0 to 10"),
    Case("no image", lambda: with_image(), "images[0] is empty; allowed: encoded or pixels"),
    Case("unreadable image", lambda: with_image(encoded=b"GIF89a nonsense"),
         "images[0].encoded is not a readable image (15 bytes"),
    Case("null characters", lambda: named(typed(), model="fashion_mnist\0"),
         r"model is 'fashion_mnist\x00'; allowed: 'fashion_mnist'", "NOT_FOUND"),
    Case("null characters", lambda: typed(profile="Shirt\0"), r"steering.profile is 'Shirt\x00'; allowed: 'Ankle boot'",
         "NOT_FOUND"),
    Case("null characters", lambda: named(typed(), version=f"{COMMITTED.name}\0"),
         rf"is '{COMMITTED.name}\x00'; allowed: '{COMMITTED.name}'", "NOT_FOUND"),
    Case("null characters", lambda: with_image(encoded=bytes(1000)), "is not a readable image (1000 bytes"),
]  # fmt: skip

IMAGES = (1, 28, 28, 1)
OPEN = [
    Case("wrong dtype", lambda: tensor(IMAGES, bytes(4 * 784), datatype="FP32"),
         "inputs[0] 'image' has the datatype 'FP32'; allowed: UINT8"),
    Case("wrong dtype", lambda: tensor(IMAGES, fp32_contents=[0.0] * 784),
         "inputs[0] 'image' has fp32_contents; allowed: uint_contents for UINT8"),
    Case("wrong rank", lambda: tensor((28, 28, 1), bytes(784)),
         "input 'image' has the shape [28, 28, 1]; allowed: [images, 28, 28, 1]"),
    Case("wrong rank", lambda: tensor((), b"\0"), "has no shape; allowed: one with the images first"),
    Case("wrong size", lambda: tensor((1, 27, 28, 1), bytes(756)),
         "input 'image' has the shape [1, 27, 28, 1]; allowed: [images, 28, 28, 1]"),
    Case("wrong size", lambda: terms([1], sites=4), "steering_latent has the shape [1, 4, 1]; allowed: [images, 5, 1"),
    Case("wrong byte count", lambda: tensor(IMAGES, bytes(783)),
         "has 783 bytes; allowed: 784 for UINT8 [1, 28, 28, 1]"),
    Case("wrong byte count", lambda: tensor(IMAGES, bytes(784), b""), "raw_input_contents has 2 entries; allowed: 1"),
    Case("wrong byte count", lambda: tensor(IMAGES, uint_contents=[0]), "has 1 elements; allowed: 784 for the shape"),
    Case("wrong byte count", lambda: tensor((1,), b"\xff\0\0\0x", name="encoded_image", datatype="BYTES"),
         "ends within element 0; allowed: a 4-byte length before each element"),
    Case("negative dims", lambda: tensor((-1, 28, 28, 1), b""),
         "has the shape [-1, 28, 28, 1]; allowed: sizes of 1 or more"),
    Case("overflowing dims", lambda: tensor((2**62, 2**62, 2**62, 1), bytes(784)),
         f"has 784 bytes; allowed: {2**186} for UINT8"),
    Case("overflowing dims", lambda: tensor((2**32, 2**32), name="encoded_image", datatype="BYTES"),
         f"has 0 elements; allowed: {2**64} for the shape"),
    Case("empty batch", lambda: tensor((0, 28, 28, 1), b""),
         "has the shape [0, 28, 28, 1]; allowed: sizes of 1 or more"),
    Case("batch over the limit", lambda: tensor((257, 28, 28, 1), bytes(257 * 784)),
         "has 257 images; allowed: 1 to 256"),
    Case("batch over the limit", lambda: tensor((9000,), bytes(36_000), name="encoded_image", datatype="BYTES"),
         "inputs[0] 'encoded_image' has more than 256 elements; allowed: at most 256"),
    Case("wrong size", lambda: tensor((300_000,), uint_contents=bytes(300_000)),
         "inputs[0] 'image' has 300000 elements; allowed: at most 200704"),
    Case("overflowing dims", lambda: tensor((2**62,) * 60_000, b""), "has a shape of 60000 sizes; allowed: 1 to 4"),
    Case("unknown model", lambda: tensor(IMAGES, bytes(784), model="resnet"),
         "model is 'resnet'; allowed: 'fashion_mnist'", "NOT_FOUND"),
    Case("unknown version", lambda: tensor(IMAGES, bytes(784), version="99"),
         f"version of model 'fashion_mnist' is '99'; allowed: '{COMMITTED.name}', or none", "NOT_FOUND"),
    Case("unknown profile", lambda: parameter("profile", string_param="Hat"),
         "steering.profile is 'Hat'; allowed: 'Ankle boot'", "NOT_FOUND"),
    Case("unknown input", lambda: tensor(IMAGES, bytes(784), name="pixels"),
         "inputs[0] 'pixels' is unknown; allowed: image, encoded_image, steering_latent"),
    Case("unknown output", lambda: tensor(IMAGES, bytes(784), outputs=("probabilities",)),
         "outputs[0] is 'probabilities'; allowed: logits, head_gate, gate_logit, residual"),
    Case("unknown parameter", lambda: parameter("temperature", int64_param=1),
         "parameter 'temperature' is unknown; allowed: profile, strength"),
    Case("unknown parameter", lambda: of_tensor("inputs", "scale", double_param=0.5),
         "inputs[0] 'image' has the parameter 'scale'; allowed: none"),
    Case("unknown parameter", lambda: of_tensor("outputs", "shared_memory_region", string_param="region"),
         "outputs[0] 'logits' has the parameter 'shared_memory_region'; allowed: classification"),
    Case("top_k out of range", lambda: of_tensor("outputs", "classification", int64_param=0),
         "outputs[0] 'logits' has the parameter classification 0; allowed: a whole number from 1"),
    Case("top_k out of range", lambda: of_tensor("outputs", "classification", string_param="3"),
         "outputs[0] 'logits' has the parameter classification '3'; allowed: a whole number from 1"),
    Case("duplicate inputs", twice, "inputs[1] 'image' is given twice; allowed: once"),
    Case("duplicate outputs", lambda: tensor(IMAGES, bytes(784), outputs=("logits", "logits")),
         "outputs[1] 'logits' is given twice; allowed: once"),
    Case("contents that contradict each other", lambda: tensor(IMAGES, bytes(784), uint_contents=[1]),
         "has contents, and there are raw_input_contents too; allowed: one of them"),
    Case("contents that contradict each other", lambda: tensor(IMAGES, uint_contents=[256] * 784),
         "has the value 256; allowed: 0 to 255"),
    Case("NaN scale", lambda: terms([1], NAN), "steering of image 0: scale is nan; allowed: a finite number from -1e6"),
    Case("infinite scale", lambda: terms([1], INFINITE), "steering of image 0: scale is inf; allowed: a finite number"),
    Case("strength that is no number", lambda: parameter("strength", string_param="much"),
         "parameter strength is 'much'; allowed: a number"),
    Case("strength that is no number", lambda: parameter("strength", bool_param=True),
         "parameter strength is True; allowed: a number"),
    Case("latent out of range", lambda: terms([7, 512]), "steering of image 0: latent is 512 at site 0; allowed: 0 to"),
    Case("site out of range", lambda: terms([1], sites=6), "has the shape [1, 6, 1]; allowed: [images, 5, 1 or more]"),
    Case("duplicate latents", lambda: terms([7, 7]), "latent 7 at site 0 is given twice; allowed: once"),
    Case("too many terms", lambda: terms(list(range(103))), "steering tensors have 515 terms an image; allowed: 512"),
    Case("conflicting profile and terms", lambda: terms([1], profile="Shirt"),
         "parameter profile is 'Shirt' and steering tensors are given too; allowed: one of them"),
    Case("no image", lambda: oip.ModelInferRequest(model_name="fashion_mnist"),
         "inputs are []; allowed: one of image and encoded_image"),
    Case("unreadable image", lambda: OIP.request([b"GIF89a nonsense"]),
         "encoded_image[0] is not a readable image (15 bytes"),
    Case("null characters", lambda: tensor(IMAGES, bytes(784), model="fashion_mnist\0"),
         r"model is 'fashion_mnist\x00'; allowed: 'fashion_mnist'", "NOT_FOUND"),
    Case("null characters", lambda: tensor(IMAGES, bytes(784), name="image\0"), r"inputs[0] 'image\x00' is unknown"),
    Case("null characters", lambda: parameter("strength\0", double_param=1.0),
         r"parameter 'strength\x00' is unknown; allowed: profile, strength"),
    Case("null characters", lambda: parameter("profile", string_param="Shirt\0"),
         r"steering.profile is 'Shirt\x00'; allowed: 'Ankle boot'", "NOT_FOUND"),
]  # fmt: skip


def cases() -> list[Any]:
    found = []
    for protocol, of_protocol in ((V1, STEERING_V1), (OIP, OPEN)):
        for case in of_protocol:
            mark = fault(f"request: {case.fault}", f"{case.code}: `{case.sentence}`", protocol.name)
            found.append(pytest.param(protocol, case, marks=mark, id=f"{protocol}-{case.fault}"))
    return found


@pytest.mark.parametrize(("protocol", "case"), cases())
def test_what_is_wrong_is_named(protocol: Protocol, case: Case, channel: grpc.Channel, traffic: Traffic) -> None:
    code, sentence = refusal(protocol.call(channel), case.make(), timeout=30)
    assert code == case.code
    assert case.sentence in sentence
    traffic.check()


@both("request: not a message", "INVALID_ARGUMENT: `the request is not a ... message (4 bytes that cannot be read)`")
def test_bytes_that_are_no_message_are_refused(protocol: Protocol, channel: grpc.Channel, traffic: Traffic) -> None:
    kind = {STEERING: "steering.v1.PredictRequest", OPEN_INFERENCE: "inference.ModelInferRequest"}[protocol.name]
    code, sentence = refusal(channel.unary_unary(protocol.path), b"\xff\xff\xff\xff", timeout=30)
    assert code == "INVALID_ARGUMENT"
    assert f"the request is not a {kind} message (4 bytes that cannot be read)" in sentence
    traffic.check()


@both(
    "request: 100 MB message",
    "RESOURCE_EXHAUSTED: gRPC's own sentence, with the size and what is allowed (`--max-message-mb`)",
)
def test_a_message_of_100_mb_is_refused_before_it_is_read(
    protocol: Protocol, channel: grpc.Channel, traffic: Traffic
) -> None:
    code, sentence = refusal(protocol.call(channel), protocol.request([bytes(100_000_000)]), timeout=30)
    assert code == "RESOURCE_EXHAUSTED"
    assert "message larger than max (1000000" in sentence
    assert f"vs. {64 * 2**20})" in sentence
    traffic.check()
