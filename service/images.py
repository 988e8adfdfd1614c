"""Encoded images -> the uint8 pixels that a model reads, within limits, by the same functions as in training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.config import Settings
from service.errors import InvalidRequest
from training.image_files import FORMATS, kind, load, resized, to_pixels
from training.image_spec import MODES, ImageSpec

DRAFT = 2
"""Minimum size of a JPEG's draft along each side, relative to the resized image: a smaller one would blur it."""
Image.MAX_IMAGE_PIXELS = None  # our own limit applies: Limits.max_pixels


@dataclass(frozen=True)
class Limits:
    """Limits of encoded images, and how large JPEGs are decoded."""

    max_bytes: int
    """Size of an encoded image."""
    max_pixels: int
    """Width x height of an encoded image."""
    jpeg_draft: bool = False
    """Whether a large JPEG is decoded at a smaller size."""

    @staticmethod
    def of(settings: Settings) -> "Limits":
        """The limits in the settings."""
        return Limits(settings.max_image_mb * 2**20, settings.max_pixels, settings.jpeg_draft)


def decode(encoded: bytes, spec: ImageSpec, limits: Limits, where: str) -> NDArray[np.uint8]:
    """An encoded image -> uint8 (height, width, channels). `where` names the field in errors.

    Raises InvalidRequest when it is not a readable image within the limits. The header decides on size before any
    pixel is decoded.
    """
    if not encoded:
        raise InvalidRequest(f"{where} is empty; allowed: {', '.join(FORMATS)}")
    if len(encoded) > limits.max_bytes:
        raise InvalidRequest(f"{where} has {len(encoded)} bytes; allowed: at most {limits.max_bytes}")

    def check(image: Image.Image) -> None:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise InvalidRequest(f"{where} has {width} x {height} pixels; allowed: at most {limits.max_pixels}")
        if min(image.size) != spec.resize and max(resized(image.size, spec)) > 100 * spec.resize:
            raise InvalidRequest(
                f"{where} has {width} x {height} pixels; allowed: sides that differ at most a hundredfold"
            )
        if image.mode not in MODES:
            raise InvalidRequest(f"{where} has the pixel format {image.mode}; allowed: 8 bits a channel")
        if limits.jpeg_draft:
            image.draft(None, (DRAFT * spec.resize,) * 2)

    try:
        return to_pixels(load(encoded, check), spec)
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow raises many kinds of exceptions for broken files
        raise InvalidRequest(
            f"{where} is not a readable image ({len(encoded)} bytes, {kind(encoded) or type(error).__name__}); "
            f"allowed: {', '.join(FORMATS)}"
        ) from error


def from_raw(pixels: bytes, spec: ImageSpec, where: str) -> NDArray[np.uint8]:
    """Raw uint8 pixels of the model's own size. Raises InvalidRequest for any other number of bytes."""
    expected = spec.height * spec.width * spec.channels
    if len(pixels) != expected:
        raise InvalidRequest(
            f"{where} has {len(pixels)} bytes; allowed: {expected} "
            f"(uint8, {spec.height} x {spec.width} x {spec.channels})"
        )
    return np.frombuffer(pixels, np.uint8).reshape(spec.shape)
