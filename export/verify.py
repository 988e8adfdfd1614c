"""python -m export verify <bundle>: checks that a bundle is complete and its graphs give the golden answers.

Checksums and weights, then the golden rows through every graph on the CPU. No torch: the server does the same before it
is ready.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from export.bundle import (
    GATE_BIAS,
    INPUTS,
    MLP_GATE,
    Bundle,
    BundleError,
    Golden,
    Manifest,
    gates_sae_digest,
    load_bundle,
    load_golden,
)
from export.contained import check_contained
from export.session import Arrays, not_finite, open_session, run_onnx

Run = Callable[[Arrays], Arrays]
"""Inputs of a graph -> its outputs."""
GATES = ("head_gate", MLP_GATE)


def verify(folder: Path) -> Bundle:
    """Check a bundle and return it. Raises BundleError, naming the file and what is wrong with it."""
    bundle = load_bundle(folder)
    manifest = bundle.manifest
    load_weights(folder, manifest)
    kinds = [(graph.file, graph.attention, graph.precision) for graph in manifest.graphs]
    kinds += [(graph.file, "fused", graph.file) for graph in manifest.specialised]
    for file, attention, rows in kinds:
        path = folder / file
        check_contained(path, manifest.files)
        try:
            session = open_session(path, attention)
        except Exception as error:  # onnxruntime raises undocumented kinds
            raise BundleError(f"{path}: onnxruntime cannot load it: {error}") from error

        if rows != file:
            check_takes_biases({entry.name for entry in session.get_inputs()}, manifest, path)
        golden = load_golden(folder, rows)
        worst = check_graph(partial(run_onnx, session), golden, path, manifest)
        print(f"{file}: golden rows within {worst:.2g} (allowed: {golden.tolerance:g})")
    return bundle


def load_weights(folder: Path, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """The tensors of sae.safetensors. Raises BundleError unless they are those of the manifest."""
    path = folder / "sae.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    digest = gates_sae_digest(weights, manifest.gated_blocks)
    if digest != manifest.gates_sae_digest:
        raise BundleError(f"{path} has the digest {digest}; the manifest says {manifest.gates_sae_digest!a}")
    shape, sites = weights["encoder"].shape, len(manifest.sites)
    if {shape} != {(sites, latents, manifest.dim) for latents in manifest.latents}:
        raise BundleError(
            f"{path}: encoder has the shape {list(shape)}; the manifest says {sites} sites of {list(manifest.latents)} "
            f"latents and the width {manifest.dim}"
        )
    return weights


def check_takes_biases(inputs: Collection[str], manifest: Manifest, path: Path) -> None:
    """Raise BundleError unless a graph for all profiles has the input for gate biases, if the manifest says so."""
    if manifest.takes_biases and GATE_BIAS not in inputs:
        raise BundleError(f"{path}: there is no input {GATE_BIAS}; allowed: one")


def check_graph(run: Run, golden: Golden, path: Path, manifest: Manifest) -> float:
    """As check_golden; also raises BundleError when inputs or outputs have other shapes than the manifest says, or the
    rows cannot be run."""
    try:
        _check_shapes(run, golden, path, manifest)
        return check_golden(run, golden, path)
    except BundleError:
        raise
    except Exception as error:  # from onnxruntime or numpy: the rows do not fit the graph
        raise BundleError(f"{path}: the rows of golden.npz cannot be run: {error}") from error


def _check_shapes(run: Run, golden: Golden, path: Path, manifest: Manifest) -> None:
    """Raise BundleError unless inputs and outputs have the shapes of the manifest, by which answers are read."""
    blocks, sites, units = len(manifest.gated_blocks), len(manifest.sites), manifest.units

    def require(arrays: Mapping[str, NDArray[Any]], allowed: Mapping[str, tuple[int, ...]], where: Path) -> None:
        for name, shape in allowed.items():
            if name not in arrays:
                raise BundleError(f"{where}: there is no output {name}; allowed: one")
            if (of_row := arrays[name].shape[1:]) != shape:
                raise BundleError(
                    f"{where}: {name} has the shape {list(of_row)} an image; the manifest says {list(shape)}"
                )

    inputs = {name: value[:1] for name, value in golden.inputs.items()}
    terms = {name: (sites, inputs[name].shape[-1]) for name in INPUTS[1:]}
    biases = {GATE_BIAS: (blocks, units)} if GATE_BIAS in inputs else {}
    answers = {"logits": (len(manifest.labels),), "gate_logit": (blocks, units)}
    in_golden = {"image": manifest.image.shape, **terms, **biases, **answers}
    require({**inputs, **golden.outputs}, in_golden, path.with_name("golden.npz"))
    mlp_gate = {MLP_GATE: (blocks, manifest.mlp_groups)} if manifest.mlp_groups else {}
    gates = {"head_gate": (blocks, manifest.heads), **mlp_gate}
    require(run(inputs), {**gates, **answers, "residual": (sites, manifest.dim)}, path)


def check_golden(run: Run, golden: Golden, path: Path) -> float:
    """Run the golden rows, one alone and all together. Returns the largest difference of a logit.

    Raises BundleError when an output is not a finite number, a gate disagrees with its logit or with golden.npz, a gate
    logit differs by more than the margin or a logit by more than the tolerance. A gate within the margin may decide
    differently, as in a graph for one profile, whose golden rows are not chosen for it; nothing after it is compared.
    (Residuals are not in golden.npz: they are compared at export.)
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
        flips, reached = flipped(gates, expected > 0)
        if (flips & reached & (np.abs(expected) > golden.margin)).any():
            raise BundleError(f"{path}: gates of golden.npz are not reproduced{cure}")
        apart = float(np.abs(outputs["gate_logit"] - expected)[np.broadcast_to(reached, gates.shape)].max())
        if not apart <= golden.margin:
            raise BundleError(
                f"{path}: gate logits differ from golden.npz by {apart:.3g}; allowed: {golden.margin:.3g}{cure}"
            )
        alike = ~flips.any((1, 2))
        differences = np.abs(outputs["logits"] - golden.outputs["logits"][rows])
        worst = max(worst, float(differences[alike].max(initial=0)))
        if not worst <= golden.tolerance:
            raise BundleError(
                f"{path}: logits differ from golden.npz by {worst:.3g}; allowed: {golden.tolerance:.3g}{cure}"
            )
    if not alike.any():
        raise BundleError(f"{path}: in each row of golden.npz a gate decides differently{cure}")
    return worst


def flipped(gates: NDArray[np.bool_], expected: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Gates (B, G, U) that decide differently, and (B, G, 1) the blocks up to the first with such a gate: what is later
    follows from other tokens."""
    flips = gates != expected
    of_block = flips.any(2, keepdims=True)
    return flips, np.cumsum(of_block, 1) - of_block == 0


def unit_gates(outputs: Arrays) -> NDArray[np.bool_]:
    """The gates of all units (B, gated blocks, units): of the heads and, if the model has them, the MLP groups."""
    gates = [outputs[name] for name in GATES if name in outputs]
    return np.concatenate(gates, 2)


def gate_names(outputs: Arrays) -> str:
    """The names of the outputs that unit_gates joins."""
    return " and ".join(name for name in GATES if name in outputs)
