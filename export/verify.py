"""A graph is compared with PyTorch on real images and steerings before it becomes part of a bundle."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from export.bundle import INPUTS, OUTPUTS, Golden
from export.graph import SteeredVit
from training.steering import SteeringTerm, Terms, at_strength, to_arrays

LOGIT_TOLERANCE = 2e-3
"""Largest allowed |difference| of a logit, of rows whose gates decide alike."""
GATE_MARGIN = 1e-3
"""Gates with |gate logit| above it must decide alike."""


class ExportError(Exception):
    """The exported graph is not what it should be."""


class ShapeError(ExportError):
    """An output has another shape or type than the contract says."""


class LogitMismatch(ExportError):
    """A logit differs by more than LOGIT_TOLERANCE."""


class GateMismatch(ExportError):
    """A gate further than GATE_MARGIN from its threshold decides differently."""


@dataclass(frozen=True)
class Certificate:
    """What the comparison saw."""

    rows: int
    """Image x steering."""
    steerings: int
    batch_sizes: tuple[int, ...]
    max_logit_difference: float
    """Over rows whose gates decide alike."""
    max_gate_logit_difference: float
    flipped_gates: int
    """Decided differently; all within the margin."""
    logit_tolerance: float
    gate_margin: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Arrays = dict[str, NDArray[Any]]


def inputs_of(images: NDArray[np.uint8], rows: Sequence[Terms], sites: int) -> Arrays:
    arrays = to_arrays(rows, sites)
    return dict(zip(INPUTS, (images, arrays.latent, arrays.scale, arrays.shift), strict=True))


@torch.no_grad()
def run_torch(steered: SteeredVit, inputs: Arrays) -> Arrays:
    outputs = steered(*(torch.from_numpy(inputs[name]) for name in INPUTS))
    return {name: value.numpy() for name, value in zip(OUTPUTS, outputs, strict=True)}


def cpu_session(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def steerings(profiles: Sequence[Terms], latents: Sequence[int], cap: int = 32) -> list[Terms]:
    """Neutral, the profiles up to a cap, and extremes of each kind."""
    strongest = [at_strength(terms, 4.0) for terms in profiles[:3]] + [
        at_strength(terms, -2.0) for terms in profiles[:3]
    ]
    ends = {
        site: (SteeringTerm(0, 0.0, 50.0), SteeringTerm(count - 1, -3.0, -50.0)) for site, count in enumerate(latents)
    }
    return [{}, *profiles[:cap], *strongest, ends]


def certify(graph: bytes, steered: SteeredVit, images: NDArray[np.uint8], tried: Sequence[Terms]) -> Certificate:
    """Compare onnxruntime with PyTorch on every image under every steering, in batches of 1, 7 and 64 mixed rows.

    images: uint8 (N, height, width, channels). Raises ShapeError, LogitMismatch or GateMismatch.
    """
    session = cpu_session(graph)
    pairs = [(index, terms) for index in range(len(images)) for terms in tried]
    sizes = (1, 7, 64)
    start, turn, flipped, worst_logit, worst_gate = 0, 0, 0, 0.0, 0.0
    while start < len(pairs):
        chunk = pairs[start : start + sizes[turn % 3]]
        start, turn = start + len(chunk), turn + 1
        inputs = inputs_of(images[[index for index, _ in chunk]], [terms for _, terms in chunk], steered.sae.sites)
        expected = run_torch(steered, inputs)
        found = dict(zip(OUTPUTS, session.run(list(OUTPUTS), inputs), strict=True))
        for name in OUTPUTS:
            if found[name].shape != expected[name].shape or found[name].dtype != expected[name].dtype:
                raise ShapeError(
                    f"{name} is {found[name].dtype} {found[name].shape}; "
                    f"allowed: {expected[name].dtype} {expected[name].shape}"
                )
        flips = found["head_gate"] != expected["head_gate"]
        far = flips & (np.abs(expected["gate_logit"]) > GATE_MARGIN)
        if far.any():
            distance = np.abs(expected["gate_logit"][far]).max()
            raise GateMismatch(f"a gate with logit {distance:.4g} decides differently; allowed: within {GATE_MARGIN}")
        flipped += int(flips.sum())
        alike = ~flips.any((1, 2))
        worst_logit = max(worst_logit, float(np.abs(found["logits"] - expected["logits"])[alike].max(initial=0)))
        worst_gate = max(worst_gate, float(np.abs(found["gate_logit"] - expected["gate_logit"])[alike].max(initial=0)))
        if not worst_logit <= LOGIT_TOLERANCE:
            raise LogitMismatch(f"a logit differs by {worst_logit:.4g}; allowed: {LOGIT_TOLERANCE}")
    return Certificate(
        len(pairs), len(tried), sizes, worst_logit, worst_gate, flipped, LOGIT_TOLERANCE, GATE_MARGIN
    )  # fmt: skip


def golden(steered: SteeredVit, images: NDArray[np.uint8], tried: Sequence[Terms], rows: int = 12) -> Golden:
    """Rows of PyTorch's answers, away from every gate's threshold, going round the steerings."""
    chosen = [tried[index % len(tried)] for index in range(len(images))]
    inputs = inputs_of(images, chosen, steered.sae.sites)
    outputs = run_torch(steered, inputs)
    distance = np.abs(outputs["gate_logit"]).min((1, 2))
    clear = np.sort(np.argsort(-distance, kind="stable")[:rows])
    return Golden(
        {name: inputs[name][clear] for name in INPUTS},
        {name: outputs[name][clear] for name in ("logits", "gate_logit")},
        LOGIT_TOLERANCE,
        GATE_MARGIN,
    )
