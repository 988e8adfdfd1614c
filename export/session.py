"""Settings of onnxruntime for our graphs, for export, verification and the server. No torch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.bundle import GATE_BIAS, INPUTS, MLP_GATE, OUTPUTS
from training.steering import Terms, to_arrays

Arrays = dict[str, NDArray[Any]]


def session_options(attention: str, threads: int = 0, spinning: bool = False) -> onnxruntime.SessionOptions:
    """threads: 0 for all cores. spinning: whether they spin while they wait for each other within a run, which is
    faster for small batches but slows other work."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # shapes within `dispatch` depend on the data, but a plan helps all the same for a single image (1.58, not 1.75 ms)
    options.enable_mem_pattern = attention != "dispatch" or spinning
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after each run
    return options


def open_session(graph: bytes | Path, attention: str = "masked", threads: int = 0) -> onnxruntime.InferenceSession:
    """A session on the CPU."""
    source = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(source, session_options(attention, threads), ["CPUExecutionProvider"])


def run_onnx(session: onnxruntime.InferenceSession, inputs: Arrays) -> Arrays:
    """All outputs by name, except for those observed for calibration. Inputs that the graph lacks are omitted: a
    specialised graph has only the image. Without GATE_BIAS there are no biases."""
    outputs = [entry.name for entry in session.get_outputs() if entry.name in (*OUTPUTS, MLP_GATE)]
    return dict(zip(outputs, session.run(outputs, inputs_for(session, inputs)), strict=True))


def inputs_for(session: onnxruntime.InferenceSession, inputs: Arrays) -> Arrays:
    """The inputs that the graph has; zeros for GATE_BIAS if it is not given."""
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    own = {name: value for name, value in inputs.items() if name in shapes}
    if GATE_BIAS in shapes.keys() - own.keys():
        own[GATE_BIAS] = np.zeros((len(inputs[INPUTS[0]]), *shapes[GATE_BIAS][1:]), np.float32)
    return own


def not_finite(outputs: Arrays, first: int = 0) -> str:
    """Describe the first value that is not finite in outputs of B images: "logits of row 3 is nan"; "" if all are
    finite.

    first: number of the first row.
    """
    for name, value in outputs.items():
        wrong = np.argwhere(~np.isfinite(value))
        if len(wrong):
            return f"{name} of row {first + wrong[0][0]} is {value[tuple(wrong[0])]}"
    return ""


def inputs_of(images: NDArray[np.uint8], rows: list[Terms], sites: int) -> Arrays:
    """Inputs of a graph: images uint8 (B, height, width, channels), each with its own terms."""
    arrays = to_arrays(rows, sites)
    return dict(zip(INPUTS, (images, arrays.latent, arrays.scale, arrays.shift), strict=True))
