"""The two ends of a model, which timm varies, as modules of one input and one output for PyTorch's exporter."""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from training.model.gated_vit import GatedVit


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
