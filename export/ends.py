"""The inputs of graphs, and the two ends of a model, which differ between timm's models, as modules for PyTorch's
exporter."""

from onnx import TensorProto
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from export.builder import Builder
from export.bundle import GATE_BIAS, INPUTS, MLP_GATE, OUTPUTS
from training.image_spec import ImageSpec
from training.model.gated_vit import GatedVit


def graph_inputs(
    spec: ImageSpec, sites: int, biases: tuple[int, int] | None = None
) -> dict[str, tuple[int, list[str | int]]]:
    """Element type and shape of a graph's inputs, by name. sites: 0 for a graph without steering inputs; biases: gated
    blocks and units of a graph with gate biases."""
    inputs: dict[str, tuple[int, list[str | int]]] = {INPUTS[0]: (TensorProto.UINT8, ["batch", *spec.shape])}
    if sites:
        kinds = (TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT)
        inputs |= {name: (kind, ["batch", sites, "terms"]) for name, kind in zip(INPUTS[1:], kinds, strict=True)}
    if biases:
        inputs[GATE_BIAS] = TensorProto.FLOAT, ["batch", *biases]
    return inputs


def gate_outputs(g: Builder, model: GatedVit, logit: str, residual: str) -> None:
    """The outputs of the gates. logit: float32 (B, gated blocks, units); residual: float32 (B, sites, width)."""
    blocks, heads, groups = len(model.gated_blocks), model.heads, model.mlp_groups
    open_ = g.op("Greater", logit, g.number(0), name="gates/open")
    if groups:
        names = ["gates/open/heads", "gates/open/mlp_groups"]
        open_, of_mlp = g.ops("Split", open_, g.integers(heads, groups), names=names, axis=2)
    g.output(open_, OUTPUTS[1], ["batch", blocks, heads], TensorProto.BOOL)
    g.output(logit, OUTPUTS[2], ["batch", blocks, heads + groups])
    g.output(residual, OUTPUTS[3], ["batch", blocks, model.dim])
    if groups:
        g.output(of_mlp, MLP_GATE, ["batch", blocks, groups], TensorProto.BOOL)


class Stem(nn.Module):
    """uint8 (B, height, width, channels) -> the tokens that enter the first block, (B, N, D)."""

    def __init__(self, model: GatedVit):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """image: uint8 (B, height, width, channels). Returns tokens (B, N, D)."""
        return self.model.embed(image)


class Classifier(nn.Module):
    """The tokens that leave the last block -> logits (B, classes)."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, Q, D), Q tokens that leave the last block. Returns logits (B, classes)."""
        logits: Tensor = self.vit.forward_head(self.vit.norm(x))
        return logits
