"""The graphs against PyTorch, for the kinds of timm models, any gates and any batch; and the contents of a graph."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from small_models import KINDS, SPEC, STEERED, assert_same, images, of_kind, rows, with_other_gates

from export.bundle import INPUTS, OUTPUTS, BundleError
from export.calibration import calibrate
from export.certify import LIMITS, Reference, run_torch
from export.compact import compact
from export.graph import SteeredVit, build
from export.precision import Arithmetic, Float, Int8
from export.session import Arrays, inputs_of, open_session, run_onnx
from export.verify import check_golden
from training.data.splits import Split
from training.steering import SteeringProfile, SteeringTerm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_gives_pytorchs_answers_in_both_graphs(kind: str) -> None:
    steered = of_kind(kind)
    inputs = rows(9)
    expected = run_torch(steered, inputs)
    assert 0.2 < expected["head_gate"].mean() < 0.8
    for attention in ("masked", "dispatch"):
        session = open_session(build(steered, SPEC, attention, {}).SerializeToString(), attention)
        assert_same(run_onnx(session, inputs), expected)


@pytest.fixture(scope="module")
def steered() -> SteeredVit:
    return of_kind("plain")


@pytest.fixture(scope="module")
def graphs(steered: SteeredVit) -> dict[str, bytes]:
    return {name: build(steered, SPEC, name, {}).SerializeToString() for name in ("masked", "dispatch")}


@pytest.fixture(scope="module")
def sessions(graphs: dict[str, bytes]) -> list[onnxruntime.InferenceSession]:
    return [open_session(graph, attention, 1) for attention, graph in graphs.items()]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 13),
    seed=st.integers(0, 1000),
    shift=st.sampled_from([-60.0, -1.0, 0.0, 1.0, 60.0]),
    latent=st.integers(0, 11),
    site=st.integers(0, 1),
)
def test_any_batch_and_any_gates(
    steered: SteeredVit,
    sessions: list[onnxruntime.InferenceSession],
    batch: int,
    seed: int,
    shift: float,
    latent: int,
    site: int,
) -> None:
    """Shifts of 60 close or open whole blocks; one row and odd batches are among the examples."""
    inputs = inputs_of(images(batch, seed), [{site: (SteeringTerm(latent, 1.0, shift),)}] * batch, 2)
    expected = run_torch(steered, inputs)
    clear = (np.abs(expected["gate_logit"]) > 1e-3).all((1, 2))
    for session in sessions:
        found = run_onnx(session, inputs)
        assert_same(*({name: value[clear] for name, value in answer.items()} for answer in (found, expected)))


@pytest.mark.parametrize("bias", [-4.0, 4.0])
def test_all_heads_off_and_all_heads_on(bias: float) -> None:
    model = with_other_gates(of_kind("plain").model)
    for gate in model.gates:
        gate.linear.weight.zero_()
        gate.linear.bias.fill_(bias)
    steered = SteeredVit(model, of_kind("plain").sae)
    for batch in (1, 4):
        expected = run_torch(steered, rows(batch))
        assert (expected["head_gate"] == (bias > 0)).all()
        for attention in ("masked", "dispatch"):
            session = open_session(build(steered, SPEC, attention, {}).SerializeToString(), attention)
            assert_same(run_onnx(session, rows(batch)), expected)


def test_a_closed_head_is_not_computed(graphs: dict[str, bytes], steered: SteeredVit) -> None:
    """Shown by the graph: with each head's queries as outputs, only open rows come out."""
    model = onnx.load_from_string(graphs["dispatch"])
    names = [f"block{b}/head{h}/query" for b in (1, 2) for h in range(3)]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    session = open_session(model.SerializeToString(), "dispatch")
    gate, *queries = session.run(["head_gate", *names], rows(11))
    assert [len(query) for query in queries] == gate.sum(0).flatten().tolist()


def saturates() -> bool:
    """Whether this CPU lacks exact products of uint8 and int8 (VNNI); a server on it refuses int8 graphs."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "avx_vnni"
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


exact_int8 = pytest.mark.skipif(saturates(), reason="8-bit products saturate on this CPU, which has no VNNI")


@exact_int8
@pytest.mark.parametrize("attention", ["masked", "dispatch"])
def test_int8_stays_close_and_its_rows_are_independent(steered: SteeredVit, attention: str) -> None:
    inputs = rows(64)
    ranges = calibrate(steered, SPEC, [inputs])
    graph = build(steered, SPEC, attention, {}, Int8(ranges)).SerializeToString()
    session, expected = open_session(graph, attention), run_torch(steered, inputs)
    found = run_onnx(session, inputs)
    assert (found["head_gate"] == expected["head_gate"]).mean() > 0.98
    alike = (found["head_gate"] == expected["head_gate"]).all((1, 2))
    spread = expected["logits"].std()
    assert np.abs(found["logits"] - expected["logits"])[alike].max() < 0.25 * spread
    outlier = {name: value.copy() for name, value in inputs.items()}
    outlier["image"][1:] = 255 * (images(63, 5) > 127)
    np.testing.assert_allclose(run_onnx(session, outlier)["logits"][0], found["logits"][0], atol=1e-5)
    alone = run_onnx(session, {name: value[:1] for name, value in inputs.items()})
    np.testing.assert_allclose(alone["logits"][0], found["logits"][0], atol=1e-5)
    assert len(graph) < len(build(steered, SPEC, attention, {}).SerializeToString())


class MatMulIntegerToFloat(OpRun):
    """uint8 x int8, exact, as it should be."""

    op_domain = "com.microsoft"

    def products(self, x: NDArray[np.int64], w: NDArray[np.int64]) -> NDArray[np.int64]:
        """x (..., in / 2, 2) and w (in / 2, 2, out) -> sums of two products each, (..., in / 2, out)."""
        return np.einsum("...kp,kpo->...ko", x, w)

    def _run(self, *inputs: Any) -> tuple[NDArray[np.float32]]:
        x, w, x_scale, w_scale, x_zero, _, *bias = inputs
        pairs = x.astype(np.int64).reshape(*x.shape[:-1], -1, 2)
        wide = w.astype(np.int64)
        total = self.products(pairs, wide.reshape(-1, 2, w.shape[1])).sum(-2) - x_zero.astype(np.int64) * wide.sum(0)
        return ((total * (x_scale * w_scale) + sum(bias)).astype(np.float32),)


class Saturating(MatMulIntegerToFloat):
    """As on a CPU with AVX2 but no VNNI: two products are added in 16 bits (VPMADDUBSW)."""

    op_domain = "com.microsoft"

    def products(self, x: NDArray[np.int64], w: NDArray[np.int64]) -> NDArray[np.int64]:
        return super().products(x, w).clip(-(2**15), 2**15 - 1)


Saturating.__name__ = MatMulIntegerToFloat.__name__  # by which it is found


@exact_int8
def test_golden_rows_of_int8_tell_a_machine_that_saturates() -> None:
    steered = of_kind("distilled")
    ranges = calibrate(steered, SPEC, [rows(64)])
    graphs = {name: build(steered, SPEC, name, {}, Int8(ranges)) for name in ("masked", "dispatch")}
    reference = Reference(steered, images(24), [{}, STEERED], images(2), np.zeros(2, np.int64))
    golden = reference.golden({"int8": graphs["masked"].SerializeToString()})["int8"]
    assert golden.tolerance < 0.5 * LIMITS["int8"].logit
    path = Path("masked.int8.onnx")
    dispatch = open_session(graphs["dispatch"].SerializeToString(), "dispatch")
    assert check_golden(partial(run_onnx, dispatch), golden, path) < 0.5 * golden.tolerance
    exact, saturating = (
        ReferenceEvaluator(graphs["masked"], new_ops=[product]) for product in (MatMulIntegerToFloat, Saturating)
    )

    def run(evaluator: ReferenceEvaluator, inputs: Arrays) -> Arrays:
        return dict(zip(OUTPUTS, evaluator.run(list(OUTPUTS), inputs), strict=True))

    assert check_golden(partial(run, exact), golden, path) < 0.5 * golden.tolerance
    with pytest.raises(BundleError, match=r"differ from golden.npz by .* may saturate here \(a CPU without VNNI\)"):
        check_golden(partial(run, saturating), golden, path)


def test_float16_decides_as_float32_but_near_the_threshold(steered: SteeredVit) -> None:
    inputs = rows(64)
    expected = run_torch(steered, inputs)
    graph = build(steered, SPEC, "masked", {}, Float(np.float16))
    found = run_onnx(open_session(graph.SerializeToString()), inputs)
    flips = found["head_gate"] != expected["head_gate"]
    assert np.abs(expected["gate_logit"][flips]).max(initial=0) < LIMITS["fp16"].gate_margin
    alike = ~flips.any((1, 2))
    assert alike.mean() > 0.9
    np.testing.assert_allclose(found["logits"][alike], expected["logits"][alike], atol=0.05)
    kinds = {w.name: w.data_type for w in graph.graph.initializer}
    assert kinds["block1/key.weight"] == onnx.TensorProto.FLOAT16
    assert kinds["block1/gate/linear.weight"] == kinds["block1/steering/decoder.weight"] == onnx.TensorProto.FLOAT


def test_compact_leaves_out_what_the_profile_does_not_use(steered: SteeredVit) -> None:
    pixels = images(40)
    classes = torch.arange(40) % 5
    profile = SteeringProfile("two", ("c2",), "learned", STEERED, {})
    labels = tuple(f"c{index}" for index in range(5))
    split = Split(torch.from_numpy(pixels), classes)
    inputs = inputs_of(pixels, [STEERED] * 40, 2)
    before = run_torch(steered, inputs)["head_gate"]
    usage = before[classes.numpy() == 2].mean(0)
    smaller = compact(steered.model, steered.sae, profile, labels, split, 0.5)
    assert smaller.kept == tuple(tuple(np.flatnonzero(row >= 0.5)) for row in usage)
    assert 0 < sum(map(len, smaller.kept)) < 6
    assert smaller.after.head_usage <= smaller.before.head_usage
    model = SteeredVit(smaller.model, steered.sae)
    expected = run_torch(model, inputs)
    removed = np.array([[head not in kept for head in range(3)] for kept in smaller.kept])
    assert not expected["head_gate"][:, removed].any()
    whole = build(steered, SPEC, "masked", {}).ByteSize()
    for attention in ("compact", "dispatch"):
        graph = build(model, SPEC, attention, {}, kept=smaller.kept)
        assert_same(run_onnx(open_session(graph.SerializeToString(), attention), inputs), expected)
        assert graph.ByteSize() < whole
    assert (run_torch(steered, inputs)["head_gate"] == before).all()  # the model itself was not changed


ARITHMETIC: dict[str, Callable[[SteeredVit], Arithmetic]] = {
    "fp32": lambda _: Float(),
    "int8": lambda steered: Int8(calibrate(steered, SPEC, [rows(8)])),
    "fp16": lambda _: Float(np.float16),
}


@pytest.mark.parametrize("precision", ARITHMETIC)
@pytest.mark.parametrize("attention", ["masked", "dispatch"])
def test_what_is_in_a_graph(steered: SteeredVit, attention: str, precision: str) -> None:
    metadata = {"model": "m", "version": "3", "labels": '["a"]'}
    model = build(steered, SPEC, attention, metadata, ARITHMETIC[precision](steered))
    assert {entry.key: entry.value for entry in model.metadata_props} == metadata
    assert [i.name for i in model.graph.input] == list(INPUTS)
    assert [o.name for o in model.graph.output] == list(OUTPUTS)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    constants = {weight.name for weight in model.graph.initializer}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    for node in model.graph.node:
        if node.op_type in ("Slice", "Transpose"):
            assert node.input[0] not in constants, f"{node.name} works on a constant"
    of_blocks = {name.split("/")[0] for name in names}
    assert {"stem", "block0", "block1", "block2", "classifier"} <= of_blocks
    if attention == "dispatch":
        assert sum(node.op_type == "NonZero" for node in model.graph.node) == 2
        assert {f"block2/head{head}/scores" for head in range(3)} <= set(names)
    content = model.SerializeToString()
    for trace in (b"/root", b"/home", b"site-packages", b".py", b"stack_trace", b"torch", b"pkg."):
        assert trace not in content, trace


def test_an_mlp_of_another_kind_is_in_an_int8_graph_too() -> None:
    """As PyTorch's exporter writes it."""
    steered = of_kind("gated MLP")
    inputs = rows(5)
    graph = build(steered, SPEC, "dispatch", {}, Int8(calibrate(steered, SPEC, [inputs])))
    found = run_onnx(open_session(graph.SerializeToString(), "dispatch"), inputs)
    assert (found["head_gate"] == run_torch(steered, inputs)["head_gate"]).mean() > 0.9
