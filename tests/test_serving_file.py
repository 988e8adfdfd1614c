"""Settings of a model in serving.json: what is in force, what is refused with which words, and that it is followed."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from altered import put, write
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from processes import ROOT, SMALL, ServerProcess, run_main, serving, until
from refusals import refusal
from test_repository import BAG, POLL, index, version_of

from export.bundle import load_bundle
from service import doctor
from service.__main__ import main
from service.client import Client
from service.pb import open_inference_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.serving_file import PER_MODEL, read

SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "schemas" / "serving.schema.json").read_text()))
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 40), st.sampled_from([1.0, 8.0, 0.5, 1e9, 10**30, -0.0]), st.floats(0, 2),
    st.sampled_from(["auto", "off", "masked.fp32", "fast", "", "8"]), st.just([]), st.just({}),
)  # fmt: skip
CONTENT = st.dictionaries(st.sampled_from([*PER_MODEL, "max_bach", "host"]), VALUES, max_size=3) | VALUES

OWN = {
    "max_batch": 2, "threads": 1, "instances": 1, "max_queue": 3, "max_images": 4, "min_budget": 0.4,
    "default_profile": "b",
}  # fmt: skip


@given(CONTENT)
def test_the_reader_allows_what_the_schema_allows_and_names_a_wrong_field(content: Any) -> None:
    if SCHEMA.is_valid(content):
        assert read(content) == content
        return
    with pytest.raises(ValueError, match="allowed: ") as caught:
        read(content)
    assert not isinstance(content, dict) or any(name in str(caught.value) for name in content)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    put(load_bundle(SMALL / "small" / "1"), tmp_path, 1)
    put(load_bundle(SMALL / "small" / "1"), tmp_path, 1, "other")
    state(tmp_path, OWN)
    return tmp_path


@pytest.fixture
def polling(repository: Path) -> Iterator[ServerProcess]:
    with serving(repository, *POLL, "--max-queue", "64", "--max-delay-ms", "1.5") as running:
        yield running


def state(repository: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    write(repository / "fashion_mnist" / "serving.json", text)


def test_each_model_has_its_settings_and_the_server_those_of_the_rest(polling: ServerProcess) -> None:
    with Client(polling.address) as client, grpc.insecure_channel(polling.address) as channel:
        own, other = client.model("fashion_mnist"), client.model("other")
        assert (own.instances.max_batch, own.instances.instances, own.instances.source) == (2, 1, "flags")
        assert (own.settings.max_queue, own.settings.max_images, own.settings.min_budget) == (3, 4, 0.4)
        assert own.settings.of_model == sorted(OWN)
        assert (other.settings.max_queue, other.settings.max_images, other.settings.of_model) == (64, 256, [])
        assert own.settings.max_delay_ms == other.settings.max_delay_ms == 1.5, "of the flag"
        stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        config = stub.ModelConfig(pb.ModelConfigRequest(name="fashion_mnist"), timeout=10).config
        assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (4, [2])
        assert {name: value.string_value for name, value in config.parameters.items()} == {
            "max_queue": "3", "max_delay_ms": "1.5", "max_images": "4", "min_budget": "0.4", "default_profile": "b",
            "target_latency_ms": "0.0", "shadow_fraction": "0.0",
        }  # fmt: skip
        assert polling.count("steervit_queue_limit_images", model="fashion_mnist") == 3
        assert len(client.predict([BAG] * 9, model="other").predictions) == 9
        assert [client.predict([BAG], model=name).receipt.profile for name in ("fashion_mnist", "other")] == ["b", ""]
        for images, sentence in ((4, "4 images at full budget"), (5, "images has 5 entries; allowed: 1 to 4")):
            assert sentence in refusal(client.predict, [BAG] * images, model="fashion_mnist")[1]


@contextlib.contextmanager
def asking(server: ServerProcess) -> Iterator[None]:
    """A client that asks the model all the time, and is always answered."""
    done, answered, problems = threading.Event(), [0], list[str]()

    def ask() -> None:
        with Client(server.address) as client:
            while not done.is_set():
                try:
                    client.predict([BAG], model="fashion_mnist")
                    answered[0] += 1
                except grpc.RpcError as error:
                    problems.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert answered[0] > 20
    assert problems == []


def test_a_changed_file_is_followed_and_a_wrong_one_changes_nothing(polling: ServerProcess, repository: Path) -> None:
    key = ("fashion_mnist", "1")

    def queue() -> int:
        return int(client.model("fashion_mnist").settings.max_queue)

    with asking(polling), Client(polling.address) as client:
        state(repository, {"max_queue": 5})
        until(lambda: queue() == 5)
        other_batches = polling.count("steervit_model_info", model="other")
        for wrong, reason in (
            ({"max_queue": 0}, "max_queue is 0; allowed: 1 or more"),
            ({"max_bach": 2}, "'max_bach' is not a setting of a model; allowed: graph, specialised"),
            ("{", "Expecting property name"),
            ({"default_profile": "night"}, "default_profile is 'night'; allowed: 'b'"),
            ({"graph": "compact.fp16"}, "graph is 'compact.fp16'; "),
        ):
            state(repository, wrong)
            until(lambda reason=reason: reason in index(polling)[key][1], 20)  # type: ignore[misc]
            assert index(polling)[key][0] == "READY", "as it was before"
            assert (queue(), version_of(client, model="fashion_mnist")) == (5, "1")
            assert polling.count("steervit_model_load_failed", model="fashion_mnist") == 1
        put(load_bundle(SMALL / "small" / "1"), repository, 2)
        until(lambda: "graph is 'compact.fp16'" in index(polling).get(("fashion_mnist", "2"), ("", ""))[1])
        assert version_of(client, model="fashion_mnist") == "1"
        (repository / "fashion_mnist" / "serving.json").unlink()
        until(lambda: version_of(client, model="fashion_mnist") == "2")
        assert queue() == 64, "of the flag"
        assert index(polling)["fashion_mnist", "2"] == ("READY", "")
        assert "steervit_model_load_failed{" not in polling.page()
        assert polling.count("steervit_model_info", model="other") == other_batches


def test_a_server_does_not_start_with_a_wrong_file(repository: Path) -> None:
    state(repository, {"min_budget": 1.5})
    done = run_main(main, "--repository", str(repository), "--port", "0", "--metrics-port", "0")
    assert done.returncode == 1
    reason = f"{repository / 'fashion_mnist' / 'serving.json'}: min_budget is 1.5; allowed: less than or"
    assert reason in done.stderr
    assert f"\n  ! {reason}" in run_main(doctor.main, "--repository", str(repository), "--metrics-port", "1").stdout
