"""Any manifest, profile file or golden.npz is either used or refused with the reason.

Each file is a valid one with something replaced anywhere, and goes through a server that must keep answering.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import PREDICT, Live
from processes import SAMPLES, SMALL, ServerProcess, serving, until

from export.bundle import Bundle, BundleError, load_bundle
from service.client import Client
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb
from training.steering import SteeringError, profiles_from_json, profiles_to_json

BAG = next((SAMPLES / "Bag").glob("*.png"))
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 600), st.floats(),
    st.sampled_from([10**400, 2**63, -1, 1e400]), st.text(max_size=8),
    st.sampled_from(["", "\0", "\ud800", "../x", "é" * 300, "0", "00", " 1"]),
)  # fmt: skip
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """Valid JSON in which one or two things were replaced, taken out or doubled."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 2))):
        place, last = [value], 0  # so that the whole of it can be replaced too
        while True:
            inner = place[last]
            if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 5)) == 0:
                break
            place, last = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        match draw(st.sampled_from(["replace", "replace", "remove", "double"])):
            case "remove" if isinstance(place, dict):
                del place[last]
            case "double" if isinstance(place, list):
                place.append(copy.deepcopy(place[last]))
            case _:
                place[last] = draw(JUNK)
    return value


def three(bundle: Bundle) -> Any:
    """The bundle's profile as three of a file in the profile folder."""
    value = profiles_to_json([replace(bundle.profiles["b"], name=f"my {number}") for number in range(3)])
    return {**value, "gates_sae_digest": bundle.manifest.gates_sae_digest}


def put(bundle: Bundle, folder: Path, manifest: Any, **files: bytes) -> None:
    """Write a bundle that appears under its name only when complete. files: contents in place of the bundle's own."""
    part = folder.parent / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in bundle.manifest.files:
        os.link(bundle.folder / name, part / name)
    for name, content in files.items():
        (part / name).unlink()
        (part / name).write_bytes(content)
    (part / "manifest.json").write_bytes(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small one, in a place of which links can be made."""
    return load_bundle(Path(shutil.copytree(SMALL / "small", tmp_path_factory.mktemp("bundles") / "small")) / "1")


@pytest.fixture(scope="module")
def loading(mine: Bundle) -> Iterator[Live]:
    """A server whose clients may load models."""
    with serving(mine.folder.parent.parent, "--model-control", "explicit", "--versions", "all") as running:
        yield Live(running.address, BAG, "b")
        assert running.count("steervit_requests_total", code="INTERNAL") == 0


def manifest_of(bundle: Bundle) -> Any:
    return json.loads((bundle.folder / "manifest.json").read_bytes()) | {"version": 2}


def tried(loading: Live, mine: Bundle, manifest: Any, **files: bytes) -> None:
    """Version 2 is this one; version 1 keeps serving, and remains the default of the valid request."""
    put(mine, mine.folder.parent / "2", manifest, **files)
    (mine.folder.parent / "labels.json").write_text('{"stable": 1}')
    said = loading.send(LOAD, oi.RepositoryModelLoadRequest(model_name="small"))
    if said.status == "OK":
        steering = pb.Steering(profile="b")
        image = pb.Image(encoded=BAG.read_bytes())
        for call in ("Predict", "Explain"):
            request = pb.PredictRequest(version="2", images=[image], steering=steering)
            said = loading.send(PREDICT.replace("Predict", call), request)
            assert said.status in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"), said
    else:
        assert said.status == "UNAVAILABLE"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_manifest_is_loaded_or_refused_while_the_other_version_serves(
    loading: Live, mine: Bundle, data: st.DataObject
) -> None:
    tried(loading, mine, data.draw(changed(manifest_of(mine))))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b'{"heads": 1e999}', b"9" * 9000])
def test_what_is_hardly_json_is_refused(loading: Live, mine: Bundle, content: bytes) -> None:
    tried(loading, mine, content)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_golden_rows_are_run_or_refused(loading: Live, mine: Bundle, data: st.DataObject) -> None:
    content = (mine.folder / "golden.npz").read_bytes()
    arrays = dict(np.load(mine.folder / "golden.npz", allow_pickle=False))
    match data.draw(st.sampled_from(["cut", "replaced", "left out"])):
        case "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        case how:
            name = data.draw(st.sampled_from(sorted(arrays)))
            del arrays[name]
            if how == "replaced":
                arrays[name] = np.zeros(
                    data.draw(st.lists(st.integers(0, 3), max_size=4)), data.draw(st.sampled_from("fiU?"))
                )
            path = mine.folder.parent / "golden.npz"
            np.savez(path, **arrays)
            content = path.read_bytes()
            path.unlink()
    manifest = manifest_of(mine)
    manifest["files"]["golden.npz"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    tried(loading, mine, manifest, **{"golden.npz": content})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_manifest_is_a_bundle_or_a_bundle_error(mine: Bundle, data: st.DataObject) -> None:
    put(mine, mine.folder.parent / "3", data.draw(changed(manifest_of(mine))))
    try:
        found = load_bundle(mine.folder.parent / "3")
    except BundleError:
        return
    finally:
        shutil.rmtree(mine.folder.parent / "3")
    m = found.manifest
    assert m.macs.dense >= m.heads * sum(m.macs.per_head) + m.mlp_groups * sum(m.macs.per_mlp_group)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_profiles_are_profiles_or_a_steering_error(mine: Bundle, data: st.DataObject) -> None:
    try:
        profiles = profiles_from_json(json.loads(json.dumps(data.draw(changed(three(mine))))))
    except SteeringError:
        return
    assert profiles_from_json(json.loads(json.dumps(profiles_to_json(profiles)))) == profiles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def following(mine: Bundle, folder: Path) -> Iterator[tuple[ServerProcess, Live]]:
    """A server that follows the folder of profiles."""
    with serving(mine.folder, "--profiles-dir", str(folder), "--poll-seconds", "0.05") as running:
        yield running, Live(running.address, BAG, "b")


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_profile_file_is_followed_or_refused_and_all_can_be_listed_and_used(
    following: tuple[ServerProcess, Live], folder: Path, mine: Bundle, data: st.DataObject
) -> None:
    server, live = following
    before = server.count("steervit_profile_reads_total")
    text = json.dumps(data.draw(changed(three(mine)))) + " " * int(before)  # always another content
    (folder / "part").write_text(text)
    (folder / "part").rename(folder / "profiles.json")
    until(lambda: server.count("steervit_profile_reads_total") > before)
    with Client(server.address) as client:
        names = [profile.name for profile in client.profiles()]
        assert {*mine.profiles} <= {*names}
        for name in {*names} - {*mine.profiles}:
            assert live.send(PREDICT, pb.PredictRequest(
                images=[pb.Image(encoded=BAG.read_bytes())], steering=pb.Steering(profile=name)
            )).status == "OK"  # fmt: skip
        assert "steervit_profiles{" in server.page(), "the metrics can carry every name"


def test_a_profile_in_use_may_be_taken_away(following: tuple[ServerProcess, Live], folder: Path, mine: Bundle) -> None:
    """Calls accepted under a profile are answered, whatever the folder contains by then."""
    server, live = following
    given_, none = json.dumps(three(mine)), json.dumps({**three(mine), "profiles": []})
    image = pb.Image(encoded=BAG.read_bytes())
    asked = pb.PredictRequest(images=[image] * 100, steering=pb.Steering(profile="my 0"))

    def write(text: str) -> None:
        before = server.count("steervit_profile_reads_total")
        (folder / "part").write_text(text)
        (folder / "part").rename(folder / "profiles.json")
        until(lambda: server.count("steervit_profile_reads_total") > before)

    predict = live.channel.unary_unary(PREDICT)
    for _ in range(3):
        write(given_)
        calls = [predict.future(asked.SerializeToString(), timeout=30) for _ in range(6)]
        write(none)
        assert {call.code().name for call in calls} <= {"OK", "NOT_FOUND"}
    assert server.count("steervit_requests_total", code="INTERNAL") == 0
