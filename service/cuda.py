"""CUDA functions that onnxruntime lacks: checking the installation, page-locked memory, memory in use. They call the
libraries that onnxruntime loads. Nothing is loaded on a machine without a GPU."""

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

PROVIDER = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Gpu:
    """One GPU and how to use it."""

    device: int = 0
    """Index of the GPU."""
    memory_mb: int = 0
    """Limit for all models together, MiB; 0: no limit."""
    graphs: bool = True
    """Whether to capture CUDA graphs."""
    tf32: bool = False
    """Whether products of float32 may keep 10 bits of each factor."""


def provider_options(gpu: Gpu, graphs: bool) -> dict[str, str]:
    """Options for a server: memory grows by the requested amount, algorithms are chosen without timing each new shape,
    and products keep all bits unless tf32 is set."""
    return {
        "device_id": str(gpu.device),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(gpu.tf32)),
        "enable_cuda_graph": str(int(graphs)),
    }


_shared: set[int] = set()
"""Devices with an arena that all models share."""


def share_memory(gpu: Gpu, options: onnxruntime.SessionOptions) -> None:
    """With a memory limit, let the session use the arena that all models share."""
    if not gpu.memory_mb:
        return
    if gpu.device not in _shared:
        info = onnxruntime.OrtMemoryInfo(
            "Cuda", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, gpu.device, onnxruntime.OrtMemType.DEFAULT
        )
        arena = onnxruntime.OrtArenaCfg({"max_mem": gpu.memory_mb * 2**20, "arena_extend_strategy": 1})  # as requested
        onnxruntime.create_and_register_allocator_v2(PROVIDER, info, {"device_id": str(gpu.device)}, arena)
        _shared.add(gpu.device)
    options.add_session_config_entry("session.use_env_allocators", "1")


def has_device() -> bool:
    """Whether the machine has a GPU with NVIDIA's driver, also under WSL, which has another device file."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


_loading = threading.Lock()


def load_libraries() -> None:
    """Load the CUDA libraries that pip installed, unless the system has them; once in a process."""
    with _loading:  # models load in parallel
        _load_once()


@cache
def _load_once() -> None:
    with contextlib.redirect_stdout(None):  # it prints what is missing; `problem` reports it
        onnxruntime.preload_dlls()


def problem(device: int) -> str:
    """What CUDA lacks on that device, and the cure; "" if nothing."""
    if PROVIDER not in onnxruntime.get_available_providers():
        return "this onnxruntime is built without CUDA. Fix: pip uninstall onnxruntime, pip install onnxruntime-gpu"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (
            "there is no NVIDIA driver (libcuda.so.1). Fix: install it on the host; in a container, ask for the GPU "
            "(docker run --gpus all, or nvidia.com/gpu in Kubernetes)"
        )
    if code := driver.cuInit(0):
        return f"the driver finds no usable GPU (cuInit gives {code}). Fix: see whether nvidia-smi lists one here"
    count, version = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    if not 0 <= device < count.value:
        allowed = f"0 to {count.value - 1}" if count.value else "none: CUDA_VISIBLE_DEVICES hides all"
        return f"device is {device}; allowed: {allowed}"
    load_libraries()
    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    needed = _needed(library)
    if needed and version.value // 1000 < needed:
        return (
            f"the driver knows CUDA up to {version.value // 1000}.{version.value % 1000 // 10}; this onnxruntime needs "
            f"{needed}. Fix: a newer driver, or an onnxruntime-gpu for the older CUDA"
        )
    try:
        ctypes.CDLL(str(library.with_name("libonnxruntime_providers_shared.so")), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"{error}. Fix: pip install 'onnxruntime-gpu[cuda,cudnn]', whose libraries fit each other"
    return ""


def _needed(library: Path) -> int:
    """The major version of CUDA that the provider was built for; 0: unknown."""
    with contextlib.suppress(OSError), library.open("rb") as file:
        if match := re.search(rb"libcudart\.so\.(\d+)", file.read(2**20)):
            return int(match[1])
    return 0


def runtime() -> "ctypes.CDLL | None":
    """CUDA's runtime, as onnxruntime loaded it."""
    for version in (13, 12, 14):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(f"libcudart.so.{version}")
    return None


def page_locked(shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
    """Zeros in memory that the device reads without an extra copy; in ordinary memory if the driver refuses it. Call
    `release` before it is freed."""
    array = np.zeros(shape, kind)
    if array.nbytes and (cuda := runtime()):
        cuda.cudaHostRegister(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), ctypes.c_uint(0))
    return array


def release(array: NDArray[Any]) -> None:
    """Unlock memory of `page_locked`, before it is freed."""
    if array.nbytes and (cuda := runtime()):
        cuda.cudaHostUnregister(ctypes.c_void_p(array.ctypes.data))


def memory(device: int) -> tuple[int, int]:
    """Bytes in use on the device, by any process, and its total; (0, 0) if unknown."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda = runtime()
    if cuda is None or cuda.cudaSetDevice(device) or cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        return 0, 0
    return total.value - free.value, total.value


class Quiet:
    """Lets either many threads use the device or one thread capture: operations of others during a capture would fail
    or be captured."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._using = 0
        self._capturing = False

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Use the device within the context. Waits while another thread captures."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._using += 1
        try:
            yield
        finally:
            with self._changed:
                self._using -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Have exclusive use of the device within the context. Waits until no other thread uses it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._capturing = True  # from now on, others wait
            self._changed.wait_for(lambda: not self._using)
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._changed.notify_all()


quiet = Quiet()
"""For all models of the process."""
