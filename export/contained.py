"""Checks that the weights of an ONNX file are in that file or in another file of the manifest.

A tensor may name any path for its values, so a graph from outside could make the runtime read files without a checksum.
The file is read with protobuf's generic reader, as the server has no onnx package; the numbers are those of onnx.proto.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from export.bundle import BundleError

NESTED = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
"""The fields through which a tensor can be reached, by message."""
TENSOR_NAME, EXTERNAL_DATA = 8, 13
KEY, VALUE = 1, 2


def check_contained(path: Path, files: Collection[str]) -> None:
    """Raise BundleError, naming the tensor, when a tensor of an ONNX file has its values in a file that is not
    listed."""
    try:
        for name, location in _elsewhere("Model", path.read_bytes()):
            if location not in files:
                raise BundleError(
                    f"{path}: the values of tensor {name!a} are in {location!a}; allowed: a file of the manifest"
                )
    except (DecodeError, RecursionError) as error:
        raise BundleError(f"{path}: not an ONNX file: {error}") from error


def _elsewhere(kind: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Names of the tensors in a message that have their values in another file, and that file."""
    fields = _fields(content)
    if kind == "Tensor":
        name = dict(fields).get(TENSOR_NAME, b"")
        for entry in (dict(_fields(data)) for number, data in fields if number == EXTERNAL_DATA):
            if entry.get(KEY) == b"location":
                yield name.decode(errors="replace"), entry.get(VALUE, b"").decode(errors="replace")
    for number, data in fields:
        if inner := NESTED[kind].get(number):
            yield from _elsewhere(inner, data)


def _fields(content: bytes) -> list[tuple[int, bytes]]:
    """Numbers and contents of strings and messages, in order. The last occurrence of a field counts."""
    fields = UnknownFieldSet(Empty.FromString(content))
    return [(field.field_number, field.data) for field in fields if isinstance(field.data, bytes)]  # type: ignore[attr-defined]
