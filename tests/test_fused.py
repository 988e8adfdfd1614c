"""The graphs for GPUs, run on the CPU: against PyTorch, for the kinds of timm models; and whether a GPU can capture
them."""

import numpy as np
import onnx
import pytest
from small_models import KINDS, SPEC, STEERED, assert_same, images, of_kind, rows, with_other_gates

from export.bundle import INPUTS, OUTPUTS
from export.certify import LIMITS, run_torch
from export.compact import _close
from export.fused import build_fused
from export.graph import SteeredVit, build
from export.precision import Float
from export.session import inputs_of, open_session, run_onnx
from training.steering import SteeringTerm, Terms

pytestmark = pytest.mark.slow

CAPTURED = {
    "Add", "Attention", "BiasGelu", "Cast", "Concat", "Div", "FastGelu", "Gather", "Gelu", "Gemm", "Greater",
    "Identity",    "LayerNormalization", "MatMul", "Mul", "MultiHeadAttention", "Pad", "Reshape", "ScatterElements",
    "SkipLayerNormalization", "Slice", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Where",
}  # fmt: skip
"""Operators that a GPU has and whose shapes depend on no data: neither NonZero nor Shape, If or Loop."""
AS_EXPORTED = {"registers and layer scale", "gated MLP", "normed queries and keys", "pre-norm without biases"}
"""Kinds with a part that goes through PyTorch's exporter, with its own operators."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_gives_pytorchs_answers(kind: str) -> None:
    steered = of_kind(kind)
    inputs = rows(9)
    expected = run_torch(steered, inputs)
    graph = build(steered, SPEC, "fused", {"model": "m"})
    assert_same(run_onnx(open_session(graph.SerializeToString(), "fused"), inputs), expected)
    half = build(steered, SPEC, "fused", {}, Float(np.float16))
    found = run_onnx(open_session(half.SerializeToString(), "fused"), inputs)
    flips = found["head_gate"] != expected["head_gate"]
    assert np.abs(expected["gate_logit"][flips]).max(initial=0) < LIMITS["fp16"].gate_margin
    np.testing.assert_allclose(found["logits"][~flips.any((1, 2))], expected["logits"][~flips.any((1, 2))], atol=0.05)
    kinds = {weight.name: weight.data_type for weight in half.graph.initializer}
    gates = [name for name in kinds if "/gate/" in name or "/steering/" in name]
    assert gates
    assert {kinds[name] for name in gates} == {onnx.TensorProto.FLOAT}, "gates and steering are in float32"
    for model in (graph, half):
        assert [entry.name for entry in model.graph.input] == list(INPUTS)
        assert [entry.name for entry in model.graph.output] == list(OUTPUTS)
        others = {node.op_type for node in model.graph.node} - CAPTURED
        assert kind in AS_EXPORTED or not others, others
        assert not {"NonZero", "If", "Loop", "Scan", "GatherND", "ScatterND"} & others


TERMS: dict[str, Terms] = {
    "none": {},
    "shifts alone": {0: (SteeringTerm(3, 1.0, 2.0), SteeringTerm(5, 1.0, -3.0)), 1: (SteeringTerm(0, 1.0, 1.5),)},
    "scales alone": {1: (SteeringTerm(2, -1.0, 0.0), SteeringTerm(11, 4.0, 0.0))},
    "both": STEERED,
    "off and on": {0: (SteeringTerm(1, 0.0, 0.0), SteeringTerm(2, 1.0, 0.0), SteeringTerm(4, 0.0, 5.0))},
}


@pytest.mark.parametrize(
    ("terms", "kept"),
    [
        ("none", ((0, 1, 2), (0, 1, 2))),
        ("shifts alone", ((0, 2), (1,))),
        ("scales alone", ((0, 1, 2), (0, 1, 2))),
        ("both", ((0, 2), (1,))),
        ("both", ((), (1,))),
        ("off and on", ((), ())),
    ],
)
def test_a_graph_for_one_steering_has_its_terms_and_heads_alone(terms: str, kept: tuple[tuple[int, ...], ...]) -> None:
    steered = of_kind("plain")
    model = with_other_gates(steered.model)
    for gate, heads in zip(model.gates, kept, strict=True):
        _close(gate, heads)
    inputs = inputs_of(images(9), [TERMS[terms]] * 9, 2)
    expected = run_torch(SteeredVit(model, steered.sae), inputs)
    graph = build_fused(model, steered.sae, SPEC, {}, np.float32, kept, TERMS[terms])
    assert [entry.name for entry in graph.graph.input] == ["image"]
    assert {node.op_type for node in graph.graph.node} <= CAPTURED
    assert_same(run_onnx(open_session(graph.SerializeToString(), "fused"), inputs), expected)
    if terms != "both":
        return
    general = build_fused(model, steered.sae, SPEC, {}, np.float32, kept)
    assert_same(run_onnx(open_session(general.SerializeToString(), "fused"), inputs), expected)
    assert graph.ByteSize() < general.ByteSize()
