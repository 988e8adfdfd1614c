"""The basis of the benches: forced gates are as requested, and rows state what they measured."""

import json
from pathlib import Path

import grpc
import numpy as np
import pytest
from processes import ServerProcess

from export.session import open_session
from service.pb import open_inference_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.perf import heads, peers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> heads.Model:
    heads.OUT = tmp_path_factory.mktemp("bench")
    return heads.fashion_mnist()


def test_forced_gates_are_those_that_were_asked_for(model: heads.Model) -> None:
    session = open_session(model.graph("dispatch", "fp32"), "dispatch")
    asked = ((1.0, 1.0, "random", 10), (1 / 3, 1 / 2, "random", 4), (1 / 6, 0.0, "uniform", 1))
    for usage, groups, kind, kept in asked:
        gates = heads.patterns(model, 8, usage, kind, groups)
        assert (gates.sum(2) == kept).all()
        (found,) = session.run(["gate_logit"], model.inputs(gates))
        np.testing.assert_array_equal(found > 0, gates)
    rows = heads.patterns(model, 8, 1 / 3, "random")
    assert len({row.tobytes() for row in rows}) == 8
    assert len({row.tobytes() for row in heads.patterns(model, 8, 1 / 3, "uniform")}) == 1


def test_a_row_is_compared_with_the_fastest_plain_model(model: heads.Model) -> None:
    def cell(variant: str, usage: float) -> heads.Cell:
        return heads.Cell(model.name, variant, "fp32", 2, 1, usage, "random")

    cells = [cell("dense", 1.0), cell("by_head", 1.0), cell("dispatch", 1 / 3)]
    rows = {row.variant: row for row in heads.measure(model, cells, rounds=3, seconds=0.0)}
    fastest = min((rows[plain] for plain in ("dense", "by_head")), key=lambda row: row.ms)
    assert fastest.ratio_to_dense == fastest.efficiency == 1.0
    dispatch = rows["dispatch"]
    closed = 1 - (1 - 1 / 3) * 6 * sum(model.macs.per_head) / model.macs.dense
    assert dispatch.ideal == pytest.approx(closed)
    assert dispatch.low <= dispatch.ms <= dispatch.high
    assert dispatch.efficiency_low <= dispatch.efficiency <= dispatch.efficiency_high
    json.dumps([row.__dict__ for row in rows.values()])


def test_triton_gives_the_answers_of_our_server(tmp_path: Path, server: ServerProcess) -> None:
    subject = peers.committed()
    pixels = b"".join(subject.pixels(subject.bundle.manifest)[:3])
    request = pb.ModelInferRequest(model_name=subject.name, raw_input_contents=[pixels])
    request.inputs.add(name="image", datatype="UINT8", shape=[3, *subject.bundle.manifest.image.shape])
    outputs = []
    try:
        with peers.triton(subject, 1, 2, tmp_path) as address:
            for peer in (address, server.address):
                with grpc.insecure_channel(peer) as channel:
                    stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
                    outputs.append(stub.ModelInfer(request, timeout=30))
    except peers.Unavailable as reason:
        pytest.skip(str(reason))
    theirs, ours = outputs
    assert [(o.name, o.datatype, list(o.shape)) for o in theirs.outputs] == [
        (o.name, o.datatype, list(o.shape)) for o in ours.outputs
    ]
    logits, expected = (np.frombuffer(o.raw_output_contents[0], "<f4") for o in outputs)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_server_is_compared_with_triton_at_its_best_setting_round_by_round() -> None:
    rates = {"steervit": (100.0, 330.0, 500.0), "Triton: 1 thread": (100.0, 300.0, 200.0), "Triton: 2": (50, 400, 400)}
    rows = [
        peers.Row("m", 1, 8, peer, peer.startswith("Triton"), number, rate, 1000 / rate, 2000 / rate)
        for peer, of in rates.items()
        for number, rate in enumerate(of)
    ]
    ((title, _, _, peer, *figures),) = peers.lines(peers.summaries(rows), {"m": "Model"})
    assert (title, peer) == ("Model", "steervit")
    # medians; the ratios of the rounds are 2, 0.825 and 1.25
    assert figures == ["330", "3.0", "6.1", "400", "2.5", "5.0", "2", "1.25"]
