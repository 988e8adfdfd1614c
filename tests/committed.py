"""The committed bundle and its sample images."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.bundle import Bundle, load_bundle, versions
from tests.processes import MODELS, SAMPLES

BUNDLE = MODELS / "fashion_mnist"


def newest(model: Path) -> Bundle:
    """The highest version in the folder of a model."""
    return load_bundle(model / str(versions(model)[-1]))


def pixels() -> NDArray[np.uint8]:
    """The sample images: uint8 (100, 28, 28, 1), by label."""
    return np.stack([np.asarray(Image.open(file))[:, :, None] for file in sorted(SAMPLES.glob("*/*.png"))])
