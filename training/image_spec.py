"""The pixels that a model reads: one definition for training, export and the server. Does not import torch."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from training.fields import Number

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's names of the supported pixel formats. Pillow would turn more than 8 bits per channel into white."""
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]


def check_mode(mode: str) -> None:
    """Raise ValueError unless this pixel format is supported."""
    if mode not in MODES:
        raise ValueError(f"the pixel format is {mode}; allowed: 8 bits a channel ({', '.join(MODES)})")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ImageSpec:
    """How an encoded image becomes the `image` input of a model.

    The image is rotated as its EXIF says, converted to `channels`, resized so that its shorter side is `resize`, and
    cropped to the centre `height` x `width`. The graph itself then computes (pixel / 255 - mean) / std per channel.
    """

    height: Side
    """Pixels."""
    width: Side
    """Pixels."""
    channels: Literal[1, 3]
    """1 (grey) or 3 (RGB)."""
    resize: Side
    """Length of the shorter side after resizing, in pixels; at least height and width."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    mean: tuple[Number, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[Annotated[Number, Field(gt=0)], ...]
    """Per channel, of pixels scaled to 0..1."""

    def __post_init__(self) -> None:
        """Check the fields together. Raises ValueError; for a single invalid field, pydantic raises its subclass
        ValidationError."""
        if self.resize < max(self.height, self.width):
            raise ValueError(f"resize is {self.resize}; allowed: at least {max(self.height, self.width)}")
        for name in ("mean", "std"):
            if (count := len(getattr(self, name))) != self.channels:
                raise ValueError(f"{name} has {count} values; allowed: one per channel ({self.channels})")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.height, self.width, self.channels

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)
