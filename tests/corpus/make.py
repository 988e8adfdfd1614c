"""python -m tests.corpus.make: writes the nasty images beside it; names begin with what is to come of them, ok or bad.

Whole files come from Pillow; what Pillow would not write is patched or put together byte by byte.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.photos import chunk, encoded

HERE = Path(__file__).parent
SIZE = 40


def picture(mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    return Image.fromarray(np.stack([rows * 6 % 256, columns * 6 % 256, rows ^ columns], 2).astype(np.uint8)).convert(
        mode
    )


def png(width: int, height: int, bits: int, *chunks: bytes) -> bytes:
    """A grey image."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def rows(width: int, height: int) -> bytes:
    """The data chunk of a black grey image."""
    return chunk(b"IDAT", zlib.compress(bytes((width + 1) * height), 9))


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    start = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return start + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def turned() -> Image.Exif:
    """By a quarter to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def files() -> Iterator[tuple[str, bytes]]:
    jpeg, small = encoded(picture(), "JPEG", quality=80), encoded(picture(), "PNG")
    frames = [picture("P"), picture("P").rotate(90), picture("P").rotate(180)]
    size = jpeg.index(b"\xff\xc0") + 5  # height and width in the JPEG's frame header
    yield "ok_animated.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "ok_animated.webp", encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)])
    yield "ok_animated.png", encoded(picture(), "PNG", save_all=True, append_images=[picture().rotate(90)])
    yield "ok_cmyk.jpg", encoded(picture("CMYK"), "JPEG")
    yield "ok_exif_rotated.jpg", encoded(picture(size=(60, 40)), "JPEG", exif=turned())
    yield "ok_palette_transparent.png", encoded(picture("P"), "PNG", transparency=0)
    yield "ok_progressive.jpg", encoded(picture(), "JPEG", progressive=True)
    yield "ok_one_pixel.png", encoded(picture(size=(1, 1)), "PNG")
    yield "ok_html_after_jpeg.jpg", jpeg + b"<script>alert(1)</script>"
    yield "ok_zip_after_png.png", small + b"PK\x05\x06" + bytes(18)
    yield "ok_gif_and_javascript.gif", gif((1, 1), (1, 1)) + b"/*=1;alert(1)//"
    yield "bad_zero_bytes.png", b""
    yield "bad_only_zeros.png", bytes(500)
    yield "bad_signature_alone.png", small[:8]
    yield "bad_truncated.png", small[: len(small) // 2]
    yield "bad_truncated.jpg", jpeg[:-100]
    yield "bad_jpeg_header_says_65535.jpg", jpeg[:size] + b"\xff\xff\xff\xff" + jpeg[size + 4 :]
    yield "bad_png_header_says_2_to_31.png", png(2**31 - 1, 2**31 - 1, 8, rows(8, 8))
    yield "bad_png_header_says_zero.png", png(0, 0, 8, rows(0, 1))
    yield "bad_png_header_says_more.png", png(4000, 4000, 8, rows(8, 8))
    yield "bad_gif_frame_larger_than_screen.gif", gif((1, 1), (65535, 65535))
    yield "bad_bomb_of_81_megapixels.png", png(9000, 9000, 1, chunk(b"IDAT", bombed(9000 // 8 + 1, 9000)))
    yield "ok_text_bomb.png", png(8, 8, 8, text_bomb(), rows(8, 8))
    yield "ok_profile_bomb.png", png(8, 8, 8, chunk(b"iCCP", b"p\0\0" + bombed(2**20, 30)), rows(8, 8))
    yield "bad_16_bit.png", encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000), "PNG")
    yield "bad_one_by_ten_thousand.png", png(1, 10_000, 8, rows(1, 10_000))
    yield "bad_tiff_named_jpg.jpg", encoded(picture(size=(8, 8)), "TIFF")
    yield "bad_svg_named_png.png", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "bad_postscript_named_png.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n"
    yield "ok_exif_that_is_nonsense.jpg", looping_exif(encoded(picture(), "JPEG", exif=turned()))
    yield (
        "bad_bmp_of_negative_size.bmp",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -9, -9, 1, 24, *[0] * 6),
    )
    yield "bad_webp_of_16383.webp", webp_canvas(16383)
    yield "bad_heic_named_jpg.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    yield "bad_html_named_jpg.jpg", b"<!DOCTYPE html><title>404</title>"
    yield "ok_png_text_of_wrong_checksum.png", png(8, 8, 8, chunk(b"tEXt", b"a\0b")[:-1] + b"\0", rows(8, 8))
    yield "ok_jpeg_of_short_segments.jpg", jpeg[:2] + b"\xff\xee\0\7Adobe\xff\xe2\0\x0eICC_PROFILE\0" + jpeg[2:]


def bombed(row: int, count: int) -> bytes:
    return zlib.compress(bytes(row * count), 9)


def text_bomb() -> bytes:
    return chunk(b"zTXt", b"Comment\0\0" + bombed(2**20, 8))


def looping_exif(file: bytes) -> bytes:
    """The first directory says that the next one is itself."""
    start = file.index(b"Exif\0\0") + 6
    return file[: start + 8] + b"\xff\xff" + file[start + 10 :]


def webp_canvas(side: int) -> bytes:
    """An animation of which only the header is there."""
    vp8x = b"VP8X" + struct.pack("<II", 10, 2) + 2 * (side - 1).to_bytes(3, "little")
    body = b"WEBP" + vp8x + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    return b"RIFF" + struct.pack("<I", len(body)) + body


if __name__ == "__main__":
    for old in HERE.iterdir():
        if old.suffix != ".py" and old.is_file():
            old.unlink()
    written = {name: (HERE / name).write_bytes(content) for name, content in files()}
    print(f"{len(written)} files, {sum(written.values())} bytes")
