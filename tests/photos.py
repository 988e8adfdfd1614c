"""Photos with broken metadata, which viewers show all the same, and photos in formats that are not read."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(*entries: tuple[int, int, bytes], count: int | None = None) -> bytes:
    """A little-endian EXIF block. entries: (tag, type, value), one value of at most 4 bytes each."""
    content = struct.pack("<H", len(entries) if count is None else count)
    for tag, kind, value in entries:
        content += struct.pack("<HHI", tag, kind, 1) + value.ljust(4, b"\0")
    return b"II*\0\x08\0\0\0" + content + bytes(4)


QUARTER = (0x0112, 3, b"\x06")
"""Orientation 6: to be turned by a quarter to the right."""
TURNED: Mapping[str, bytes] = {
    "nothing else": exif(QUARTER),
    "rational as ASCII": exif(QUARTER, (0x011A, 2, b"ab")),
    "rational that is NaN": exif(QUARTER, (0x011B, 11, b"\xff\xff\xff\xff")),
    "rational with zero": exif(QUARTER, (0x011A, 5, b"\x1a")) + bytes(8),
    "width as ASCII": exif((0x0100, 2, b"abc"), QUARTER),
    "unit as ASCII": exif(QUARTER, (0x0128, 2, b"a")),
    "value past the end": exif((0x010F, 5, b"\xff\xff"), QUARTER),
    "block past the end": exif(QUARTER, (0x8769, 4, b"\xff\xff")),
    "block within itself": exif(QUARTER, (0x8769, 4, b"\x08")),
    "unknown type": exif((0x010F, 77, b"abcd"), QUARTER),
    "more entries than there are": exif(QUARTER, count=200),
}
"""EXIF with a valid orientation, 6, by what is wrong with the rest."""
UPRIGHT: Mapping[str, bytes] = {
    "garbage": bytes(range(255)),
    "header alone": b"II*\0",
    "header of another kind": b"XX*\0\x08\0\0\0" + bytes(20),
    "orientation 9": exif((0x0112, 3, b"\x09")),
    "orientation as ASCII": exif((0x0112, 2, b"6")),
}
"""EXIF without an orientation that can be read."""


def chunk(name: bytes, content: bytes, broken: bool = False) -> bytes:
    """broken: its checksum is wrong."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content) ^ broken)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_chunk(png: bytes, added: bytes) -> bytes:
    return png[:33] + added + png[33:]  # after the header


def with_segment(jpeg: bytes, added: bytes) -> bytes:
    return jpeg[:2] + added + jpeg[2:]


def with_exif(image: Image.Image, kind: str, block: bytes) -> bytes:
    """The image with that EXIF block, lossless except for JPEG."""
    if kind == "JPEG":
        return with_segment(encoded(image, "JPEG", quality=95), segment(0xE1, b"Exif\0\0" + block))
    if kind == "PNG":
        return with_chunk(encoded(image, "PNG"), chunk(b"eXIf", block))
    return encoded(image, "WEBP", lossless=True, exif=block)


LARGE = zlib.compress(bytes(2**20 + 1), 9)
"""Text of more than Pillow's limit of 2^20 bytes."""
Change = Callable[[bytes], bytes]
IN_PNG: Mapping[str, Change] = {
    "compressed text over the limit": lambda png: with_chunk(png, chunk(b"zTXt", b"a\0\0" + LARGE)),
    "international text over the limit": lambda png: with_chunk(png, chunk(b"iTXt", b"a\0\1\0\0\0" + LARGE)),
    "text over the limit after the pixels": lambda png: png[:-12] + chunk(b"zTXt", b"a\0\0" + LARGE) + png[-12:],
    "colour profile over the limit": lambda png: with_chunk(png, chunk(b"iCCP", b"a\0\0" + LARGE)),
    "checksum of a text": lambda png: with_chunk(png, chunk(b"tEXt", b"a\0b", broken=True)),
    "checksum of EXIF": lambda png: with_chunk(png, chunk(b"eXIf", exif(QUARTER), broken=True)),
    "compression of a text": lambda png: with_chunk(png, chunk(b"zTXt", b"a\0\7abc")),
    "empty colour profile": lambda png: with_chunk(png, chunk(b"iCCP", b"")),
    "short resolution": lambda png: with_chunk(png, chunk(b"pHYs", b"\0")),
    "short transparency": lambda png: with_chunk(png, chunk(b"tRNS", b"")),
    "broken animation": lambda png: with_chunk(png, chunk(b"acTL", b"\0")),
    "EXIF as a text": lambda png: with_chunk(png, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  5\nzz\n")),
    "trailing garbage": lambda png: png + b"garbage",
    "no end": lambda png: png[:-12],
}
IN_JPEG: Mapping[str, Change] = {
    "garbage as a colour profile": lambda jpeg: with_segment(jpeg, segment(0xE2, b"ICC_PROFILE\0\7\1garbage")),
    "short colour profile": lambda jpeg: with_segment(jpeg, segment(0xE2, b"ICC_PROFILE\0")),
    "short JFIF header": lambda jpeg: with_segment(jpeg, segment(0xE0, b"JFIF\0")),
    "short Adobe header": lambda jpeg: with_segment(jpeg, segment(0xEE, b"Adobe")),
    "garbage as an index of pictures": lambda jpeg: with_segment(jpeg, segment(0xE2, b"MPF\0garbage")),
    "broken Photoshop block": lambda jpeg: with_segment(jpeg, segment(0xED, b"Photoshop 3.0\08BIM\x03\xed\0\0")),
    "filling before a marker": lambda jpeg: with_segment(jpeg, b"\xff\xff\xff"),
    "trailing garbage": lambda jpeg: jpeg + b"garbage",
}
"""What is broken around the pixels."""


OTHERS: Mapping[str, bytes] = {
    "HEIC": struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(99),
    "AVIF": struct.pack(">I", 24) + b"ftypavif\0\0\0\0mif1avif" + bytes(99),
    "TIFF or a camera's raw format": encoded(Image.new("RGB", (8, 8)), "TIFF"),
    "JPEG XL": b"\xff\x0a" + bytes(30),
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "base64": b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAg",
    "nothing but zeros": bytes(500),
}
"""Files that are named like photos, by what they are."""
