"""The inputs of graphs; and the two ends of a model, which timm varies, as modules for PyTorch's exporter."""

from onnx import TensorProto
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from export.bundle import INPUTS
from training.image_spec import ImageSpec
from training.model.gated_vit import GatedVit


def graph_inputs(spec: ImageSpec, sites: int) -> dict[str, tuple[int, list[str | int]]]:
    """Element type and shape of a graph's inputs, by name. sites: 0 for a graph without steering inputs."""
    inputs: dict[str, tuple[int, list[str | int]]] = {INPUTS[0]: (TensorProto.UINT8, ["batch", *spec.shape])}
    if sites:
        kinds = (TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT)
        inputs |= {name: (kind, ["batch", sites, "terms"]) for name, kind in zip(INPUTS[1:], kinds, strict=True)}
    return inputs


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
