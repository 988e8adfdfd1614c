"""Runs the checked graphs of a bundle: arrays in, arrays out. Knows no requests, protobuf or metrics."""

import logging
import math
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.bundle import GATE_BIAS, INPUTS, MLP_GATE, OUTPUTS, Bundle, Golden, Graph, load_golden
from export.contained import check_contained
from export.session import Arrays, session_options
from export.verify import check_graph, check_takes_biases
from service import cuda
from service.cuda import Gpu
from service.loaded import Bounds, EngineError, Loaded
from training.steering import SteeringArrays

log = logging.getLogger("steervit.engine")
FOR_GPU = ("fused.fp16", "fused.fp32", "masked.fp16", "masked.fp32", "compact.fp16", "compact.fp32")
"""Graphs for a GPU, the fastest first. `dispatch` would wait for the host at every block, and int8 has no GPU
kernels."""
NEAR_THRESHOLD = 1e-3
"""|gate logit| below which rounding could decide a gate."""
TERMS = 16
"""Fixed shapes have room for at least this many terms per image and site."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs for B images. Derived numbers are computed for the whole batch, which costs as much as one row."""

    logits: NDArray[np.float32]
    """(B, classes)"""
    head_gate: NDArray[np.bool_]
    """(B, gated blocks, heads)"""
    mlp_gate: NDArray[np.bool_]
    """(B, gated blocks, MLP groups)"""
    gate_logit: NDArray[np.float32]
    """(B, gated blocks, units): heads, then MLP groups."""
    head_usage: NDArray[np.float64]
    """(B,)"""
    mlp_usage: NDArray[np.float64]
    """(B,); 0 in a model without MLP groups."""
    macs: NDArray[np.int64]
    """(B,) multiply-accumulates spent."""
    near_threshold: NDArray[np.int64]
    """(B,) gates that rounding could decide."""
    residual: NDArray[np.float32] | None
    """(B, sites, width), if requested."""
    seconds: float
    """Wall time of the inference."""

    def rows(self, index: slice | NDArray[np.int64]) -> "Outputs":
        """The outputs for some of the images, with the time of the whole batch."""
        return Outputs(
            self.logits[index], self.head_gate[index], self.mlp_gate[index], self.gate_logit[index],
            self.head_usage[index], self.mlp_usage[index], self.macs[index], self.near_threshold[index],
            None if self.residual is None else self.residual[index], self.seconds,
        )  # fmt: skip

    def ranked(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The classes from the most probable on, and their probabilities: (B, classes) each."""
        ranking = (-self.logits).argsort(1, kind="stable")
        logits = self.logits[np.arange(len(self.logits))[:, None], ranking]
        above = np.exp(logits - logits[:, :1])
        return ranking, above / above.sum(1, keepdims=True)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of several batches, one after the other; their times are added."""
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(Outputs) if field.name not in ("residual", "seconds")]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    residuals = [part.residual for part in parts if part.residual is not None]
    # a part may have residuals only because another call in its batch requested them
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
        max_batch: int = 1,
        bounded: bool | None = None,
        spinning: bool = False,
        gpu: Gpu | None = None,
        specialised: bool | None = None,
    ):
        """provider: auto, cpu or cuda; threads: 0 for all CPUs of the process; graph: auto, or a name such as
        masked.fp32; max_batch: the largest batch to be warm for; bounded: whether batches are padded to a few
        shapes; spinning: whether threads spin within a run; gpu: how to use it; specialised: whether graphs
        for one profile are loaded too. bounded and specialised are on by default with CUDA alone.

        Raises EngineError or BundleError.
        """
        check_installation()
        self.bundle = bundle
        self._macs_per_head = np.array(bundle.manifest.macs.per_head, np.int64)  # (G,)
        self._macs_per_mlp_group = np.array(bundle.manifest.macs.per_mlp_group, np.int64)  # (G,), or empty
        self.provider = resolve_provider(provider)
        self.graph = choose_graph(bundle, self.provider, graph)
        self.threads = threads or usable_cpus()
        used = (gpu or Gpu()) if self.provider == "cuda" else None
        if used:
            check_gpu(used)
        golden = load_golden(bundle.folder, self.graph.precision)
        bounds = Bounds(max_batch, self._terms(golden)) if bounded or (bounded is None and used) else None

        def load(file: str, attention: str) -> Loaded:
            path = bundle.folder / file
            check_contained(path, bundle.manifest.files)
            options = session_options(attention, self.threads, spinning)
            return Loaded(path, options, self.provider, used, bounds)

        self._general = load(self.graph.file, self.graph.attention)
        check_takes_biases(self._general.inputs, bundle.manifest, bundle.folder / self.graph.file)
        self._specialised: dict[str, Loaded] = {}
        """Graphs for one profile, by the digest of its terms."""
        if specialised or (specialised is None and used):
            for entry in bundle.manifest.specialised:
                self._specialised[entry.digest] = load(entry.file, "fused")
        self._check(golden, self.graph.file, "")
        for entry in bundle.manifest.specialised:
            if entry.digest in self._specialised:
                self._check(load_golden(bundle.folder, entry.file), entry.file, entry.digest)
        self.on_gpu = (used.device, len(self.captured)) if used else None
        """The index of the GPU, and how many batch sizes run as CUDA graphs; None on the CPU."""
        if self._specialised:
            for loaded in (self._general, *self._specialised.values()):
                loaded.measure(dict(golden.inputs), max_batch)

    @property
    def captured(self) -> Sequence[int]:
        """Batch sizes that run as CUDA graphs."""
        return self._general.captured

    @property
    def specialised(self) -> Collection[str]:
        """The digests of the steerings with a graph of their own."""
        return self._specialised.keys()

    def seconds(self, rows: int, digest: str = "") -> float:
        """Seconds for a batch, as measured at the start. digest: in the graph for those terms. Only for an engine with
        such graphs."""
        return self._specialised.get(digest, self._general).seconds(rows)

    def _check(self, golden: Golden, file: str, digest: str) -> None:
        """Raise BundleError unless a graph agrees with golden.npz and the manifest. Afterwards it is warm."""
        path = self.bundle.folder / file

        def answers(inputs: Arrays) -> Arrays:
            image, latent, scale, shift = (inputs[name] for name in INPUTS)
            steering = SteeringArrays(latent, scale, shift, inputs.get(GATE_BIAS))
            outputs = self.run(image, steering, residual=True, digest=digest)
            return {name: getattr(outputs, name) for name in (*OUTPUTS, MLP_GATE)}

        check_graph(answers, golden, path, self.bundle.manifest)

    def _terms(self, golden: Golden) -> int:
        """The largest number of terms per image and site in profiles and golden rows. Requests may have more."""
        of_profiles = [len(terms) for profile in self.bundle.profiles.values() for terms in profile.terms.values()]
        return max([TERMS, int(golden.inputs[INPUTS[1]].shape[2]), *of_profiles])

    @property
    def graph_name(self) -> str:
        """<attention>.<precision>, such as masked.fp32."""
        return f"{self.graph.attention}.{self.graph.precision}"

    def run(
        self, images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False, digest: str = ""
    ) -> Outputs:
        """images (B, height, width, channels), steering arrays (B, S, T), with gate biases only where graphs take them.
        digest: of the terms, if all images have the same and no biases; a graph for them runs if there is one."""
        manifest = self.bundle.manifest
        inputs: Arrays = dict(zip(INPUTS, (images, steering.latent, steering.scale, steering.shift), strict=True))
        if manifest.takes_biases:
            shape = len(images), len(manifest.gated_blocks), manifest.units
            inputs[GATE_BIAS] = np.zeros(shape, np.float32) if steering.gate_bias is None else steering.gate_bias
        names = ["logits", "head_gate", "gate_logit", *[MLP_GATE] * bool(manifest.mlp_groups), *["residual"] * residual]
        loaded = self._specialised.get(digest, self._general) if digest else self._general
        start = time.perf_counter()
        logits, head_gate, gate_logit, *others = loaded.run(names, inputs)
        seconds = time.perf_counter() - start
        kept = head_gate.sum(2)  # (B, G)
        macs = manifest.macs.dense - (manifest.heads - kept) @ self._macs_per_head
        mlp_gate, mlp_usage = head_gate[:, :, :0], np.zeros(len(logits))
        if manifest.mlp_groups:
            mlp_gate = others.pop(0)
            groups = mlp_gate.sum(2)  # (B, G)
            mlp_usage = groups.sum(1) / mlp_gate[0].size
            macs -= (manifest.mlp_groups - groups) @ self._macs_per_mlp_group
        return Outputs(
            logits, head_gate, mlp_gate, gate_logit,
            head_usage=kept.sum(1) / head_gate[0].size,
            mlp_usage=mlp_usage,
            macs=macs,
            near_threshold=(np.abs(gate_logit) < NEAR_THRESHOLD).reshape(len(logits), -1).sum(1),
            residual=others[0] if others else None,
            seconds=seconds,
        )  # fmt: skip


def choose_graph(bundle: Bundle, provider: str, name: str) -> Graph:
    """The graph of that name. auto: the bundle's default; on a GPU the fastest of FOR_GPU.

    Raises EngineError when the bundle has no such graph.
    """
    graphs = {f"{graph.attention}.{graph.precision}": graph for graph in bundle.manifest.graphs}
    if name != "auto":
        if name not in graphs:
            raise EngineError(f"graph is {name!r}; {bundle.folder} has: {', '.join(graphs)}")
        return graphs[name]
    if provider == "cuda":
        for fit in FOR_GPU:
            if fit in graphs:
                return graphs[fit]
        log.warning(
            "%s has no graph for a GPU (%s): with %s the GPU waits for the host. Fix: "
            "steervit export --attention fused --precision fp16", bundle.folder, ", ".join(FOR_GPU), next(iter(graphs)),
        )  # fmt: skip
    return bundle.manifest.graphs[0]


def check_gpu(gpu: Gpu) -> None:
    """Raise EngineError unless CUDA is completely installed and has that device."""
    if missing := cuda.problem(gpu.device):
        raise EngineError(f"provider is 'cuda', but {missing}; or start with --provider cpu")


def check_installation() -> None:
    """Raise EngineError when both builds of onnxruntime are installed: they share a folder and break each other."""
    installed = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(installed) > 1:
        raise EngineError(
            f"{' and '.join(installed)} are both installed; allowed: one. "
            "Fix: pip uninstall onnxruntime onnxruntime-gpu, then install this project again"
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
    """`cpu` or `cuda`. auto: `cuda` if this onnxruntime supports it and the machine has a GPU."""
    if provider == "auto":
        usable = cuda.PROVIDER in onnxruntime.get_available_providers() and cuda.has_device()
        return "cuda" if usable else "cpu"
    return provider
