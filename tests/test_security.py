"""The defences in SECURITY.md: names and links, graphs, pickles, limits, secrets, model control."""

import ast
import re
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import trustme
from altered import put
from live import PREDICT, Live
from onnx import TensorProto, helper
from photos import encoded
from PIL import Image
from processes import MODELS, ROOT, SAMPLES, ServerProcess, serving, start_server
from prometheus_client import CollectorRegistry

from export.bundle import Bundle, BundleError, load_bundle, load_golden
from export.contained import check_contained
from service.catalogue import scan
from service.metrics import Metrics
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb
from service.profiles import ProfileFolder

BAG = next((SAMPLES / "Bag").glob("*.png"))
INFERENCE = "/inference.GRPCInferenceService/"
GRAPH = "dispatch.fp32.onnx"


@pytest.fixture(scope="module")
def outside(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(bundle, tmp_path_factory.mktemp("outside"), 1)


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 is fine."""
    folder = tmp_path_factory.mktemp("repository")
    put(bundle, folder, 1)
    return folder


@pytest.fixture(scope="module")
def loading(repository: Path) -> Iterator[Live]:
    """A server whose clients may load models; version 1 serves."""
    (repository / "fashion_mnist" / "labels.json").write_text('{"stable": 1}')
    with serving(repository, "--model-control", "explicit") as running:
        yield Live(running.address, BAG)


def load(live: Live, name: str = "fashion_mnist") -> tuple[str, str]:
    said = live.send(f"{INFERENCE}RepositoryModelLoad", oi.RepositoryModelLoadRequest(model_name=name))
    return said.status, said.sentence


def folder_elsewhere(version: Path, outside: Path) -> None:
    version.symlink_to(outside)


def file_elsewhere(version: Path, outside: Path) -> None:
    shutil.copytree(outside, version)
    (version / GRAPH).unlink()
    (version / GRAPH).symlink_to(outside / GRAPH)


def manifest_elsewhere(version: Path, outside: Path) -> None:
    shutil.copytree(outside, version)
    (version / "manifest.json").unlink()
    (version / "manifest.json").symlink_to(outside / "manifest.json")


def link_around(version: Path, outside: Path) -> None:
    """Make two links that look harmless on their own."""
    (version.parent / ".door").unlink(missing_ok=True)
    (version.parent / ".door").symlink_to(outside)
    version.symlink_to(".door")


@pytest.mark.parametrize("make", [folder_elsewhere, file_elsewhere, manifest_elsewhere, link_around])
def test_paths_that_leave_the_repository_are_refused_and_the_rest_is_served(
    loading: Live, repository: Path, outside: Path, make: Callable[[Path, Path], None]
) -> None:
    version = repository / "fashion_mnist" / "2"
    make(version, outside)
    try:
        status, sentence = load(loading)
        assert status == "UNAVAILABLE"
        assert "resolves to" in sentence
        assert "outside" in sentence
    finally:
        version.unlink() if version.is_symlink() else shutil.rmtree(version)
    assert load(loading) == ("OK", "")


def test_labels_that_lie_outside_are_not_read(repository: Path, outside: Path) -> None:
    labels = repository / "fashion_mnist" / "labels.json"
    (outside.parent / "labels.json").write_text('{"stolen": 1}')
    labels.unlink(missing_ok=True)
    labels.symlink_to(outside.parent / "labels.json")
    shelf = scan(repository)["fashion_mnist"]
    assert shelf.labels == {}
    assert "resolves to" in shelf.problem
    labels.unlink()
    labels.write_text('{"stable": 1}')


def test_links_within_the_repository_are_followed_as_kubernetes_mounts_need(bundle: Bundle, tmp_path: Path) -> None:
    """A ConfigMap's `..data`, and a repository that is itself reached through a link, as a model car's."""
    model = tmp_path / "real" / "fashion_mnist"
    (model / "..2026").mkdir(parents=True)
    put(bundle, tmp_path / "real", 1).rename(model / "..2026" / "1")
    (model / "..data").symlink_to("..2026")
    (model / "1").symlink_to("..data/1")
    (tmp_path / "mount").symlink_to("real")
    found = scan(tmp_path / "mount")["fashion_mnist"].versions[1]
    assert load_bundle(found.path, tmp_path / "mount").manifest.version == 1


@pytest.mark.parametrize("name", ["../outside", "/etc", "fashion_mnist/1", "..", ".", "fashion_mnist\0", "%2e%2e/x"])
def test_a_name_is_looked_up_and_never_a_path(loading: Live, name: str) -> None:
    assert load(loading, name)[0] == "NOT_FOUND"
    for request in (
        pb.PredictRequest(model=name, images=[pb.Image(pixels=bytes(784))]),
        pb.PredictRequest(version=name, images=[pb.Image(pixels=bytes(784))]),
        pb.PredictRequest(steering=pb.Steering(profile=name), images=[pb.Image(pixels=bytes(784))]),
    ):
        said = loading.send(PREDICT, request)
        assert said.status == "NOT_FOUND"
        assert "; allowed: " in said.sentence


def test_model_control_is_out_of_reach_unless_it_was_turned_on(server: ServerProcess) -> None:
    live = Live(server.address, BAG)
    for call, request in (
        ("RepositoryModelLoad", oi.RepositoryModelLoadRequest(model_name="fashion_mnist")),
        ("RepositoryModelUnload", oi.RepositoryModelUnloadRequest(model_name="fashion_mnist")),
    ):
        said = live.send(INFERENCE + call, request)
        assert said.status == "PERMISSION_DENIED"
        assert "--model-control is 'none'; allowed: 'explicit'" in said.sentence


def elsewhere(tensor: onnx.TensorProto, location: str) -> onnx.TensorProto:
    """A tensor whose values are in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


@pytest.mark.parametrize("location", ["../../../secret.bin", "/etc/passwd", "weights.bin"])
def test_a_graph_whose_weights_are_outside_the_bundle_or_its_manifest_is_refused(
    loading: Live, repository: Path, bundle: Bundle, location: str
) -> None:
    model = onnx.load(bundle.folder / GRAPH)
    elsewhere(model.graph.initializer[0], location)
    name = model.graph.initializer[0].name
    folder = put(bundle, repository, 3, **{GRAPH: model.SerializeToString()})
    try:
        status, sentence = load(loading)
        assert status == "UNAVAILABLE"
        assert f"the values of tensor '{name}' are in '{location}'; allowed: a file of the manifest" in sentence
    finally:
        shutil.rmtree(folder)


def tensor() -> onnx.TensorProto:
    made = helper.make_tensor("w", TensorProto.FLOAT, [1], struct.pack("<f", 1.0), raw=True)
    return elsewhere(made, "x.bin")


def constant() -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor())


def inner_graph() -> onnx.NodeProto:
    inner = helper.make_graph([constant()], "inner", [], [])
    return helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=helper.make_graph([], "none", [], []))


def sparse() -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor(), dims=[1])


@pytest.mark.parametrize(
    "model",
    [
        helper.make_model(helper.make_graph([constant()], "g", [], [])),
        helper.make_model(helper.make_graph([inner_graph()], "g", [], [])),
        helper.make_model(helper.make_graph([], "g", [], [], sparse_initializer=[sparse()])),
        helper.make_model(
            helper.make_graph([], "g", [], []),
            functions=[helper.make_function("d", "f", [], ["c"], [constant()], [helper.make_opsetid("", 20)])],
        ),
    ],
    ids=["constant", "branch", "sparse", "function"],
)
def test_another_file_is_found_wherever_a_graph_can_name_it(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"the values of tensor 'w' are in 'x\.bin'; allowed: a file of the manifest"):
        check_contained(path, [])


def test_golden_rows_that_are_pickles_are_not_unpickled(bundle: Bundle, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    arrays = dict(np.load(bundle.folder / "golden.npz", allow_pickle=False))
    arrays["image"] = np.array([Bomb()], object)
    np.savez(tmp_path / "golden.npz", **arrays)
    with pytest.raises(BundleError, match="allow_pickle"):
        load_golden(tmp_path, "fp32")
    assert not (tmp_path / "exploded").exists()


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_nothing_of_the_project_can_unpickle_or_run_what_it_reads() -> None:
    loads = 0
    for path in [path for folder in ("service", "export", "training") for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & UNSAFE_MODULES, path
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path}:{node.lineno} {called}"
            assert called not in {"eval", "exec", "compile", "os.system", "os.popen", "__import__"}, where
            assert keywords.get("shell", "False") == "False", where
            if called in {"np.load", "numpy.load"}:
                loads += 1
                assert keywords.get("allow_pickle") == "False", where
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", where
    assert loads > 0


LIMITED = (
    "--max-pixels", "1000", "--max-image-mb", "1", "--max-images", "2", "--max-terms", "3", "--max-message-mb", "4",
    "--max-streams", "3", "--max-delay-ms", "400",
)  # fmt: skip


@pytest.fixture(scope="module")
def limited() -> Iterator[tuple[ServerProcess, Live]]:
    with serving(MODELS, *LIMITED) as running:
        yield running, Live(running.address, BAG)


def picture(width: int, height: int) -> bytes:
    return encoded(Image.new("L", (width, height)), "PNG")


PIXELS = pb.Image(pixels=bytes(784))
PAST: dict[str, tuple[pb.PredictRequest, str, str]] = {
    "pixels": (
        pb.PredictRequest(images=[pb.Image(encoded=picture(40, 26))]),
        "INVALID_ARGUMENT",
        "images[0].encoded has 40 x 26 pixels; allowed: at most 1000",
    ),
    "bytes of an image": (
        pb.PredictRequest(images=[pb.Image(encoded=picture(10, 10) + bytes(2**20))]),
        "INVALID_ARGUMENT",
        "allowed: at most 1048576",
    ),
    "images": (pb.PredictRequest(images=[PIXELS] * 3), "INVALID_ARGUMENT", "images has 3 entries; allowed: 1 to 2"),
    "terms": (
        pb.PredictRequest(images=[PIXELS], steering=pb.Steering(terms=[pb.SteeringTerm(latent=i) for i in range(4)])),
        "INVALID_ARGUMENT",
        "steering.terms has 4 entries; allowed: 3",
    ),
    "bytes of a message": (
        pb.PredictRequest(images=[pb.Image(encoded=bytes(2**22))]),
        "RESOURCE_EXHAUSTED",
        "message larger than max",
    ),
}


@pytest.mark.parametrize("limit", PAST)
def test_what_is_past_a_limit_is_refused(limited: tuple[ServerProcess, Live], limit: str) -> None:
    request, status, sentence = PAST[limit]
    said = limited[1].send(PREDICT, request)
    assert said.status == status
    assert sentence in said.sentence


def test_a_compressed_message_counts_as_what_it_unpacks_to(limited: tuple[ServerProcess, Live]) -> None:
    message = pb.PredictRequest(images=[pb.Image(encoded=bytes(2**25))]).SerializeToString()
    call = limited[1].channel.unary_unary(PREDICT)
    with pytest.raises(grpc.RpcError, match="larger than max"):
        call(message, timeout=20, compression=grpc.Compression.Gzip)


def test_steering_tensors_have_the_limit_of_terms_too(limited: tuple[ServerProcess, Live]) -> None:
    request = oi.ModelInferRequest(model_name="fashion_mnist")
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 28, 28, 1])
    request.raw_input_contents.append(bytes(784))
    for name, kind, size in (("latent", "INT64", 8), ("scale", "FP32", 4), ("shift", "FP32", 4)):
        request.inputs.add(name=f"steering_{name}", datatype=kind, shape=[1, 5, 1])
        request.raw_input_contents.append(bytes(5 * size))
    said = limited[1].send(f"{INFERENCE}ModelInfer", request)
    assert said.status == "INVALID_ARGUMENT"
    assert said.sentence == "steering tensors have 5 terms an image; allowed: 3"


def test_refused_calls_leave_nothing_in_memory() -> None:
    """Each is 8 MiB of empty images: four million messages once they are parsed."""
    with serving(MODELS) as server, grpc.insecure_channel(server.address) as channel:
        before, predict = server.resident_mb(), channel.unary_unary(PREDICT)
        for _ in range(2):
            calls = [predict.future(b"\x1a\x00" * 2**22, timeout=60) for _ in range(4)]
            assert {call.code() for call in calls} == {grpc.StatusCode.INVALID_ARGUMENT}
        assert server.resident_mb() - before < 300, "a thousand if each kept its message"


def test_further_calls_of_a_connection_wait_at_the_client(limited: tuple[ServerProcess, Live]) -> None:
    """Each call waits 0.4 s for others to share its batch with: three at a time, nine take three times as long."""
    server, _ = limited
    request = pb.PredictRequest(images=[PIXELS]).SerializeToString()
    most = 0.0
    with grpc.insecure_channel(server.address) as channel:
        channel.unary_unary(PREDICT)(request, timeout=30)  # now the client knows the limit
        start = time.monotonic()
        calls = [channel.unary_unary(PREDICT).future(request, timeout=30) for _ in range(9)]
        while not all(call.done() for call in calls):
            most = max(most, server.count("steervit_queue_images"))
            time.sleep(0.02)
    assert [call.code() for call in calls] == [grpc.StatusCode.OK] * 9
    assert 1 <= most <= 3
    assert time.monotonic() - start > 2.5 * 0.4


def test_secrets_are_in_no_log_and_on_no_page(tmp_path: Path) -> None:
    """The server's key and the metadata of requests, with the most verbose log level, failed calls included."""
    ca = trustme.CA()
    leaf = ca.issue_cert("127.0.0.1")
    key, chain = tmp_path / "server.key", tmp_path / "server.pem"
    leaf.private_key_pem.write_to_path(str(key))
    leaf.cert_chain_pems[0].write_to_path(str(chain))
    flags = ("--tls-certificate", str(chain), "--tls-key", str(key), "--log-level", "debug")
    running = start_server(MODELS, *flags)
    secret = "c0ffee-do-not-tell"
    channel = grpc.secure_channel(running.address, grpc.ssl_channel_credentials(ca.cert_pem.bytes()))
    metadata = (("authorization", f"Bearer {secret}"), ("cookie", secret), ("x-api-key-bin", secret.encode()))
    with channel:
        for message, status in (
            (pb.PredictRequest(images=[PIXELS]).SerializeToString(), "OK"),
            (b"\xff\xff", "INVALID_ARGUMENT"),
            (pb.PredictRequest(model="resnet").SerializeToString(), "NOT_FOUND"),
        ):
            call = channel.unary_unary(PREDICT).future(message, timeout=20, metadata=metadata)
            assert call.code().name == status
        channel.unary_unary("/nowhere/Nothing").future(b"", timeout=20, metadata=metadata).code()
    key.write_text("-----BEGIN PRIVATE KEY-----\n" + secret + "\n-----END PRIVATE KEY-----\n")  # does not fit
    bad = grpc.secure_channel(running.address, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes()))
    with bad:
        assert bad.unary_unary(PREDICT).future(b"", timeout=5).code() is grpc.StatusCode.UNAVAILABLE
    page = running.page()
    running.process.send_signal(signal.SIGUSR1)
    running.process.terminate()
    output, errors = running.process.communicate(timeout=30)
    assert "stopping" in errors
    assert errors.count('service/batcher.py", line ') >= 1, "the stacks of its threads"
    told = output + errors + page
    assert secret not in told
    lines = [line for line in leaf.private_key_pem.bytes().decode().splitlines() if re.fullmatch(r"[\w+/=]{16,}", line)]
    assert len(lines) > 1
    assert not any(line in told for line in lines)


def test_a_profile_file_that_lies_outside_its_folder_is_refused(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inside, other = tmp_path / "profiles", tmp_path / "other.json"
    inside.mkdir()
    other.write_text("{}")
    (inside / "x.json").symlink_to(other)
    assert not ProfileFolder(inside, Metrics(CollectorRegistry(), 1)).refresh([(bundle, "")])
    assert "x.json resolves to" in caplog.text
