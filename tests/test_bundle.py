"""A bundle that is incomplete or wrong is refused with the reason; a graph that does not match PyTorch is not
written."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from altered import sign
from numpy.typing import NDArray
from processes import SMALL

from export.bundle import Bundle, BundleError, Manifest, load_bundle, load_golden, write_bundle
from export.certify import (
    LIMITS,
    AccuracyLoss,
    ExportError,
    GateMismatch,
    LogitMismatch,
    NeighbourMismatch,
    NotFinite,
    Reference,
    ResidualMismatch,
    ShapeError,
    _Differences,
    steerings,
)
from export.graph import SteeredVit, build
from export.verify import verify
from service.engine import Engine
from service.explain import Explainer
from training.config import VitSettings
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.gated_vit import GatedVit
from training.model.sae import Sae
from training.steering import SteeringTerm

GRAPH = {"file": "dispatch.fp32.onnx", "attention": "dispatch", "precision": "fp32", "opset": 20, "certificate": {}}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SMALL / "small" / "1", tmp_path / "1"))


def rewrite(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its entry in the manifest."""
    (folder / name).write_bytes(content)
    sign(folder)


def multiplied(graph: bytes, output: str, factor: float) -> bytes:
    """The graph with one of its outputs multiplied; what else reads that value is not changed."""
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["unchanged" if name == output else name for name in names]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(factor), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["unchanged", "factor"], [output]))
    return model.SerializeToString()


@pytest.mark.parametrize("name", ["dispatch.fp32.onnx", "profiles.json", "golden.npz", "sae.safetensors"])
def test_a_changed_or_missing_file_is_refused(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name} has the SHA-256"):
        load_bundle(copy)
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{name} has {len(content) - 1} bytes; the manifest says {len(content)}"):
        load_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 1}, "schema_version is 1; allowed: 2 or 3"),
        ({"version": 0}, "version is 0; allowed: 1 or more"),
        ({"version": "3"}, "version is '3'; allowed: a valid integer"),
        ({"heads": True}, "heads is True; allowed: a valid integer"),
        ({"heads": 6.5}, "heads is 6.5; allowed: a valid integer"),
        ({"name": "../x"}, "name is '../x'"),
        ({"gated_blocks": [0, 1, 2, 3, 4]}, "gated_blocks[0] is 0; allowed: 1 or more"),
        ({"labels": ["one"]}, "labels is"),
        ({"labels": ["one", "one"]}, "labels is"),
        ({"labels": ["one", "t\two"]}, "labels[1]: name is 't\\two'; allowed: no control characters"),
        ({"graphs": []}, "graphs is"),
        (
            {"graphs": [{**GRAPH, "attention": "sparse"}]},
            "graphs[0].attention is 'sparse'; allowed: 'dispatch'",
        ),
        (
            {"graphs": [{**GRAPH, "precision": "fp8"}]},
            "graphs[0].precision is 'fp8'; allowed: 'fp32', 'int8'",
        ),
        ({"files": {"../../etc/passwd": {"sha256": "", "size": 1}}}, "a key of files is '../../etc/passwd'"),
        ({"image": {"height": 28}}, "image.width is missing"),
    ],
)
def test_a_manifest_that_is_not_allowed_is_refused(copy: Path, changes: dict[str, object], message: str) -> None:
    rewrite(copy, **changes)
    with pytest.raises(BundleError) as caught:
        load_bundle(copy)
    assert message in str(caught.value)
    assert str(copy) in str(caught.value)


def test_whole_numbers_may_have_a_decimal_point_and_unknown_fields_are_ignored(copy: Path) -> None:
    manifest = load_bundle(copy).manifest
    rewrite(copy, version=float(manifest.version), heads=float(manifest.heads), added_later={"x": 1})
    assert load_bundle(copy).manifest == manifest


def test_what_is_not_json_is_refused(copy: Path) -> None:
    replace_file(copy, "profiles.json", b"{")
    with pytest.raises(BundleError, match=r"profiles\.json: not JSON: Expecting"):
        load_bundle(copy)
    (copy / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(BundleError, match=r"manifest\.json: not JSON: "):
        load_bundle(copy)


def test_of_many_writers_of_a_version_one_succeeds_and_the_others_get_an_error(bundle: Bundle, tmp_path: Path) -> None:
    files = {name: (bundle.folder / name).read_bytes() for name in bundle.manifest.files}
    start = threading.Barrier(4)

    def write(_: int) -> str:
        start.wait()
        try:
            return str(write_bundle(tmp_path, bundle.manifest, files))
        except BundleError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        said = sorted(pool.map(write, range(4)))
    folder = tmp_path / "fashion_mnist" / str(bundle.manifest.version)
    assert said == [str(folder), *[f"{folder} already exists; allowed: another version"] * 3]
    assert load_bundle(folder).digest == bundle.digest
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_golden_rows_there_must_be(copy: Path) -> None:
    golden = dict(np.load(copy / "golden.npz"))
    rows = {name: value[:0] if value.ndim else value for name, value in golden.items()}
    np.savez(copy / "golden.npz", **rows)
    replace_file(copy, "golden.npz", (copy / "golden.npz").read_bytes())
    for check in (verify, lambda folder: Engine(load_bundle(folder), "cpu", 1)):
        with pytest.raises(BundleError, match=r"golden\.npz: image has 0 rows; allowed: 1 or more"):
            check(copy)


def served(folder: Path) -> None:
    """Check a bundle as a server does."""
    bundle = load_bundle(folder)
    Explainer(bundle)
    Engine(bundle, "cpu", 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image", lambda rows: rows.astype(np.float32), "cannot be run: .*Unexpected input data type"),
        (
            "image",
            lambda rows: rows[:, :8],
            r"golden\.npz: image has the shape \[8, 16, 3\] an image; .* \[16, 16, 3\]",
        ),
        ("steering_latent", lambda rows: rows + 99, "cannot be run: .*out of data bounds, idx=99"),
        ("steering_shift", lambda rows: rows[:, :1], r"steering_shift has the shape \[1, 2\] an image; .* \[2, 2\]"),
        ("steering_scale", lambda rows: rows[0, 0, 0], "cannot be run: "),
        ("fp32.logits", lambda rows: rows[:3], "cannot be run: .*broadcast"),
        ("fp32.logits", lambda rows: rows[0, 0], r"golden\.npz: logits has the shape \[\] an image; .* \[5\]"),
        ("fp32.gate_logit", lambda rows: rows[:, :1], r"golden\.npz: gate_logit has the shape \[1, 3\] an image"),
        ("fp32.margin", lambda _: np.inf, r"golden\.npz: fp32\.margin is inf; allowed: a finite number, 0 or more"),
        ("fp32.tolerance", lambda _: np.nan, r"golden\.npz: fp32\.tolerance is nan; allowed: a finite number"),
    ],
)
def test_golden_rows_that_do_not_fit_are_refused_by_verify_and_by_the_server(
    copy: Path, name: str, change: Callable[[NDArray[Any]], Any], message: str
) -> None:
    golden = dict(np.load(copy / "golden.npz"))
    golden[name] = change(golden[name])
    np.savez(copy / "golden.npz", **golden)
    sign(copy)
    for check in (verify, served):
        with pytest.raises(BundleError, match=message):
            check(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["a", "b"]}, r"golden\.npz: logits has the shape \[5\] an image; the manifest says \[2\]"),
        ({"heads": 2}, r"golden\.npz: gate_logit has the shape \[2, 3\] an image; the manifest says \[2, 2\]"),
        ({"schema_version": 3}, "there is no input gate_bias; allowed: one"),
        ({"gates_sae_digest": "0" * 16}, "sae.safetensors has the digest c8fc.* the manifest says '0000000000000000'"),
        ({"dim": 48}, r"encoder has the shape \[2, 12, 24\]; the manifest says .* the width 48"),
        (
            {"sites": [{"block": 1, "latents": 12}, {"block": 2, "latents": 13}]},
            r"encoder has the shape \[2, 12, 24\]; the manifest says 2 sites of \[12, 13\] latents",
        ),
    ],
)
def test_a_manifest_of_another_model_is_refused_by_verify_and_by_the_server(
    copy: Path, changes: dict[str, object], message: str
) -> None:
    rewrite(copy, **changes)
    for check in (verify, served):
        with pytest.raises(BundleError, match=message):
            check(copy)


def test_truncated_autoencoders_are_refused_by_verify_and_by_the_server(copy: Path) -> None:
    replace_file(copy, "sae.safetensors", (copy / "sae.safetensors").read_bytes()[:-5])
    for check in (verify, served):
        with pytest.raises(BundleError, match=r"sae\.safetensors cannot be read: "):
            check(copy)


def test_the_engine_refuses_a_graph_that_does_not_reproduce_the_golden_rows(copy: Path) -> None:
    golden = dict(np.load(copy / "golden.npz"))
    golden["fp32.logits"] = golden["fp32.logits"] + 0.01
    np.savez(copy / "golden.npz", **golden)
    changed = Bundle(copy, Manifest.from_json(json.loads((copy / "manifest.json").read_text())), {}, "")
    with pytest.raises(BundleError, match=r"logits differ from golden.npz by 0\.01"):
        Engine(changed, "cpu", 1)
    golden["fp32.gate_logit"] = -golden["fp32.gate_logit"]
    np.savez(copy / "golden.npz", **golden)
    with pytest.raises(BundleError, match=r"gates of golden.npz are not reproduced"):
        Engine(changed, "cpu", 1)


def test_golden_rows_have_clear_gates_and_several_steerings(bundle: Bundle) -> None:
    golden = load_golden(bundle.folder, "fp32")
    assert np.abs(golden.outputs["gate_logit"]).min() > golden.margin
    changed = (golden.inputs["steering_scale"] != 1) | (golden.inputs["steering_shift"] != 0)
    steered = changed.any((1, 2))
    assert steered.any()
    assert len(steered) >= 8


def test_the_committed_graph_carries_no_local_paths_or_stack_traces(bundle: Bundle) -> None:
    model = onnx.load(bundle.folder / "dispatch.fp32.onnx")
    for weight in model.graph.initializer:
        weight.raw_data = b""  # some of its numbers may look like a word
    content = model.SerializeToString()
    for trace in (b"/root", b"/home", b"site-packages", b".py", b"stack_trace", b"torch"):
        assert trace not in content, trace


@pytest.fixture(scope="module")
def steered() -> SteeredVit:
    torch.manual_seed(0)
    spec = ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,))
    model = GatedVit(create_vit(VitSettings(dim=24, depth=2, heads=3), spec, 10), (1,), spec)
    torch.nn.init.normal_(model.gates[0].linear.weight)
    sae = Sae(1, 16, 24)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    return SteeredVit(model, sae).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graph(steered: SteeredVit) -> bytes:
    return build(steered, ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,)), "dispatch", {}).SerializeToString()


def test_a_graph_that_does_not_match_pytorch_is_refused(
    steered: SteeredVit, graph: bytes, sample_pixels: NDArray[np.uint8]
) -> None:
    images = sample_pixels[::10]
    tried = steerings([{0: (SteeringTerm(3, 2.0, 1.0),)}], [16])
    classes = steered.model(torch.from_numpy(sample_pixels))[0].argmax(1).numpy()

    def certify() -> object:
        return Reference(steered, images, tried, sample_pixels, classes).certify(graph, "dispatch", "fp32")

    certificate = certify()
    assert certificate.rows == len(images) * len(tried)
    assert certificate.max_logit_difference < certificate.logit_tolerance
    assert certificate.accuracy == certificate.accuracy_of_model == 1.0
    head, gate = steered.model.vit.head, steered.model.gates[0].linear
    head.bias += 0.01
    with pytest.raises(LogitMismatch, match=r"a logit differs by 0\.01"):
        certify()
    head.bias -= 0.01
    gate.bias *= -1
    with pytest.raises(
        GateMismatch, match=r"decides differently; allowed: 0\.001\. Train longer .*LIMITS in export/cert"
    ):
        certify()
    gate.bias *= -1
    steered.model.vit.head = torch.nn.Linear(24, 11)
    try:
        with pytest.raises(ShapeError, match="logits is float32"):
            certify()
    finally:
        steered.model.vit.head = head


def test_a_graph_whose_answers_depend_on_the_batch_is_refused(
    steered: SteeredVit, graph: bytes, sample_pixels: NDArray[np.uint8]
) -> None:
    """A hundredth of the sum over the batch is added to every logit, which the limits of int8 let pass otherwise."""
    model = onnx.load_from_string(multiplied(graph, "logits", 0.01))
    model.graph.node[-1].output[0] = "own"
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["own"], ["of_batch"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["own", "of_batch"], ["logits"]))
    reference = Reference(steered, sample_pixels[:10], [{}], sample_pixels, np.zeros(100, np.int64))
    with pytest.raises(NeighbourMismatch, match="alone and in a batch"):
        reference.certify(model.SerializeToString(), "dispatch", "int8")


def test_more_flipped_gates_than_the_limit_are_refused() -> None:
    _Differences(gates=1000, flipped=1).check(LIMITS["fp32"], "")
    with pytest.raises(GateMismatch, match="1 of 999 gates decide differently"):
        _Differences(gates=999, flipped=1).check(LIMITS["fp32"], "")


def test_a_graph_that_is_right_less_often_is_refused(
    steered: SteeredVit, graph: bytes, sample_pixels: NDArray[np.uint8]
) -> None:
    """Within every other limit: the images that count are those whose two best logits are nearly equal."""
    logits = steered.model(torch.from_numpy(sample_pixels))[0]
    best = logits.topk(2).indices[:, 1].numpy()
    reference = Reference(steered, sample_pixels[:2], [{}], sample_pixels, best)
    reference.accuracy = 0.01  # as if PyTorch had been right once
    with pytest.raises(AccuracyLoss, match=r"accuracy is 0\.0000 on 100 images, 0\.0100 in PyTorch"):
        reference.certify(graph, "dispatch", "fp32")


def test_every_profile_is_compared_however_many_there_are(
    steered: SteeredVit, graph: bytes, sample_pixels: NDArray[np.uint8]
) -> None:
    """Each is known by its shift. 3 images: 40 steerings each are enough for 108, not for 308."""
    for count, rows in ((10, 3 * 18), (100, 3 * 40), (300, 3 * 103)):
        tried = steerings([{0: (SteeringTerm(3, 1.0, 0.01 * index),)} for index in range(1, count + 1)], [16])
        reference = Reference(steered, sample_pixels[:3], tried, sample_pixels[:1], np.zeros(1, np.int64))
        seen = np.concatenate([batch["steering_shift"].ravel() for batch, _ in reference.batches])
        assert {np.float32(0.01 * index) for index in range(1, count + 1)} <= set(seen)
        assert reference.certify(graph, "dispatch", "fp32").rows == rows
        golden = reference.golden({"fp32": graph})["fp32"]
        assert len({tuple(terms.ravel()) for terms in golden.inputs["steering_shift"]}) > 10


@pytest.mark.parametrize("output", ["logits", "gate_logit", "residual"])
def test_an_answer_that_is_not_a_number_is_refused_everywhere(
    steered: SteeredVit, graph: bytes, sample_pixels: NDArray[np.uint8], copy: Path, output: str
) -> None:
    reference = Reference(steered, sample_pixels[:2], [{}], sample_pixels, np.zeros(100, np.int64))
    for factor, said in ((np.nan, "nan"), (np.inf, "(-?inf|nan)")):
        with pytest.raises(NotFinite, match=rf"^{output} of row 0 is {said}; allowed: a finite number"):
            reference.certify(multiplied(graph, output, factor), "dispatch", "fp32")
    path = copy / "dispatch.fp32.onnx"
    replace_file(copy, path.name, multiplied(path.read_bytes(), output, np.nan))
    for check in (verify, lambda folder: Engine(load_bundle(folder), "cpu", 1)):
        with pytest.raises(BundleError, match=f"for golden.npz {output} of row 0 is nan; allowed: a finite number"):
            check(copy)


@pytest.mark.parametrize(
    ("output", "factor", "error", "message", "in_golden"),
    [
        ("residual", 0.0, ResidualMismatch, "a residual differs by 1 of its length; allowed: 0.0001", None),
        ("residual", 1.001, ResidualMismatch, "a residual differs by 0.001", None),
        ("gate_logit", 100.0, GateMismatch, "a gate logit differs by", "gate logits differ from golden.npz by"),
        ("gate_logit", 1.01, GateMismatch, "a gate logit differs by 0.0", "gate logits differ from golden.npz by 0.0"),
        ("gate_logit", -1.0, GateMismatch, "head_gate is not gate_logit > 0", "head_gate is not gate_logit > 0"),
    ],
)
def test_gate_logits_and_residuals_are_compared_too(
    steered: SteeredVit, graph: bytes, sample_pixels: NDArray[np.uint8], copy: Path,
    output: str, factor: float, error: type[ExportError], message: str, in_golden: str | None,
) -> None:  # fmt: skip
    reference = Reference(steered, sample_pixels[:4], [{}], sample_pixels, np.zeros(100, np.int64))
    with pytest.raises(error, match=message):
        reference.certify(multiplied(graph, output, factor), "dispatch", "fp32")
    if in_golden:
        path = copy / "dispatch.fp32.onnx"
        replace_file(copy, path.name, multiplied(path.read_bytes(), output, factor))
        with pytest.raises(BundleError, match=in_golden):
            verify(copy)


def test_verify_needs_no_torch_and_names_what_is_wrong(copy: Path) -> None:
    blocked = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None\n"
        "from export.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )

    def verify() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", blocked, "verify", str(copy)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = verify()
    assert (done.returncode, done.stderr) == (0, "")
    assert "dispatch.fp32.onnx: golden rows within" in done.stdout
    golden = dict(np.load(copy / "golden.npz"))
    golden["fp32.logits"] = golden["fp32.logits"] + 0.5
    np.savez(copy / "golden.npz", **golden)
    assert "golden.npz has" in verify().stderr
    replace_file(copy, "golden.npz", (copy / "golden.npz").read_bytes())
    done = verify()
    assert done.returncode == 1
    assert "dispatch.fp32.onnx: logits differ from golden.npz by 0.5" in done.stderr
