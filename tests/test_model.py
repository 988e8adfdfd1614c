"""A model in this process: what it counts under which name."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from export.bundle import Bundle
from service.config import Settings
from service.metrics import Metrics
from service.model import Model
from service.tuning import Surroundings
from training.steering import NEUTRAL


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def model(bundle: Bundle, registry: CollectorRegistry) -> Iterator[Model]:
    """All steered images are shadowed; one profile has the name that means no steering."""
    profiles = {**bundle.profiles, "none": replace(bundle.profiles["Shirt"], name="none")}
    settings = Settings(repository=bundle.folder, provider="cpu", tune="off", shadow_fraction=1.0)
    with ThreadPoolExecutor(1) as pool:
        served = replace(bundle, profiles=profiles)
        model = Model(served, settings, Metrics(registry, 200), pool, Surroundings(serving=False, spinning=False))
        yield model
        model.batcher.close()


async def test_a_profile_called_none_is_shadowed_and_counted_as_a_profile(
    model: Model, registry: CollectorRegistry, sample_pixels: NDArray[np.uint8]
) -> None:
    await model.predict(sample_pixels[:4], model.steering("none", NEUTRAL, 1.0), None)
    await model.predict(sample_pixels[:2], model.steering("", NEUTRAL, 1.0), None)
    of_model = {"model": "fashion_mnist", "version": str(model.bundle.manifest.version)}
    for name, profile, images in (
        ("steervit_shadow_images_total", "profile:none", 4), ("steervit_images_total", "profile:none", 4),
        ("steervit_shadow_images_total", "none", 0), ("steervit_images_total", "none", 2),
    ):  # fmt: skip
        assert registry.get_sample_value(name, {**of_model, "profile": profile}) == images
