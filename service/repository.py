"""Finds the bundles of a repository, loads them, and answers which model serves a request."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle, BundleError, is_bundle, load_bundle, versions
from service.batcher import Answer, Batcher
from service.config import Settings
from service.engine import Engine
from service.errors import InvalidRequest, NotFound, Overloaded
from service.metrics import CUSTOM, NONE, Metrics, ModelMetrics
from service.steering import Steering

log = logging.getLogger("steervit.repository")
NEAR_THRESHOLD = 1e-3
"""|gate logit| below which rounding could decide a gate."""


class Model:
    """A bundle that is being served."""

    def __init__(self, bundle: Bundle, settings: Settings, metrics: Metrics, pool: ThreadPoolExecutor):
        """Loads the graph and checks it. Raises BundleError or EngineError."""
        self.bundle = bundle
        self.engine = Engine(bundle, settings.provider, settings.threads)
        self._pool = pool
        self._metrics: ModelMetrics = metrics.for_model(
            bundle, self.engine.graph_name, self.engine.provider, lambda: self.batcher.queued
        )
        self.batcher = Batcher(
            self.engine,
            settings.max_batch,
            settings.max_delay_ms / 1000,
            settings.max_queue,
            self._metrics.batch,
            self._metrics.dropped,
            bundle.manifest.name,
        )

    async def predict(
        self, decoders: list[Callable[[], NDArray[np.uint8]]], steering: Steering, seconds_left: float | None
    ) -> Answer:
        """Decode the images in the pool, run them, count them. seconds_left: until the deadline, if there is one.

        Raises what a decoder raises (InvalidRequest), and Overloaded, Expired or Stopping.
        """
        deadline = math.inf if seconds_left is None else time.monotonic() + seconds_left
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        images = await loop.run_in_executor(self._pool, lambda: np.stack([decode() for decode in decoders]))
        self._metrics.decoded(time.perf_counter() - start)
        try:
            answer = await self.batcher.submit(images, steering, deadline)
        except Overloaded:
            self._metrics.dropped("queue_full", len(images))
            raise
        near = int((np.abs(answer.gate_logit) < NEAR_THRESHOLD).sum())
        self._metrics.answered(steering.profile or (CUSTOM if steering.custom else NONE), answer.head_gate, near)
        return answer


class Repository:
    """The models of a repository folder, or of a single bundle folder: of each model the newest version."""

    def __init__(self, settings: Settings, metrics: Metrics):
        """Loads everything. Raises BundleError or EngineError: a server starts with all that it was given or not."""
        self._pool = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._models: dict[str, Model] = {}
        for folder in find_bundles(settings.repository):
            bundle = load_bundle(folder)
            name = bundle.manifest.name
            if name in self._models:
                raise BundleError(f"{folder}: the model {name!r} is there twice in {settings.repository}")
            self._models[name] = Model(bundle, settings, metrics, self._pool)
            log.info(
                "model %s version %d: %s on %s, %d profiles, digest %s",
                name, bundle.manifest.version, self._models[name].engine.graph_name, self._models[name].engine.provider,
                len(bundle.profiles), bundle.digest,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return all(model.batcher.alive for model in self._models.values())

    def get(self, name: str, version: str) -> Model:
        """The model that a request names; "" where it names none. Raises NotFound or InvalidRequest."""
        if not name:
            if len(self._models) != 1:
                raise InvalidRequest(f"model is empty; allowed: one of {self._names()}")
            name = next(iter(self._models))
        if name not in self._models:
            raise NotFound(f"model is {name!r}; allowed: {self._names()}")
        model = self._models[name]
        served = str(model.bundle.manifest.version)
        if version not in ("", served):
            raise NotFound(f"version of model {name!r} is {version!r}; allowed: {served!r}, or none")
        return model

    def close(self) -> None:
        for model in self._models.values():
            model.batcher.close()
        self._pool.shutdown()

    def _names(self) -> str:
        return ", ".join(repr(name) for name in sorted(self._models))


def find_bundles(repository: Path) -> list[Path]:
    """The bundle folders to serve. Raises BundleError when there is none, or one resolves outside the repository."""
    if is_bundle(repository):
        return [repository]
    if not repository.is_dir():
        raise BundleError(f"repository is {repository}, which is not a folder")
    found = []
    for model in sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith(".")):
        numbers = versions(model)
        if not numbers:
            continue
        folder = model / str(numbers[-1])
        if not folder.resolve().is_relative_to(repository.resolve()):
            raise BundleError(f"{folder} resolves to {folder.resolve()}, outside {repository.resolve()}")
        found.append(folder)
    if not found:
        raise BundleError(f"repository is {repository}; allowed: a bundle, or folders <model>/<version>/ with bundles")
    return found
