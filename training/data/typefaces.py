"""Typefaces: the characters 0-9A-Za-z in the typefaces of Debian's packages, degraded as in scanned forms.

Designs, not faces, are split into train, selection and test. A design has all faces of a family name, and of families
that look alike (revivals, copies, the Latin letters that fonts of other scripts borrow). Outlines are rendered once,
into mapped files; degradation.py draws images from them.

Letters: F faces, K characters, S side of an outline in pixels.
"""

import functools
import hashlib
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from training import processes
from training.config import DataSettings
from training.data.degradation import DEGRADATIONS, DegradedPixels
from training.data.pixel_map import default_cache, mapped
from training.data.pixels import DataError, MappedPixels, Split, image_spec
from training.image_spec import ImageSpec

PACKAGES = Path(__file__).with_name("typefaces.txt")
SMALL = ("fonts-dustin", "fonts-eurofurence", "fonts-liberation")
"""The packages of `typefaces-small`."""
INSTALLED = Path("/var/lib/dpkg/info")
"""The folder with Debian's lists of the files of each package."""
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
ALIKE = "cijklmopsuvwxyz"
"""Lower-case letters that `/merged` puts into one class with their upper case, as EMNIST does (arXiv:1702.05373)."""
NOT_LATIN = {
    "90 Stars BRK", "Alfa-beta", "Binary BRK", "Binary X BRK", "Bit Blocks TTF BRK", "Code Of Life BRK", "Ellhnikh",
    "Faux Snow BRK", "FutharkAdapted", "Head-Ding Maker BRK", "Janken BRK", "Line Dings BRK", "Skull Capz BRK",
    "Snailets BRK", "Symmetry BRK", "Tearful BRK",
}  # fmt: skip
"""Families with pictures, or letters of other scripts, instead of Latin letters."""
SIDE = 40
"""S."""
CAPITAL = 20
"""Height of an H in an outline, pixels."""
FINER = 4
"""Outlines are rendered this many times larger, where hinting matters little, and averaged."""
LIKENESS = 0.98
"""Faces whose outlines correlate above this belong to one design."""
MOST_FACES = 4
"""Largest number of faces of a design; others are left out."""
DRAWINGS = 4
"""Drawings of each outline in selection and test."""
FACTORS = ("design", "face", *DEGRADATIONS)
"""The columns of Split.factors for selection and test: the number of the design and of the face within its split, and
the parameters of the degradation."""


@dataclass(frozen=True)
class Faces:
    """Typefaces that have every character."""

    outlines: np.ndarray
    """uint8 (F, K, S, S): ink is 255."""
    design: np.ndarray
    """int64 (F,)"""


def typefaces(settings: DataSettings) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Labels, and the images of `train`, `selection` and `test`.

    Raises DataError for invalid settings, and for packages that are not installed.
    """
    if settings.channels != 1 or settings.crop_fraction != 1:
        raise DataError(f"{settings.dataset} is grey and not cropped; allowed: channels 1, crop_fraction 1")
    name, _, merged = settings.dataset.partition("/")
    files = font_files(SMALL if name == "typefaces-small" else PACKAGES.read_text().splitlines())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    find = functools.cache(lambda: faces(files))
    shares = (settings.selection_fraction, settings.test_fraction)

    def rows(number: int) -> Iterator[tuple[np.ndarray, int]]:
        every = find()
        chosen = part_of(every.design, shares) == number
        for outlines, design in zip(every.outlines[chosen], every.design[chosen], strict=True):
            yield from ((drawn[..., None], int(design)) for drawn in outlines)  # stored in place of the class

    labels, class_of = classes(bool(merged))
    splits, counts = {}, []
    for number, part in enumerate(("train", "selection", "test")):
        made_for = {
            "dataset": name, "split": part, "fonts": digest.hexdigest(), "freetype": features.version("freetype2"),
            "shares": list(shares), "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        }  # fmt: skip
        spec = ImageSpec(SIDE, SIDE, 1, SIDE, "bilinear", (0.5,), (0.5,))
        outlines = mapped(settings.cache or default_cache(), f"{name}-{part}", made_for, spec, rows(number))
        assert isinstance(outlines.images, MappedPixels)
        drawings = 1 if part == "train" else DRAWINGS
        pixels = DegradedPixels(
            torch.arange(len(outlines) * drawings), image_spec(settings), outlines.images.path, len(outlines), SIDE,
            len(CHARACTERS), drawings, number + 1, settings.degradation,
        )  # fmt: skip
        row = pixels.rows // drawings
        split = Split(pixels, class_of[row % len(CHARACTERS)], f"{digest.hexdigest()} {settings.degradation}")
        if part != "train":
            of_face = torch.stack([outlines.classes[row], row // len(CHARACTERS)], 1)
            split = replace(split, factors=torch.cat([of_face, pixels.factors()], 1))
        splits[part] = split
        counts.append(f"{len(outlines.classes.unique())} {part}")
    if processes.is_main():
        print(f"data: designs: {', '.join(counts)}", flush=True)
    return labels, splits


def classes(merged: bool) -> tuple[tuple[str, ...], torch.Tensor]:
    """The labels, and the class of each character: int64 (K,). merged: upper and lower case of the same shape are one
    class."""
    label_of = [c.upper() if merged and c in ALIKE else c for c in CHARACTERS]
    labels = tuple(dict.fromkeys(label_of))
    return labels, torch.tensor([labels.index(label) for label in label_of])


def font_files(lines: Sequence[str]) -> list[Path]:
    """The font files of Debian packages, sorted. lines: one package each. Raises DataError when a package is not
    installed."""
    packages = [line for line in lines if line and not line.startswith("#")]
    missing = [package for package in packages if not (INSTALLED / f"{package}.list").is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(packages)} Debian packages of typefaces are not installed "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): make typefaces"
        )
    listed = {Path(file) for package in packages for file in (INSTALLED / f"{package}.list").read_text().splitlines()}
    fonts = (file for file in listed if file.suffix.lower() in (".ttf", ".otf") and not file.is_symlink())
    return sorted(file for file in fonts if file.is_file())


def faces(files: Sequence[Path]) -> Faces:
    """The outlines of the faces that have every character; at most MOST_FACES of a design, spread over its files."""
    outlines, families = [], []
    for file in tqdm(files, "data: typefaces", unit="face", mininterval=5, delay=2, dynamic_ncols=True):
        family, drawn = outline(file)
        if drawn is not None and family not in NOT_LATIN:
            outlines.append(drawn)
            families.append(family)
    stacked = np.stack(outlines)
    design = designs(stacked, families)
    kept = []
    for number in range(design.max() + 1):
        members = np.flatnonzero(design == number)
        kept += members[np.linspace(0, len(members) - 1, min(len(members), MOST_FACES)).round().astype(int)].tolist()
    kept.sort()
    return Faces(stacked[kept], design[kept])


def outline(file: Path, characters: str = CHARACTERS) -> tuple[str, np.ndarray | None]:
    """The family's name, and the outlines uint8 (K, S, S) with horizontally centred ink on a common baseline; None when
    the face lacks a character or has two identical ones."""
    try:
        font = ImageFont.truetype(file, 100, layout_engine=ImageFont.Layout.BASIC)
        family = str(font.getname()[0])
        _, top, _, bottom = font.getbbox("H", anchor="ls")
        if bottom - top < 20:  # no capital letters
            return family, None
        font = font.font_variant(size=100 * CAPITAL * FINER / (bottom - top))
        drawn = [_drawn(font, character) for character in f"{characters}\U0010fffd"]
    except (OSError, ValueError):
        return file.name, None
    different = {image.tobytes() for image in (*drawn, np.zeros_like(drawn[0]))}
    missing = drawn.pop()
    if len(different) < len(characters) + 1 + bool(missing.any()):
        return family, None
    return family, np.stack(drawn)


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    left, _, right, _ = font.getbbox(character, anchor="ls")
    image = Image.new("L", (SIDE * FINER, SIDE * FINER))
    place = (SIDE * FINER / 2 - (left + right) / 2, (SIDE + CAPITAL) / 2 * FINER)
    ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="ls")
    return np.asarray(image.reduce(FINER))


def designs(outlines: np.ndarray, families: Sequence[str]) -> np.ndarray:
    """int64 (F,): the design of each face. Faces belong to one design if they share the family name or their outlines
    correlate above LIKENESS, directly or through other faces (single linkage)."""
    names = np.unique(families, return_inverse=True)[1]
    linked = (likeness(outlines) > LIKENESS) | (names[:, None] == names)
    return np.asarray(connected_components(linked, directed=False)[1], np.int64)


def likeness(outlines: np.ndarray) -> np.ndarray:
    """Correlations (F, F) of faces over the pixels of all characters, at half the resolution; float32."""
    f, k, s, _ = outlines.shape
    halved = outlines.reshape(f, k, s // 2, 2, s // 2, 2).mean((3, 5), dtype=np.float32).reshape(f, -1)
    halved -= halved.mean(1, keepdims=True)
    halved /= np.linalg.norm(halved, axis=1, keepdims=True)
    return np.asarray(halved @ halved.T)


def part_of(design: np.ndarray, shares: tuple[float, float]) -> np.ndarray:
    """The split of each face: int64 (F,); 0 train, 1 selection, 2 test. By design, the same for every seed. shares: of
    selection and test."""
    count = int(design.max()) + 1
    selection, test = (max(1, round(share * count)) for share in shares)
    part = np.zeros(count, np.int64)
    order = np.random.default_rng(0).permutation(count)
    part[order[:selection]], part[order[selection : selection + test]] = 1, 2
    return np.asarray(part[design])
