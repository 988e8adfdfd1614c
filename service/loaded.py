"""One open and warm graph: its session, the shapes of its batches, and how long batches take."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.bundle import BundleError
from export.session import Arrays
from service import cuda
from service.buckets import Buckets, sizes
from service.cuda import Gpu

log = logging.getLogger("steervit.engine")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": cuda.PROVIDER}


class EngineError(Exception):
    """The engine cannot start with these settings; the message has the reason and a cure."""


class Bounds(NamedTuple):
    """Upper bounds of the shapes of batches."""

    rows: int
    terms: int


class Loaded:
    """An open graph. `run` may be called from several threads at once."""

    def __init__(
        self, path: Path, options: onnxruntime.SessionOptions, provider: str, gpu: Gpu | None, bounds: Bounds | None
    ):
        """Opens and warms the graph. gpu: None for the CPU; bounds: None for batches of any shape.

        Raises EngineError or BundleError.
        """
        self._path, self._provider, self._gpu = path, provider, gpu
        self.captured: Sequence[int] = ()
        """Batch sizes that run as CUDA graphs."""
        self._seconds: list[float] = []
        """Durations of batches of 1, 2, 4, ... images."""
        self._session, self._buckets = self._opened(options, bounds)
        self.inputs = {entry.name for entry in self._session.get_inputs()}
        """Names of the graph's inputs."""

    def run(self, names: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        """The named outputs. Inputs that the graph does not have are ignored."""
        if self._buckets:
            return self._buckets.run(names, inputs)
        own = inputs if len(self.inputs) == len(inputs) else {name: inputs[name] for name in self.inputs}
        outputs: list[NDArray[Any]] = self._session.run(list(names), own)
        return outputs

    def measure(self, inputs: Arrays, largest: int) -> None:
        """Time batches of 1, 2, 4, ... images, made from these rows: the fastest of three runs each."""
        for size in sizes(largest):
            rows = np.arange(size) % len(inputs["image"])
            batch = {name: value[rows] for name, value in inputs.items()}
            taken = []
            for _ in range(3):
                start = time.perf_counter()
                self.run(["logits"], batch)
                taken.append(time.perf_counter() - start)
            self._seconds.append(min(taken))

    def seconds(self, rows: int) -> float:
        """The measured duration of a batch: on a GPU, of the shape in which it runs; else in proportion to its rows."""
        upper = min((rows - 1).bit_length(), len(self._seconds) - 1)
        return self._seconds[upper] * (1.0 if self._buckets and rows <= 2**upper else rows / 2**upper)

    def _opened(
        self, options: onnxruntime.SessionOptions, bounds: Bounds | None
    ) -> tuple[onnxruntime.InferenceSession, Buckets | None]:
        """The session and its shapes, each of which has run once: as CUDA graphs, if settings and graph allow it."""
        gpu, name = self._gpu, self._path.name
        if gpu and gpu.graphs and bounds:
            start = time.perf_counter()
            try:
                with cuda.quiet.using():  # loading would disturb a capture too
                    session = self._open(options, capture=True)
                    buckets = Buckets(session, *bounds, gpu)
                with cuda.quiet.capturing():
                    buckets.first_runs()
            except Exception as error:  # onnxruntime raises undocumented kinds
                log.warning("%s runs without CUDA graphs, more slowly: %s", name, error)
            else:
                self.captured = buckets.rows
                log.info("%s: CUDA graphs for batches of %s, captured in %.1f s", name,
                         ", ".join(map(str, self.captured)), time.perf_counter() - start)  # fmt: skip
                return session, buckets
        session = self._open(options)
        if bounds is None:
            return session, None
        buckets = Buckets(session, *bounds, gpu)
        buckets.first_runs()
        return session, buckets

    def _open(self, options: onnxruntime.SessionOptions, capture: bool = False) -> onnxruntime.InferenceSession:
        """Open the session. capture: for CUDA graphs."""
        names: list[Any] = [PROVIDERS["cpu"]]
        if self._gpu:
            names.insert(0, (cuda.PROVIDER, cuda.provider_options(self._gpu, capture)))
            cuda.share_memory(self._gpu, options)
        try:
            session = onnxruntime.InferenceSession(str(self._path), options, providers=names)
        except Exception as error:  # onnxruntime raises undocumented kinds
            raise BundleError(f"{self._path}: onnxruntime cannot load it: {error}") from error
        got = session.get_providers()[0]
        if got != PROVIDERS[self._provider]:
            raise EngineError(
                f"provider is {self._provider!r}, but the session has {got}. "
                "Fix: install a CUDA and cuDNN that onnxruntime-gpu fits, or start with --provider cpu"
            )
        return session
