"""Encoded images that lie, are broken or unusual, in both protocols, while another client asks correctly."""

import io
import struct
import zlib
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.bundle import Bundle
from tests.faults.listed import fault
from tests.faults.protocols import PROTOCOLS, Protocol
from tests.faults.traffic import Traffic
from tests.photos import IN_PNG, OTHERS, TURNED, chunk, encoded, with_exif
from tests.refusals import refusal

Picture = NDArray[np.uint8]
"""(28, 28)"""


def large(picture: Picture) -> Image.Image:
    return Image.fromarray(picture).resize((280, 280))


def truncated(picture: Picture) -> bytes:
    file = encoded(large(picture), "JPEG")
    return file[: len(file) // 2]


def with_size(picture: Picture, side: int) -> bytes:
    """A JPEG of 280 x 280 pixels with side x side in its header."""
    file = bytearray(encoded(large(picture), "JPEG"))
    start = file.index(b"\xff\xc0")
    file[start + 5 : start + 9] = struct.pack(">HH", side, side)
    return bytes(file)


def lying(picture: Picture) -> bytes:
    return with_size(picture, 65_500)


def bomb(_: Picture) -> bytes:
    """A PNG of 110 kB with 30,000 x 30,000 white pixels, all of them there."""
    packer, side = zlib.compressobj(9), 30_000
    row = b"\0" + b"\xff" * (side // 8)
    pixels = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def deep(picture: Picture) -> bytes:
    return encoded(Image.fromarray(picture.astype(np.uint16) * 257), "PNG")


REFUSED: dict[str, tuple[str, Callable[[Picture], bytes], str]] = {
    "HEIC": ("image of a kind that is not read", lambda _: OTHERS["HEIC"], "is not a readable image (123 bytes, HEIC)"),
    "truncated": ("truncated JPEG", truncated, "is not a readable image ("),
    "overstated": ("lying JPEG", lying, "has 65500 x 65500 pixels; allowed: at most 50000000"),
    "bomb": ("decompression bomb", bomb, "has 30000 x 30000 pixels; allowed: at most 50000000"),
    "16 bits": ("16-bit image", deep, "has the pixel format I;16; allowed: 8 bits a channel"),
}


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        pytest.param(
            p, name, id=f"{p}-{name}", marks=fault(f"request: {of}", f"INVALID_ARGUMENT: `... {says}`", p.name)
        )
        for p in PROTOCOLS
        for name, (of, _, says) in REFUSED.items()
    ],
)
def test_a_broken_or_lying_file_is_refused(
    protocol: Protocol, name: str, channel: grpc.Channel, traffic: Traffic, sample_pixels: NDArray[np.uint8]
) -> None:
    _, make, sentence = REFUSED[name]
    picture = sample_pixels[10, :, :, 0]
    good = encoded(Image.fromarray(picture), "PNG")
    code, said = refusal(protocol.call(channel), protocol.request([good, make(picture)]), timeout=30)
    assert code == "INVALID_ARGUMENT"
    assert "[1]" in said, "the image is named"
    assert sentence in said
    traffic.check()


def animated(picture: Picture) -> tuple[bytes, Picture]:
    frames = [Image.fromarray(frame) for frame in (picture, 255 - picture, picture.T)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), picture


def cmyk(picture: Picture) -> tuple[bytes, Picture]:
    file = encoded(Image.fromarray(picture).convert("RGB").convert("CMYK"), "JPEG", quality=100)
    return file, np.asarray(Image.open(io.BytesIO(file)).convert("L"))


def rotated(picture: Picture) -> tuple[bytes, Picture]:
    """The picture on its side, with EXIF that turns it by a quarter to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(Image.fromarray(np.rot90(picture)), "JPEG", quality=100, exif=exif)
    return file, np.rot90(np.asarray(Image.open(io.BytesIO(file))), -1)


def with_broken_exif(picture: Picture) -> tuple[bytes, Picture]:
    """EXIF that turns the picture by a quarter, and has the width as text."""
    return with_exif(Image.fromarray(np.rot90(picture)), "PNG", TURNED["width as ASCII"]), picture


def with_large_text(picture: Picture) -> tuple[bytes, Picture]:
    return IN_PNG["compressed text over the limit"](encoded(Image.fromarray(picture), "PNG")), picture


def several(picture: Picture) -> tuple[bytes, Picture]:
    image = Image.fromarray(picture)
    file = encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)], quality=100)
    return file, np.asarray(Image.open(io.BytesIO(file)))


def boasting(picture: Picture) -> tuple[bytes, Picture]:
    """Its header says 1,120 x 1,120 pixels, within the limit; there are 280 x 280."""
    file = with_size(picture, 1_120)
    return file, np.asarray(Image.open(io.BytesIO(file)).resize((28, 28), Image.Resampling.BICUBIC))


TAKEN: dict[str, tuple[Callable[[Picture], tuple[bytes, Picture]], str]] = {
    "lying JPEG": (boasting, "the answer to what there is of it; the rest is grey"),
    "animated image": (animated, "the answer to the first frame"),
    "CMYK image": (cmyk, "the answer to its grey (or RGB) pixels"),
    "EXIF-rotated image": (rotated, "the answer to the image turned upright"),
    "photo with broken EXIF": (with_broken_exif, "the answer to the image turned upright, where that much can be read"),
    "photo with broken metadata": (
        with_large_text,
        "the answer to its pixels, such as those of a PNG with 1 MiB of text or a wrong checksum of it",
    ),
    "several pictures in a JPEG": (several, "the answer to the first"),
}


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        pytest.param(p, name, id=f"{p}-{name}", marks=fault(f"request: {name}", says, p.name))
        for p in PROTOCOLS
        for name, (_, says) in TAKEN.items()
    ],
)
def test_an_unusual_file_is_answered_as_the_pixels_that_one_sees(
    protocol: Protocol,
    name: str,
    channel: grpc.Channel,
    traffic: Traffic,
    sample_pixels: NDArray[np.uint8],
    bundle: Bundle,
) -> None:
    make, _ = TAKEN[name]
    file, seen = make(sample_pixels[10, :, :, 0])
    call = protocol.call(channel)
    found = protocol.read(call(protocol.request([file], "Bag"), timeout=30), bundle)
    wanted = protocol.read(call(protocol.request(seen[None, :, :, None], "Bag"), timeout=30), bundle)
    assert name == "lying JPEG" or bundle.manifest.labels[int(found.probabilities.argmax())] == "Bag"
    np.testing.assert_array_equal(found.mask, wanted.mask)
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-5)
    traffic.check()
