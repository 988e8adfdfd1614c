"""Several models and versions in one server: policies, labels, swaps under load, versions that do not work."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from altered import put, write
from processes import SAMPLES, SMALL, ServerProcess, run_main, serving, start_server, stop_server, until
from refusals import refusal

from export.bundle import Bundle, load_bundle
from service.__main__ import main
from service.client import Client
from service.pb import open_inference_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.faults.listed import fault
from training.steering import SteeringProfile, SteeringTerm, profiles_to_json

BAG = next((SAMPLES / "Bag").glob("*.png")).read_bytes()
POLL = ("--model-control", "poll", "--poll-seconds", "0.1")


def breaks(folder: Path) -> None:
    graph = folder / "dispatch.fp32.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])


@pytest.fixture(scope="module")
def small() -> Bundle:
    return load_bundle(SMALL / "small" / "1")


@pytest.fixture
def repository(small: Bundle, tmp_path: Path) -> Path:
    put(small, tmp_path, 1)
    return tmp_path


@pytest.fixture
def polling(repository: Path) -> Iterator[ServerProcess]:
    with serving(repository, *POLL) as running:
        yield running


def version_of(client: Client, version: str = "", model: str = "") -> str:
    return str(client.predict([BAG], model=model, version=version).receipt.version)


def index(server: ServerProcess) -> dict[tuple[str, str], tuple[str, str]]:
    with grpc.insecure_channel(server.address) as channel:
        stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        found = stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=10).models
    return {(entry.name, entry.version): (entry.state, entry.reason) for entry in found}


def ready(server: ServerProcess) -> set[tuple[str, str]]:
    return {key for key, (state, _) in index(server).items() if state == "READY"}


def statistics_of(server: ServerProcess, version: str) -> list[str]:
    """The versions with statistics."""
    with grpc.insecure_channel(server.address) as channel:
        stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        request = pb.ModelStatisticsRequest(name="fashion_mnist", version=version)
        return [found.version for found in stub.ModelStatistics(request, timeout=10).model_stats]


@fault("bundle: swap under load", "the answer of the old or of the new version, as the receipt says; no call is lost")
def test_a_new_version_takes_over_without_a_lost_or_mixed_request(
    polling: ServerProcess, repository: Path, small: Bundle, samples: dict[str, list[bytes]]
) -> None:
    with Client(polling.address) as client:
        expected = client.predict(samples["Shirt"], profile="b", top_k=5).predictions
    done, seen, problems = threading.Event(), set(), []

    def ask() -> None:
        with Client(polling.address) as client:
            while not done.is_set():
                try:
                    answer = client.predict(samples["Shirt"], profile="b", top_k=5)
                except grpc.RpcError as error:
                    problems.append(str(error))
                    continue
                seen.add(answer.receipt.version)
                for found, wanted_ in zip(answer.predictions, expected, strict=True):
                    if found.head_mask != wanted_.head_mask or found.classes[0].label != wanted_.classes[0].label:
                        problems.append("another answer")

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        for version in (2, 3):
            put(small, repository, version)
            until(lambda version=version: str(version) in seen)  # type: ignore[misc]
            time.sleep(0.3)
    finally:
        done.set()
        for thread in clients:
            thread.join()
    assert problems == []
    assert seen == {"1", "2", "3"}
    until(lambda: ready(polling) == {("fashion_mnist", "3")})
    assert index(polling)["fashion_mnist", "1"] == ("UNAVAILABLE", "not loaded")
    assert polling.count("steervit_model_info") == 1
    gauges = (
        "model_info",
        "queue_images",
        "queue_work_images",
        "queue_limit_images",
        "gated_heads",
        "profiles",
        "profile_expected_head_usage",
    )
    for name in gauges:  # counts of a retired version are retained, its descriptions are not
        lines = [line for line in polling.page().splitlines() if line.startswith(f"steervit_{name}{{")]
        assert lines
        assert all('version="3"' in line for line in lines), name


@fault(
    "bundle: version that fails to load while an older one serves",
    "the older version answers; the index has the reason; NOT_FOUND: "
    "`version of model 'fashion_mnist' is '2'; allowed: '1', or none`",
)
def test_a_version_that_does_not_work_changes_nothing_and_is_reported(
    polling: ServerProcess, repository: Path, small: Bundle
) -> None:
    part = put(small, repository, 7, "elsewhere")
    breaks(part)
    shutil.move(part, repository / "fashion_mnist" / "2")
    shutil.rmtree(repository / "elsewhere")
    key = ("fashion_mnist", "2")
    until(lambda: key in index(polling))
    state, reason = index(polling)[key]
    assert state == "UNAVAILABLE"
    assert "dispatch.fp32.onnx has 1000 bytes; the manifest says" in reason
    assert polling.count("steervit_model_load_failures_total", version="2") == 1
    with Client(polling.address) as client:
        assert version_of(client) == "1"
        assert refusal(version_of, client, "2")[1] == "version of model 'fashion_mnist' is '2'; allowed: '1', or none"
        time.sleep(0.5)
        assert polling.count("steervit_model_load_failures_total", version="2") == 1, "the same files are tried once"
        assert polling.count("steervit_model_load_failed", version="2") == 1
        shutil.rmtree(repository / "fashion_mnist" / "2")
        put(small, repository, 2)
        until(lambda: version_of(client) == "2")
        until(lambda: ready(polling) == {key})
        assert "steervit_model_load_failed{" not in polling.page()


def test_a_model_without_a_working_version_is_reported_while_its_folder_exists(
    polling: ServerProcess, repository: Path, small: Bundle
) -> None:
    part = put(small, repository / "elsewhere", 4, "other").parent
    breaks(part / "4")
    part.rename(repository / "other")
    until(lambda: polling.count("steervit_model_load_failed", model="other", version="4") == 1)
    state, reason = index(polling)["other", "4"]
    assert state == "UNAVAILABLE"
    assert "dispatch.fp32.onnx has 1000 bytes" in reason
    time.sleep(0.5)
    assert polling.count("steervit_model_load_failures_total", model="other") == 1, "the same files are tried once"
    with Client(polling.address) as client, pytest.raises(grpc.RpcError) as caught:
        version_of(client, model="other")
    assert caught.value.details() == "model is 'other'; allowed: 'fashion_mnist'"
    shutil.rmtree(repository / "other")
    until(lambda: "steervit_model_load_failed{" not in polling.page())
    assert ("other", "4") not in index(polling)


def test_labels_name_versions_and_follow_their_file(polling: ServerProcess, repository: Path, small: Bundle) -> None:
    put(small, repository, 2)
    label = partial(write, repository / "fashion_mnist" / "labels.json")
    with Client(polling.address) as client:
        until(lambda: version_of(client) == "2")
        label('{"stable": 1, "canary": 2}')
        until(lambda: version_of(client) == "1")
        assert version_of(client, "canary") == version_of(client, "2") == "2"
        assert statistics_of(polling, "") == ["1", "2"]
        assert statistics_of(polling, "canary") == ["2"]
        for wrong in ("{", '{"stable": 9}', '{"Stable!": 1}', "[1]"):
            label(wrong)
            until(lambda: polling.count("steervit_repository_last_read_successful") == 0)
            said = polling.page("readyz")
            assert said.startswith(f"OK\ndegraded, as the repository's last valid state is served: {repository}"), said
            assert version_of(client) == version_of(client, "stable") == "1"
            done = run_main(main, "--repository", str(repository), *POLL, "--port", "0", "--metrics-port", "0")
            assert (done.returncode, "labels.json" in done.stderr) == (1, True), "it would serve version 2 by default"
            label('{"stable": 1, "canary": 2}')
            until(lambda: polling.count("steervit_repository_last_read_successful") == 1)
        assert polling.page("readyz") == "OK\n"
        assert "is 'beta'; allowed: '1', '2', 'canary', 'stable', or none" in refusal(version_of, client, "beta")[1]
        label('{"stable": 2}')
        until(lambda: version_of(client) == "2")


def test_a_repository_that_disappears_is_reported_and_its_models_are_served(
    polling: ServerProcess, repository: Path
) -> None:
    with Client(polling.address) as client:
        elsewhere = repository.rename(repository.with_name("elsewhere"))
        until(lambda: polling.count("steervit_repository_last_read_successful") == 0)
        assert polling.page("readyz").endswith(f": repository is {repository}, which is not a folder\n")
        assert version_of(client) == "1"
        elsewhere.rename(repository)
        until(lambda: polling.count("steervit_repository_last_read_successful") == 1)
        assert polling.page("readyz") == "OK\n"


def test_a_problem_with_labels_is_logged_once(repository: Path, small: Bundle) -> None:
    server = start_server(repository, *POLL)
    for wrong in ('{"stable": 9}', "["):
        write(repository / "fashion_mnist" / "labels.json", wrong)
        time.sleep(0.8)
    log = [line for line in stop_server(server).splitlines() if "labels of fashion_mnist are unchanged" in line]
    assert len(log) == 2
    assert "stable is 9; allowed: one of 1" in log[0]


def test_models_come_and_go(polling: ServerProcess, repository: Path, small: Bundle) -> None:
    put(small, repository, 4, "other")
    with Client(polling.address) as client:
        until(lambda: ("other", "4") in ready(polling))
        assert version_of(client, model="other") == "4"
        assert refusal(version_of, client)[1] == "model is empty; allowed: one of 'fashion_mnist', 'other'"
        shutil.rmtree(repository / "other")
        until(lambda: set(index(polling)) == {("fashion_mnist", "1")})
        assert version_of(client) == "1"


def test_clients_load_and_unload_only_where_they_may(polling: ServerProcess, repository: Path, small: Bundle) -> None:
    load, unload = pb.RepositoryModelLoadRequest, pb.RepositoryModelUnloadRequest

    def calls(server: ServerProcess, name: str, **more: Any) -> list[tuple[str, str]]:
        found = []
        with grpc.insecure_channel(server.address) as channel:
            stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            for call, request in (
                (stub.RepositoryModelUnload, unload(model_name=name, **more)),
                (stub.RepositoryModelLoad, load(model_name=name, **more)),
            ):
                try:
                    call(request, timeout=20)
                    found.append(("OK", ""))
                except grpc.RpcError as error:
                    found.append((error.code().name, error.details()))
        return found

    sentence = "models cannot be loaded or unloaded by clients: --model-control is 'poll'; allowed: 'explicit'"
    assert calls(polling, "fashion_mnist") == [("PERMISSION_DENIED", sentence)] * 2
    with serving(repository, "--model-control", "explicit") as server, Client(server.address) as client:
        put(small, repository, 2)
        assert version_of(client) == "1"
        assert calls(server, "fashion_mnist") == [("OK", "")] * 2
        assert version_of(client) == "2"
        assert [code for code, _ in calls(server, "resnet")] == ["NOT_FOUND", "NOT_FOUND"]
        breaks(put(small, repository, 3))
        code, reason = calls(server, "fashion_mnist")[1]
        assert code == "UNAVAILABLE"
        assert "dispatch.fp32.onnx has 1000 bytes" in reason
        config = {"config": pb.ModelRepositoryParameter(string_param="{}")}
        refused = "parameter 'config' is not served; allowed: "
        assert calls(server, "fashion_mnist", parameters=config) == [
            ("INVALID_ARGUMENT", f"{refused}unload_dependents"),
            ("INVALID_ARGUMENT", f"{refused}none"),
        ]


def test_an_older_version_is_served_rather_than_none(repository: Path, small: Bundle) -> None:
    breaks(put(small, repository, 2))
    done = run_main(main, "--repository", str(repository), "--port", "0", "--metrics-port", "0")
    assert done.returncode == 1, "started once and for all, everything must work"
    assert "dispatch.fp32.onnx has 1000 bytes" in done.stderr
    with serving(repository, *POLL) as running, Client(running.address) as client:
        assert version_of(client) == "1"


def test_a_requested_version_that_is_missing_is_reported(repository: Path, small: Bundle) -> None:
    sentence = "version 7 does not exist; allowed: 1"
    for flags in (("--versions", "1,7"), ("--versions", "7", *POLL)):
        done = run_main(main, "--repository", str(repository), *flags, "--port", "0", "--metrics-port", "0")
        assert done.returncode == 1
        assert sentence in done.stderr
    with serving(repository, "--versions", "1,7", *POLL) as running:
        assert index(running)["fashion_mnist", "7"] == ("UNAVAILABLE", sentence)
        assert running.count("steervit_model_load_failed", version="7") == 1
        assert ready(running) == {("fashion_mnist", "1")}
        put(small, repository, 7)
        until(lambda: ready(running) == {("fashion_mnist", "1"), ("fashion_mnist", "7")})


def test_a_label_on_a_broken_version_moves_nobody(polling: ServerProcess, repository: Path, small: Bundle) -> None:
    label = partial(write, repository / "fashion_mnist" / "labels.json")
    put(small, repository, 2)
    label('{"stable": 1, "canary": 2}')
    until(lambda: ready(polling) == {("fashion_mnist", "1"), ("fashion_mnist", "2")})
    part = put(small, repository, 3, "elsewhere")
    breaks(part)
    shutil.move(part, repository / "fashion_mnist" / "3")
    label('{"stable": 3, "canary": 2}')
    with Client(polling.address) as client:
        until(lambda: index(polling).get(("fashion_mnist", "3"), ("", ""))[0] == "UNAVAILABLE")
        time.sleep(0.5)
        assert [version_of(client, version) for version in ("", "stable", "canary")] == ["1", "1", "2"]
        shutil.rmtree(repository / "fashion_mnist" / "3")
        put(small, repository, 3)
        until(lambda: version_of(client) == "3")
        until(lambda: ready(polling) == {("fashion_mnist", "2"), ("fashion_mnist", "3")})


@fault(
    "bundle: unload in use",
    "a client that gives up waiting for it gets DEADLINE_EXCEEDED; the change is carried through: the model serves, "
    "or is gone and its memory with it",
)
def test_a_change_continues_when_the_client_that_requested_it_disconnects(
    bundle: Bundle, tmp_path: Path, samples: dict[str, list[bytes]]
) -> None:
    put(bundle, tmp_path, 1)
    info = "steervit_model_info{"
    flags = ("--model-control", "explicit", "--max-images", "2000", "--max-queue", "2000")
    with (
        serving(tmp_path, *flags) as running,
        grpc.insecure_channel(running.address) as channel,
        Client(running.address) as client,
    ):
        stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        images = [image for of_label in samples.values() for image in of_label] * 8  # most of a second
        for call, change, after in (
            (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="fashion_mnist"), False),
            (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="fashion_mnist"), True),
        ):
            busy = threading.Thread(target=client.predict, args=(images,)) if not after else None
            if busy:
                busy.start()
                until(lambda: running.count("steervit_requests_in_flight") > 0)
            assert refusal(call, change, timeout=0.05)[0] == "DEADLINE_EXCEEDED"
            until(lambda after=after: (ready(running) == {("fashion_mnist", "1")}) is after)
            until(lambda after=after: (info in running.page()) is after)
            if busy:
                busy.join()
        assert version_of(client) == "1"


def test_a_new_version_has_the_profiles_of_the_folder_and_explains_from_memory(
    repository: Path, small: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    profiles = tmp_path_factory.mktemp("profiles")
    made_for = {"gates_sae_digest": small.manifest.gates_sae_digest}
    night = SteeringProfile("night", ("Bag",), "by hand", {1: (SteeringTerm(7, 0.0, 40.0),)})
    (profiles / "night.json").write_text(json.dumps({**profiles_to_json([night]), **made_for}))
    flags = (*POLL, "--profiles-dir", str(profiles))
    with serving(repository, *flags) as running, Client(running.address) as client:
        folder = put(small, repository, 2)
        until(lambda: version_of(client) == "2")
        assert "night" in {profile.name for profile in client.profiles()}
        before = client.explain([BAG], profile="night")
        (folder / "sae.safetensors").write_bytes(bytes(1000))
        until(lambda: index(running)["fashion_mnist", "2"][1] != "")
        assert client.explain([BAG], profile="night").explanations == before.explanations


def test_a_folder_that_is_not_what_its_name_says_is_refused(repository: Path) -> None:
    (repository / "fashion_mnist" / "1").rename(repository / "fashion_mnist" / "2")
    done = run_main(main, "--repository", str(repository), "--port", "0", "--metrics-port", "0")
    assert done.returncode == 1
    assert "the manifest says 'fashion_mnist' version 1; allowed: 'fashion_mnist' version 2" in done.stderr
