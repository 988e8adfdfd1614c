"""The numbers that a graph computes with: float32, float16, or 8-bit integers in its linear layers.

int8: activations are unsigned 8-bit with one constant scale and zero point a tensor, measured on real images
(calibration.py); weights are signed 8-bit with one scale a column. All scales are constants, so a row's answer does
not depend on its neighbours. The input of a block's attention is quantised once for all heads. Gates, steering, norms
and the attention itself are in float32.

float16, for GPUs: the tokens and all weights that meet them. Patches, classifier, gates and steering are in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from export.builder import MICROSOFT, Builder

Range = tuple[float, float]
"""The lowest and the highest value of an activation."""


@dataclass(frozen=True)
class Operand:
    """The input of a linear layer."""

    value: str
    key: str
    """The key of its scale: values with the same key are quantised alike."""

    def through(self, value: str) -> "Operand":
        """An operand with some of the same numbers."""
        return replace(self, value=value)


class Arithmetic(Protocol):
    """How linear layers are computed: `enter` prepares what they read, `linear` adds one to the graph."""

    real: type[np.floating[Any]]
    """The type of the tokens."""
    observed: list[tuple[str, str]]
    """(key, value) of the values that also become outputs of the graph."""

    def enter(self, g: Builder, value: str, key: str, at: str | None = None) -> Operand:
        """Prepare a value of the tokens' type for linear layers.

        at: the path of the nodes, if several values share a key.
        """
        ...

    def linear(self, g: Builder, x: Operand, weight: Tensor, bias: Tensor | None, name: str) -> str:
        """(..., out) = x (..., in) @ weight (in, out) + bias (out,), of the tokens' type."""
        ...


@dataclass
class Float:
    """Linear layers in float32 or float16, like the tokens."""

    real: type[np.floating[Any]] = np.float32
    observe: bool = False
    """Whether inputs of linear layers become outputs, for calibration."""
    observed: list[tuple[str, str]] = field(default_factory=list)

    def enter(self, g: Builder, value: str, key: str, at: str | None = None) -> Operand:
        """The value, unchanged. With `observe` it is added to `observed`."""
        if self.observe:
            self.observed.append((key, value))
        return Operand(value, key)

    def linear(self, g: Builder, x: Operand, weight: Tensor, bias: Tensor | None, name: str) -> str:
        """As Arithmetic.linear; the result has the type of the tokens."""
        stored = g.weight(f"{name}.weight", weight)
        if bias is None:
            return g.op("MatMul", x.value, stored, name=name)
        product = g.op("MatMul", x.value, stored, name=f"{name}/product")
        return g.op("Add", product, g.weight(f"{name}.bias", bias), name=name)


@dataclass
class Int8:
    """8-bit integers within linear layers, float32 between them."""

    ranges: Mapping[str, Range]
    """Ranges of the operands, by key."""
    real: type[np.floating[Any]] = np.float32
    observed: list[tuple[str, str]] = field(default_factory=list)
    _scales: dict[str, tuple[str, str]] = field(default_factory=dict)

    def enter(self, g: Builder, value: str, key: str, at: str | None = None) -> Operand:
        """Quantise the value to uint8, with the scale of its key. Raises KeyError when `ranges` lacks the key."""
        if key not in self._scales:
            low, high = min(self.ranges[key][0], 0.0), max(self.ranges[key][1], 0.0)
            scale = max(high - low, 1e-8) / 255
            zero = int(np.clip(round(-low / scale), 0, 255))
            self._scales[key] = g.weight(f"{key}.scale", scale), g.weight(f"{key}.zero", zero, np.uint8)
        return Operand(g.op("QuantizeLinear", value, *self._scales[key], name=f"{at or key}/quantized"), key)

    def linear(self, g: Builder, x: Operand, weight: Tensor, bias: Tensor | None, name: str) -> str:
        """As Arithmetic.linear. The weight is stored as int8, with one scale a column."""
        stored = weight.detach().double().numpy()
        scale = np.maximum(np.abs(stored).max(0), 1e-12) / 127  # (out,)
        scale_name, zero_name = self._scales[x.key]
        inputs = [
            x.value,
            g.weight(f"{name}.weight", np.round(stored / scale), np.int8),
            scale_name,
            g.weight(f"{name}.scale", scale),
            zero_name,
            g.weight(f"{name}.zero", np.zeros(len(scale)), np.int8),
        ]
        if bias is not None:
            inputs.append(g.weight(f"{name}.bias", bias))
        return g.op("MatMulIntegerToFloat", *inputs, name=name, domain=MICROSOFT)
