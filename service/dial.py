"""From the budget and the forced units of a request to gate biases, which the graph adds to the gate logits.

A budget becomes a position on the model's dial, by the curve of the profile or of the model without steering, so that
the mean compute spent is the budget; approximately so at strengths other than 1, with inline terms, and with forced
units.

Letters: G gated blocks, U units of a block (heads, then MLP groups).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle, Manifest
from service.errors import InvalidRequest, Lacking
from training.dial import position
from training.steering import UNBIASED, GateBias, bias_array

Bias = NDArray[np.float32]
FORCED = 1e4
"""The bias of a forced unit: gate logits lie within +-4, and the biases of a dial within +-1000 (MAX_KNOT)."""


class Unit(NamedTuple):
    """A head or an MLP group of a gated block."""

    block: int
    """Index of the transformer block."""
    kind: Literal["head", "mlp_group"]
    number: int

    def __str__(self) -> str:
        return f"block {self.block} {self.kind} {self.number}"


@dataclass(frozen=True)
class Forced:
    """Units that a request opens or closes whatever their gates read."""

    open: Sequence[Unit] = ()
    closed: Sequence[Unit] = ()

    def __bool__(self) -> bool:
        return bool(self.open or self.closed)


ROUNDING = 1e-6
"""Tolerance of the budgets in a request, whose fields have single precision."""
FREE = Forced()
"""No unit is forced."""


def budget_bias(bundle: Bundle, budget: float | None, profile: str) -> Bias | None:
    """The dial's gate biases (G, U) for a budget; None without one. profile: "" for none, or inline terms.

    Raises Lacking when the model has no dial, and InvalidRequest when the budget is not on it.
    """
    if budget is None:
        return None
    if bundle.dial is None:
        raise Lacking(f"budget is {budget:g}, but {_name(bundle)} has no dial; allowed: no budget")
    lowest = bundle.dial.lowest
    if not lowest - ROUNDING <= budget <= 1:  # NaN too
        raise InvalidRequest(f"budget is {budget:g}; allowed: {lowest:g} to 1")
    curve = bundle.curves.get(profile, bundle.curves[""])
    bias: Bias = bundle.dial.at(np.array([position(budget, curve)]))[0]
    return bias


def floor_of(bundle: Bundle, budget: float | None, asked: float | None, default: float) -> float | None:
    """The budget that brownout may lower a request's budget to; None: it may not. asked: the request's min_budget, or
    None for the default.

    Raises Lacking when the model has no dial, and InvalidRequest when min_budget is not between it and the budget.
    """
    most = 1.0 if budget is None else budget
    if asked is None:
        floor = None if bundle.dial is None else max(default, bundle.dial.lowest)
        return floor if floor is not None and floor < most else None
    if bundle.dial is None:
        raise Lacking(f"min_budget is {asked:g}, but {_name(bundle)} has no dial; allowed: no min_budget")
    lowest = bundle.dial.lowest
    if not lowest - ROUNDING <= asked <= most + ROUNDING:  # NaN too
        raise InvalidRequest(f"min_budget is {asked:g}; allowed: {lowest:g} to {most:g}, the budget")
    return max(asked, lowest) if asked < most else None


def steering_bias(bundle: Bundle, gate_bias: GateBias, strength: float, forced: Forced) -> Bias | None:
    """The gate biases (G, U) of the steering itself: those of its profile at the strength, then forced units. None if
    there are none.

    Raises Lacking when the model takes no biases, and InvalidRequest when a unit does not exist or is forced both ways.
    """
    manifest = bundle.manifest
    if not gate_bias and not forced:
        return None
    require_biases(bundle, f"steering.open and steering.closed name {len(forced.open) + len(forced.closed)} units")
    bias = (bias_array(gate_bias, manifest.gated_blocks, manifest.units) * strength).astype(np.float32)
    if both := set(forced.open) & set(forced.closed):
        raise InvalidRequest(f"steering.open and steering.closed both have {both.pop()}; allowed: one of them")
    for value, field, units in ((FORCED, "open", forced.open), (-FORCED, "closed", forced.closed)):
        for index, unit in enumerate(units):
            bias[_place(manifest, unit, f"steering.{field}[{index}]")] = value
    return bias if bias.any() else None


def require_biases(bundle: Bundle, given: str) -> None:
    """Raise Lacking unless the graphs of the model take gate biases. given: what needs them."""
    manifest = bundle.manifest
    if not manifest.takes_biases:
        what = "compact" if manifest.compact is not None else f"of schema version {manifest.schema_version}"
        raise Lacking(
            f"{given}, but the graphs of {_name(bundle)} have no input gate_bias: its bundle is {what}; allowed: none"
        )


def as_gate_bias(manifest: Manifest, bias: Bias | None) -> GateBias:
    """The biases (G, U) by gated block, as in a profile."""
    if bias is None:
        return UNBIASED
    return dict(zip(manifest.gated_blocks, map(tuple, bias.tolist()), strict=True))


def total(*biases: Bias | None) -> Bias | None:
    """The sum of the given biases; None if there are none."""
    given = [bias for bias in biases if bias is not None]
    return np.sum(given, 0, np.float32) if given else None


def _place(manifest: Manifest, unit: Unit, field: str) -> tuple[int, int]:
    """The row and column of a unit. Raises InvalidRequest when the model has no such unit."""
    if unit.block not in manifest.gated_blocks:
        blocks = ", ".join(map(str, manifest.gated_blocks))
        raise InvalidRequest(f"{field}.block is {unit.block}; allowed: a gated block, {blocks}")
    first, count = (0, manifest.heads) if unit.kind == "head" else (manifest.heads, manifest.mlp_groups)
    if not 0 <= unit.number < count:
        allowed = f"0 to {count - 1}" if count else "none, as the model has no MLP groups"
        raise InvalidRequest(f"{field}.{unit.kind} is {unit.number}; allowed: {allowed}")
    return manifest.gated_blocks.index(unit.block), first + unit.number


def _name(bundle: Bundle) -> str:
    return f"model {bundle.manifest.name!r} version {bundle.manifest.version}"
