"""Runs batches in a few fixed shapes: powers of two for the rows, and one number of terms.

On a GPU each new shape costs time, and a CUDA graph replays a captured run at the same addresses. So each shape has its
inputs and outputs on the device, allocated and bound once, and a batch is copied into them. Unused rows and terms have
no effect on the others. It works the same way on the CPU.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.bundle import GATE_BIAS, INPUTS
from export.session import Arrays
from service import cuda

R = TypeVar("R")
KINDS = {
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(bool)": np.bool_,
}
NOT_CAPTURED = -1
"""The graph id of a run that neither captures nor replays a graph."""


def sizes(largest: int) -> list[int]:
    """1, 2, 4, ... up to the first that is not smaller than `largest`."""
    return [2**power for power in range((largest - 1).bit_length() + 1)]


class Buckets:
    """A session and its shapes.

    On a GPU everything runs in one thread: a captured graph belongs to the thread that captured it.
    """

    def __init__(self, session: onnxruntime.InferenceSession, largest: int, terms: int, gpu: cuda.Gpu | None):
        """largest: the least number of rows of the largest shape; terms: per row and site; gpu: None for the CPU."""
        self._session, self._gpu = session, gpu
        self.terms = sizes(terms)[-1]
        self._thread = ThreadPoolExecutor(1, "buckets") if gpu else None
        self._buckets = {rows: _Bucket(session, rows, self.terms, gpu) for rows in sizes(largest)}

    @property
    def rows(self) -> Sequence[int]:
        """The rows of each shape."""
        return list(self._buckets)

    def run(self, names: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        """The named outputs. A batch that fits no shape runs in a shape of its own, more slowly."""
        count = len(inputs[INPUTS[0]])
        width = inputs[INPUTS[1]].shape[2]
        bucket = self._buckets.get(sizes(count)[-1])
        fits = bucket is not None and width <= self.terms
        return self._call(bucket.run if bucket and fits else self._at_its_own_shape, names, inputs)

    def first_runs(self) -> None:
        """Run every shape once, on black images. With CUDA graphs on, this captures them.

        Raises onnxruntime's exceptions when it cannot.
        """
        for bucket in self._buckets.values():
            self._call(bucket.again)

    def again(self, rows: int) -> None:
        """Run the shape with this many rows again, on its current inputs."""
        self._call(self._buckets[rows].again)

    def _call(self, work: Callable[..., R], *arguments: Any) -> R:
        """Call `work`, in the GPU's thread if there is one."""
        return self._thread.submit(work, *arguments).result() if self._thread else work(*arguments)

    def _at_its_own_shape(self, names: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        options = onnxruntime.RunOptions()
        if self._gpu:
            options.add_run_config_entry("gpu_graph_id", str(NOT_CAPTURED))
        read = {entry.name for entry in self._session.get_inputs()}
        padded = {name: value for name, value in filled_up(inputs).items() if name in read}
        with cuda.quiet.using():
            outputs: list[NDArray[Any]] = self._session.run(list(names), padded, options)
        return [value[: len(inputs[INPUTS[0]])] for value in outputs]


class _Bucket:
    """One shape."""

    def __init__(self, session: onnxruntime.InferenceSession, rows: int, terms: int, gpu: cuda.Gpu | None):
        self._session = session
        where = ("cpu", 0) if gpu is None else ("cuda", gpu.device)
        make: Callable[[tuple[int, ...], Any], NDArray[Any]] = np.zeros if gpu is None else cuda.page_locked
        lengths = {"batch": rows, "terms": terms}
        self._options = onnxruntime.RunOptions()
        if gpu:
            self._options.add_run_config_entry("gpu_graph_id", str(rows))
        self._binding = session.io_binding()
        self._staged: dict[str, NDArray[Any]] = {}
        """The inputs on the host."""
        self._inputs: dict[str, onnxruntime.OrtValue] = {}
        self._outputs: dict[str, onnxruntime.OrtValue] = {}
        for entry in session.get_inputs():
            shape = tuple(lengths.get(length, length) for length in entry.shape)
            self._staged[entry.name] = staged = make(shape, KINDS[entry.type])
            if entry.name == "steering_scale":
                staged.fill(1)
            self._inputs[entry.name] = value = onnxruntime.OrtValue.ortvalue_from_numpy(staged, *where)
            self._binding.bind_ortvalue_input(entry.name, value)
        for entry in session.get_outputs():
            shape = tuple(lengths.get(length, length) for length in entry.shape)
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, KINDS[entry.type], *where)
            self._outputs[entry.name] = value
            self._binding.bind_ortvalue_output(entry.name, value)
        self._locked = gpu is not None

    def __del__(self) -> None:
        if getattr(self, "_locked", False):
            for array in self._staged.values():
                cuda.release(array)

    def again(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)

    def run(self, names: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        count = len(inputs[INPUTS[0]])
        with cuda.quiet.using():
            for name, staged in self._staged.items():
                value = inputs[name]
                if name in (INPUTS[0], GATE_BIAS):
                    staged[:count] = value  # the other rows keep earlier values, which do not affect these
                else:
                    width = value.shape[2]
                    staged[:count, :, :width] = value
                    staged[:count, :, width:] = 1 if name == "steering_scale" else 0
                self._inputs[name].update_inplace(staged)
            self._session.run_with_iobinding(self._binding, self._options)
            outputs = [self._outputs[name].numpy()[:count] for name in names]
            return outputs if self._locked else [value.copy() for value in outputs]  # on a CPU they are views


def filled_up(inputs: Arrays) -> Arrays:
    """The inputs padded to powers of two: rows with black images without steering, terms with neutral ones, biases with
    0."""
    count, _, terms = inputs[INPUTS[1]].shape
    rows, width = sizes(count)[-1] - count, sizes(terms)[-1] - terms
    padded = {INPUTS[0]: np.pad(inputs[INPUTS[0]], ((0, rows), (0, 0), (0, 0), (0, 0)))}
    for name in INPUTS[1:]:
        neutral = 1 if name == "steering_scale" else 0
        padded[name] = np.pad(inputs[name], ((0, rows), (0, 0), (0, width)), constant_values=neutral)
    if GATE_BIAS in inputs:
        padded[GATE_BIAS] = np.pad(inputs[GATE_BIAS], ((0, rows), (0, 0), (0, 0)))
    return padded
