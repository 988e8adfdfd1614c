"""Compares a graph with PyTorch on real images and steerings, before it becomes part of a bundle."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from export.bundle import GATE_BIAS, INPUTS, MLP_GATE, OUTPUTS, Golden
from export.graph import SteeredVit
from export.session import Arrays, inputs_of, not_finite, open_session, run_onnx
from export.verify import flipped, gate_names, unit_gates
from training.steering import NEUTRAL, SteeringTerm, Terms, at_strength


class ExportError(Exception):
    """The exported graph does not match the model."""


class ShapeError(ExportError):
    """An output has a shape or type that differs from the contract."""


class NotFinite(ExportError):
    """An output is not a finite number, which no comparison would detect."""


class LogitMismatch(ExportError):
    """A logit differs by more than the limit."""


class GateMismatch(ExportError):
    """A gate far from its threshold decides differently, too many gates do, or a gate logit exceeds its limit."""


class ResidualMismatch(ExportError):
    """A residual differs by more than the limit."""


class NeighbourMismatch(ExportError):
    """An answer depends on the other rows of its batch."""


class AccuracyLoss(ExportError):
    """The graph is right less often than the model."""


@dataclass(frozen=True)
class Limits:
    """How much a graph of some precision may differ from the model in PyTorch.

    The limit of gate logits is wider than the margin of gates: a steered latent near its own threshold changes a gate
    logit by its whole value.
    """

    logit: float
    """Limit of a logit difference, in rows whose gates decide alike."""
    gate_margin: float
    """|gate logit| above which a gate must decide alike, unless a gate of an earlier block did not."""
    flipped: float
    """Largest share of gates that may decide differently."""
    gate_logit: float
    """Limit of a gate logit's difference, up to the first block of a row in which a gate decides differently."""
    residual: float
    """Limit for a residual in the same blocks: length of the difference relative to the length in PyTorch."""
    neighbour: float
    """Limit of a logit's difference between batches, in rows whose gates decide alike."""
    accuracy: float
    """Largest loss of accuracy, as a share of the images."""


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
"""Limits by precision. The largest differences seen with the committed model, the preset `smoke` and the small models
of the tests, in the same order: gate logit 1.4e-5, 0.05 and 1.1; residual 1.7e-6, 0.004 and 0.22."""
CURES = {
    "fp32": ". Train longer (--vit.joint-epochs): gate logits move away from 0. If the model is trained, the graph is "
    "wrong: please report it. The limits are LIMITS in export/certify.py",
    "other": ". Export in fp32 (--precision fp32), or train longer (--vit.joint-epochs): gate logits move away from 0. "
    "The limits are LIMITS in export/certify.py",
}
"""What to do about a graph that exceeds its limits, by precision."""
OWN_INT8 = 2.0
"""How much an int8 graph's own golden answers may differ on another machine, in multiples of their difference from
PyTorch."""
BATCH_SIZES = (1, 7, 64)
STEERINGS = 40
"""Limit of the steerings per image; if there are more, they are distributed over the images."""


@dataclass(frozen=True)
class Certificate:
    """The result of the comparison."""

    rows: int
    """Number of compared rows: images x steerings."""
    steerings: int
    batch_sizes: tuple[int, ...]
    max_logit_difference: float
    """In rows whose gates decide alike."""
    max_gate_logit_difference: float
    """Up to the first block of a row in which a gate decides differently."""
    max_residual_difference: float
    """In the same blocks, relative to the residual's length in PyTorch."""
    gates: int
    flipped_gates: int
    """Number of gates that decided differently."""
    max_flip_distance: float
    """Largest |gate logit| in PyTorch of a gate that decided differently, in the first such block of its row."""
    max_neighbour_difference: float
    """Largest difference of a logit between a row alone and the same row in a mixed batch."""
    images: int
    """Labelled images for the accuracies; without steering, or for a specialised graph under its profile."""
    accuracy: float
    accuracy_of_model: float
    """Accuracy in PyTorch."""
    logit_tolerance: float
    gate_margin: float
    biases: int = 0
    """Number of gate biases tried, each on every image; 0: none."""

    def to_json(self) -> dict[str, Any]:
        """The value of Graph.certificate in the manifest, without `biases` if there are none."""
        return {name: value for name, value in asdict(self).items() if name != "biases" or value}

    def __str__(self) -> str:
        biases = f", {self.biases} gate biases" * bool(self.biases)
        return (
            f"{self.rows} rows ({self.steerings} steerings{biases}), largest logit difference "
            f"{self.max_logit_difference:.2g}; {self.flipped_gates} of {self.gates} gates flipped, at most "
            f"{self.max_flip_distance:.2g} from the threshold; accuracy {self.accuracy:.4f} on {self.images} images, "
            f"{self.accuracy_of_model:.4f} in PyTorch"
        )


@dataclass
class _Differences:
    """The largest differences from PyTorch over all batches; the fields are those of Certificate and Limits."""

    rows: int = 0
    gates: int = 0
    flipped: int = 0
    flip_distance: float = 0.0
    logit: float = 0.0
    gate_logit: float = 0.0
    residual: float = 0.0
    neighbour: float = 0.0

    def add(self, outputs: Arrays, expected: Arrays, alone: Arrays) -> None:
        """Add a batch. alone: the outputs of its last row in a batch of its own."""
        flips, of_blocks = flipped(unit_gates(outputs), unit_gates(expected))
        self.rows, self.gates, self.flipped = (
            self.rows + len(flips), self.gates + flips.size, self.flipped + int(flips.sum()),
        )  # fmt: skip
        first, reached = flips & of_blocks, of_blocks[:, :, 0]
        self.flip_distance = max(self.flip_distance, float(np.abs(expected["gate_logit"])[first].max(initial=0)))
        self.gate_logit = max(self.gate_logit, _worst(outputs, expected, "gate_logit", reached))
        length = np.linalg.norm(expected["residual"], axis=2).clip(1e-12)  # (B, G)
        apart = np.linalg.norm(outputs["residual"] - expected["residual"], axis=2)
        self.residual = max(self.residual, float((apart / length)[reached].max(initial=0)))
        self.logit = max(self.logit, _worst(outputs, expected, "logits", np.asarray(~flips.any((1, 2)))))
        last = {name: value[-1:] for name, value in outputs.items()}
        same = (unit_gates(alone) == unit_gates(last)).all((1, 2))
        self.neighbour = max(self.neighbour, _worst(alone, last, "logits", same))

    def check(self, limits: Limits, cure: str) -> None:
        """Raise LogitMismatch, GateMismatch, ResidualMismatch or NeighbourMismatch if a limit is exceeded."""
        if not self.flip_distance <= limits.gate_margin:
            raise GateMismatch(
                f"a gate with logit {self.flip_distance:.4g} decides differently; allowed: {limits.gate_margin}{cure}"
            )
        if not self.flipped <= limits.flipped * self.gates:
            raise GateMismatch(
                f"{self.flipped} of {self.gates} gates decide differently; allowed: {limits.flipped:.2%}{cure}"
            )
        if not self.gate_logit <= limits.gate_logit:
            raise GateMismatch(f"a gate logit differs by {self.gate_logit:.4g}; allowed: {limits.gate_logit}{cure}")
        if not self.residual <= limits.residual:
            raise ResidualMismatch(
                f"a residual differs by {self.residual:.4g} of its length; allowed: {limits.residual}{cure}"
            )
        if not self.logit <= limits.logit:
            raise LogitMismatch(f"a logit differs by {self.logit:.4g}; allowed: {limits.logit}{cure}")
        if not self.neighbour <= limits.neighbour:
            raise NeighbourMismatch(
                f"a logit differs by {self.neighbour:.4g} alone and in a batch; allowed: {limits.neighbour}"
            )


@torch.no_grad()
def run_torch(steered: SteeredVit, inputs: Arrays) -> Arrays:
    """PyTorch's outputs, by the names in OUTPUTS and MLP_GATE. inputs: by the names in INPUTS and GATE_BIAS. The model
    must be on the CPU."""
    outputs = steered(*(torch.from_numpy(inputs[name]) for name in (*INPUTS, GATE_BIAS) if name in inputs))
    return {name: value.numpy() for name, value in zip((*OUTPUTS, MLP_GATE), outputs, strict=False)}


def steerings(profiles: Sequence[Terms], latents: Sequence[int]) -> list[Terms]:
    """The steerings to compare: neutral, every profile, and extremes of each kind."""
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
        biases: Sequence[NDArray[np.float32]] = (),
    ):
        """images: uint8 (N, height, width, channels), to compare under the steerings of `tried`; labelled (M, ...) and
        classes (M,): those for accuracy, under `steering`. biases: gate biases (G, U), as of a dial's knots:
        each image is compared under each of them too, the steerings in turn. Graphs then need the input GATE_BIAS."""
        self.steerings, self.biases = len(tried), len(biases)
        each = min(self.steerings, max(STEERINGS, -(-self.steerings // len(images))))

        def compared(each: int, biases: Sequence[NDArray[np.float32]]) -> list[tuple[Arrays, Arrays]]:
            """Inputs and outputs of batches with `each` rows per image, which take the steerings and the biases in
            turn."""
            batches: list[tuple[Arrays, Arrays]] = []
            rows = range(each * len(images))
            while rows:
                size = BATCH_SIZES[len(batches) % len(BATCH_SIZES)]
                chunk, rows = rows[:size], rows[size:]
                terms = [tried[row % self.steerings] for row in chunk]
                inputs = inputs_of(images[[row // each for row in chunk]], terms, steered.sae.sites)
                if biases:
                    inputs[GATE_BIAS] = np.stack([biases[row % len(biases)] for row in chunk])
                expected = run_torch(steered, inputs)
                _check_finite(expected, "PyTorch's ", sum(len(out["logits"]) for _, out in batches))
                batches.append((inputs, expected))
            return batches

        self.batches, self.biased = compared(each, ()), compared(self.biases, biases)
        self.classes = classes
        self.labelled = [
            inputs_of(part, [steering] * len(part), steered.sae.sites)
            for part in np.array_split(labelled, max(1, len(labelled) // 64))
        ]
        self.accuracy = self._share(np.concatenate([run_torch(steered, part)["logits"] for part in self.labelled]))

    def _share(self, logits: NDArray[np.float32]) -> float:
        return float((logits.argmax(1) == self.classes).mean())

    def certify(self, graph: bytes | Path, attention: str, precision: str) -> Certificate:
        """Compare a graph. Raises ShapeError or NotFinite and, if it exceeds LIMITS[precision], LogitMismatch,
        GateMismatch, ResidualMismatch, NeighbourMismatch or AccuracyLoss."""
        limits, session = LIMITS[precision], open_session(graph, attention)
        worst = self._differences(session)
        cure = CURES["fp32" if precision == "fp32" else "other"]
        worst.check(limits, cure)
        logits = np.concatenate([run_onnx(session, part)["logits"] for part in self.labelled])
        _check_finite({"logits": logits}, "of the labelled images, ", 0)
        accuracy = self._share(logits)
        if not accuracy >= self.accuracy - limits.accuracy:
            raise AccuracyLoss(
                f"accuracy is {accuracy:.4f} on {len(self.classes)} images, {self.accuracy:.4f} in PyTorch; "
                f"allowed: {limits.accuracy} less{cure}"
            )
        return Certificate(
            worst.rows, self.steerings, BATCH_SIZES, worst.logit, worst.gate_logit, worst.residual, worst.gates,
            worst.flipped, worst.flip_distance, worst.neighbour, len(self.classes), accuracy, self.accuracy,
            limits.logit, limits.gate_margin, self.biases,
        )  # fmt: skip

    def _differences(self, session: InferenceSession) -> "_Differences":
        """The differences over all batches. Raises ShapeError, NotFinite or GateMismatch."""
        worst = _Differences()
        for inputs, expected in (*self.batches, *self.biased):
            outputs = run_onnx(session, inputs)
            _check_shapes(outputs, expected)
            _check_finite(outputs, "", worst.rows)
            if not np.array_equal(unit_gates(outputs), outputs["gate_logit"] > 0):
                raise GateMismatch(f"{gate_names(outputs)} is not gate_logit > 0")
            alone = run_onnx(session, {name: value[-1:] for name, value in inputs.items()})
            _check_finite(alone, "alone, ", worst.rows + len(outputs["logits"]) - 1)
            worst.add(outputs, expected, alone)
        return worst

    def golden(self, graphs: Mapping[str, bytes | Path], count: int = 12) -> dict[str, Golden]:
        """Golden rows by precision: `count` rows of several steerings, those whose gates are furthest from their
        thresholds.

        The answers are PyTorch's for fp32, and the graph's own for others, which only another machine can change. Sums
        of 8-bit products are exact, so with int8 a correct machine differs in a few roundings (measured: 0.1 to 0.55 of
        the graph's difference from PyTorch in these rows). OWN_INT8 times that difference is allowed. More
        means another arithmetic, such as that of a CPU without VNNI, which saturates (measured: 0.9 to 32 times).
        """
        names = list(INPUTS)
        inputs = {name: _joined([batch[name] for batch, _ in self.batches], name) for name in names}
        expected = {name: np.concatenate([out[name] for _, out in self.batches]) for name in OUTPUTS}
        distance = np.abs(expected["gate_logit"]).min((1, 2))
        clear: list[int] = []
        for steering in range(self.steerings):  # the clearest rows of each steering
            own = np.arange(steering, len(distance), self.steerings)
            clear += own[np.argsort(-distance[own], kind="stable")][: -(-count // self.steerings)].tolist()
        clear = sorted(sorted(clear, key=lambda row: -distance[row])[:count])
        rows = {name: value[clear] for name, value in inputs.items()}
        golden = {}
        for precision, graph in graphs.items():
            limits, answers = LIMITS[precision], {name: expected[name][clear] for name in ("logits", "gate_logit")}
            tolerance = limits.logit
            if precision != "fp32":
                outputs = run_onnx(open_session(graph), rows)
                if precision == "int8":
                    apart = float(np.abs(outputs["logits"] - answers["logits"]).max())
                    tolerance = float(np.clip(OWN_INT8 * apart, LIMITS["fp32"].logit, limits.logit))
                answers = {name: outputs[name] for name in answers}
            golden[precision] = Golden(rows, answers, tolerance, limits.gate_margin)
        return golden


def _worst(outputs: Arrays, expected: Arrays, name: str, rows: NDArray[np.bool_]) -> float:
    return float(np.abs(outputs[name] - expected[name])[rows].max(initial=0))


def _joined(parts: list[NDArray[Any]], name: str) -> NDArray[Any]:
    """Concatenate batches; steering arrays with different numbers of terms are padded with neutral ones."""
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


def _check_shapes(outputs: Arrays, expected: Arrays) -> None:
    for name in expected:
        if outputs[name].shape != expected[name].shape or outputs[name].dtype != expected[name].dtype:
            raise ShapeError(
                f"{name} is {outputs[name].dtype} {outputs[name].shape}; "
                f"allowed: {expected[name].dtype} {expected[name].shape}"
            )
