"""The gates of a block in a graph, in the form that heads (attention.py) and MLP groups (mlp.py) read.

Letters: B batch, U units of a block that are in the graph, R images for which a unit's gate is open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto

from export.builder import Builder


@dataclass(frozen=True)
class Closing:
    """The gates of a block's heads, or of its MLP groups."""

    units: tuple[int, ...]
    """The units that are in the graph."""
    number: str
    """(B, 1, 1, U): 0 or 1, in the type of the tokens."""
    rows: Sequence[str]
    """For a dispatch graph, by unit: int64 (R, 1), the images whose gate is open."""


def closings(
    g: Builder, open_: str, heads: Sequence[int], groups: Sequence[int], dispatch: bool, name: str
) -> tuple[Closing, Closing]:
    """The gates of the heads and of the MLP groups of a block.

    open_: bool (B, 1, 1, U), the gates of its units in the graph: heads, then groups.
    """
    number = g.real(open_, f"{name}/gate/number")
    numbers: Sequence[str] = (number, number)
    if groups and heads:
        names = [f"{name}/gate/heads", f"{name}/gate/mlp_groups"]
        numbers = g.ops("Split", number, g.integers(len(heads), len(groups)), names=names, axis=3)
    units = [f"{name}/head{head}" for head in heads] + [f"{name}/mlp/group{group}" for group in groups]
    rows = _open_rows(g, open_, units, f"{name}/dispatch") if dispatch and units else ()
    return (
        Closing(tuple(heads), numbers[0], rows[: len(heads)]),
        Closing(tuple(groups), numbers[1], rows[len(heads) :]),
    )


def _open_rows(g: Builder, open_: str, units: Sequence[str], name: str) -> Sequence[str]:
    """The images whose gate is open, by unit: int64 (R, 1). One NonZero gives the open (unit, image) pairs, ordered by
    unit. units: the paths of their nodes."""
    by_unit = g.op("Transpose", open_, name=f"{name}/gate", perm=[3, 0, 1, 2])  # (U, B, 1, 1)
    pairs = g.op("NonZero", by_unit, name=f"{name}/pairs")  # (4, pairs): unit, image, 0, 0
    rows = g.op("Gather", pairs, g.integers(1), name=f"{name}/images", axis=0)
    rows = g.op("Transpose", rows, name=f"{name}/rows", perm=[1, 0])  # (pairs, 1)
    counts = g.op("Cast", by_unit, name=f"{name}/open", to=TensorProto.INT64)
    counts = g.op("ReduceSum", counts, g.integers(1, 2, 3), name=f"{name}/counts", keepdims=0)
    return g.ops("Split", rows, counts, names=[f"{unit}/rows" for unit in units], axis=0)
