"""Batches of fixed shapes, on the CPU as on a GPU; and the error for a missing GPU."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.bundle import GATE_BIAS, Bundle
from export.session import Arrays, inputs_of, open_session, session_options
from service import cuda
from service import loaded as loaded_module
from service.buckets import Buckets, sizes
from service.cuda import Gpu, Quiet
from service.engine import Engine
from service.loaded import Bounds, EngineError, Loaded
from training.steering import SteeringTerm

NAMES = ("logits", "head_gate", "gate_logit", "residual")


@pytest.fixture(scope="module")
def buckets(bundle: Bundle) -> Buckets:
    graph = next(graph for graph in bundle.manifest.graphs if graph.attention == "dispatch")
    buckets = Buckets(open_session(bundle.folder / graph.file, "dispatch", 1), 6, 10, None)
    buckets.first_runs()
    return buckets


def test_shapes_are_powers_of_two(buckets: Buckets) -> None:
    assert sizes(1) == [1]
    assert sizes(6) == sizes(8) == [1, 2, 4, 8]
    assert buckets.rows == [1, 2, 4, 8]
    assert buckets.terms == 16


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_was_in_a_shape_before_changes_nothing(
    buckets: Buckets, bundle: Bundle, sample_pixels: NDArray[np.uint8], data: st.DataObject
) -> None:
    """Successive batches of 1 to 11 images with 1 to 20 terms, some of which fit no shape."""
    session, sites = buckets._session, len(bundle.manifest.sites)
    units = bundle.manifest.heads + bundle.manifest.mlp_groups

    def batch() -> Arrays:
        count = data.draw(st.integers(1, 11))
        width = data.draw(st.sampled_from([0, 1, 5, 16, 20]))
        strength = data.draw(st.sampled_from([0.0, 3.0, -20.0]))
        terms = {site: tuple(SteeringTerm(7 * i, strength, strength) for i in range(width)) for site in range(sites)}
        first = data.draw(st.integers(0, 80))
        images, rows = sample_pixels[first : first + count], [terms if i % 2 else {} for i in range(count)]
        bias = np.full((count, sites, units), data.draw(st.sampled_from([0.0, 2.0, -2.0])), np.float32)
        return inputs_of(images, rows, sites) | {GATE_BIAS: bias}

    for inputs in (batch(), batch()):
        found, expected = buckets.run(NAMES, inputs), session.run(NAMES, inputs)
        clear = (np.abs(expected[2]) > 1e-3).all((1, 2))
        for name, one, other in zip(NAMES, found, expected, strict=True):
            assert one.shape == other.shape, name
            np.testing.assert_allclose(one[clear], other[clear], rtol=1e-4, atol=2e-4, err_msg=name)


def test_answers_are_not_overwritten_by_the_next_batch(
    buckets: Buckets, bundle: Bundle, sample_pixels: NDArray[np.uint8]
) -> None:
    sites, units = len(bundle.manifest.sites), bundle.manifest.heads + bundle.manifest.mlp_groups
    bias = {GATE_BIAS: np.zeros((4, sites, units), np.float32)}
    (first,) = buckets.run(["logits"], inputs_of(sample_pixels[:4], [{}] * 4, sites) | bias)
    kept = first.copy()
    buckets.run(["logits"], inputs_of(sample_pixels[50:54], [{}] * 4, sites) | bias)
    np.testing.assert_array_equal(first, kept)


def test_a_capture_waits_for_exclusive_use_of_the_device() -> None:
    quiet, order = Quiet(), []
    inside, leave = threading.Event(), threading.Event()

    def use(name: str) -> None:
        with quiet.using():
            order.append(f"{name} in")
            inside.set()
            leave.wait(10)
            order.append(f"{name} out")

    def capture() -> None:
        with quiet.capturing():
            order.append("capture in")
            time.sleep(0.05)
            order.append("capture out")

    threads = [threading.Thread(target=use, args=("first",)), threading.Thread(target=capture)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    while not quiet._capturing:
        time.sleep(0.001)
    threads.append(threading.Thread(target=use, args=("second",)))
    threads[2].start()
    time.sleep(0.05)
    assert order == ["first in"], "neither the capture nor another user may start"
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first in", "first out", "capture in", "capture out", "second in", "second out"]


def test_models_that_load_side_by_side_leave_standard_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Happened: two engines replaced it at the same time, and the server never printed that it was ready."""
    before, calls = sys.stdout, []

    def preload() -> None:
        calls.append(1)
        time.sleep(0.02)

    monkeypatch.setattr(cuda.onnxruntime, "preload_dlls", preload)
    cuda._load_once.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cuda.load_libraries(), range(8)))
    cuda._load_once.cache_clear()
    assert sys.stdout is before
    assert calls == [1]


@pytest.mark.skipif(cuda.has_device(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_is_missing(bundle: Bundle) -> None:
    with pytest.raises(
        EngineError, match=r"provider is 'cuda', but there is no NVIDIA driver \(libcuda.so.1\). Fix: .*"
    ):
        Engine(bundle, "cuda", 1)


def test_options_of_the_provider_are_those_of_a_server() -> None:
    options = cuda.provider_options(Gpu(device=3), graphs=True)
    assert options["device_id"] == "3"
    assert options["enable_cuda_graph"] == "1"
    assert options["use_tf32"] == "0", "10-bit products decide no gates unless somebody asks for them"
    assert cuda.provider_options(Gpu(tf32=True), graphs=False)["use_tf32"] == "1"
    assert cuda.memory(0) == (0, 0) or cuda.has_device()


@pytest.mark.skipif(cuda.has_device(), reason="there is a GPU")
def test_a_graph_that_cannot_be_captured_runs_uncaptured_and_the_reason_is_logged(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the CPU: the session that is opened for capture fails, and the next one, without capture, serves."""
    graph = bundle.manifest.graphs[0]
    opened: list[bool] = []

    def without_cuda(self: Loaded, options: onnxruntime.SessionOptions, capture: bool = False) -> object:
        opened.append(capture)
        if capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        return open_session(bundle.folder / graph.file, graph.attention, 1)

    monkeypatch.setattr(Loaded, "_open", without_cuda)
    monkeypatch.setattr(loaded_module, "Buckets", lambda session, rows, terms, _: Buckets(session, rows, terms, None))
    options = session_options(graph.attention, 1)
    loaded = Loaded(bundle.folder / graph.file, options, "cuda", Gpu(), Bounds(4, 8))
    assert opened == [True, False]
    assert list(loaded.captured) == []
    assert "runs without CUDA graphs, more slowly: operation not permitted when stream" in caplog.text
