"""python -m export verify <bundle>: checks that a bundle is complete and its graphs give the golden answers.

Checksums, then the golden rows through every graph on the CPU. No torch: the server does the same before it is ready.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.bundle import MLP_GATE, Bundle, BundleError, Golden, load_bundle, load_golden
from export.contained import check_contained
from export.session import Arrays, not_finite, open_session, run_onnx

Run = Callable[[Arrays], Arrays]
"""Inputs of a graph -> its outputs."""
GATES = ("head_gate", MLP_GATE)


def verify(folder: Path) -> Bundle:
    """Check a bundle and return it. Raises BundleError, naming the file and what is wrong with it."""
    bundle = load_bundle(folder)
    kinds = [(graph.file, graph.attention, graph.precision) for graph in bundle.manifest.graphs]
    kinds += [(graph.file, "fused", graph.file) for graph in bundle.manifest.specialised]
    for file, attention, rows in kinds:
        path = folder / file
        check_contained(path, bundle.manifest.files)
        try:
            session = open_session(path, attention)
        except Exception as error:  # onnxruntime raises undocumented kinds
            raise BundleError(f"{path}: onnxruntime cannot load it: {error}") from error

        golden = load_golden(folder, rows)
        worst = check_golden(partial(run_onnx, session), golden, path)
        print(f"{file}: golden rows within {worst:.2g} (allowed: {golden.tolerance:g})")
    return bundle


def check_golden(run: Run, golden: Golden, path: Path) -> float:
    """Run the golden rows, one alone and all together. Returns the largest difference of a logit.

    Raises BundleError when an output is not a finite number, a gate disagrees with its logit or with golden.npz, a gate
    logit differs by more than the margin or a logit by more than the tolerance. (Residuals are not in golden.npz:
    they are compared at export.)
    """
    if wrong := not_finite(dict(golden.outputs)):
        raise BundleError(f"{path.parent / 'golden.npz'}: {wrong}; allowed: a finite number")
    int8 = ".int8." in path.name
    cure = ". 8-bit products may saturate here (a CPU without VNNI): take another graph" if int8 else ""
    worst = 0.0
    for rows in (slice(0, 1), slice(None)):
        outputs = run({name: value[rows] for name, value in golden.inputs.items()})
        if wrong := not_finite(outputs):
            raise BundleError(f"{path}: for golden.npz {wrong}; allowed: a finite number")
        gates = unit_gates(outputs)
        if not np.array_equal(gates, outputs["gate_logit"] > 0):
            raise BundleError(f"{path}: {gate_names(outputs)} is not gate_logit > 0")
        expected = golden.outputs["gate_logit"][rows]
        far = np.abs(expected) > golden.margin
        if not np.array_equal(gates[far], (expected > 0)[far]):
            raise BundleError(f"{path}: gates of golden.npz are not reproduced{cure}")
        apart = float(np.abs(outputs["gate_logit"] - expected).max())
        if not apart <= golden.margin:
            raise BundleError(
                f"{path}: gate logits differ from golden.npz by {apart:.3g}; allowed: {golden.margin:.3g}{cure}"
            )
        worst = max(worst, float(np.abs(outputs["logits"] - golden.outputs["logits"][rows]).max()))
        if not worst <= golden.tolerance:
            raise BundleError(
                f"{path}: logits differ from golden.npz by {worst:.3g}; allowed: {golden.tolerance:.3g}{cure}"
            )
    return worst


def unit_gates(outputs: Arrays) -> NDArray[np.bool_]:
    """The gates of all units (B, gated blocks, units): of the heads and, if the model has them, the MLP groups."""
    gates = [outputs[name] for name in GATES if name in outputs]
    return np.concatenate(gates, 2)


def gate_names(outputs: Arrays) -> str:
    """The names of the outputs that unit_gates joins."""
    return " and ".join(name for name in GATES if name in outputs)
