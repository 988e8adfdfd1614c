"""The same request in both protocols, so that one test covers both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from service.engine import Engine
from service.pb import open_inference_pb2 as oip
from service.pb import steering_pb2 as pb
from service.tensors import packed
from tests.faults.listed import OPEN_INFERENCE, STEERING, fault
from tests.masks import unit_mask
from training.steering import Terms, to_arrays

TOLERANCE = 1e-4
"""|difference| of a probability."""
NEAR = 1e-3
"""|gate logit| below which rounding may decide a gate: images with such a gate are not compared."""
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True)
class Read:
    """An answer for B images."""

    probabilities: NDArray[np.float64]
    """(B, classes)"""
    mask: NDArray[np.bool_]
    """(B, gated blocks, units)"""


@dataclass(frozen=True)
class Alone(Read):
    """The answers of onnxruntime to one image at a time, in this process."""

    clear: NDArray[np.bool_]
    """(B,): no gate is near its threshold."""

    def wrong(self, answer: Read, rows: Sequence[int]) -> list[str]:
        """What is wrong with an answer for these images."""
        if len(answer.mask) != len(rows):
            return [f"{len(answer.mask)} answers to {len(rows)} images"]
        rows = np.asarray(rows)
        same = (answer.mask == self.mask[rows]).all((1, 2))
        same &= np.abs(answer.probabilities - self.probabilities[rows]).max(1) < TOLERANCE
        return [f"image {row} is answered otherwise than alone" for row in rows[~same & self.clear[rows]].tolist()]


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def alone(engine: Engine, images: NDArray[np.uint8], terms: Terms) -> Alone:
    steering = to_arrays([terms], len(engine.bundle.manifest.sites))
    rows = [engine.run(images[i : i + 1], steering) for i in range(len(images))]
    gates = np.concatenate([row.gate_logit for row in rows])
    logits = np.concatenate([row.logits for row in rows])
    return Alone(softmax(logits), gates > 0, (np.abs(gates) > NEAR).all((1, 2)))


@dataclass(frozen=True)
class Protocol:
    name: str
    path: str
    """Path of the RPC."""
    request: Callable[..., Any]
    """(images uint8 (B, height, width, channels) or encoded files, profile, terms, strength) -> message"""
    response: Any
    read: Callable[[Any, Bundle], Read]

    def call(self, channel: grpc.Channel) -> Any:
        return channel.unary_unary(self.path, lambda message: message.SerializeToString(), self.response.FromString)

    def __str__(self) -> str:
        return self.name.replace(" ", "")


def _predict(
    images: NDArray[np.uint8] | Sequence[bytes], profile: str = "", terms: Terms | None = None, strength: float = 1.0
) -> pb.PredictRequest:
    message = pb.PredictRequest(model="fashion_mnist", top_k=10)
    for image in images:
        message.images.add(encoded=image) if isinstance(image, bytes) else message.images.add(pixels=image.tobytes())
    message.steering.profile, message.steering.strength = profile, strength
    for site, of_site in (terms or {}).items():
        for term in of_site:
            message.steering.terms.add(site=site, latent=term.latent, scale=term.scale, shift=term.shift)
    return message


def _read_prediction(answer: pb.PredictResponse, bundle: Bundle) -> Read:
    probabilities = np.zeros((len(answer.predictions), len(bundle.manifest.labels)))
    for row, prediction in enumerate(answer.predictions):
        for found in prediction.classes:
            probabilities[row, found.index] = found.probability
    return Read(probabilities, unit_mask(answer.predictions))


def _infer(
    images: NDArray[np.uint8] | Sequence[bytes], profile: str = "", terms: Terms | None = None, strength: float = 1.0
) -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name="fashion_mnist")
    if isinstance(images, np.ndarray):
        message.inputs.add(name="image", datatype="UINT8", shape=images.shape)
        message.raw_input_contents.append(images.tobytes())
    else:
        message.inputs.add(name="encoded_image", datatype="BYTES", shape=[len(images)])
        message.raw_input_contents.append(packed(images))
    if terms is not None:
        tensors(message, vars(to_arrays([terms] * len(images), 5)))
    if profile:
        message.parameters["profile"].string_param = profile
    message.parameters["strength"].double_param = strength
    return message


def tensors(message: oip.ModelInferRequest, arrays: Mapping[str, NDArray[Any]]) -> oip.ModelInferRequest:
    """Steering as tensors: latent, scale and shift."""
    for name, datatype in (("latent", "INT64"), ("scale", "FP32"), ("shift", "FP32")):
        message.inputs.add(name=f"steering_{name}", datatype=datatype, shape=arrays[name].shape)
        message.raw_input_contents.append(arrays[name].tobytes())
    return message


def _read_tensors(answer: oip.ModelInferResponse, bundle: Bundle) -> Read:
    raw = {output.name: (output, raw) for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)}
    logits, heads, groups = (
        np.frombuffer(raw[name][1], kind).reshape(list(raw[name][0].shape))
        for name, kind in (("logits", "<f4"), ("head_gate", bool), ("mlp_gate", bool))
    )
    return Read(softmax(logits), np.concatenate([heads, groups], 2))


V1 = Protocol(STEERING, "/steering.v1.SteeringService/Predict", _predict, pb.PredictResponse, _read_prediction)
OIP = Protocol(
    OPEN_INFERENCE, "/inference.GRPCInferenceService/ModelInfer", _infer, oip.ModelInferResponse, _read_tensors
)
PROTOCOLS = (V1, OIP)


def both(name: str, sees: str) -> Any:
    """Mark a test with a parameter `protocol` as one of this fault, and run it in both protocols."""
    marked = [pytest.param(p, marks=fault(name, sees, p.name), id=str(p)) for p in PROTOCOLS]
    return pytest.mark.parametrize("protocol", marked)
