"""Writes an ONNX graph node by node, with names that people can read in Netron.

A value is represented by its name. A node has the name of its first output, a path such as `block3/head2/query`.
"""

import logging
import math
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data
from torch import Tensor, nn

OPSET = 20
IR_VERSION = 10
MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""
EXTERNAL_FROM = 1_900_000_000
"""Weights of this many bytes or more go into a file beside the graph: a protobuf message has at most 2 GiB."""

_PARTS: MutableMapping[nn.Module, dict[str, onnx.GraphProto]] = WeakKeyDictionary()
"""Graphs that the exporter has written, by model and name of the part."""


class Builder:
    """Collects the nodes, weights and outputs of a graph, until `finish` makes a model of them.

    Every method that names something raises ValueError when the name is taken.
    """

    def __init__(self, real: type[np.floating[Any]] = np.float32) -> None:
        """real: the type of the tokens and the weights that meet them, float32 or float16."""
        self._real = real
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, TensorProto] = {}
        self._names: set[str] = set()
        self._outputs: list[onnx.ValueInfoProto] = []

    def op(self, kind: str, *inputs: str, name: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; returns its name."""
        return self.ops(kind, *inputs, names=(name,), domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: str, names: Sequence[str], domain: str = "", **attributes: Any) -> Sequence[str]:
        """Add a node with several outputs; returns their names. An unused output has the name ""."""
        self._take(*filter(None, names))
        self._nodes.append(helper.make_node(kind, inputs, names, name=names[0], domain=domain, **attributes))
        return names

    def weight(self, name: str, array: ArrayLike | Tensor, dtype: Any = None) -> str:
        """Add a constant with a name of its own. dtype: by default that of the tokens."""
        value = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
        self._take(name)
        self._weights[name] = numpy_helper.from_array(np.ascontiguousarray(value.astype(dtype or self._real)), name)
        return name

    def integers(self, *values: int) -> str:
        """An int64 vector; equal ones are one constant."""
        return self._shared("integers", np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """An int64 scalar; equal ones are one constant."""
        return self._shared("integer", np.array(value, np.int64))

    def matrix(self, value: int) -> str:
        """int64 (1, 1)."""
        return self._shared("matrix", np.array([[value]], np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar; equal ones are one constant."""
        return self._shared("number", np.array(value, np.float32))

    def _shared(self, kind: str, array: NDArray[Any]) -> str:
        name = f"{kind}/{'x'.join(map(str, array.flatten().tolist()))}"
        if name not in self._weights:
            self._take(name)
            self._weights[name] = numpy_helper.from_array(array, name)
        return name

    def _take(self, *names: str) -> None:
        for name in names:
            if name in self._names:
                raise ValueError(f"the name {name} is taken")
            self._names.add(name)

    def affine(self, norm: nn.LayerNorm, name: str, dtype: Any = None) -> tuple[str, str]:
        """The constants <name>.weight and <name>.bias of a norm, 1 and 0 if it has none. dtype: as for `weight`."""
        weight = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight
        bias = torch.zeros(norm.normalized_shape) if norm.bias is None else norm.bias
        return self.weight(f"{name}.weight", weight, dtype), self.weight(f"{name}.bias", bias, dtype)

    def norm(self, norm: nn.Module, value: str, example: Tensor, name: str, dtype: Any = None) -> str:
        """A norm of the last axis; kinds other than LayerNorm go through the exporter. dtype: as for `weight`."""
        if not isinstance(norm, nn.LayerNorm):
            return self.call(norm, value, example, name)
        parameters = self.affine(norm, name, dtype)
        return self.op("LayerNormalization", value, *parameters, name=name, axis=-1, epsilon=norm.eps)

    def first(self, tokens: str, count: int, name: str) -> str:
        """(B, N, D) -> (B, count, D)"""
        return self.op("Slice", tokens, self.integers(0), self.integers(count), self.integers(1), name=name)

    def real(self, value: str, name: str) -> str:
        """A float32 or bool value, cast to the type of the tokens."""
        return self.op("Cast", value, name=name, to=helper.np_dtype_to_tensor_dtype(np.dtype(self._real)))

    def float32(self, value: str, name: str) -> str:
        """A value of the tokens, cast to float32."""
        return value if self._real is np.float32 else self.op("Cast", value, name=name, to=TensorProto.FLOAT)

    def call(self, module: nn.Module, value: str, example: Tensor, name: str, of: nn.Module | None = None) -> str:
        """A module of one input and one output, with the batch on axis 0, as PyTorch's exporter writes it.

        It computes in float32; the output has the type of the tokens. of: the model that the module is a part of, if
        all graphs of the model share this part: the exporter takes seconds, so it writes the part only once.
        """
        parts = {} if of is None else _PARTS.setdefault(of, {})
        if name not in parts:
            parts[name] = exported(module, example)
        part = onnx.GraphProto()
        part.CopyFrom(parts[name])
        out = name if self._real is np.float32 else f"{name}/float32"
        value = self.float32(value, f"{name}/input") if example.dtype == torch.float32 else value
        renamed = {part.input[0].name: value, part.output[0].name: out}

        def rename(old: str) -> str:
            return old and renamed.setdefault(old, f"{name}/{old}")

        for tensor in part.initializer:
            tensor.name = rename(tensor.name)
            self._take(tensor.name)
            self._weights[tensor.name] = tensor
        for node in part.node:
            node.name = f"{name}/{node.name}"
            node.input[:] = [rename(old) for old in node.input]
            node.output[:] = [rename(old) for old in node.output]
            self._take(*filter(None, node.output))
            self._nodes.append(node)
        return name if out == name else self.real(out, name)

    def output(self, value: str, name: str, shape: Sequence[str | int], kind: int = TensorProto.FLOAT) -> None:
        """Make a value an output of the graph. shape: a size or a symbol for each axis; kind: element type."""
        self.op("Identity", value, name=name)
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def finish(
        self, inputs: Mapping[str, tuple[int, Sequence[str | int]]], metadata: Mapping[str, str]
    ) -> onnx.ModelProto:
        """The model, checked. inputs: element type and shape by name."""
        described = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        graph = helper.make_graph(self._nodes, "steervit", described, self._outputs, list(self._weights.values()))
        return checked(graph, metadata)


def checked(graph: onnx.GraphProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """A model of the graph without the exporter's notes (stack traces, local paths), validated by onnx's checker."""
    parts: list[onnx.GraphProto | onnx.NodeProto | onnx.ValueInfoProto | TensorProto]
    parts = [graph, *graph.node, *graph.value_info, *graph.initializer]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    domains = {node.domain for node in graph.node}
    opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(MICROSOFT, 1)] * (MICROSOFT in domains)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="steervit")
    helper.set_model_props(model, dict(metadata))
    if weight_bytes(model) < EXTERNAL_FROM:
        onnx.checker.check_model(model, full_check=True)
    return model


def weight_bytes(model: onnx.ModelProto) -> int:
    """Size of the weights within the model, in bytes, without those in a file beside it."""
    return sum(
        math.prod(weight.dims) * helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        for weight in model.graph.initializer
        if not uses_external_data(weight)
    )


def save(model: onnx.ModelProto, path: Path, external_from: int = EXTERNAL_FROM) -> list[Path]:
    """Write the model; returns its files: a large one's weights are in <path>.data. They are moved out of `model`."""
    if weight_bytes(model) < external_from:
        path.write_bytes(model.SerializeToString())
        return [path]
    beside = path.with_name(f"{path.name}.data")
    onnx.save_model(model, path, save_as_external_data=True, location=beside.name, size_threshold=1024)
    onnx.checker.check_model(path, full_check=True)
    return [path, beside]


def exported(module: nn.Module, example: Tensor) -> onnx.GraphProto:
    """The graph of one module in evaluation mode. example (batch, ...), any batch."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs every node that it leaves unconverted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # internal to the exporter; certify.py checks the result
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto.graph
