"""One onnxruntime session: arrays in, arrays out. Knows nothing of requests, protobuf or metrics."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.bundle import INPUTS, OUTPUTS, Bundle, BundleError, Golden, Graph, load_golden
from export.contained import check_contained
from export.session import Arrays, session_options
from export.verify import check_golden
from training.steering import SteeringArrays

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class EngineError(Exception):
    """The engine cannot start as asked; the message says why and what would help."""


NEAR_THRESHOLD = 1e-3
"""|gate logit| below which rounding could decide a gate."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """For B images. What every answer needs of a row is computed for a whole batch: that costs as much as one row."""

    logits: NDArray[np.float32]
    """(B, classes)"""
    head_gate: NDArray[np.bool_]
    """(B, gated blocks, heads)"""
    gate_logit: NDArray[np.float32]
    """(B, gated blocks, heads)"""
    head_usage: NDArray[np.float64]
    """(B,)"""
    macs: NDArray[np.int64]
    """(B,) multiply-accumulates spent."""
    near_threshold: NDArray[np.int64]
    """(B,) gates that rounding could decide."""
    residual: NDArray[np.float32] | None
    """(B, sites, width), when it was asked for."""
    seconds: float
    """Wall time of the inference."""

    def rows(self, index: slice | NDArray[np.int64]) -> "Outputs":
        """Of some images; the time stays that of all."""
        return Outputs(
            self.logits[index], self.head_gate[index], self.gate_logit[index],
            self.head_usage[index], self.macs[index], self.near_threshold[index],
            None if self.residual is None else self.residual[index], self.seconds,
        )  # fmt: skip

    def ranked(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The classes, the most probable first, and their probabilities: (B, classes) each."""
        ranking = (-self.logits).argsort(1, kind="stable")
        logits = self.logits[np.arange(len(self.logits))[:, None], ranking]
        above = np.exp(logits - logits[:, :1])
        return ranking, above / above.sum(1, keepdims=True)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """The images of several batches, one after the other; their times added."""
    if len(parts) == 1:
        return parts[0]
    names = ("logits", "head_gate", "gate_logit", "head_usage", "macs", "near_threshold")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    residuals = [part.residual for part in parts if part.residual is not None]
    # A part may have them only because another call in its batch asked.
    residual = np.concatenate(residuals) if len(residuals) == len(parts) else None
    return Outputs(**arrays, residual=residual, seconds=sum(part.seconds for part in parts))


class Engine:
    """A graph of a bundle, loaded, checked against its golden rows and warm.

    On the CPU, `run` may be called from several threads at once: they share the weights. With threads=1 each call runs
    in its caller's thread alone.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str,
        threads: int,
        graph: str = "auto",
        device: int = 0,
        gpu_memory_mb: int = 0,
        max_batch: int = 1,
        bounded: bool | None = None,
        spinning: bool = False,
    ):
        """provider: auto, cpu or cuda; threads: 0 for all CPUs of the process; graph: auto, or a name such as
        masked.fp32; device, gpu_memory_mb (0: no limit): of a GPU; max_batch: the largest batch to be warm for;
        bounded: whether batches are filled up so that only a few shapes occur, by default on a GPU; spinning: whether
        threads spin within a run.

        Raises EngineError or BundleError.
        """
        check_installation()
        self.bundle = bundle
        self._macs_per_head = np.array(bundle.manifest.macs.per_head, np.int64)  # (G,)
        self.provider = resolve_provider(provider)
        self.graph = choose_graph(bundle, self.provider, graph)
        self._bounded = self.provider == "cuda" if bounded is None else bounded
        path = bundle.folder / self.graph.file
        check_contained(path, bundle.manifest.files)
        self.threads = threads or usable_cpus()
        options = session_options(self.graph.attention, self.threads, spinning)
        self.session = _open(path, self.provider, options, device, gpu_memory_mb)
        golden = load_golden(bundle.folder, self.graph.precision)
        try:
            self._check_shapes(golden, path)
            check_golden(self._answers, golden, path)  # right, and warm for small batches
            for size in _sizes(max_batch) if self._bounded else []:
                rows = np.arange(size) % len(golden.inputs["image"])
                self._answers({name: value[rows] for name, value in golden.inputs.items()})
        except BundleError:
            raise
        except Exception as error:  # of onnxruntime or numpy: the rows do not fit the graph
            raise BundleError(f"{path}: the rows of golden.npz cannot be run: {error}") from error

    @property
    def graph_name(self) -> str:
        return f"{self.graph.attention}.{self.graph.precision}"

    def run(self, images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False) -> Outputs:
        """images (B, height, width, channels), steering arrays (B, S, T)."""
        count = len(images)
        inputs: Arrays = dict(zip(INPUTS, (images, steering.latent, steering.scale, steering.shift), strict=True))
        if self._bounded:
            inputs = filled_up(inputs)
        names = ["logits", "head_gate", "gate_logit", *["residual"] * residual]
        start = time.perf_counter()
        logits, head_gate, gate_logit, *others = (value[:count] for value in self._run(names, inputs))
        seconds = time.perf_counter() - start
        macs = self.bundle.manifest.macs
        kept = head_gate.sum(2)  # (B, G)
        return Outputs(
            logits, head_gate, gate_logit,
            head_usage=kept.sum(1) / head_gate[0].size,
            macs=macs.dense - (head_gate.shape[2] - kept) @ self._macs_per_head,
            near_threshold=(np.abs(gate_logit) < NEAR_THRESHOLD).reshape(count, -1).sum(1),
            residual=others[0] if others else None,
            seconds=seconds,
        )  # fmt: skip

    def _run(self, names: list[str], inputs: Arrays) -> list[NDArray[Any]]:
        if self.provider == "cpu":
            found: list[NDArray[Any]] = self.session.run(names, inputs)
            return found
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name in names:
            binding.bind_output(name)  # to the host's memory
        self.session.run_with_iobinding(binding)
        copied: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return copied

    def _check_shapes(self, golden: Golden, path: Path) -> None:
        """Raise BundleError unless the graph reads and gives what the manifest says: answers are read by it."""
        manifest = self.bundle.manifest
        gates, sites = (len(manifest.gated_blocks), manifest.heads), len(manifest.sites)
        image, *steering = (golden.inputs[name][:1] for name in INPUTS)
        found = self.run(image, SteeringArrays(*steering), residual=True)
        for name, value, allowed in (
            ("image", image, manifest.image.shape),
            ("logits", found.logits, (len(manifest.labels),)),
            ("head_gate", found.head_gate, gates),
            ("gate_logit", found.gate_logit, gates),
            ("residual", found.residual, (sites, manifest.dim)),
            *((name, array, (sites, array.shape[2])) for name, array in zip(INPUTS[1:], steering, strict=True)),
        ):
            assert value is not None
            if value.shape[1:] != allowed:
                raise BundleError(
                    f"{path}: {name} has the shape {list(value.shape[1:])} an image; the manifest says {list(allowed)}"
                )

    def _answers(self, inputs: Arrays) -> Arrays:
        found = self.run(inputs["image"], SteeringArrays(*(inputs[name] for name in INPUTS[1:])), residual=True)
        return {name: getattr(found, name) for name in OUTPUTS}


def _sizes(largest: int) -> list[int]:
    """1, 2, 4, ... up to the first that is not smaller."""
    return [2**power for power in range((largest - 1).bit_length() + 1)]


def filled_up(inputs: Arrays) -> Arrays:
    """As many rows as the next power of two, the new ones black images without steering, and likewise terms."""
    count, _, terms = inputs[INPUTS[1]].shape
    rows, width = _sizes(count)[-1] - count, _sizes(terms)[-1] - terms
    found = {"image": np.pad(inputs["image"], ((0, rows), (0, 0), (0, 0), (0, 0)))}
    for name in INPUTS[1:]:
        neutral = 1 if name == "steering_scale" else 0
        found[name] = np.pad(inputs[name], ((0, rows), (0, 0), (0, width)), constant_values=neutral)
    return found


def choose_graph(bundle: Bundle, provider: str, name: str) -> Graph:
    """The graph of that name. auto: the bundle's default; on a GPU the first that is fit for it, if there is one:
    `dispatch` would wait for the host at every block, and int8 has no kernels there.

    Raises EngineError when the bundle has no such graph.
    """
    graphs = bundle.manifest.graphs
    if name != "auto":
        for graph in graphs:
            if name == f"{graph.attention}.{graph.precision}":
                return graph
        has = ", ".join(f"{graph.attention}.{graph.precision}" for graph in graphs)
        raise EngineError(f"graph is {name!r}; {bundle.folder} has: {has}")
    if provider == "cuda":
        fit = [graph for graph in graphs if graph.attention != "dispatch" and graph.precision != "int8"]
        return [*fit, *graphs][0]
    return graphs[0]


def check_installation() -> None:
    """Raise EngineError when both builds of onnxruntime are installed: they share a folder and break each other."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) > 1:
        raise EngineError(
            f"{' and '.join(found)} are both installed; allowed: one. "
            "Cure: pip uninstall onnxruntime onnxruntime-gpu, then install this project again"
        )


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and the cgroup's quota (version 2 or 1) rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in (
        _read_quota(Path("/sys/fs/cgroup/cpu.max")),
        _read_quota(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
    ):
        if quota > 0 and period > 0:
            count = min(count, max(1, math.ceil(quota / period)))
    return count


def _read_quota(*paths: Path) -> tuple[int, int]:
    try:
        quota, period = " ".join(path.read_text().strip() for path in paths).split()
        return int(quota), int(period)
    except (OSError, ValueError):  # no such file, or "max 100000": no limit
        return 0, 0


def resolve_provider(provider: str) -> str:
    if provider == "auto":
        found = PROVIDERS["cuda"] in onnxruntime.get_available_providers() and _has_nvidia_device()
        return "cuda" if found else "cpu"
    return provider


def _open(
    graph: Path, provider: str, options: onnxruntime.SessionOptions, device: int, gpu_memory_mb: int
) -> onnxruntime.InferenceSession:
    of_gpu = {"device_id": str(device), "arena_extend_strategy": "kSameAsRequested"}
    of_gpu["use_tf32"] = "0"  # its 10 bits would decide other gates than the certificate's; fp16 is for speed
    if gpu_memory_mb:
        of_gpu["gpu_mem_limit"] = str(gpu_memory_mb * 2**20)
    names: list[Any] = [PROVIDERS["cpu"]]
    if provider == "cuda":
        names.insert(0, (PROVIDERS["cuda"], of_gpu))
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=names)
    except Exception as error:  # onnxruntime raises its own kinds, none of them documented
        raise BundleError(f"{graph}: onnxruntime cannot load it: {error}") from error
    got = session.get_providers()[0]
    if got != PROVIDERS[provider]:
        raise EngineError(
            f"provider {provider!r} was asked for but the session has {got}. "
            "Cure: install a CUDA and cuDNN that onnxruntime-gpu fits, or start with --provider cpu"
        )
    return session


def _has_nvidia_device() -> bool:
    return Path("/dev/nvidiactl").exists()
