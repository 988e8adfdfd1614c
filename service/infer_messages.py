"""The messages of ModelInfer: what a request asks for, and the bytes of its answer."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from export.bundle import MLP_GATE, OUTPUTS, Manifest
from service.calls import Answer
from service.engine import Outputs
from service.errors import InvalidRequest
from service.model import Model
from service.pb import open_inference_pb2 as pb
from service.receipt import Origin, measures, origin
from service.steering import Steering
from service.tensors import RESERVED, TensorHeader, packed, read_headers

OUTPUT_TYPES = dict(zip((*OUTPUTS, MLP_GATE), ("FP32", "BOOL", "FP32", "FP32", "BOOL"), strict=True))
BY_DEFAULT = OUTPUTS[:3]
"""Without MLP_GATE, which models with MLP groups add."""
MAX_CACHED_BYTES = 2048
"""Requests up to this size, raw contents excluded, have their parsed form cached."""


class Asked(NamedTuple):
    """A parsed request, without the elements of its tensors."""

    tensors: tuple[TensorHeader, ...]
    outputs: Mapping[str, int]
    """The requested outputs, each with its number of classes; 0: the tensor itself. Empty: the default ones."""
    profile: str
    strength: float
    budget: float | None
    min_budget: float | None


def read_request(request: pb.ModelInferRequest, raw: bool) -> tuple[Asked, Sequence[Any]]:
    """The parsed request, and the typed contents of its inputs. raw: whether it has raw contents; they and the id are
    cleared. Most requests of a client differ only in these, so the parsed form of the rest is cached.

    Raises InvalidRequest.
    """
    if raw:
        request.ClearField("raw_input_contents")
        request.ClearField("id")
        if request.ByteSize() <= MAX_CACHED_BYTES:
            return _cached(request.SerializeToString()), ()
    return _asked(request), [tensor.contents for tensor in request.inputs]


def _asked(request: pb.ModelInferRequest) -> Asked:
    return Asked(read_headers(request), _requested(request), *_parameters(request.parameters))


@lru_cache(maxsize=256)
def _cached(request: bytes) -> Asked:
    return _asked(pb.ModelInferRequest.FromString(request))


def _parameters(
    parameters: Mapping[str, pb.InferParameter],
) -> tuple[str, float, float | None, float | None]:
    """Profile, strength, budget and min_budget."""
    profile, strength = "", 1.0
    budget = min_budget = None
    for name, parameter in parameters.items():
        value = _value(parameter)
        if name == "profile":
            if not isinstance(value, str):
                raise InvalidRequest(f"parameter profile is {value!r}; allowed: a string")
            profile = value
        elif name == "strength":
            strength = _number(name, value)
        elif name == "budget":
            budget = round(_number(name, value), 6)  # as in steering.v1
        elif name == "min_budget":
            min_budget = round(_number(name, value), 6)
        elif not RESERVED.fullmatch(name):
            raise InvalidRequest(f"parameter {name!r} is unknown; allowed: profile, strength, budget, min_budget")
    return profile, strength, budget, min_budget


def _number(name: str, value: bool | int | float | str | None) -> float:
    """A parameter as a number; it may be a string with one. Raises InvalidRequest."""
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise InvalidRequest(f"parameter {name} is {value!r}; allowed: a number")
    return number


def _value(parameter: pb.InferParameter) -> bool | int | float | str | None:
    kind = parameter.WhichOneof("parameter_choice")
    value: bool | int | float | str | None = getattr(parameter, kind) if kind else None
    return value


def _requested(request: pb.ModelInferRequest) -> dict[str, int]:
    """The requested outputs, as in Asked.outputs."""
    outputs: dict[str, int] = {}
    for index, output in enumerate(request.outputs):
        where = f"outputs[{index}]"
        if output.name not in OUTPUT_TYPES:
            raise InvalidRequest(f"{where} is {output.name!r}; allowed: {', '.join(OUTPUT_TYPES)}")
        if output.name in outputs:
            raise InvalidRequest(f"{where} {output.name!r} is given twice; allowed: once")
        outputs[output.name] = _classes(output, f"{where} {output.name!r}")
    return outputs


def by_default(manifest: Manifest) -> list[str]:
    """The outputs of a request that names none."""
    return [*BY_DEFAULT, *[MLP_GATE] * bool(manifest.mlp_groups)]


def _classes(output: pb.ModelInferRequest.InferRequestedOutputTensor, where: str) -> int:
    """The value of the output's parameter `classification`; 0 without it."""
    allowed = ["classification"] if output.name == "logits" else []
    for name in output.parameters:
        if name not in allowed and not RESERVED.fullmatch(name):
            raise InvalidRequest(f"{where} has the parameter {name!r}; allowed: {', '.join(allowed) or 'none'}")
    if "classification" not in output.parameters:
        return 0
    value = _value(output.parameters["classification"])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{where} has the parameter classification {value!r}; allowed: a whole number from 1")
    return value


def response(request_id: str, model: Model, steering: Steering, answer: Answer, outputs: Mapping[str, int]) -> bytes:
    """The bytes of the ModelInferResponse. outputs: as Asked.outputs.

    Serialised messages of one kind concatenate to one message, so the part that similar calls share is cached.
    """
    contents: list[bytes] = []
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, classes in (outputs or dict.fromkeys(by_default(model.bundle.manifest), 0)).items():
        if classes:
            rows = _classified(answer.outputs, model.bundle.manifest.labels, classes)
            tensors.append((name, "BYTES", (len(rows), len(rows[0]))))
            contents.append(packed(chain.from_iterable(rows)))
        else:
            value = getattr(answer.outputs, name)
            tensors.append((name, OUTPUT_TYPES[name], value.shape))
            contents.append(value.tobytes())
    message = pb.ModelInferResponse(id=request_id, raw_output_contents=contents)
    for name, number in measures(model, steering, answer)._asdict().items():
        if number is True:
            message.parameters[name].bool_param = True
        elif isinstance(number, float):
            message.parameters[name].double_param = number
        elif number:  # 0 is omitted, as in Receipt
            message.parameters[name].int64_param = number
    return _constant_part(origin(model, steering), tuple(tensors)) + message.SerializeToString()


@lru_cache(maxsize=256)
def _constant_part(came_from: Origin, tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """The part of a ModelInferResponse that similar calls share. tensors: name, datatype and shape of each output."""
    message = pb.ModelInferResponse(model_name=came_from.model, model_version=came_from.version)
    for name, datatype, shape in tensors:
        message.outputs.add(name=name, datatype=datatype, shape=shape)
    for name, value in came_from._asdict().items():
        if value:
            message.parameters[name].string_param = value
    return message.SerializeToString()


def _classified(outputs: Outputs, labels: Sequence[str], count: int) -> list[list[bytes]]:
    """The most likely classes of each image, in the format of Triton's clients.

    https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_classification.html
    """
    return [
        [f"{logits[index]:f}:{index}:{labels[index]}".encode() for index in ranking[:count]]
        for logits, ranking in zip(outputs.logits.tolist(), outputs.ranked()[0].tolist(), strict=True)
    ]
