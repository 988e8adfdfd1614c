"""One onnxruntime session: arrays in, arrays out. Knows nothing of requests, protobuf or metrics."""

import math
import os
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.bundle import INPUTS, Bundle, BundleError, Graph, load_golden
from training.steering import SteeringArrays

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class EngineError(Exception):
    """The engine cannot start as asked; the message says why and what would help."""


@dataclass(frozen=True)
class Outputs:
    logits: NDArray[np.float32]
    """(B, classes)"""
    head_gate: NDArray[np.bool_]
    """(B, gated blocks, heads)"""
    gate_logit: NDArray[np.float32]
    """(B, gated blocks, heads)"""
    seconds: float
    """Wall time of the inference."""


class Engine:
    """A graph of a bundle, loaded, checked against its golden rows and warm. `run` is for one thread at a time."""

    def __init__(self, bundle: Bundle, provider: str, threads: int):
        """provider: auto, cpu or cuda; threads: 0 for all CPUs of the process. Raises EngineError or BundleError."""
        check_installation()
        self.bundle = bundle
        self.graph = choose_graph(bundle)
        self.session, self.provider = _open(bundle.folder / self.graph.file, provider, threads or usable_cpus())
        self._check_golden()

    @property
    def graph_name(self) -> str:
        return f"{self.graph.attention}.{self.graph.precision}"

    def run(self, images: NDArray[np.uint8], steering: SteeringArrays) -> Outputs:
        """images (B, height, width, channels), steering arrays (B, S, T)."""
        inputs = dict(zip(INPUTS, (images, steering.latent, steering.scale, steering.shift), strict=True))
        start = time.perf_counter()
        logits, head_gate, gate_logit = self.session.run(["logits", "head_gate", "gate_logit"], inputs)
        return Outputs(logits, head_gate, gate_logit, time.perf_counter() - start)

    def _check_golden(self) -> None:
        """Run the golden rows, alone and together: the answers are right, and the session is warm."""
        golden = load_golden(self.bundle.folder)
        image, latent, scale, shift = (golden.inputs[name] for name in INPUTS)
        count = len(image)
        for rows in (slice(0, 1), slice(0, count)):
            found = self.run(image[rows], SteeringArrays(latent[rows], scale[rows], shift[rows]))
            expected = golden.outputs["gate_logit"][rows]
            far = np.abs(expected) > golden.margin
            if not np.array_equal(found.head_gate[far], (expected > 0)[far]):
                raise BundleError(f"{self.bundle.folder / self.graph.file}: gates of golden.npz are not reproduced")
            worst = float(np.abs(found.logits - golden.outputs["logits"][rows]).max())
            if not worst <= golden.tolerance:
                raise BundleError(
                    f"{self.bundle.folder / self.graph.file}: logits differ from golden.npz by {worst:.3g}; "
                    f"allowed: {golden.tolerance:.3g}"
                )


def choose_graph(bundle: Bundle) -> Graph:
    return bundle.manifest.graphs[0]


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


def _open(graph: Path, provider: str, threads: int) -> tuple[onnxruntime.InferenceSession, str]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = provider
    if provider == "auto":
        wanted = (
            "cuda" if PROVIDERS["cuda"] in onnxruntime.get_available_providers() and _has_nvidia_device() else "cpu"
        )
    names: list[Any] = [PROVIDERS[wanted]] if wanted == "cpu" else [PROVIDERS[wanted], PROVIDERS["cpu"]]
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=names)
    except Exception as error:  # onnxruntime raises its own kinds, none of them documented
        raise BundleError(f"{graph}: onnxruntime cannot load it: {error}") from error
    got = session.get_providers()[0]
    if got != PROVIDERS[wanted]:
        raise EngineError(
            f"provider {wanted!r} was asked for but the session has {got}. "
            "Cure: install a CUDA and cuDNN that onnxruntime-gpu fits, or start with --provider cpu"
        )
    return session, wanted


def _has_nvidia_device() -> bool:
    return Path("/dev/nvidiactl").exists()
