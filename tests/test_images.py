"""Pixels equal those of timm's transform for evaluation exactly, in training and in the server."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from photos import IN_JPEG, IN_PNG, OTHERS, TURNED, UPRIGHT, Change, encoded, with_exif
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform

from service.errors import InvalidRequest
from service.images import MODES, Limits, decode, from_raw
from training.config import DataSettings
from training.data.pixels import image_spec, open_image, upright
from training.data.splits import eval_transform
from training.image_spec import ImageSpec

LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000)


def spec(size: int, resize: int, channels: int, interpolation: str) -> ImageSpec:
    return ImageSpec(size, size, channels, resize, interpolation, (0.5,) * channels, (0.5,) * channels)


def by_timm(image: Image.Image, wanted: ImageSpec) -> NDArray[np.uint8]:
    """The pixels of an upright image by timm: (height, width, channels)."""
    transform = create_transform(
        (wanted.channels, wanted.height, wanted.width),
        is_training=False,
        use_prefetcher=True,  # stops at uint8
        interpolation=wanted.interpolation,
        crop_pct=wanted.height / (wanted.resize + 0.5),  # timm floors height / crop_pct
    )
    return np.asarray(transform(image)).transpose(1, 2, 0)


def picture(width: int, height: int, mode: str, seed: int) -> Image.Image:
    """Smooth shapes and noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 4), np.uint8), "RGBA").resize((width, height))
    noisy = np.asarray(coarse).astype(int) + generator.integers(-20, 20, (height, width, 4))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8), "RGBA").convert(mode)


@settings(max_examples=120, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    mode=st.sampled_from(["RGB", "L", "RGBA", "LA", "P", "1"]),
    channels=st.sampled_from([1, 3]),
    size=st.sampled_from([16, 28, 33]),
    margin=st.sampled_from([0, 1, 5]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    seed=st.integers(0, 1000),
)
def test_pixels_equal_the_evaluation_transform(
    width: int, height: int, mode: str, channels: int, size: int, margin: int, interpolation: str, seed: int
) -> None:
    wanted = spec(size, size + margin, channels, interpolation)
    file = encoded(picture(width, height, mode, seed), "PNG")
    with Image.open(io.BytesIO(file)) as image:
        expected = by_timm(upright(image, channels), wanted)
        np.testing.assert_array_equal(eval_transform(wanted)(image), expected)
    found = decode(file, wanted, LIMITS, "image")
    assert found.dtype == np.uint8
    assert found.shape == (size, size, channels)
    np.testing.assert_array_equal(found, expected)


def test_both_resize_alike_for_every_size_and_crop() -> None:
    """A gradient shows any difference of the resize in every pixel. All sizes and fractions that give another
    resize."""
    ramp = Image.linear_gradient("L").resize((61, 47))
    specs = {
        image_spec(DataSettings(image_size=size, crop_fraction=fraction / 100))
        for size in (*range(8, 257), 299, 384, 1024)
        for fraction in (50, 80, 85, 87.5, 90, 95, 100)
    }
    floored = [s for s in specs if math.floor(s.height / (s.height / s.resize)) != s.resize]
    assert (192, 225) in [(s.height, s.resize) for s in floored], "192 / (192 / 225) is below 225"
    for wanted in [*floored, *sorted(specs, key=lambda s: (s.height, s.resize))[::40]]:
        found = decode(encoded(ramp, "PNG"), wanted, LIMITS, "image")
        np.testing.assert_array_equal(found, by_timm(upright(ramp, wanted.channels), wanted), str(wanted))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_turned_upright_by_both(orientation: int) -> None:
    image = picture(41, 29, "RGB", 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(image, "JPEG", exif=exif, quality=95)
    wanted = spec(24, 28, 3, "bicubic")
    with Image.open(io.BytesIO(file)) as opened:
        expected = eval_transform(wanted)(opened)
    found = decode(file, wanted, LIMITS, "image")
    np.testing.assert_array_equal(found, expected)
    upright = eval_transform(wanted)(Image.open(io.BytesIO(encoded(image, "JPEG", quality=95))))
    assert np.array_equal(found, upright) == (orientation == 1)


def assert_both_read(file: bytes, expected: Image.Image) -> None:
    wanted = spec(24, 28, 3, "bicubic")
    pixels = eval_transform(wanted)(expected)
    np.testing.assert_array_equal(decode(file, wanted, LIMITS, "image"), pixels)
    np.testing.assert_array_equal(eval_transform(wanted)(open_image(file)), pixels)


def as_stored(image: Image.Image, kind: str) -> Image.Image:
    return Image.open(io.BytesIO(with_exif(image, kind, b"II*\0"))).convert("RGB")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("broken", TURNED)
def test_the_orientation_is_read_whatever_the_other_tags_hold(broken: str, kind: str) -> None:
    image = picture(41, 29, "RGB", 1)
    upright = as_stored(image, kind).transpose(Image.Transpose.ROTATE_270)
    assert_both_read(with_exif(image, kind, TURNED[broken]), upright)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("broken", UPRIGHT)
def test_a_photo_without_a_readable_orientation_is_upright(broken: str, kind: str) -> None:
    image = picture(41, 29, "RGB", 1)
    assert_both_read(with_exif(image, kind, UPRIGHT[broken]), as_stored(image, kind))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(pytest.param("PNG", change, id=f"PNG-{name}") for name, change in IN_PNG.items()),
        *(pytest.param("JPEG", change, id=f"JPEG-{name}") for name, change in IN_JPEG.items()),
    ],
)
def test_metadata_never_make_a_photo_unreadable(kind: str, change: Change) -> None:
    plain = encoded(picture(41, 29, "RGB", 1), kind)
    assert change(plain) != plain
    assert_both_read(change(plain), Image.open(io.BytesIO(plain)))


def test_the_first_of_several_pictures_in_a_file_is_read() -> None:
    """As phones write them (MPO), also with a truncated second picture."""
    image = picture(41, 29, "RGB", 1)
    file = encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)])
    first = file[: file.index(b"\xff\xd8\xff", 2)]
    for content in (file, file[:-20]):
        assert_both_read(content, Image.open(io.BytesIO(first)))


@pytest.mark.parametrize("mode", ["CMYK", "L", "progressive"])
def test_broken_metadata_do_not_change_colours_or_orientation(mode: str) -> None:
    """For CMYK, Adobe's segment tells whether the inks are inverted; it is kept."""
    image = picture(41, 29, "RGB", 1).convert("RGB" if mode == "progressive" else mode)
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = encoded(image, "JPEG", quality=95, progressive=mode == "progressive", exif=turned)
    broken = IN_JPEG["short colour profile"](plain)
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(broken))
    stored = Image.open(io.BytesIO(plain))
    stored.load()
    assert_both_read(broken, stored)
    assert open_image(broken).mode == open_image(plain).mode


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_called_by_its_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(OTHERS[name], spec(16, 16, 3, "bicubic"), LIMITS, "photo")
    size = len(OTHERS[name])
    assert str(caught.value) == (
        f"photo is not a readable image ({size} bytes, {name}); allowed: JPEG, PNG, WEBP, BMP, GIF"
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photo_that_is_cut_short_stays_refused(kind: str) -> None:
    """Its missing pixels would be invented."""
    file = encoded(picture(41, 29, "RGB", 1), kind)
    name = {"WEBP": "WebP"}.get(kind, kind)
    with pytest.raises(InvalidRequest, match=rf"photo is not a readable image \(.* bytes, a broken {name}\); allowed"):
        decode(file[: len(file) * 2 // 3], spec(16, 16, 3, "bicubic"), LIMITS, "photo")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "photo is empty; allowed: JPEG, PNG, WEBP, BMP, GIF"),
        (b"not an image", "photo is not a readable image (12 bytes, UnidentifiedImageError)"),
        (encoded(picture(40, 40, "RGB", 0), "PNG")[:300], "photo is not a readable image (300 bytes"),
        (encoded(picture(40, 40, "RGB", 0), "TIFF"), "photo is not a readable image"),
        (encoded(Image.new("RGB", (1001, 1000)), "PNG"), "photo has 1001 x 1000 pixels; allowed: at most 1000000"),
        (b"x" * 1_000_001, "photo has 1000001 bytes; allowed: at most 1000000"),
        (encoded(Image.new("I;16", (8, 8)), "PNG"), "photo has the pixel format I;16; allowed: 8 bits a channel"),
        (encoded(Image.new("L", (2, 5000)), "PNG"), "allowed: sides that differ at most a hundredfold"),
    ],
)
def test_what_is_not_a_usable_image_is_named(file: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(file, spec(16, 16, 3, "bicubic"), LIMITS, "photo")
    assert message in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F", "LAB"])
def test_both_refuse_the_same_pixel_formats(mode: str) -> None:
    image = Image.new(mode, (20, 20))
    if mode in MODES:
        assert eval_transform(spec(16, 16, 3, "bicubic"))(image).shape == (16, 16, 3)
        return
    with pytest.raises(ValueError, match=f"the pixel format is {mode}; allowed: 8 bits a channel"):
        eval_transform(spec(16, 16, 3, "bicubic"))(image)


def test_raw_pixels_must_have_the_models_size() -> None:
    wanted = spec(16, 16, 3, "bicubic")
    pixels = np.random.default_rng(0).integers(0, 256, wanted.shape, np.uint8)
    np.testing.assert_array_equal(from_raw(pixels.tobytes(), wanted, "pixels"), pixels)
    with pytest.raises(InvalidRequest, match=r"pixels has 767 bytes; allowed: 768 \(uint8, 16 x 16 x 3\)"):
        from_raw(pixels.tobytes()[:-1], wanted, "pixels")


def test_drafts_are_near_and_only_of_large_jpegs() -> None:
    """A photo of 1600 x 1200 for 224 pixels is decoded at half its size; small images and other formats are not
    affected."""
    wanted, coarse = spec(224, 256, 3, "bicubic"), picture(1600, 1200, "RGB", 1)
    limits, drafts = Limits(10**7, 10**7), Limits(10**7, 10**7, jpeg_draft=True)
    photo = coarse.resize((800, 600)).resize((1600, 1200))  # without noise from pixel to pixel, as a photo
    found, exact = (decode(encoded(photo, "JPEG"), wanted, given, "image").astype(int) for given in (drafts, limits))
    difference = np.abs(found - exact)
    assert 0 < difference.max() < 16
    assert difference.mean() < 1
    small = photo.resize((500, 400))  # less than twice 256 along a side
    for file in (encoded(small, "JPEG"), encoded(photo, "PNG")):
        np.testing.assert_array_equal(decode(file, wanted, drafts, "image"), decode(file, wanted, limits, "image"))
