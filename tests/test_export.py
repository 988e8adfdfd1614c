"""python -m export on a run that was trained here: every kind of graph, compact bundles, and which one the server
uses."""

import asyncio
import json
import math
import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from processes import COMMITTED, MODELS, run_main, serving
from torch import nn

from export.__main__ import main as export_main
from export.builder import Builder, save, weight_bytes
from export.bundle import INPUTS, Bundle, BundleError, FileEntry, Manifest, load_bundle
from export.rebuild import rebuild
from export.session import inputs_of, open_session, run_onnx
from export.write import _named
from service.batcher import Batcher, BatchStats
from service.client import Client
from service.engine import Engine, choose_graph
from service.loaded import EngineError
from service.pb import steering_pb2 as pb
from service.steering import resolve
from training.config import VitSettings
from training.model import macs
from training.presets import PRESETS
from training.steering import NEUTRAL, SteeringProfile, digest, profiles_from_json, to_arrays


@pytest.mark.slow
def test_every_graph_of_a_bundle_serves_the_same_answers(smoke_models: Path, sample_pixels: NDArray[np.uint8]) -> None:
    bundle = load_bundle(smoke_models / "smoke" / "1")
    names = [f"{graph.attention}.{graph.precision}" for graph in bundle.manifest.graphs]
    assert names == [
        *("dispatch.fp32", "masked.fp32", "fused.fp32", "dispatch.int8", "masked.int8", "masked.fp16", "fused.fp16")
    ]
    profile = bundle.profiles["Shirt"]
    rows = to_arrays([profile.terms if i % 2 else {} for i in range(100)], len(bundle.manifest.sites))
    found = {name: Engine(bundle, "cpu", 1, name).run(sample_pixels, rows) for name in names}
    expected = found["masked.fp32"]
    assert 0.1 < expected.head_gate.mean() < 0.9
    for name in ("dispatch.fp32", "fused.fp32"):
        np.testing.assert_allclose(found[name].logits, expected.logits, atol=1e-4)
        np.testing.assert_array_equal(found[name].head_gate, expected.head_gate)
    shares = {"dispatch.int8": 0.98, "masked.int8": 0.98, "masked.fp16": 0.995, "fused.fp16": 0.995}
    for name, share in shares.items():
        assert (found[name].head_gate == expected.head_gate).mean() >= share, name
        assert (found[name].logits.argmax(1) == expected.logits.argmax(1)).mean() >= 0.97, name
    for graph in bundle.manifest.graphs:
        seen = graph.certificate
        assert seen["accuracy"] >= seen["accuracy_of_model"] - 5e-3
        assert seen["flipped_gates"] <= 0.02 * seen["gates"]
        assert seen["batch_sizes"] == [1, 7, 64]
    done = run_main(export_main, "verify", str(bundle.folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("golden rows within") == len(names) + 2


@pytest.mark.slow
async def test_a_graph_for_one_profile_answers_for_its_batches(
    smoke_models: Path, sample_pixels: NDArray[np.uint8]
) -> None:
    """As on a GPU: the graph omits heads that the profile does not use, and the others answer as in the general graph.
    In any mix of calls, each gets the answer that it gets alone."""
    bundle = load_bundle(smoke_models / "smoke" / "1")
    entries = bundle.manifest.specialised
    assert [(entry.profile, entry.precision) for entry in entries] == [("Shirt", "fp16"), ("Bag", "fp16")]
    engine = Engine(bundle, "cpu", 1, "fused.fp32", max_batch=16, bounded=True, specialised=True)
    assert set(engine.specialised) == {digest(bundle.profiles[name].terms) for name in ("Shirt", "Bag")}
    sites = len(bundle.manifest.sites)
    some_removed = np.False_
    for entry in entries:
        removed = np.array([[head not in kept for head in range(bundle.manifest.heads)] for kept in entry.kept])
        some_removed |= removed.any()
        arrays = to_arrays([bundle.profiles[entry.profile].terms] * 100, sites)
        general = engine.run(sample_pixels, arrays)
        own = engine.run(sample_pixels, arrays, digest=entry.digest)
        assert not own.head_gate[:, removed].any()
        clear = (np.abs(general.gate_logit) > 0.1).all((1, 2)) & ~general.head_gate[:, removed].any(1)
        assert clear.sum() > 5, entry.profile
        np.testing.assert_array_equal(own.head_gate[clear], general.head_gate[clear])
        np.testing.assert_allclose(own.logits[clear], general.logits[clear], atol=0.05)
        assert (own.macs[clear] == general.macs[clear]).all()
        assert engine.seconds(16, entry.digest) > 0
    assert some_removed
    names = ["", "Shirt", "Bag", "Coat"]
    asked = [resolve(bundle, names[index % 4], NEUTRAL, 1.0) for index in range(40)]
    batches: list[BatchStats] = []
    batcher = Batcher([engine], 16, 0.01, 100, batches.append, lambda *_: None, "t", specialists=engine)
    calls = [
        batcher.submit(sample_pixels[i : i + 1], steering, math.inf, residual=i % 8 == 1)
        for i, steering in enumerate(asked)
    ]
    answers = await asyncio.gather(*calls)
    batcher.close()
    assert len(batches) < len(asked)
    for index, (steering, answer) in enumerate(zip(asked, answers, strict=True)):
        with_residual = index % 8 == 1
        assert (answer.outputs.residual is not None) or not with_residual
        alone = [
            engine.run(sample_pixels[index : index + 1], steering.arrays, digest=which)
            for which in ("", *([steering.digest] if not with_residual else []))
        ]
        apart = [float(np.abs(answer.outputs.logits - one.logits).max()) for one in alone]
        assert min(apart) < 0.01, (index, apart)


@pytest.mark.slow
def test_a_server_runs_a_profiles_own_graph_and_counts_its_images(
    smoke_models: Path, sample_pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    shutil.copytree(smoke_models / "smoke", tmp_path / "smoke")
    images, flags = list(sample_pixels[:8]), ("--specialised", "on", "--graph", "fused.fp32")
    with serving(tmp_path, *flags) as running, Client(running.address) as client:
        own, twice = client.predict(images, profile="Shirt"), client.predict(images, profile="Shirt", strength=2.0)
        client.predict(images)
        described = client._stub.GetModel(pb.GetModelRequest())
        assert client.explain(images[:1], profile="Shirt").receipt.profile == "Shirt"
        assert running.count("steervit_specialised_images_total") == 8
    assert list(described.specialised_profiles) == ["Shirt", "Bag"]
    assert not described.cuda_graph_batches
    assert own.receipt.steering_digest != twice.receipt.steering_digest


def test_specialised_graphs_are_for_the_terms_that_they_were_made_with(bundle: Bundle) -> None:
    entry = {
        "file": "specialised-0.fp16.onnx", "precision": "fp16", "profile": "Shirt", "digest": "0" * 16,
        "kept": [[0, 5]] * 5, "threshold": 0.01, "before": {}, "after": {}, "certificate": {},
    }  # fmt: skip
    value = bundle.manifest.to_json()
    assert "specialised" not in value, "a bundle without them is written as before"
    files = {**value["files"], entry["file"]: {"sha256": "", "size": 1}}
    read = Manifest.from_json({**value, "files": files, "specialised": [entry]})
    assert read.specialised[0].kept == ((0, 5),) * 5
    assert Manifest.from_json(json.loads(json.dumps(read.to_json()))) == read
    for change, message in (
        ({"kept": [[0, 99]] * 5}, "specialised.kept"),
        ({"file": "other.onnx"}, "specialised.file is 'other.onnx'; allowed: specialised-0.fp16.onnx"),
        ({"precision": "fp8"}, "specialised[0].precision is 'fp8'"),
    ):
        with pytest.raises(BundleError, match=re.escape(message)):
            Manifest.from_json({**value, "files": files, "specialised": [{**entry, **change}]})
    with pytest.raises(BundleError, match="allowed: a list with specialised-0"):
        Manifest.from_json({**value, "specialised": [entry]})


@pytest.mark.slow
def test_a_compact_bundle_is_a_bundle_of_its_own(
    smoke_run: Path, smoke_models: Path, sample_pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    whole = load_bundle(smoke_models / "smoke" / "1")
    # a profile under which some heads are hardly used, and some are
    profiles = json.loads((smoke_run / "results.json").read_text())["profiles"]
    usage = {profile["name"]: np.array(profile["head_usage_after"]) for profile in profiles}
    name = next(name for name, of_heads in usage.items() if of_heads.min() < 0.1 and of_heads.max() > 0.3)
    flags = ("--compact-for", name, "--compact-threshold", "0.2", "--verify-images", "12")
    done = run_main(export_main, str(smoke_run), str(tmp_path), "--name", "compact", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "units removed (kept by < 20.0%)" in done.stdout
    bundle = load_bundle(tmp_path / "compact" / "1")
    made = bundle.manifest.compact
    assert made is not None
    assert list(bundle.profiles) == [made["profile"]] == [name]
    assert bundle.manifest.gates_sae_digest != whole.manifest.gates_sae_digest
    assert [graph.attention for graph in bundle.manifest.graphs] == ["dispatch", "compact"]
    removed = np.array([[h not in kept for h in range(bundle.manifest.heads)] for kept in made["kept"]])
    assert removed.any()
    outputs = Engine(bundle, "cpu", 1).run(sample_pixels, to_arrays([bundle.profiles[name].terms] * 100, 2))
    assert not outputs.head_gate[:, removed].any()
    assert outputs.head_gate[:, ~removed].any()
    assert made["after"]["head_usage"] <= made["before"]["head_usage"]
    assert whole.manifest.macs == bundle.manifest.macs  # closed heads are counted as closed, of the same whole
    done = run_main(export_main, str(smoke_run), str(tmp_path), "--name", "x", "--compact-for", "-rf")
    assert done.returncode == 1
    assert "--compact-for is '-rf'; allowed: 'T-shirt', 'Trouser'" in done.stderr
    assert not (tmp_path / "x").exists()


def test_warnings_of_a_run_are_shown_at_export_and_by_the_server(
    smoke_run: Path, smoke_models: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(smoke_models / "smoke", models / "smoke")
    assert "warnings" not in load_bundle(models / "smoke" / "1").manifest.evaluation
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    for name, keys, value in (
        ("vit.json", ("result", "selection", "head_usage"), 1.0),
        ("sae.json", ("result", "fidelity", 0, "fvu"), 19.0),
        ("results.json", ("neutral", "accuracy"), 0.11),
    ):
        changed = whole = json.loads((run / name).read_text())
        for key in keys[:-1]:
            changed = changed[key]
        changed[keys[-1]] = value
        (run / name).write_text(json.dumps(whole))
    flags = ("--attention", "masked", "--verify-images", "2", "--accuracy-images", "50")
    done = run_main(export_main, str(run), str(models), "--name", "untrained", *flags)
    assert done.returncode == 0, done.stderr
    warnings = load_bundle(models / "untrained" / "1").manifest.evaluation["warnings"]
    assert [warning.partition(",")[0].partition(";")[0] for warning in warnings] == [
        "head usage is 1.0000",
        "an autoencoder leaves a fraction of variance unexplained of 19.0000",
        "accuracy is 0.1100 on the test images",
    ]
    assert all(f"export: warning: {warning}\n" in done.stderr for warning in warnings)
    with (tmp_path / "log").open("w") as log, serving(models, stderr=log):
        pass
    logged = (tmp_path / "log").read_text()
    assert all(f"model untrained version 1: {warning}\n" in logged for warning in warnings)
    assert logged.count("WARNING") == len(warnings)


def test_an_evaluation_of_other_terms_is_not_joined_to_a_profile(smoke_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    results = json.loads((run / "results.json").read_text())
    terms = {p.name: p.terms for p in profiles_from_json(json.loads((run / "profiles.json").read_text()))}

    def export(digests: dict[str, str]) -> str:
        """The error of an export for a missing profile, which is checked after the evaluations."""
        for entry in results["profiles"]:
            entry["digest"] = digests[entry["name"]]
        (run / "results.json").write_text(json.dumps(results))
        done = run_main(export_main, str(run), str(tmp_path / "models"), "--name", "x", "--compact-for", "Hat")
        assert done.returncode == 1
        return done.stderr

    right = {name: digest(of_profile) for name, of_profile in terms.items()}
    assert "--compact-for is 'Hat'" in export(right)
    said = export({**right, "Coat": right["Bag"]})
    assert f"measured other terms of profile 'Coat': digest is '{right['Bag']}'; allowed: '{right['Coat']}'" in said
    assert "evaluate again" in said
    results["profiles"] = [entry for entry in results["profiles"] if entry["name"] != "Bag"]
    assert "results.json has no profile 'Bag': evaluate again" in export(right)


@pytest.mark.parametrize("name", ["caf\xe9", "\uac00", "\u1e69"])
def test_a_compact_bundle_finds_its_profile_in_either_unicode_form(name: str) -> None:
    profile = SteeringProfile(name, (name,), "by hand", {})
    assert _named([profile], unicodedata.normalize("NFD", name)) is _named([profile], name) is profile


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--precision", "fp8"), "'fp8'; allowed: some of fp32,int8,fp16, each once"),
        (("--attention", "masked,masked"), "'masked,masked'; allowed: some of dispatch,masked,fused, each once"),
        (("--verify-images", "0"), "argument --verify-images: '0'; allowed: a number of images, 1 or more"),
        (("--accuracy-images=-5",), "argument --accuracy-images: '-5'; allowed: a number of images, 1 or more"),
        (("--compact-threshold", "nan"), "argument --compact-threshold: 'nan'; allowed: 0 to 1"),
        (("--compact-threshold", "1.5"), "argument --compact-threshold: '1.5'; allowed: 0 to 1"),
    ],
)
def test_unusable_flags_are_refused_before_anything_is_done(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    done = run_main(export_main, str(tmp_path), str(tmp_path / "models"), "--name", "x", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--name", "../x"), "name is '../x'; allowed: [A-Za-z0-9]"),
        (
            ("--name", "x", "--attention", "fused", "--precision", "int8"),
            "--precision is int8 with --attention fused; allowed with fused: fp32 or fp16 too, or --attention dispatch",
        ),
        (("--name", "x", "--version", "0"), "version is 0; allowed: a positive integer"),
        (
            ("--name", "fashion_mnist", "--version", COMMITTED.name),
            f"{COMMITTED} already exists; allowed: another version",
        ),
    ],
)
def test_names_versions_and_graphs_are_refused_before_the_run_is_read(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    done = run_main(export_main, str(tmp_path / "no-run"), str(MODELS), *flags)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_repository_that_cannot_be_written_is_refused_before_the_run_is_read(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    done = run_main(export_main, str(tmp_path / "no-run"), str(tmp_path / "models"), "--name", "x")
    assert done.returncode == 1
    assert f"x/1 cannot be written: {tmp_path / 'models'} is not a folder that may be changed" in done.stderr


def test_weights_count_in_every_storage() -> None:
    def size(*weights: onnx.TensorProto) -> int:
        return weight_bytes(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], weights)))

    raw = onnx.numpy_helper.from_array(np.ones((2, 3), np.float16), "raw")
    typed = onnx.helper.make_tensor("typed", onnx.TensorProto.INT64, [5], range(5))
    assert size(raw, typed) == 2 * 6 + 8 * 5
    onnx.external_data_helper.set_external_data(raw, "beside.data")
    assert size(raw, typed) == 8 * 5


def test_a_name_of_a_graph_is_given_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    for first in ("part", "part/0.weight"):
        g = Builder()
        g.weight(first, np.ones(3))
        with pytest.raises(ValueError, match=f"the name {first} is taken"):
            g.call(module, "x", torch.zeros(2, 3), "part", module)


def test_weights_of_a_large_model_lie_beside_it(bundle: Bundle, tmp_path: Path) -> None:
    """As for models over 2 GB, with a lower limit."""
    model = onnx.load(bundle.folder / bundle.manifest.graphs[0].file)
    size, path = weight_bytes(model), tmp_path / "dispatch.fp32.onnx"
    assert save(model, path, external_from=1_000_000) == [path, tmp_path / "dispatch.fp32.onnx.data"]
    assert path.stat().st_size < 0.1 * size
    assert (tmp_path / "dispatch.fp32.onnx.data").stat().st_size > 0.9 * size
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    rest = {name: (bundle.folder / name).read_bytes() for name in manifest["files"] if not name.endswith(".onnx")}
    for name, content in rest.items():
        (tmp_path / name).write_bytes(content)
    beside = {"dispatch.fp32.onnx.data": FileEntry("", 0)}
    manifest_ = replace(bundle.manifest, files={**bundle.manifest.files, **beside})
    moved = Bundle(tmp_path, manifest_, bundle.profiles, bundle.digest)
    assert Engine(moved, "cpu", 1).graph_name == "dispatch.fp32"  # its golden rows are right


def test_a_bundles_model_comes_back_in_pytorch(bundle: Bundle, sample_pixels: NDArray[np.uint8]) -> None:
    settings = VitSettings(**PRESETS["fashion-mnist"]["vit"])
    _, steered = rebuild(bundle.folder, settings)
    counted = macs.count(steered.model)
    assert (counted.dense, counted.per_head) == (bundle.manifest.macs.dense, bundle.manifest.macs.per_head)
    names = list(bundle.profiles)
    rows = inputs_of(sample_pixels, [bundle.profiles[names[i % len(names)]].terms for i in range(100)], 5)
    expected = run_onnx(open_session(bundle.folder / "dispatch.fp32.onnx", "dispatch"), rows)
    logits, head_gate, *_ = steered(*(torch.from_numpy(rows[name]) for name in INPUTS))
    np.testing.assert_array_equal(head_gate.numpy(), expected["head_gate"])
    np.testing.assert_allclose(logits.numpy(), expected["logits"], rtol=0, atol=1e-4)
    with pytest.raises(BundleError, match=r"dispatch\.fp32\.onnx does not fit the settings of its model: .*mlp\.fc1"):
        rebuild(bundle.folder, settings.model_copy(update={"mlp_ratio": 4}))


def test_the_server_takes_the_default_graph_and_another_one_on_a_gpu(bundle: Bundle) -> None:

    def choice(provider: str, name: str, *graphs: str) -> str:
        made = [
            replace(bundle.manifest.graphs[0], attention=g.split(".")[0], precision=g.split(".")[1]) for g in graphs
        ]
        chosen = choose_graph(replace(bundle, manifest=replace(bundle.manifest, graphs=tuple(made))), provider, name)
        return f"{chosen.attention}.{chosen.precision}"

    assert choice("cpu", "auto", "dispatch.fp32", "masked.fp32") == "dispatch.fp32"
    assert choice("cuda", "auto", "dispatch.fp32", "masked.int8", "masked.fp32", "masked.fp16") == "masked.fp16"
    assert choice("cuda", "auto", "masked.fp16", "fused.fp32", "fused.fp16") == "fused.fp16"
    assert choice("cuda", "auto", "masked.fp16", "fused.fp32") == "fused.fp32"
    assert choice("cuda", "auto", "dispatch.fp32", "compact.fp32") == "compact.fp32"
    assert choice("cuda", "auto", "dispatch.fp32") == "dispatch.fp32"
    assert choice("cuda", "dispatch.fp32", "masked.fp32", "dispatch.fp32") == "dispatch.fp32"
    with pytest.raises(EngineError, match=r"graph is 'masked.int8'; .* has: dispatch.fp32, masked.fp32"):
        choice("cpu", "masked.int8", "dispatch.fp32", "masked.fp32")


def test_batches_of_bounded_shapes_give_the_same_answers(bundle: Bundle, sample_pixels: NDArray[np.uint8]) -> None:
    """As on a GPU, where each new shape costs time."""
    plain, bounded = Engine(bundle, "cpu", 1), Engine(bundle, "cpu", 1, max_batch=8, bounded=True)
    profile = bundle.profiles["Shirt"]
    for count in (1, 3, 8, 11):
        rows = to_arrays([profile.terms if i % 2 else {} for i in range(count)], len(bundle.manifest.sites))
        expected, found = (engine.run(sample_pixels[:count], rows, residual=True) for engine in (plain, bounded))
        np.testing.assert_array_equal(found.head_gate, expected.head_gate)
        np.testing.assert_allclose(found.logits, expected.logits, atol=2e-4)
        assert found.residual is not None
        assert found.residual.shape == (count, 5, 192)
