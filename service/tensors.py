"""Reads and checks the input tensors of a ModelInfer request: raw or typed contents -> numpy arrays."""

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle import GATE_BIAS, INPUTS
from service.errors import InvalidRequest
from service.pb import open_inference_pb2 as pb

Tensor = NDArray[Any]
DTYPES: dict[str, tuple[np.dtype[Any], str]] = {
    "BOOL": (np.dtype(bool), "bool_contents"),
    "UINT8": (np.dtype(np.uint8), "uint_contents"),
    "INT64": (np.dtype("<i8"), "int64_contents"),
    "FP32": (np.dtype("<f4"), "fp32_contents"),
}
"""The numpy type and the field of InferTensorContents, by datatype."""
STEERING = INPUTS[1:]
INPUT_TYPES = {
    "image": "UINT8",
    "encoded_image": "BYTES",
    **dict(zip(STEERING, ("INT64", "FP32", "FP32"), strict=True)),
    GATE_BIAS: "FP32",
}
MAX_RANK = 4
"""Limit of the dimensions of a tensor."""
MAX_TYPED = 2**18
"""Limit of the elements of a typed tensor: each becomes a Python object on the event loop (0.02 us a pixel)."""
RESERVED = re.compile(r"triton_.*|sequence_.*|priority|timeout|headers|binary_data.*|content_type")
"""Parameters of the protocol and of its clients that are ignored here."""


class TensorHeader(NamedTuple):
    """An input without its elements."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    typed: bool
    """Whether it has contents of its own."""
    where: str
    """The name of the input in errors."""


def read_headers(request: pb.ModelInferRequest) -> tuple[TensorHeader, ...]:
    """The headers of the inputs, checked. Raises InvalidRequest."""
    headers: dict[str, TensorHeader] = {}
    for index, tensor in enumerate(request.inputs):
        where = f"inputs[{index}] {tensor.name!r}"
        if tensor.name not in INPUT_TYPES:
            raise InvalidRequest(f"{where} is unknown; allowed: {', '.join(INPUT_TYPES)}")
        if tensor.name in headers:
            raise InvalidRequest(f"{where} is given twice; allowed: once")
        for name in tensor.parameters:
            if not RESERVED.fullmatch(name):
                raise InvalidRequest(f"{where} has the parameter {name!r}; allowed: none")
        if tensor.datatype != INPUT_TYPES[tensor.name]:
            raise InvalidRequest(f"{where} has the datatype {tensor.datatype!r}; allowed: {INPUT_TYPES[tensor.name]}")
        if not tensor.shape:
            raise InvalidRequest(f"{where} has no shape; allowed: one with the images first")
        if len(tensor.shape) > MAX_RANK:  # before the sizes are multiplied
            raise InvalidRequest(f"{where} has a shape of {len(tensor.shape)} sizes; allowed: 1 to {MAX_RANK}")
        if min(tensor.shape) < 1:
            raise InvalidRequest(f"{where} has the shape {list(tensor.shape)}; allowed: sizes of 1 or more")
        typed = tensor.contents.ByteSize() > 0
        headers[tensor.name] = TensorHeader(tensor.name, tensor.datatype, tuple(tensor.shape), typed, where)
    return tuple(headers.values())


def read_tensors(
    headers: Sequence[TensorHeader], raw: Sequence[bytes], contents: Sequence[Any], most: Mapping[str, int]
) -> dict[str, Tensor]:
    """The inputs by name, their sizes checked. raw: the contents of all inputs; if it is empty, contents has typed
    ones. most: limit of the elements of each typed input. Raises InvalidRequest."""
    if raw and len(raw) != len(headers):
        raise InvalidRequest(f"raw_input_contents has {len(raw)} entries; allowed: {len(headers)}, one for each input")
    tensors: dict[str, Tensor] = {}
    for index, header in enumerate(headers):
        if raw and header.typed:
            raise InvalidRequest(
                f"{header.where} has contents, and there are raw_input_contents too; allowed: one of them"
            )
        limit = most[header.name]
        tensors[header.name] = (
            _from_raw(header, raw[index], limit) if raw else _from_typed(header, contents[index], limit)
        )
    return tensors


def _from_raw(header: TensorHeader, raw: bytes, most: int) -> Tensor:
    if header.datatype == "BYTES":
        parts = _split(raw, header.where, most)
        _check_count(parts, header, most)
        return np.array(parts, object).reshape(header.shape)
    dtype, _ = DTYPES[header.datatype]
    needed = math.prod(header.shape) * dtype.itemsize
    if len(raw) != needed:
        allowed = f"{needed} for {header.datatype} {list(header.shape)}"
        raise InvalidRequest(f"{header.where} has {len(raw)} bytes; allowed: {allowed}")
    return np.frombuffer(raw, dtype).reshape(header.shape)


def _from_typed(header: TensorHeader, contents: Any, most: int) -> Tensor:
    where, datatype = header.where, header.datatype
    field = "bytes_contents" if datatype == "BYTES" else DTYPES[datatype][1]
    others = {descriptor.name for descriptor, _ in contents.ListFields()} - {field}
    if others:
        raise InvalidRequest(f"{where} has {', '.join(sorted(others))}; allowed: {field} for {datatype}")
    elements: Sequence[Any] = getattr(contents, field)
    _check_count(elements, header, most)
    if len(elements) > MAX_TYPED:
        raise InvalidRequest(
            f"{where} has {len(elements)} elements in {field}; allowed: {MAX_TYPED}, or raw_input_contents"
        )
    values = elements[:]  # a list; faster than list(elements)
    if datatype == "BYTES":
        return np.array(values, object).reshape(header.shape)
    if datatype == "UINT8":
        try:
            return np.frombuffer(bytes(values), np.uint8).reshape(header.shape)
        except ValueError:  # a value does not fit a byte
            raise InvalidRequest(f"{where} has the value {max(values)}; allowed: 0 to 255") from None
    return np.array(values, DTYPES[datatype][0]).reshape(header.shape)


def _check_count(values: Sequence[Any], header: TensorHeader, most: int) -> None:
    count, where = math.prod(header.shape), header.where
    if len(values) != count:
        raise InvalidRequest(f"{where} has {len(values)} elements; allowed: {count} for the shape {list(header.shape)}")
    if count > most:
        raise InvalidRequest(f"{where} has {count} elements; allowed: at most {most}")


def packed(elements: Iterable[bytes]) -> bytes:
    """Raw contents of BYTES: each element after its length in 4 little-endian bytes."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def _split(raw: bytes, where: str, most: int) -> list[bytes]:
    """The inverse of packed."""
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
