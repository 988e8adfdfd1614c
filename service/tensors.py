"""The input tensors of a ModelInfer request, read and checked: its raw or its typed contents -> numpy arrays."""

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle import INPUTS
from service.errors import InvalidRequest
from service.pb import open_inference_pb2 as pb

Tensor = NDArray[Any]
DTYPES: dict[str, tuple[np.dtype[Any], str]] = {
    "BOOL": (np.dtype(bool), "bool_contents"),
    "UINT8": (np.dtype(np.uint8), "uint_contents"),
    "INT64": (np.dtype("<i8"), "int64_contents"),
    "FP32": (np.dtype("<f4"), "fp32_contents"),
}
"""The numpy type, and the field of InferTensorContents, of a datatype."""
STEERING = INPUTS[1:]
INPUT_TYPES = {
    "image": "UINT8",
    "encoded_image": "BYTES",
    **dict(zip(STEERING, ("INT64", "FP32", "FP32"), strict=True)),
}
MAX_RANK = 4
"""Sizes in a shape."""
MAX_TYPED = 2**18
"""Elements of a tensor that are not raw: each becomes a Python object on the event loop (0.02 us a pixel)."""
RESERVED = re.compile(r"triton_.*|sequence_.*|priority|timeout|headers|binary_data.*|content_type")
"""Parameters of the protocol and of its clients that mean nothing here."""


def read_tensors(request: pb.ModelInferRequest, most: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a request by name, their types and sizes checked. most: elements of each, that are not raw."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries; allowed: {len(request.inputs)}, one for each input"
        )
    found: dict[str, Tensor] = {}
    for index, tensor in enumerate(request.inputs):
        where = f"inputs[{index}] {tensor.name!r}"
        if tensor.name not in INPUT_TYPES:
            raise InvalidRequest(f"{where} is unknown; allowed: {', '.join(INPUT_TYPES)}")
        if tensor.name in found:
            raise InvalidRequest(f"{where} is there twice; allowed: once")
        for name in tensor.parameters:
            if not RESERVED.fullmatch(name):
                raise InvalidRequest(f"{where} has the parameter {name!r}; allowed: none")
        if tensor.datatype != INPUT_TYPES[tensor.name]:
            raise InvalidRequest(f"{where} has the datatype {tensor.datatype!r}; allowed: {INPUT_TYPES[tensor.name]}")
        if not tensor.shape:
            raise InvalidRequest(f"{where} has no shape; allowed: one with the images first")
        if len(tensor.shape) > MAX_RANK:  # before anything is multiplied
            raise InvalidRequest(f"{where} has a shape of {len(tensor.shape)} sizes; allowed: 1 to {MAX_RANK}")
        if min(tensor.shape) < 1:
            raise InvalidRequest(f"{where} has the shape {list(tensor.shape)}; allowed: sizes of 1 or more")
        typed = tensor.contents.ByteSize() > 0
        if raw and typed:
            raise InvalidRequest(f"{where} has contents, and there are raw_input_contents too; allowed: one of them")
        limit = most[tensor.name]
        found[tensor.name] = _from_raw(tensor, raw[index], where, limit) if raw else _from_typed(tensor, where, limit)
    return found


def _from_raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes, where: str, most: int) -> Tensor:
    count = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        parts = _split(raw, where, most)
        _check_count(parts, tensor, where, most)
        return np.array(parts, object).reshape(tensor.shape)
    dtype, _ = DTYPES[tensor.datatype]
    if len(raw) != count * dtype.itemsize:
        needed = f"{count * dtype.itemsize} for {tensor.datatype} {list(tensor.shape)}"
        raise InvalidRequest(f"{where} has {len(raw)} bytes; allowed: {needed}")
    return np.frombuffer(raw, dtype).reshape(tensor.shape)


def _from_typed(tensor: pb.ModelInferRequest.InferInputTensor, where: str, most: int) -> Tensor:
    field = "bytes_contents" if tensor.datatype == "BYTES" else DTYPES[tensor.datatype][1]
    others = {descriptor.name for descriptor, _ in tensor.contents.ListFields()} - {field}
    if others:
        raise InvalidRequest(f"{where} has {', '.join(sorted(others))}; allowed: {field} for {tensor.datatype}")
    elements: Sequence[Any] = getattr(tensor.contents, field)
    _check_count(elements, tensor, where, most)
    if len(elements) > MAX_TYPED:
        raise InvalidRequest(
            f"{where} has {len(elements)} elements in {field}; allowed: {MAX_TYPED}, or raw_input_contents"
        )
    values = elements[:]  # a list; faster than list(elements)
    if tensor.datatype == "BYTES":
        return np.array(values, object).reshape(tensor.shape)
    if tensor.datatype == "UINT8":
        try:
            return np.frombuffer(bytes(values), np.uint8).reshape(tensor.shape)
        except ValueError:  # of bytes
            raise InvalidRequest(f"{where} has the value {max(values)}; allowed: 0 to 255") from None
    return np.array(values, DTYPES[tensor.datatype][0]).reshape(tensor.shape)


def _check_count(values: Sequence[Any], tensor: pb.ModelInferRequest.InferInputTensor, where: str, most: int) -> None:
    count = math.prod(tensor.shape)
    if len(values) != count:
        raise InvalidRequest(f"{where} has {len(values)} elements; allowed: {count} for the shape {list(tensor.shape)}")
    if count > most:
        raise InvalidRequest(f"{where} has {count} elements; allowed: at most {most}")


def packed(elements: Iterable[bytes]) -> bytes:
    """Raw contents of BYTES: each element after its length in 4 little-endian bytes."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def _split(raw: bytes, where: str, most: int) -> list[bytes]:
    """The reverse of packed."""
    parts: list[bytes] = []
    start = 0
    while start < len(raw):
        if len(parts) == most:
            raise InvalidRequest(f"{where} has more than {most} elements; allowed: at most {most}")
        size = struct.unpack_from("<I", raw, start)[0] if start + 4 <= len(raw) else len(raw)
        if start + 4 + size > len(raw):
            raise InvalidRequest(
                f"{where} ends within element {len(parts)}; allowed: a 4-byte length before each element"
            )
        parts.append(raw[start + 4 : start + 4 + size])
        start += 4 + size
    return parts
