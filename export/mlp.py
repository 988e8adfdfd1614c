"""How an ONNX graph closes an MLP group, an equal slice of the hidden neurons, like a head (attention.py).

`masked`    every group is computed and multiplied by its gate.
`dispatch`  a group is computed only for the images whose gate is open.

The bias of the second layer is always added.

Letters: B batch, Q tokens, D residual width, M MLP groups in the graph, R images whose gate of the group is open.
"""

from collections.abc import Callable

from export.builder import Builder
from export.closing import Closing
from export.precision import Arithmetic, Operand
from export.weights import MlpWeights


def masked(
    g: Builder, arithmetic: Arithmetic, w: MlpWeights, x: str, y: str, closing: Closing | None, of: int, name: str
) -> str:
    """x (B, Q, D) plus the MLP of y (B, Q, D). closing: None for an MLP without gates; of: the number of the
    block's groups, omitted ones included."""
    at, kept = f"{name}/mlp", w.groups(of, closing.units) if closing else w
    if closing and not closing.units:
        return _with_bias(g, w, x, name)
    hidden = _hidden(g, arithmetic, kept, arithmetic.enter(g, y, f"{at}/in"), at)
    if closing:
        groups = len(closing.units)
        gate = g.op("Reshape", closing.number, g.integers(0, 1, groups, 1), name=f"{at}/gate")
        by_group = g.op("Reshape", hidden, g.integers(0, 0, groups, -1), name=f"{at}/by_group")
        hidden = g.op("Mul", by_group, gate, name=f"{at}/gated/by_group")
        hidden = g.op("Reshape", hidden, g.integers(0, 0, kept.first.shape[1]), name=f"{at}/gated")
    entered = arithmetic.enter(g, hidden, f"{at}/hidden")
    out = arithmetic.linear(g, entered, kept.second, kept.second_bias, f"{at}/fc2")
    return g.op("Add", x, out, name=name)


def dispatch(
    g: Builder, arithmetic: Arithmetic, w: MlpWeights, x: str, y: str, closing: Closing | None, of: int, name: str
) -> str:
    """As masked, but each group runs only on its own images."""
    if closing is None:
        return masked(g, arithmetic, w, x, y, None, of, name)
    total, at = _with_bias(g, w, x, name), f"{name}/mlp"
    entered = arithmetic.enter(g, y, f"{at}/in") if closing.units else None
    for group, rows in zip(closing.units, closing.rows, strict=True):
        assert entered is not None
        own, path = w.groups(of, [group]), f"{at}/group{group}"
        tokens = entered.through(g.op("GatherND", entered.value, rows, name=f"{path}/in"))  # (R, Q, D)
        operand = arithmetic.enter(g, _hidden(g, arithmetic, own, tokens, path), f"{at}/hidden", path)
        out = arithmetic.linear(g, operand, own.second, None, f"{path}/fc2")
        total = g.op("ScatterND", total, rows, out, name=f"{path}/added", reduction="add")  # no image twice
    return total


Run = Callable[[Builder, Arithmetic, MlpWeights, str, str, Closing | None, int, str], str]
MLP: dict[str, Run] = {"dispatch": dispatch, "masked": masked, "compact": masked}


def _hidden(g: Builder, arithmetic: Arithmetic, w: MlpWeights, tokens: Operand, at: str) -> str:
    hidden = arithmetic.linear(g, tokens, w.first, w.first_bias, f"{at}/fc1")
    return g.op("Gelu", hidden, name=f"{at}/gelu", approximate=w.approximate)


def _with_bias(g: Builder, w: MlpWeights, x: str, name: str) -> str:
    if w.second_bias is None:
        return x
    return g.op("Add", x, g.weight(f"{name}/mlp/fc2.bias", w.second_bias), name=f"{name}/mlp/biased")
