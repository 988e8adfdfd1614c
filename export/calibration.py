"""Ranges of the inputs of linear layers on real images under real steerings, for the scales of int8."""

from collections.abc import Iterable

import numpy as np

from export.graph import SteeredVit, build
from export.precision import Float, Range
from export.session import Arrays, inputs_for, open_session
from training.image_spec import ImageSpec


def calibrate(steered: SteeredVit, spec: ImageSpec, batches: Iterable[Arrays]) -> dict[str, Range]:
    """The lowest and the highest value by the key of precision.Operand. batches: inputs of the graph, with or without
    gate biases."""
    graph = build(steered, spec, "masked", {}, Float(observe=True), gate_bias=True)
    session = open_session(graph.SerializeToString())
    names = [output.name for output in session.get_outputs() if output.name.startswith("observed/")]
    ranges: dict[str, Range] = {}
    for batch in batches:
        for name, value in zip(names, session.run(names, inputs_for(session, batch)), strict=True):
            key = name.removeprefix("observed/")
            low, high = ranges.get(key, (np.inf, -np.inf))
            ranges[key] = min(low, float(value.min())), max(high, float(value.max()))
    return ranges
