"""Bundles that are broken, and models that go while they are in use: the others go on."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from service.pb import open_inference_pb2 as oip
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.altered import put, sign
from tests.faults.conftest import Undisturbed
from tests.faults.listed import fault
from tests.faults.protocols import UNLIMITED, V1
from tests.processes import ServerProcess, serving, until
from tests.refusals import refusal

GRAPH = "dispatch.fp32.onnx"


def without_profiles(folder: Path) -> None:
    (folder / "profiles.json").unlink()


def one_bit_off(folder: Path) -> None:
    content = bytearray((folder / GRAPH).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / GRAPH).write_bytes(content)


def of_tomorrow(folder: Path) -> None:
    sign(folder, schema_version=4)


def cut(folder: Path) -> None:
    (folder / GRAPH).write_bytes((folder / GRAPH).read_bytes()[:100_000])


def cut_and_signed(folder: Path) -> None:
    cut(folder)
    sign(folder)


def other_answers(folder: Path) -> None:
    golden = dict(np.load(folder / "golden.npz"))
    golden["fp32.logits"] += 0.01
    np.savez(folder / "golden.npz", **golden)
    sign(folder)


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("missing file", without_profiles, "No such file or directory: "),
    "one bit off": ("wrong checksum", one_bit_off, "dispatch.fp32.onnx has the SHA-256 "),
    "newer": ("newer schema", of_tomorrow, "manifest.json: schema_version is 4; allowed: 2 or 3"),
    "cut": ("truncated graph", cut, "dispatch.fp32.onnx has 100000 bytes; the manifest says "),
    "cut and signed": ("truncated graph", cut_and_signed, "dispatch.fp32.onnx: not an ONNX file"),
    "other answers": ("golden mismatch", other_answers, "logits differ from golden.npz by 0.01"),
}


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    put(bundle, folder, 1)
    return folder


@pytest.fixture(scope="module")
def controlled(repository: Path) -> Iterator[ServerProcess]:
    """A server whose clients may load and unload."""
    with serving(repository, "--model-control", "explicit", "--max-images", "1024", "--max-queue", "4096") as running:
        yield running


@pytest.fixture
def control(controlled: ServerProcess) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(controlled.address) as channel:
        yield GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=fault(f"bundle: {of}", f"on load UNAVAILABLE: `... {says}...`; the older version answers")
        )
        for name, (of, _, says) in BROKEN.items()
    ],
)
def test_a_broken_version_is_refused_with_the_reason_and_the_older_one_answers(
    name: str,
    control: GRPCInferenceServiceStub,
    controlled: ServerProcess,
    repository: Path,
    bundle: Bundle,
    undisturbed: Undisturbed,
) -> None:
    _, breaks, sentence = BROKEN[name]
    with undisturbed(controlled):
        folder = put(bundle, repository, 2)
        breaks(folder)
        try:
            code, said = refusal(
                control.RepositoryModelLoad, oip.RepositoryModelLoadRequest(model_name="fashion_mnist"), timeout=30
            )
            assert code == "UNAVAILABLE"
            assert sentence in said
            index = control.RepositoryIndex(oip.RepositoryIndexRequest(), timeout=10).models
            assert {entry.version: entry.state for entry in index if entry.name == "fashion_mnist"} == {
                "1": "READY", "2": "UNAVAILABLE",
            }  # fmt: skip
        finally:
            shutil.rmtree(folder)


@fault(
    "bundle: unload in use",
    "calls in flight are answered; later ones get NOT_FOUND: `model is 'other'; allowed: 'fashion_mnist'`",
)
def test_a_model_that_is_unloaded_answers_what_it_accepted(
    control: GRPCInferenceServiceStub,
    controlled: ServerProcess,
    repository: Path,
    bundle: Bundle,
    undisturbed: Undisturbed,
    sample_pixels: NDArray[np.uint8],
) -> None:
    put(bundle, repository, 1, "other")
    control.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="other"), timeout=30)
    request = V1.request(np.repeat(sample_pixels, 5, 0))
    request.model = "other"
    with undisturbed(controlled), grpc.insecure_channel(controlled.address, UNLIMITED) as channel:
        call = V1.call(channel)
        calls = [call.future(request, timeout=60) for _ in range(4)]
        until(lambda: controlled.count("steervit_queue_images", model="other") > 500)
        control.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="other"), timeout=60)
        assert [len(each.result().predictions) for each in calls] == [500] * 4
        assert refusal(call, request, timeout=10) == ("NOT_FOUND", "model is 'other'; allowed: 'fashion_mnist'")
    shutil.rmtree(repository / "other")


@fault("bundle: swap under load", "right answers throughout; the memory of the old version is given back")
def test_a_version_that_was_replaced_leaves_no_memory_behind(
    control: GRPCInferenceServiceStub,
    controlled: ServerProcess,
    repository: Path,
    bundle: Bundle,
    undisturbed: Undisturbed,
) -> None:
    sizes = []
    with undisturbed(controlled):
        for version in range(2, 12):
            shutil.rmtree(repository / "fashion_mnist" / str(version - 1))
            put(bundle, repository, version)
            control.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="fashion_mnist"), timeout=30)
            sizes.append(controlled.resident_mb())
    graph = (bundle.folder / GRAPH).stat().st_size / 2**20
    assert sizes[-1] - sizes[1] < graph, f"eight versions later: {sizes}"


@fault("bundle: unload in use", "with no model left NOT_FOUND: `model is 'fashion_mnist'; allowed: none is loaded`")
def test_a_server_without_a_model_says_so(tmp_path: Path, bundle: Bundle) -> None:
    repository = put(bundle, tmp_path, 1).parents[1]
    flags = ("--model-control", "explicit")
    with serving(repository, *flags) as running, grpc.insecure_channel(running.address) as channel:
        control = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        control.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="fashion_mnist"), timeout=30)
        request = V1.request(np.zeros((1, 28, 28, 1), np.uint8))
        for name in ("fashion_mnist", ""):
            request.model = name
            sentence = f"model is {name!r}; allowed: none is loaded"
            assert refusal(V1.call(channel), request, timeout=10) == ("NOT_FOUND", sentence)
        control.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="fashion_mnist"), timeout=30)
        assert len(V1.call(channel)(request, timeout=10).predictions) == 1
