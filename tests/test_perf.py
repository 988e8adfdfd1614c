"""What the benches rest on: forced gates are the gates that were asked for, and rows say what they measured."""

import json

import numpy as np
import pytest

from tests.perf import heads


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> heads.Model:
    heads.OUT = tmp_path_factory.mktemp("bench")
    return heads.fashion_mnist()


def test_forced_gates_are_those_that_were_asked_for(model: heads.Model) -> None:
    session = heads.open_session(model.graph("dispatch", "fp32"), "dispatch")
    for usage, kind, kept in ((1.0, "random", 6), (1 / 3, "random", 2), (1 / 6, "uniform", 1)):
        gates = heads.patterns(model, 8, usage, kind)
        assert (gates.sum(2) == kept).all()
        (found,) = session.run(["head_gate"], model.inputs(gates))
        np.testing.assert_array_equal(found, gates)
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
