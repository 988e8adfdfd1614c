"""The receipt of an answer, for both protocols: its fields here have the names that clients see."""

from typing import NamedTuple

from service.calls import Answer
from service.model import Model
from service.steering import Steering


class Origin(NamedTuple):
    """The fields that all calls with one steering share."""

    model: str
    version: str
    bundle_digest: str
    gates_sae_digest: str
    graph: str
    profile: str
    steering_digest: str


class Measures(NamedTuple):
    """The fields of one call."""

    queue_seconds: float
    inference_seconds: float
    head_usage: float
    compute_fraction: float
    gates_near_threshold: int
    mlp_usage: float | None
    """None in a model without MLP groups."""
    budget: float | None
    """The requested budget."""
    budget_applied: float | None
    brownout: bool
    """Whether the server lowered the budget under load."""


def origin(model: Model, steering: Steering) -> Origin:
    """The model, its graph and the steering of a call. profile: "" for inline terms or none."""
    manifest = model.bundle.manifest
    return Origin(
        manifest.name,
        str(manifest.version),
        model.bundle.digest,
        manifest.gates_sae_digest,
        model.engine.graph_name,
        steering.profile,
        steering.digest,
    )


def measures(model: Model, steering: Steering, answer: Answer) -> Measures:
    """Usages and compute fraction are means over the call's images; gates near their threshold are added up."""
    outputs, manifest = answer.outputs, model.bundle.manifest
    count = len(outputs.logits)
    return Measures(
        answer.queue_seconds,
        outputs.seconds,
        sum(outputs.head_usage.tolist()) / count,
        sum(outputs.macs.tolist()) / (count * manifest.macs.dense),
        sum(outputs.near_threshold.tolist()),
        sum(outputs.mlp_usage.tolist()) / count if manifest.mlp_groups else None,
        steering.budget,
        answer.lowered.budget if answer.lowered else steering.budget,
        answer.lowered is not None,
    )
