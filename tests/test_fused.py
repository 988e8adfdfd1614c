"""The graphs for GPUs, run on the CPU: against PyTorch, for the kinds of timm models; and whether a GPU can capture
them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import KINDS, SPEC, STEERED, assert_same, images, model_of, of_kind, rows, small, with_other_gates

from export.bundle import INPUTS, OUTPUTS, BundleError, Golden
from export.certify import LIMITS, run_torch
from export.compact import _close
from export.fused import build_fused
from export.graph import SteeredVit, build
from export.precision import Float
from export.session import Arrays, inputs_of, open_session, run_onnx
from export.verify import check_golden
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


def test_a_model_for_images_of_any_size_gives_pytorchs_answers() -> None:
    """Its patches are a grid, of which timm makes tokens only where it adds the positions."""
    steered = model_of(small(dynamic_img_size=True))
    graph = build(steered, SPEC, "fused", {})
    assert_same(run_onnx(open_session(graph.SerializeToString(), "fused"), rows(9)), run_torch(steered, rows(9)))


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


def test_golden_rows_may_have_a_gate_on_its_threshold() -> None:
    """As those of a graph for one profile, which are chosen for all graphs: another machine may decide otherwise."""
    steered, inputs = of_kind("plain"), inputs_of(images(9), [STEERED] * 9, 2)

    def answers(logit: float, other: float = 0.0) -> Arrays:
        """Those of the model whose first gate has this logit for the first image. other: what the classifier adds."""
        model = with_other_gates(steered.model)
        linear = model.gates[0].linear
        for _ in range(20):  # logits are bounded, so a step falls short
            linear.bias[0] += logit - float(run_torch(SteeredVit(model, steered.sae), inputs)["gate_logit"][0, 0, 0])
        outputs = run_torch(SteeredVit(model, steered.sae), inputs)
        return {**outputs, "logits": outputs["logits"] + other}

    def check(found: Arrays, margin: float = 0.05, rows: int = 9) -> float:
        expected = answers(0.001)
        golden = Golden(
            {name: value[:rows] for name, value in inputs.items()},
            {name: expected[name][:rows] for name in ("logits", "gate_logit")}, 1e-3, margin,
        )  # fmt: skip
        return check_golden(lambda part: {k: v[: len(part["image"])] for k, v in found.items()}, golden, Path("x.onnx"))

    below = answers(-0.001)
    assert np.abs(below["logits"] - answers(0.001)["logits"])[0].max() > 2e-3
    assert check(below) < 1e-4
    with pytest.raises(BundleError, match=r"gates of golden\.npz are not reproduced"):
        check(below, margin=0.0005)
    with pytest.raises(BundleError, match=r"logits differ from golden\.npz by 0\.2"):
        check(answers(-0.001, 0.2))
    with pytest.raises(BundleError, match=r"in each row of golden\.npz a gate decides differently"):
        check(below, rows=1)
