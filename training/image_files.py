"""Reads image files, from bytes to a model's pixels, for training and the server alike. Needs Pillow and numpy.

Bad metadata never makes an image unreadable. Only the orientation is used; if a library fails on other metadata, the
file is read again without it, as browsers do.
"""

import io
import re
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from training.image_spec import ImageSpec

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transformation that makes an image upright, by its EXIF orientation."""
SIZES = {1: 1, 3: 2, 4: 4}
"""Size of a number in bytes, by its type in EXIF."""
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
KINDS = {
    rb"\xff\xd8\xff": "a broken JPEG",
    rb"\x89PNG\r\n\x1a\n": "a broken PNG",
    rb"RIFF....WEBP": "a broken WebP",
    rb"GIF8": "a broken GIF",
    rb"BM": "a broken BMP",
    rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)": "HEIC",
    rb"....ftypavi[fs]": "AVIF",
    rb"....ftyp": "a video",
    rb"II\*\0|MM\0\*|II\+\0|MM\0\+": "TIFF or a camera's raw format",
    rb"\0\0\0\x0cj[P\x20]\x20\x20|\xff\x4f\xff\x51": "JPEG 2000",
    rb"\xff\x0a|\0\0\0\x0cJXL\x20": "JPEG XL",
    rb"8BPS": "PSD",
    rb"%PDF": "PDF",
    rb"%!PS": "PostScript",
    rb"\0\0\x01\0": "an icon",
    rb"(\xef\xbb\xbf)?\s*<(\?xml|svg|!--)": "SVG or other XML",
    rb"(?i)\s*<(!doctype\x20)?html": "HTML",
    rb"version\x20https://git-lfs": "a Git LFS pointer",
    rb"PK\x03\x04": "a ZIP archive",
    rb"\x1f\x8b": "gzip",
    rb"/9j/|iVBORw0KGgo|UklGR|data:image/": "base64",
    rb"\0*\Z": "nothing but zeros",
}
"""Kinds of files that are not supported, by a regular expression for their first bytes."""

# These warnings are about metadata that nothing here reads; Pillow's errors are not silenced.
warnings.filterwarnings("ignore", module=r"PIL\.")


def kind(content: bytes) -> str:
    """The likely kind of an unreadable file; "" if its first bytes are unknown."""
    if not content:
        return "empty"
    start = content[:512]
    return next((name for pattern, name in KINDS.items() if re.match(pattern, start, re.DOTALL)), "")


def load(content: bytes, check: Callable[[Image.Image], None]) -> Image.Image:
    """The decoded image of a file; for an animation, its first frame. check: raises when the size or mode is not
    allowed, before any pixel is decoded.

    Raises what `check` raises, and what Pillow raises for a broken file.
    """
    try:
        return _load(content, check)
    except Exception:
        plain = without_metadata(content)
        if plain == content:
            raise
        return _load(plain, check)


def _load(content: bytes, check: Callable[[Image.Image], None]) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        actual = kind(content) or "of an unknown kind"
        raise UnidentifiedImageError(f"the file is {actual}; allowed: {', '.join(FORMATS)}") from None
    check(image)
    image.load()
    return image


def to_pixels(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """The image upright, grey or RGB, resized by its shorter side and cropped at the centre: uint8 (height, width,
    channels). Identical to the bit to timm's evaluation transform."""
    image = upright(image, spec.channels)
    if min(image.size) != spec.resize:
        image = image.resize(resized(image.size, spec), RESAMPLING[spec.interpolation])
    width, height = image.size
    top, left = round((height - spec.height) / 2.0), round((width - spec.width) / 2.0)
    return np.array(image.crop((left, top, left + spec.width, top + spec.height)), np.uint8).reshape(spec.shape)


def resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """Width and height of an image after its shorter side has been resized to spec.resize."""
    width, height = size
    longer = int(spec.resize * max(size) / min(size))
    return (spec.resize, longer) if width <= height else (longer, spec.resize)


def upright(image: Image.Image, channels: int) -> Image.Image:
    """The image rotated as its EXIF says, in grey (1 channel) or RGB (3). Transparency of a palette is ignored."""
    turn = TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if it is missing or unreadable. No other tag is read."""
    image.load()  # a PNG may have its EXIF after its pixels
    try:  # Pillow also finds it in XMP, but stops at the first broken entry of an EXIF block
        value = _in_exif(image.info.get("exif", b"")) or image.getexif().get(ORIENTATION)
        return int(value) if value in TURNS else 1
    except Exception:  # Pillow raises many types of exceptions for broken EXIF
        return 1


def _in_exif(block: bytes) -> int:
    """The orientation, or 0 without one. Broken entries are skipped. TIFF 6.0, section 2:
    https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf"""
    block = block.removeprefix(b"Exif\0\0")
    if block[:4] not in (b"II*\0", b"MM\0*"):
        return 0

    def number(at: int, size: int) -> int:
        return int.from_bytes(block[at : at + size], "little" if block[:1] == b"I" else "big")

    first = number(4, 4) + 2
    for at in range(first, min(first + 12 * number(first - 2, 2), len(block) - 11), 12):
        if number(at, 2) == ORIENTATION:
            return number(at + 8, SIZES.get(number(at + 2, 2), 0))
    return 0


def without_metadata(content: bytes) -> bytes:
    """A JPEG or PNG reduced to its pixels, transparency and EXIF; other files unchanged."""
    if content.startswith(PNG):
        return _plain_png(content)
    return _plain_jpeg(content) if content.startswith(JPEG) else content


def _plain_png(content: bytes) -> bytes:
    """https://www.w3.org/TR/png-3/#5Chunk-layout: size, name, data, checksum. Critical names begin with a capital."""
    parts, at = [PNG], len(PNG)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        name, body = content[at + 4 : at + 8], content[at + 4 : end - 4]
        whole = len(body) > 4 and zlib.crc32(body) == int.from_bytes(content[end - 4 : end], "big")
        if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and whole):
            parts.append(content[at:end])
        at = len(content) if name == b"IEND" else end
    return b"".join(parts)


def _plain_jpeg(content: bytes) -> bytes:
    """https://www.w3.org/Graphics/JPEG/itu-t81.pdf, annex B: marker, size, data, up to the first scan (SOS)."""
    parts, at = [content[:2]], 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        if content[at + 1] == 0xFF:  # fill bytes
            at += 1
            continue
        marker, end = content[at + 1], at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        exif = marker == 0xE1 and content.startswith(b"Exif\0\0", at + 4)
        colours = marker == 0xEE and content.startswith(b"Adobe", at + 4) and end - at >= 16
        if exif or colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts.append(content[at:end])
        at = max(end, at + 4)
    return b"".join([*parts, content[at:]])
