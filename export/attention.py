"""How an ONNX graph closes a head.

`masked`    every head is computed and multiplied by its gate. The reference; any execution provider.
`dispatch`  a head is computed only for the images whose gate is open: a closed head costs nothing.
`compact`   as masked, for a model with heads that are always closed and not in the graph (compact.py).

All give the same numbers, up to rounding. Each saves work in three ways. A number added to all scores of a query does
not change the softmax, so the keys need no bias unless they are normed. The softmax weights add up to 1, so the bias of
the values of open heads passes through to the output. Scales are multiplied into weights.

Letters: B batch, R images for which a head's gate is open, N tokens, Q tokens that leave the block, D residual
width, H heads, E head width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from export.builder import MICROSOFT, Builder
from export.closing import Closing
from export.precision import Arithmetic, Operand
from export.weights import HeadWeights


def masked(
    g: Builder,
    arithmetic: Arithmetic,
    w: HeadWeights,
    x: str,
    y: str,
    closing: Closing | None,
    leaving: int | None,
    name: str,
) -> str:
    """x (B, Q, D) plus the attention of its tokens over y (B, N, D). leaving: Q, when it is not all tokens."""
    heads = closing.units if closing else tuple(range(len(w.query)))
    x = _with_biases(g, w, x, closing, heads, name)
    if not heads:
        return x
    picked = list(heads)
    h, e = len(heads), w.query.shape[2]
    entered = arithmetic.enter(g, y, f"{name}/attention/in")
    leavers = entered if leaving is None else _first(g, entered, leaving, f"{name}/attention/leaving")

    def project(tokens: Operand, weight: Tensor, bias: Tensor | None, what: str, order: list[int]) -> str:
        wide = weight[picked].transpose(0, 1).flatten(1)  # (D, heads * E)
        z = arithmetic.linear(g, tokens, wide, None if bias is None else bias[picked].flatten(), f"{name}/{what}")
        z = g.op("Reshape", z, g.integers(0, -1, h, e), name=f"{name}/{what}/by_head")
        return g.op("Transpose", z, name=f"{name}/{what}/heads", perm=order)

    query = project(leavers, w.query, w.query_bias, "query", [0, 2, 1, 3])  # (B, H, Q, E)
    normed = not isinstance(w.key_norm, nn.Identity)
    key = project(entered, w.key, w.key_bias, "key", [0, 2, 1, 3] if normed else [0, 2, 3, 1])
    value = project(entered, w.value, None, "value", [0, 2, 1, 3])
    query = _normed(g, w.query_norm, query, (2, h, 3, e), f"{name}/query/norm")
    if normed:
        key = _normed(g, w.key_norm, key, (2, h, 3, e), f"{name}/key/norm")
        key = g.op("Transpose", key, name=f"{name}/key/transposed", perm=[0, 1, 3, 2])
    weights = g.op("MatMul", query, key, name=f"{name}/scores")  # (B, H, Q, N)
    weights = g.op("Softmax", weights, name=f"{name}/weights", axis=-1)
    mixed = g.op("MatMul", weights, value, name=f"{name}/mixed/heads")  # (B, H, Q, E)
    if closing:
        open_ = g.op("Reshape", closing.number, g.integers(0, h, 1, 1), name=f"{name}/gate/by_head")
        mixed = g.op("Mul", mixed, open_, name=f"{name}/mixed/gated")
    mixed = g.op("Transpose", mixed, name=f"{name}/mixed/by_token", perm=[0, 2, 1, 3])
    mixed = g.op("Reshape", mixed, g.integers(0, -1, h * e), name=f"{name}/mixed")
    entered = arithmetic.enter(g, mixed, f"{name}/attention/mixed")
    out = arithmetic.linear(g, entered, w.output[picked].flatten(0, 1), None, f"{name}/output")
    return g.op("Add", x, out, name=f"{name}/attention")


def dispatch(
    g: Builder,
    arithmetic: Arithmetic,
    w: HeadWeights,
    x: str,
    y: str,
    closing: Closing | None,
    leaving: int | None,
    name: str,
) -> str:
    """As masked, but each head runs only on its own images."""
    heads = closing.units if closing else tuple(range(len(w.query)))
    total = _with_biases(g, w, x, closing, heads, name)
    if not heads:
        return total
    entered = arithmetic.enter(g, y, f"{name}/attention/in")
    if closing is None:  # every head is open: one after the other is faster on a CPU than all at once
        all_mixed = [_mixed(g, arithmetic, w, entered, leaving, head, f"{name}/head{head}") for head in heads]
        mixed = g.op("Concat", *all_mixed, name=f"{name}/mixed", axis=-1)
        operand = arithmetic.enter(g, mixed, f"{name}/attention/mixed")
        out = arithmetic.linear(g, operand, w.output.flatten(0, 1), None, f"{name}/output")
        return g.op("Add", total, out, name=f"{name}/attention")
    for head, own in zip(heads, closing.rows, strict=True):
        at = f"{name}/head{head}"
        tokens = entered.through(g.op("GatherND", entered.value, own, name=f"{at}/in"))  # (R, N, D)
        mixed = _mixed(g, arithmetic, w, tokens, leaving, head, at)
        operand = arithmetic.enter(g, mixed, f"{name}/attention/mixed", at)
        out = arithmetic.linear(g, operand, w.output[head], None, f"{at}/output")
        total = g.op("ScatterND", total, own, out, name=f"{at}/added", reduction="add")  # no image occurs twice
    return total


def _mixed(
    g: Builder, arithmetic: Arithmetic, w: HeadWeights, tokens: Operand, leaving: int | None, head: int, at: str
) -> str:
    """One head: tokens (R, N, D) -> the values that its queries attend to, (R, Q, E)."""
    leavers = tokens if leaving is None else _first(g, tokens, leaving, f"{at}/leaving")

    def project(of: Operand, weight: Tensor, bias: Tensor | None, norm: nn.Module, what: str) -> str:
        z = arithmetic.linear(g, of, weight[head], None if bias is None else bias[head], f"{at}/{what}")
        return _normed(g, norm, z, (2, 3, weight.shape[2]), f"{at}/{what}/norm")

    query = project(leavers, w.query, w.query_bias, w.query_norm, "query")  # (R, Q, E)
    key = project(tokens, w.key, w.key_bias, w.key_norm, "key")
    value = project(tokens, w.value, None, nn.Identity(), "value")
    weights = g.op("FusedMatMul", query, key, name=f"{at}/scores", domain=MICROSOFT, transB=1)  # (R, Q, N)
    weights = g.op("Softmax", weights, name=f"{at}/weights", axis=-1)
    return g.op("MatMul", weights, value, name=f"{at}/mixed")


Attend = Callable[[Builder, Arithmetic, HeadWeights, str, str, Closing | None, int | None, str], str]
ATTENTION: dict[str, Attend] = {"dispatch": dispatch, "masked": masked, "compact": masked}


def _with_biases(g: Builder, w: HeadWeights, x: str, closing: Closing | None, heads: Sequence[int], name: str) -> str:
    """x plus the bias of the output and the biases of the open heads' values, which do not depend on the tokens."""
    if closing is None or w.added is None or not heads:
        bias = w.bias
        if w.added is not None and closing is None:
            bias = w.added.sum(0) + (0 if bias is None else bias)
        return x if bias is None else g.op("Add", x, g.weight(f"{name}/output.bias", bias), name=f"{name}/biased")
    added = g.weight(f"{name}/value.bias", w.added[list(heads)])
    bias = torch.zeros(w.added.shape[1]) if w.bias is None else w.bias
    moved = g.op("MatMul", closing.number, added, name=f"{name}/biases/product")  # (B, 1, 1, D)
    moved = g.op("Add", moved, g.weight(f"{name}/output.bias", bias), name=f"{name}/biases")
    moved = g.op("Squeeze", moved, g.integers(1), name=f"{name}/biases/row")
    return g.op("Add", x, moved, name=f"{name}/biased")


def _normed(g: Builder, norm: nn.Module, value: str, shape: tuple[int, ...], name: str) -> str:
    return value if isinstance(norm, nn.Identity) else g.norm(norm, value, torch.zeros(shape), name)


def _first(g: Builder, tokens: Operand, count: int, name: str) -> Operand:
    """(B, N, D) -> (B, count, D)"""
    return tokens.through(g.first(tokens.value, count, name))
