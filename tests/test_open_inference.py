"""The Open Inference Protocol: an unmodified tritonclient in a process of its own, and wrong requests."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from documented import examples
from masks import unit_mask
from processes import MODELS, ROOT, SAMPLES, ServerProcess, serving
from refusals import refusal

from export.bundle import Bundle
from service.client import Client
from service.pb import open_inference_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.tensors import packed
from training.steering import SteeringTerm

TRITON_CLIENT = ("tritonclient[grpc]==2.73.0", "pillow")
"""In an environment of its own: it needs another protobuf, and its package `inference` is also the name of ours."""


@pytest.fixture(scope="session")
def triton_python() -> Path:
    folder = ROOT / "build" / "tritonclient"
    python = folder / "bin" / "python"
    if not (folder / "with-pillow").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, *TRITON_CLIENT], check=True)
        (folder / "with-pillow").touch()
    return python


@pytest.fixture(scope="session")
def triton(server: ServerProcess, triton_python: Path) -> dict[str, Any]:
    """The results of the client."""
    script = ROOT / "tests" / "clients" / "triton.py"
    done = subprocess.run(
        [str(triton_python), str(script), server.address, str(SAMPLES / "Shirt")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_documented_example_for_tritonclient_works(server: ServerProcess, triton_python: Path) -> None:
    (example,) = (each.text for each in examples("docs/serving.md") if "tritonclient" in each.text)
    code = example.replace("127.0.0.1:8001", server.address)
    done = subprocess.run([triton_python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_tritonclient_finds_the_server_and_the_model(triton: dict[str, Any], bundle: Bundle) -> None:
    assert triton["live"] is triton["ready"] is True
    assert triton["model_ready"] == [True, False, False]
    assert {"classification", "statistics", "model_configuration", "model_repository"} <= set(
        triton["server"]["extensions"]
    )
    metadata, version = triton["metadata"], str(bundle.manifest.version)
    assert (metadata["name"], metadata["versions"]) == ("fashion_mnist", [version])
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["-1", "28", "28", "1"]}]
    assert [output["name"] for output in metadata["outputs"]] == ["logits", "head_gate", "gate_logit", "mlp_gate"]
    config = triton["config"]["config"]
    assert config["max_batch_size"] == 256
    assert config["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": ["28", "28", "1"]}]
    assert triton["index"]["models"] == [{"name": "fashion_mnist", "version": version, "state": "READY"}]


def test_tritonclient_gets_the_answers_of_the_typed_api(
    triton: dict[str, Any], client: Client, samples: dict[str, list[bytes]], bundle: Bundle
) -> None:
    logits = np.array(triton["plain"]["logits"])
    assert triton["plain"]["id"] == "7"
    assert triton["plain"]["names"] == ["logits", "head_gate", "gate_logit", "mlp_gate"]
    typed = client.predict(samples["Shirt"], top_k=1)
    labels = [bundle.manifest.labels[index] for index in logits.argmax(1)]
    assert labels == [p.classes[0].label for p in typed.predictions]
    np.testing.assert_allclose(triton["aio"], logits, atol=1e-4)
    steered = client.predict(samples["Shirt"], profile="Shirt", strength=0.5)
    assert triton["steered"]["names"] == ["head_gate"]
    assert triton["steered"]["head_gate"] == [[list(b.kept) for b in p.head_mask] for p in steered.predictions]
    receipt = triton["steered"]["receipt"]
    for name in ("bundle_digest", "gates_sae_digest", "graph", "profile", "steering_digest"):
        assert receipt[name] == getattr(steered.receipt, name), name


def test_tritonclient_gets_the_most_likely_classes_as_text(triton: dict[str, Any], bundle: Bundle) -> None:
    for row, found in zip(triton["plain"]["logits"], triton["classes"], strict=True):
        best = sorted(range(10), key=lambda index: -row[index])[:3]
        parts = [element.split(":") for element in found]
        assert [(int(index), label) for _, index, label in parts] == [(i, bundle.manifest.labels[i]) for i in best]
        np.testing.assert_allclose([float(value) for value, *_ in parts], [row[i] for i in best], atol=1e-4)


def test_steering_tensors_steer_each_image_by_itself(triton: dict[str, Any], client: Client) -> None:
    gate_logit = np.array(triton["by_tensors"])
    black = np.zeros((28, 28, 1), np.uint8)
    terms = {site: (SteeringTerm(7, 1.0, 5.0),) for site in range(5)}
    expected = [client.predict([black]), client.predict([black], terms=terms), client.predict([black])]
    for row, answer in zip(gate_logit, expected, strict=True):
        np.testing.assert_array_equal(row > 0, unit_mask(answer.predictions)[0])
    np.testing.assert_array_equal(gate_logit[0], gate_logit[2])
    assert not np.array_equal(gate_logit[0], gate_logit[1])
    assert triton["residual"] == [3, 5, 192]


def test_statistics_are_true(triton: dict[str, Any]) -> None:
    (model,) = triton["statistics"]["model_stats"]
    stats = model["inference_stats"]
    batches = [(int(b["batch_size"]), int(b["compute_infer"]["count"])) for b in model["batch_stats"]]
    assert sum(size * count for size, count in batches) == int(model["inference_count"])
    assert sum(count for _, count in batches) == int(model["execution_count"])
    assert int(stats["success"]["ns"]) > int(stats["compute_infer"]["ns"]) > 0


def test_statistics_count_calls_and_batches_as_triton_does() -> None:
    flags = ("--instances", "1", "--max-batch", "8", "--max-delay-ms", "1000")
    with serving(MODELS, *flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        calls = [stub.ModelInfer.future(raw(request(), bytes(784)), timeout=30) for _ in range(8)]
        assert [len(call.result().outputs) for call in calls] == [4] * 8
        no_image = typed(request((1,), "encoded_image", "BYTES"), bytes_contents=[b"x"])
        for wrong in (raw(request(), bytes(783)), no_image):
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(wrong, timeout=30)
        (model,) = stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=30).model_stats
    stats, (batch,) = model.inference_stats, model.batch_stats
    assert (model.inference_count, model.execution_count, batch.batch_size, batch.compute_infer.count) == (8, 1, 8, 1)
    assert counts(stats) == {8}
    assert stats.compute_infer.ns == pytest.approx(8 * batch.compute_infer.ns)
    assert stats.fail.count == 2


def counts(stats: pb.InferStatistics) -> set[int]:
    """The counts of answered calls and of each of their parts."""
    parts = (stats.success, stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    return {part.count for part in parts}


def test_every_kind_of_call_counts_once_in_each_part_of_the_statistics(
    stub: GRPCInferenceServiceStub, client: Client
) -> None:
    """perf_analyzer aborts when the counts differ."""

    def statistics() -> pb.ModelStatistics:
        (model,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="fashion_mnist"), timeout=30).model_stats
        return model

    file = next((SAMPLES / "Bag").glob("*.png")).read_bytes()
    steered = raw(request(), bytes(784), struct.pack("<5q", *range(5)), bytes(20), bytes(20))
    for name, kind in (("latent", "INT64"), ("scale", "FP32"), ("shift", "FP32")):
        steered.inputs.add(name=f"steering_{name}", datatype=kind, shape=[1, 5, 1])
    profile = raw(request((256, 28, 28, 1)), bytes(256 * 784))
    profile.parameters["profile"].string_param = "Shirt"
    answered = [
        raw(request(), bytes(784)), typed(request(), uint_contents=bytes(784)), steered, profile,
        raw(request((1,), "encoded_image", "BYTES"), struct.pack("<I", len(file)) + file),
        typed(request((1,), "encoded_image", "BYTES"), bytes_contents=[file]),
    ]  # fmt: skip
    unknown = raw(request(), bytes(784))
    unknown.parameters["profile"].string_param = "Hat"
    refused = [
        raw(request(), bytes(783)),
        unknown,
        typed(request((1,), "encoded_image", "BYTES"), bytes_contents=[b"x"]),
    ]
    before = statistics().inference_stats
    for call in answered:
        stub.ModelInfer(call, timeout=30)
    client.predict([file])
    client.compare([np.zeros((28, 28, 1), np.uint8)], profile="Shirt")
    client.explain([file])
    for call in refused:
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(call, timeout=30)
    for wrong in ({"profile": "Hat"}, {"top_k": 11}):
        with pytest.raises(grpc.RpcError):
            client.predict([file], **wrong)
    model = statistics()
    stats = model.inference_stats
    assert counts(stats) == {before.success.count + len(answered) + 3}
    assert stats.fail.count == before.fail.count + len(refused) + 2
    assert stats.compute_output.ns > before.compute_output.ns
    for batch in model.batch_stats:
        assert batch.compute_input.count == batch.compute_output.count == batch.compute_infer.count > 0
    parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert stats.success.ns <= sum(part.ns for part in parts) + 1000 * stats.success.count


SEEN = {
    "model": ("NOT_FOUND", "model is 'resnet'; allowed: 'fashion_mnist'"),
    "terms": ("INVALID_ARGUMENT", "allowed: steering_latent, steering_scale, steering_shift, all [3, 5, terms]"),
    "classes": ("INVALID_ARGUMENT", "outputs[0] 'head_gate' has the parameter 'classification'; allowed: none"),
    "shared output": ("INVALID_ARGUMENT", "outputs[0] 'logits' has the parameter 'shared_memory_"),
    "shared input": ("INVALID_ARGUMENT", "inputs[0] 'image' has the parameter 'shared_memory_"),
    "shared memory": ("UNIMPLEMENTED", "SystemSharedMemoryStatus is not served; allowed: ServerLive, ServerReady"),
    "stream": ("UNIMPLEMENTED", "ModelStreamInfer is not served; allowed: ServerLive, ServerReady"),
    "tracing": ("UNIMPLEMENTED", "TraceSetting is not served"),
}


@pytest.mark.parametrize("name", SEEN)
def test_tritonclient_is_told_what_is_wrong(triton: dict[str, Any], name: str) -> None:
    status, sentence = triton["errors"][name]
    assert status == f"StatusCode.{SEEN[name][0]}"
    assert SEEN[name][1] in sentence


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


def request(shape: tuple[int, ...] = (1, 28, 28, 1), name: str = "image", kind: str = "UINT8") -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="fashion_mnist")
    made.inputs.add(name=name, datatype=kind, shape=shape)
    return made


def raw(made: pb.ModelInferRequest, *contents: bytes) -> pb.ModelInferRequest:
    made.raw_input_contents.extend(contents)
    return made


def typed(made: pb.ModelInferRequest, **contents: Any) -> pb.ModelInferRequest:
    for name, values in contents.items():
        getattr(made.inputs[0].contents, name).extend(values)
    return made


def test_typed_and_raw_contents_give_the_same_answer(stub: GRPCInferenceServiceStub, bundle: Bundle) -> None:
    pixels = bytes(range(256)) * 3 + bytes(16)
    answers = [stub.ModelInfer(raw(request(), pixels)), stub.ModelInfer(typed(request(), uint_contents=pixels))]
    assert answers[0].raw_output_contents == answers[1].raw_output_contents
    file = next((SAMPLES / "Bag").glob("*.png")).read_bytes()
    element = struct.pack("<I", len(file)) + file
    encoded = request((1,), "encoded_image", "BYTES")
    answers = [
        stub.ModelInfer(raw(request((1,), "encoded_image", "BYTES"), element)),
        stub.ModelInfer(typed(encoded, bytes_contents=[file])),
    ]
    assert answers[0].raw_output_contents == answers[1].raw_output_contents
    logits = np.frombuffer(answers[0].raw_output_contents[0], "<f4")
    assert bundle.manifest.labels[int(logits.argmax())] == "Bag"


def test_large_inputs_must_be_raw_contents() -> None:
    """Typed contents would occupy the event loop."""
    shape = (400, 28, 28, 1)
    with serving(MODELS, "--max-images", "400") as server, grpc.insecure_channel(server.address) as channel:
        stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        large = typed(request(shape), uint_contents=bytes(400 * 784))
        sentence = "inputs[0] 'image' has 313600 elements in uint_contents; allowed: 262144, or raw_input_contents"
        assert refusal(stub.ModelInfer, large, timeout=30) == ("INVALID_ARGUMENT", sentence)
        assert stub.ModelInfer(raw(request(shape), bytes(400 * 784)), timeout=60).outputs[0].shape[0] == 400


def test_reserved_parameters_are_let_through(stub: GRPCInferenceServiceStub) -> None:
    made = raw(request(), bytes(784))
    made.parameters["triton_enable_empty_final_response"].bool_param = False
    made.parameters["priority"].int64_param = 1
    made.inputs[0].parameters["binary_data_size"].int64_param = 784
    made.outputs.add(name="logits")
    for part in (made, made.inputs[0], made.outputs[0]):
        part.parameters["content_type"].string_param = "np"  # of MLServer's clients
    assert len(stub.ModelInfer(made, timeout=10).outputs) == 1


@pytest.mark.parametrize(("sent", "read"), [(1.0000000000000002, 1.0), (float(np.float32(0.7)), 0.7)])
def test_budgets_are_rounded_as_in_the_typed_api(stub: GRPCInferenceServiceStub, sent: float, read: float) -> None:
    image = {"name": "image", "datatype": "UINT8", "shape": [1, 28, 28, 1]}
    parameters = {name: pb.InferParameter(double_param=sent) for name in ("budget", "min_budget")}
    request = pb.ModelInferRequest(
        model_name="fashion_mnist", inputs=[image], parameters=parameters, raw_input_contents=[bytes(784)]
    )
    assert stub.ModelInfer(request, timeout=20).parameters["budget"].double_param == read


def test_encoded_images_come_in_one_or_two_dimensions(stub: GRPCInferenceServiceStub) -> None:
    files = [path.read_bytes() for path in sorted((SAMPLES / "Shirt").glob("*.png"))[:3]]

    def encoded(*shape: int, typed: bool = False) -> pb.ModelInferRequest:
        made = pb.ModelInferRequest(model_name="fashion_mnist")
        made.inputs.add(name="encoded_image", datatype="BYTES", shape=shape)
        if typed:
            made.inputs[0].contents.bytes_contents.extend(files)
            return made
        return raw(made, packed(files))

    flat = stub.ModelInfer(encoded(3), timeout=10).raw_output_contents
    for request in (encoded(3, 1), encoded(3, 1, typed=True), encoded(3, typed=True)):
        assert stub.ModelInfer(request, timeout=10).raw_output_contents == flat
    for shape in ((1, 3), (3, 1, 1)):
        _, sentence = refusal(stub.ModelInfer, encoded(*shape), timeout=10)
        assert sentence == f"input 'encoded_image' has the shape {list(shape)}; allowed: [images] or [images, 1]"


def test_more_classes_than_there_are_give_all(stub: GRPCInferenceServiceStub) -> None:
    made = raw(request(), bytes(784))
    made.outputs.add(name="logits").parameters["classification"].int64_param = 1000
    assert list(stub.ModelInfer(made, timeout=10).outputs[0].shape) == [1, 10]
