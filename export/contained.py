"""Whether an ONNX file keeps all of its weights in itself.

A tensor may name another file for its values, by any path: a graph from outside could have the runtime read what it
likes, past the manifest's checksums. Ours never do, so one that does is refused. The file is read with protobuf's
generic reader, as the server has no onnx package; the numbers are those of onnx.proto.
"""

from collections.abc import Iterator
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
"""By message, the fields through which a tensor can be reached."""
TENSOR_NAME, EXTERNAL_DATA, DATA_LOCATION = 8, 13, 14


def check_self_contained(path: Path) -> None:
    """Raise BundleError, naming the tensor, when a tensor of an ONNX file has its values elsewhere."""
    try:
        name = next(_outside("Model", path.read_bytes()), None)
    except (DecodeError, RecursionError) as error:
        raise BundleError(f"{path}: not an ONNX file: {error}") from error
    if name is not None:
        raise BundleError(f"{path}: the values of tensor {name} are in another file; allowed: none but this one")


def _outside(kind: str, content: bytes) -> Iterator[str]:
    """Names of the tensors in a message that have their values elsewhere."""
    fields = list(UnknownFieldSet(Empty.FromString(content)))  # type: ignore[call-overload]  # it can be iterated
    if kind == "Tensor":
        values = {field.field_number: field.data for field in fields}
        if values.get(EXTERNAL_DATA) or values.get(DATA_LOCATION):
            yield ascii(values.get(TENSOR_NAME, b""))
    for field in fields:
        inner = NESTED[kind].get(field.field_number)
        if inner and isinstance(field.data, bytes):
            yield from _outside(inner, field.data)
