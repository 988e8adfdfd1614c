"""A graph is compared with PyTorch on real images and steerings before it becomes part of a bundle."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.bundle import INPUTS, OUTPUTS, Golden
from export.graph import SteeredVit
from export.session import Arrays, inputs_of, not_finite, open_session, run_onnx
from training.steering import NEUTRAL, SteeringTerm, Terms, at_strength


class ExportError(Exception):
    """The exported graph is not what it should be."""


class ShapeError(ExportError):
    """An output has another shape or type than the contract says."""


class NotFinite(ExportError):
    """An output is not a finite number: no comparison would see it."""


class LogitMismatch(ExportError):
    """A logit differs by more than is allowed."""


class GateMismatch(ExportError):
    """A gate decides differently that should not, or too many do; or a gate logit differs by more than is allowed."""


class ResidualMismatch(ExportError):
    """A residual differs by more than is allowed."""


class NeighbourMismatch(ExportError):
    """An answer depends on what else is in the batch."""


class AccuracyLoss(ExportError):
    """The graph is right less often than the model."""


@dataclass(frozen=True)
class Limits:
    """What a graph of some precision may differ by from the model in PyTorch.

    Gate logits have more room than gates that decide differently: a steered latent near its own threshold comes or goes
    as a whole, and only the few gates near theirs can decide differently.
    """

    logit: float
    """Of rows whose gates decide alike."""
    gate_margin: float
    """|gate logit| above which a gate must decide alike, unless a gate of an earlier block did not."""
    flipped: float
    """Share of gates that may decide differently."""
    gate_logit: float
    """Of a gate logit, -4 to 4, up to the first block of a row in which a gate decides differently."""
    residual: float
    """Of the same blocks: length of the difference, as a share of the length in PyTorch."""
    neighbour: float
    """Of a logit, by what else is in the batch; rows whose gates decide alike."""
    accuracy: float
    """Share of images that may be lost."""


LIMITS = {
    "fp32": Limits(
        logit=2e-3, gate_margin=1e-3, flipped=1e-3, gate_logit=1e-3, residual=1e-4, neighbour=2e-3, accuracy=1e-3
    ),
    "fp16": Limits(
        logit=0.1, gate_margin=0.05, flipped=5e-3, gate_logit=0.25, residual=0.02, neighbour=2e-3, accuracy=3e-3
    ),
    "int8": Limits(
        logit=1.0, gate_margin=0.5, flipped=2e-2, gate_logit=2.0, residual=0.4, neighbour=2e-3, accuracy=5e-3
    ),
}
"""By precision. The largest differences seen with the committed model, the preset `smoke` and the small models of the
tests, in the same order: gate logit 1.4e-5, 0.05 and 1.1; residual 1.7e-6, 0.004 and 0.22."""
CURES = {
    "fp32": ". Train longer (--vit.joint-epochs): gate logits move away from 0. If the model is trained, the graph is "
    "wrong: please report it. The limits are LIMITS in export/certify.py",
    "other": ". Export in fp32 (--precision fp32), or train longer (--vit.joint-epochs): gate logits move away from 0. "
    "The limits are LIMITS in export/certify.py",
}
"""What to do about a graph that is not within its limits, by precision."""
OWN_INT8 = 2.0
"""How far an int8 graph's own golden answers may be off on another machine: so many times what they differ from
PyTorch's."""
BATCH_SIZES = (1, 7, 64)
STEERINGS = 40
"""An image is seen under that many; when there are more, they are dealt out over the images."""


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
    """Up to the first block of a row in which a gate decides differently."""
    max_residual_difference: float
    """Over the same blocks: of the residual's length in PyTorch."""
    gates: int
    flipped_gates: int
    """Decided differently."""
    max_flip_distance: float
    """Largest |gate logit| in PyTorch of a gate that decided differently, in the first such block of its row."""
    max_neighbour_difference: float
    """Of a logit: a row alone and the same row in a mixed batch."""
    images: int
    """Labelled images that the accuracies are of, without steering; of a specialised graph under its profile."""
    accuracy: float
    accuracy_of_model: float
    """In PyTorch."""
    logit_tolerance: float
    gate_margin: float

    def to_json(self) -> dict[str, Any]:
        """The value of Graph.certificate in the manifest."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.rows} rows ({self.steerings} steerings), largest logit difference {self.max_logit_difference:.2g}; "
            f"{self.flipped_gates} of {self.gates} gates flipped, at most {self.max_flip_distance:.2g} from the "
            f"threshold; accuracy {self.accuracy:.4f} on {self.images} images, {self.accuracy_of_model:.4f} in PyTorch"
        )


@torch.no_grad()
def run_torch(steered: SteeredVit, inputs: Arrays) -> Arrays:
    """PyTorch's outputs, by OUTPUTS. inputs: by INPUTS. The model must be on the CPU."""
    outputs = steered(*(torch.from_numpy(inputs[name]) for name in INPUTS))
    return {name: value.numpy() for name, value in zip(OUTPUTS, outputs, strict=True)}


def steerings(profiles: Sequence[Terms], latents: Sequence[int]) -> list[Terms]:
    """Neutral, every profile, and extremes of each kind."""
    strongest = [at_strength(terms, 4.0) for terms in profiles[:3]] + [
        at_strength(terms, -2.0) for terms in profiles[:3]
    ]
    ends = {
        site: (SteeringTerm(0, 0.0, 50.0), SteeringTerm(count - 1, -3.0, -50.0)) for site, count in enumerate(latents)
    }
    return [{}, *profiles, *strongest, ends]


class Reference:
    """PyTorch's answers, computed once for all graphs of a bundle."""

    def __init__(
        self,
        steered: SteeredVit,
        images: NDArray[np.uint8],
        tried: Sequence[Terms],
        labelled: NDArray[np.uint8],
        classes: NDArray[np.int64],
        steering: Terms = NEUTRAL,
    ):
        """images: uint8 (N, height, width, channels), on which every steering of `tried` is seen; labelled (M, ...) and
        classes (M,): those that accuracy is measured on, under `steering`."""
        self.steerings = len(tried)
        self.batches: list[tuple[Arrays, Arrays]] = []
        each = min(self.steerings, max(STEERINGS, -(-self.steerings // len(images))))
        pairs = [(row // each, tried[row % self.steerings]) for row in range(each * len(images))]
        while pairs:
            size = BATCH_SIZES[len(self.batches) % len(BATCH_SIZES)]
            chunk, pairs = pairs[:size], pairs[size:]
            rows = [terms for _, terms in chunk]
            inputs = inputs_of(images[[index for index, _ in chunk]], rows, steered.sae.sites)
            expected = run_torch(steered, inputs)
            _check_finite(expected, "PyTorch's ", sum(len(out["logits"]) for _, out in self.batches))
            self.batches.append((inputs, expected))
        self.classes = classes
        self.labelled = [
            inputs_of(part, [steering] * len(part), steered.sae.sites)
            for part in np.array_split(labelled, max(1, len(labelled) // 64))
        ]
        self.accuracy = self._share(np.concatenate([run_torch(steered, part)["logits"] for part in self.labelled]))

    def _share(self, logits: NDArray[np.float32]) -> float:
        return float((logits.argmax(1) == self.classes).mean())

    def certify(self, graph: bytes | Path, attention: str, precision: str) -> Certificate:
        """Raises ShapeError or NotFinite, and past LIMITS[precision] LogitMismatch, GateMismatch, ResidualMismatch,
        NeighbourMismatch or AccuracyLoss."""
        limits, session = LIMITS[precision], open_session(graph, attention)
        rows = gates = flipped = 0
        worst_logit = worst_gate = worst_flip = worst_residual = worst_neighbour = 0.0
        for inputs, expected in self.batches:
            found = run_onnx(session, inputs)
            _check_shapes(found, expected)
            _check_finite(found, "", rows)
            flips = found["head_gate"] != expected["head_gate"]
            rows, gates, flipped = rows + len(flips), gates + flips.size, flipped + int(flips.sum())
            if not np.array_equal(found["head_gate"], found["gate_logit"] > 0):
                raise GateMismatch("head_gate is not gate_logit > 0")
            of_block = flips.any(2)
            reached = np.cumsum(of_block, 1) - of_block == 0  # (B, G): up to the first block that differs at all
            first = flips & reached[:, :, None]
            worst_flip = max(worst_flip, float(np.abs(expected["gate_logit"])[first].max(initial=0)))
            worst_gate = max(worst_gate, _worst(found, expected, "gate_logit", reached))
            length = np.linalg.norm(expected["residual"], axis=2).clip(1e-12)  # (B, G)
            apart = np.linalg.norm(found["residual"] - expected["residual"], axis=2)
            worst_residual = max(worst_residual, float((apart / length)[reached].max(initial=0)))
            alike = ~flips.any((1, 2))
            worst_logit = max(worst_logit, _worst(found, expected, "logits", alike))
            alone = run_onnx(session, {name: value[-1:] for name, value in inputs.items()})
            _check_finite(alone, "alone, ", rows - 1)
            same = (alone["head_gate"] == found["head_gate"][-1:]).all((1, 2))
            last = {name: value[-1:] for name, value in found.items()}
            worst_neighbour = max(worst_neighbour, _worst(alone, last, "logits", same))
        cure = CURES["fp32" if precision == "fp32" else "other"]
        if not worst_flip <= limits.gate_margin:
            raise GateMismatch(
                f"a gate with logit {worst_flip:.4g} decides differently; allowed: {limits.gate_margin}{cure}"
            )
        if not flipped <= limits.flipped * gates:
            raise GateMismatch(f"{flipped} of {gates} gates decide differently; allowed: {limits.flipped:.2%}{cure}")
        if not worst_gate <= limits.gate_logit:
            raise GateMismatch(f"a gate logit differs by {worst_gate:.4g}; allowed: {limits.gate_logit}{cure}")
        if not worst_residual <= limits.residual:
            raise ResidualMismatch(
                f"a residual differs by {worst_residual:.4g} of its length; allowed: {limits.residual}{cure}"
            )
        if not worst_logit <= limits.logit:
            raise LogitMismatch(f"a logit differs by {worst_logit:.4g}; allowed: {limits.logit}{cure}")
        if not worst_neighbour <= limits.neighbour:
            raise NeighbourMismatch(
                f"a logit differs by {worst_neighbour:.4g} alone and in a batch; allowed: {limits.neighbour}"
            )
        logits = np.concatenate([run_onnx(session, part)["logits"] for part in self.labelled])
        _check_finite({"logits": logits}, "of the labelled images, ", 0)
        accuracy = self._share(logits)
        if not accuracy >= self.accuracy - limits.accuracy:
            raise AccuracyLoss(
                f"accuracy is {accuracy:.4f} on {len(self.classes)} images, {self.accuracy:.4f} in PyTorch; "
                f"allowed: {limits.accuracy} less{cure}"
            )
        return Certificate(
            rows, self.steerings, BATCH_SIZES, worst_logit, worst_gate, worst_residual, gates, flipped, worst_flip,
            worst_neighbour, len(self.classes), accuracy, self.accuracy, limits.logit, limits.gate_margin,
        )  # fmt: skip

    def golden(self, graphs: Mapping[str, bytes | Path], count: int = 12) -> dict[str, Golden]:
        """By precision: `count` rows of several steerings, those whose gates are furthest from their thresholds.

        The answers are PyTorch's for fp32, and the graph's own for others: only another machine can change them. Sums
        of 8-bit products are exact, so with int8 a right machine differs in a few roundings (seen: 0.1 to 0.55 of what
        the graph differs from PyTorch in these rows). OWN_INT8 of that is allowed: more is another arithmetic, as of a
        CPU without VNNI, which saturates (seen: 0.9 to 32 of it).
        """
        names = list(INPUTS)
        inputs = {name: _joined([batch[name] for batch, _ in self.batches], name) for name in names}
        expected = {name: np.concatenate([out[name] for _, out in self.batches]) for name in OUTPUTS}
        distance = np.abs(expected["gate_logit"]).min((1, 2))
        clear: list[int] = []
        for steering in range(self.steerings):  # in turn, the clearest row of each
            own = np.arange(steering, len(distance), self.steerings)
            clear += own[np.argsort(-distance[own], kind="stable")][: -(-count // self.steerings)].tolist()
        clear = sorted(sorted(clear, key=lambda row: -distance[row])[:count])
        rows = {name: value[clear] for name, value in inputs.items()}
        found = {}
        for precision, graph in graphs.items():
            limits, answers = LIMITS[precision], {name: expected[name][clear] for name in ("logits", "gate_logit")}
            tolerance = limits.logit
            if precision != "fp32":
                given = run_onnx(open_session(graph), rows)
                if precision == "int8":
                    apart = float(np.abs(given["logits"] - answers["logits"]).max())
                    tolerance = float(np.clip(OWN_INT8 * apart, LIMITS["fp32"].logit, limits.logit))
                answers = {name: given[name] for name in answers}
            found[precision] = Golden(rows, answers, tolerance, limits.gate_margin)
        return found


def _worst(found: Arrays, expected: Arrays, name: str, rows: NDArray[np.bool_]) -> float:
    return float(np.abs(found[name] - expected[name])[rows].max(initial=0))


def _joined(parts: list[NDArray[Any]], name: str) -> NDArray[Any]:
    """Batches of steering arrays have as many terms as they need: fill up with neutral ones."""
    if name == "image":
        return np.concatenate(parts)
    terms = max(part.shape[2] for part in parts)
    neutral = 1 if name == "steering_scale" else 0
    widths = [((0, 0), (0, 0), (0, terms - part.shape[2])) for part in parts]
    padded = [np.pad(part, width, constant_values=neutral) for part, width in zip(parts, widths, strict=True)]
    return np.concatenate(padded)


def _check_finite(outputs: Arrays, whose: str, first: int) -> None:
    if wrong := not_finite(outputs, first):
        raise NotFinite(f"{whose}{wrong}; allowed: a finite number")


def _check_shapes(found: Arrays, expected: Arrays) -> None:
    for name in OUTPUTS:
        if found[name].shape != expected[name].shape or found[name].dtype != expected[name].dtype:
            raise ShapeError(
                f"{name} is {found[name].dtype} {found[name].shape}; "
                f"allowed: {expected[name].dtype} {expected[name].shape}"
            )
