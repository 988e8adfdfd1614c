"""What pixels a model reads: the one definition that training, export and the server share.

Standard library only, so that the server can import it without torch.
"""

from dataclasses import asdict, dataclass
from typing import Any

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's names of the pixel formats that are read. Of more than 8 bits a channel it would make white."""


def check_mode(mode: str) -> None:
    """Raises ValueError unless images of this pixel format are read."""
    if mode not in MODES:
        raise ValueError(f"the pixel format is {mode}; allowed: 8 bits a channel ({', '.join(MODES)})")


@dataclass(frozen=True)
class ImageSpec:
    """How an encoded image becomes the `image` input of a model.

    Orientation is taken from EXIF, colours are converted to `channels`, the shorter side is resized to
    `resize`, the centre `height` x `width` is cut out. The graph itself then computes
    (pixel / 255 - mean) / std per channel.
    """

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    resize: int
    """Length of the shorter side after resizing, in pixels; at least height and width."""
    interpolation: str
    """One of INTERPOLATIONS."""
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1; above 0."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "resize"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 4096:
                raise ValueError(f"image.{name} is {value!r}; allowed: 1 to 4096")
        if self.channels not in (1, 3):
            raise ValueError(f"image.channels is {self.channels}; allowed: 1 (grey) or 3 (RGB)")
        if self.resize < max(self.height, self.width):
            raise ValueError(f"image.resize is {self.resize}; allowed: at least {max(self.height, self.width)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"image.interpolation is {self.interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) != self.channels:
                raise ValueError(f"image.{name} has {len(value)} values; allowed: one per channel ({self.channels})")
        if not min(self.std) > 0:
            raise ValueError(f"image.std is {self.std}; allowed: above 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.height, self.width, self.channels

    def to_json(self) -> dict[str, Any]:
        """The fields by name, which from_json reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ImageSpec":
        """Raises ValueError, naming the field, on a value that is not allowed; TypeError on a missing or extra one."""
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
