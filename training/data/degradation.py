"""Draws characters as on a scanned form: outlines rotated, blurred and noisy, between parts of their neighbours.

Every drawing depends only on its key and row, not on batches, processes or resuming.

Letters: B images, S side of an outline in pixels, K outlines per face.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from training.data.pixels import Pixels, as_picture

DEGRADATIONS = (
    "size", "stretch", "rotation", "shear", "right", "down", "blur across", "blur down", "contrast",
    "brightness", "noise", "dark on light", "left gap", "right gap",
)  # fmt: skip
"""The parameters that turn an outline into an image, in this order: size and stretch as factors; rotation in radians;
shear as a factor; right and down, and the blurs' standard deviations, in pixels of a 28-pixel image; contrast,
brightness and the noise's standard deviation as shares of white; 1 for dark on light; gaps to the neighbours in pixels
of the outline, NO_NEIGHBOUR if there is none."""
NO_NEIGHBOUR = 99.0
DRAWS = 19
"""Uniform numbers that one drawing takes."""
NOISE = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32)
"""The noise of a drawing is a section of these numbers from a random start."""


@dataclass(frozen=True)
class DegradedPixels(Pixels):
    """Drawings of the outlines in a mapped file. Row r shows outline r // drawings. Indexing always gives the same
    drawing; `draw` gives a new one for each epoch."""

    path: Path
    """The file of the outlines: uint8 (faces x K, S, S)."""
    total: int
    """Outlines in the file."""
    side: int
    """S."""
    characters: int
    """K: number of rows of a face in the file."""
    drawings: int
    """Number of drawings of each outline."""
    split: int
    """Number of the split, so that splits have different drawings."""
    strength: float
    """0: clean; 1: as in a poor scan."""

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """As Pixels.read."""
        return self._drawn(rows, (self.split, 0, 0))

    def draw(self, index: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
        """The images at `index`, drawn for this epoch: uint8 (B, H, W, C)."""
        return self._drawn(self.rows[index], (0, seed % 2**64, epoch))

    def factors(self) -> torch.Tensor:
        """The parameters of the images that indexing gives: float32 (B, DEGRADATIONS)."""
        return self._factors(self._uniform(self.rows, (self.split, 0, 0)))

    def picture(self, index: int) -> Image.Image:
        """As Pixels.picture, in the size that the model reads, the only one there is."""
        return as_picture(self[index])

    def _drawn(self, rows: torch.Tensor, key: tuple[int, int, int]) -> torch.Tensor:
        uniform = self._uniform(rows, key)
        outline = rows.numpy() // self.drawings
        face = outline // self.characters * self.characters
        neighbours = face[:, None] + (uniform[:, -3:-1] * self.characters).astype(np.int64)  # (B, 2)
        mapped = np.memmap(self.path, np.uint8, "r", shape=(self.total, self.side, self.side))
        outlines = torch.from_numpy(mapped[np.concatenate([outline[:, None], neighbours], 1)])  # (B, 3, S, S)
        place = (uniform[:, -1:] * (len(NOISE) - self.spec.height**2)).astype(np.int64)
        noise = torch.from_numpy(NOISE[place + np.arange(self.spec.height**2)])
        return degraded(outlines, self._factors(uniform), noise, self.spec.height)

    def _uniform(self, rows: torch.Tensor, key: tuple[int, int, int]) -> np.ndarray:
        """Random numbers from 0 to 1, independent for each row: (B, DRAWS)."""
        drawn = [np.random.default_rng((*key, row)).random(DRAWS) for row in rows.tolist()]
        return np.stack(drawn) if drawn else np.empty((0, DRAWS))

    def _factors(self, uniform: np.ndarray) -> torch.Tensor:
        u, much = uniform.T, self.strength
        either = 2 * u - 1  # from -1 to 1
        contrast = 1 - 0.75 * min(much, 1.2) * u[8]
        columns = [
            np.exp(-0.5 * much * u[0]),
            np.exp(0.25 * much * either[1]),
            0.3 * much * either[2],
            0.3 * much * either[3],
            2.5 * much * either[4],
            2.5 * much * either[5],
            0.3 + 1.2 * much * u[6] ** 2,
            0.3 + 1.2 * much * u[7] ** 2,
            contrast,
            0.5 + 0.5 * (1 - contrast) * either[9],
            0.25 * much * u[10] ** 2 * contrast,
            u[11] < 0.5 * min(much, 1),
            *(np.where(u[n] < 0.5 * much, 5 * u[n + 1] - 1, NO_NEIGHBOUR) for n in (12, 14)),
        ]
        return torch.from_numpy(np.stack(columns, 1).astype(np.float32))


def degraded(outlines: torch.Tensor, factors: torch.Tensor, noise: torch.Tensor, size: int) -> torch.Tensor:
    """The images of outlines with these parameters: uint8 (B, size, size, 1).

    outlines: uint8 (B, 3, S, S): the character, its left and its right neighbour, with the ink centred horizontally.
    factors: (B, DEGRADATIONS). noise: (B, size x size), standard normal.
    """
    scale, stretch, turn, shear, right, down, across, upright, contrast, brightness, sigma, dark, *gaps = factors.T
    b, _, s, _ = outlines.shape
    # pixel p of an image, relative to its centre, shows point matrix (p - (right, down)) + (offset, 0) of the outline
    unit = size / 28
    cos, sin = torch.cos(turn), torch.sin(turn)
    forward = torch.stack(
        [scale * stretch * cos, scale * (shear * cos - sin) / stretch,
         scale * stretch * sin, scale * (shear * sin + cos) / stretch], 1,
    ).view(b, 2, 2)  # fmt: skip
    matrix = torch.linalg.inv(forward)
    origin = -(matrix @ torch.stack([right, down], 1)[..., None])[..., 0]  # (B, 2)
    half = half_widths(outlines)
    left = half[:, 0] + gaps[0] + half[:, 1]
    offset = torch.stack([torch.zeros(b), left, -(half[:, 0] + gaps[1] + half[:, 2])], 1)  # (B, 3)
    theta = torch.empty(b, 3, 2, 3)
    theta[..., :2] = (matrix * (size / unit / s))[:, None]
    theta[..., 0, 2] = (origin[:, None, 0] + offset) * (2 / s)
    theta[..., 1, 2] = origin[:, None, 1] * (2 / s)
    grid = F.affine_grid(theta.view(-1, 2, 3), [3 * b, 1, size, size], align_corners=False)
    flat = outlines.view(-1, 1, s, s).float() / 255
    ink = F.grid_sample(flat, grid, align_corners=False).view(b, 3, size, size).amax(1)
    ink = blur(size, upright * unit) @ ink @ blur(size, across * unit).mT
    sign = torch.where(dark > 0, -contrast, contrast)
    image = brightness[:, None, None] + sign[:, None, None] * (ink - 0.5)
    image = image + sigma[:, None, None] * noise.view(b, size, size)
    pixels: torch.Tensor = (image * 255).round().clamp(0, 255).byte()
    return pixels[..., None]


def half_widths(outlines: torch.Tensor) -> torch.Tensor:
    """The distance from the middle to the farthest column with ink, in pixels: uint8 (..., S, S) -> float32 (...)."""
    s = outlines.shape[-1]
    distance = (torch.arange(s) - (s - 1) / 2).abs() + 0.5
    return ((outlines.amax(-2) > 64) * distance).amax(-1)


def blur(size: int, sigma: torch.Tensor) -> torch.Tensor:
    """Matrices (B, size, size) that blur columns by normal distributions with these standard deviations, in pixels."""
    place = torch.arange(size)
    weight: torch.Tensor = torch.exp(-0.5 * (place / sigma[:, None]).square())[:, (place - place[:, None]).abs()]
    return weight / weight.sum(-1, keepdim=True)
