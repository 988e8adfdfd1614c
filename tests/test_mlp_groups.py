"""MLP groups and gate biases in every kind of graph, against PyTorch, and against MLPs without the closed groups."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import ROOT, until
from safetensors.torch import load_file
from small_models import SPEC, STEERED, assert_same, images, of_kind, rows, source_of

from export import write
from export.bundle import GATE_BIAS, INPUTS, MLP_GATE, OUTPUTS
from export.calibration import calibrate
from export.certify import GateMismatch, Reference, run_torch
from export.compact import compact
from export.graph import SteeredVit, build
from export.precision import Int8
from export.rebuild import _state
from export.session import Arrays, open_session, run_onnx
from export.write import ExportSettings
from training.__main__ import main
from training.checkpoint import Run, Stored
from training.config import VitSettings
from training.data.splits import Split
from training.dial import Dial, Point, check_curve
from training.evaluation.protocol import STATE
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.gated_vit import GatedVit, keep_positive
from training.model.inference import answers, steered_by
from training.model.sae import Sae
from training.steering import SteeringProfile

pytestmark = pytest.mark.slow

KINDS = ("masked", "dispatch", "fused")
UNITS = 3 + 4


def biased(count: int, seed: int = 0, spread: float = 3.0) -> Arrays:
    """Inputs with steering in every second row and a bias for every gate."""
    drawn = np.random.default_rng(seed).normal(0, spread, (count, 2, UNITS)).astype(np.float32)
    return {**rows(count, seed), GATE_BIAS: drawn}


@pytest.fixture(scope="module")
def steered() -> SteeredVit:
    return of_kind("plain", 4)


@pytest.fixture(scope="module")
def sessions(steered: SteeredVit) -> dict[str, onnxruntime.InferenceSession]:
    graphs = {kind: build(steered, SPEC, kind, {}, gate_bias=True) for kind in KINDS}
    return {kind: open_session(graph.SerializeToString(), kind, 1) for kind, graph in graphs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_has_the_gates_and_the_biases_of_both_kinds_of_units(kind: str, steered: SteeredVit) -> None:
    graph = build(steered, SPEC, kind, {}, gate_bias=True).graph
    assert [entry.name for entry in graph.input] == [*INPUTS, GATE_BIAS]
    assert [entry.name for entry in graph.output] == [*OUTPUTS, MLP_GATE]
    assert [entry.name for entry in build(steered, SPEC, kind, {}).graph.input] == list(INPUTS)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 13), seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1.0, 3.0, 8.0, 1e6]))
def test_any_batch_and_any_biases(
    steered: SteeredVit, sessions: dict[str, onnxruntime.InferenceSession], batch: int, seed: int, spread: float
) -> None:
    """Biases of a million close or open every unit."""
    inputs = biased(batch, seed, spread)
    expected = run_torch(steered, inputs)
    clear = (np.abs(expected["gate_logit"]) > 1e-3).all((1, 2))
    for session in sessions.values():
        outputs = run_onnx(session, inputs)
        assert_same(*({name: value[clear] for name, value in answer.items()} for answer in (outputs, expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_bias_is_a_bias_of_zero_to_the_bit(
    kind: str, steered: SteeredVit, sessions: dict[str, onnxruntime.InferenceSession]
) -> None:
    without = open_session(build(steered, SPEC, kind, {}).SerializeToString(), kind, 1)
    inputs = biased(9, spread=0.0)
    biased_by_zero = run_onnx(sessions[kind], inputs)
    for name, value in run_onnx(without, inputs).items():
        np.testing.assert_array_equal(value, biased_by_zero[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_group_is_the_same_as_one_that_is_not_in_the_graph(
    kind: str, steered: SteeredVit, sessions: dict[str, onnxruntime.InferenceSession]
) -> None:
    """Heads and groups; also a block without groups and one without heads."""
    kept = ((0, 2), (4, 6))
    inputs = biased(9)
    for site, units in enumerate(kept):
        inputs[GATE_BIAS][:, site, [unit for unit in range(UNITS) if unit not in units]] = -100
    expected = run_onnx(sessions[kind], inputs)
    assert 0 < expected["head_gate"].mean() < 0.5
    graph = build(steered, SPEC, kind, {}, kept=kept, gate_bias=True)
    outputs = run_onnx(open_session(graph.SerializeToString(), kind, 1), inputs)
    assert np.abs(outputs["logits"] - expected["logits"]).max() < 2e-5
    present = np.zeros((2, UNITS), bool)
    for site, units in enumerate(kept):
        present[site, list(units)] = True
    np.testing.assert_array_equal(outputs["gate_logit"][:, present], expected["gate_logit"][:, present])
    np.testing.assert_array_equal(outputs[MLP_GATE], expected[MLP_GATE])
    smaller = sum(weight.ByteSize() for weight in graph.graph.initializer)
    assert smaller < 0.8 * sum(w.ByteSize() for w in build(steered, SPEC, kind, {}).graph.initializer)


def test_a_closed_group_is_not_computed(steered: SteeredVit) -> None:
    """Shown by the graph: the hidden neurons of a group are computed only for its open images."""
    model = build(steered, SPEC, "dispatch", {}, gate_bias=True)
    names = [f"block{block}/mlp/group{group}/gelu" for block in (1, 2) for group in range(4)]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    session = open_session(model.SerializeToString(), "dispatch")
    gate, *hidden = session.run([MLP_GATE, *names], biased(11))
    assert [len(of_group) for of_group in hidden] == gate.sum(0).flatten().tolist()
    assert {of_group.shape[1:] for of_group in hidden} == {(17, 24), (1, 24)}, "of 96 hidden neurons"


@pytest.mark.parametrize("kind", ["masked", "dispatch"])
def test_int8_stays_close_with_groups_and_biases(kind: str, steered: SteeredVit) -> None:
    inputs = biased(64)
    graph = build(steered, SPEC, kind, {}, Int8(calibrate(steered, SPEC, [rows(64)])), gate_bias=True)
    outputs = run_onnx(open_session(graph.SerializeToString(), kind), inputs)
    expected = run_torch(steered, inputs)
    agree = [(outputs[name] == expected[name]).all((1, 2)) for name in ("head_gate", MLP_GATE)]
    alike = agree[0] & agree[1]
    assert alike.mean() > 0.6
    assert np.abs(outputs["logits"] - expected["logits"])[alike].max() < 0.25 * expected["logits"].std()


@pytest.mark.parametrize("kind", ["distilled", "registers and layer scale", "pre-norm without biases"])
def test_a_distilled_model_and_layer_scale_have_groups_too(kind: str) -> None:
    steered = of_kind(kind, 4)
    for attention in KINDS:
        session = open_session(build(steered, SPEC, attention, {}, gate_bias=True).SerializeToString(), attention, 1)
        assert_same(run_onnx(session, biased(5)), run_torch(steered, biased(5)))


def test_a_compact_model_has_the_units_that_its_profile_opens(steered: SteeredVit) -> None:
    """Units of both kinds. Without the others it answers as if their gates were closed, in PyTorch and as a graph."""
    split = Split(torch.from_numpy(images(40)), torch.arange(40) % 5)
    profile = SteeringProfile("c", ("c1", "c3"), "by hand", STEERED)
    made = compact(steered.model, steered.sae, profile, tuple(f"c{i}" for i in range(5)), split, 0.3)
    own = torch.isin(split.classes, torch.tensor([1, 3]))
    steer = steered_by(steered.sae, STEERED)
    open_ = answers(steered.model, split, steer).gate[own].double().mean(0) >= 0.3  # (G, U)
    assert made.kept == tuple(tuple(torch.nonzero(of_block).flatten().tolist()) for of_block in open_)
    assert 0 < open_[:, :3].sum() < 6
    assert 0 < open_[:, 3:].sum() < 8

    def closed(site: int, logit: torch.Tensor) -> torch.Tensor:
        return keep_positive(site, logit) * open_[site]

    expected, found = answers(steered.model, split, steer, closed), answers(made.model, split, steer)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.gate, expected.gate)
    assert made.after.mlp_usage == pytest.approx(expected.mlp_gate[own].double().mean().item())
    assert made.to_json()["after"]["unit_usage"] < made.to_json()["before"]["unit_usage"]
    compacted = SteeredVit(made.model, steered.sae)
    graph = build(compacted, SPEC, "compact", {}, kept=made.kept).SerializeToString()
    inputs = rows(30)
    outputs, torch_outputs = run_onnx(open_session(graph), inputs), run_torch(compacted, inputs)
    np.testing.assert_array_equal(outputs[MLP_GATE], torch_outputs[MLP_GATE])
    np.testing.assert_allclose(outputs["logits"], torch_outputs["logits"], atol=2e-5)


def test_a_certificate_covers_gate_biases(steered: SteeredVit) -> None:
    """A graph that drops one bias is detected; MLP gates count like head gates."""
    biases = [np.full((2, UNITS), value, np.float32) for value in (-8.0, -1.0, 0.5)]
    reference = Reference(steered, images(6), [{}, STEERED], images(4), np.zeros(4, np.int64), biases=biases)
    graph = build(steered, SPEC, "dispatch", {}, gate_bias=True)
    certificate = reference.certify(graph.SerializeToString(), "dispatch", "fp32")
    assert (certificate.rows, certificate.biases) == (6 * 2 + 6 * 3, 3)
    assert certificate.gates == certificate.rows * 2 * UNITS
    assert certificate.to_json()["biases"] == 3
    plain = Reference(steered, images(6), [{}], images(4), np.zeros(4, np.int64))
    deaf = build(steered, SPEC, "dispatch", {}).SerializeToString()
    assert "biases" not in plain.certify(deaf, "dispatch", "fp32").to_json()
    with pytest.raises(GateMismatch, match=r"a gate with logit .* decides differently"):
        reference.certify(deaf, "dispatch", "fp32")


OWN = SteeringProfile("own", ("c",), "by hand", {}, gate_bias={2: (0, 0, 0, 0, 0, 0, 2.5)})


@pytest.mark.parametrize(("limit", "profiles"), [(3.0, ()), (2.0, (OWN,))])
def test_a_model_without_a_dial_is_compared_under_the_biases_that_a_server_takes(
    steered: SteeredVit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: float,
    profiles: Sequence[SteeringProfile],
) -> None:
    """A graph that takes smaller biases only: its own golden rows, which it has in float16, would not tell."""

    def limited(*arguments: Any) -> onnx.ModelProto:
        model = build(*arguments)
        bounds = [onnx.numpy_helper.from_array(np.float32(sign * limit), f"limit{sign}") for sign in (-1, 1)]
        model.graph.initializer.extend(bounds)
        for node in model.graph.node:
            node.input[:] = ["limited" if name == GATE_BIAS else name for name in node.input]
        names = [GATE_BIAS, *(bound.name for bound in bounds)]
        model.graph.node.insert(0, onnx.helper.make_node("Clip", names, ["limited"]))
        return model

    source = source_of(steered, profiles)
    options = ExportSettings("m", attentions=("masked",), precisions=("fp16",), verify_images=3, accuracy_images=4)
    monkeypatch.setattr(write, "build", limited)
    if profiles:  # the profile's own biases alone would tell
        monkeypatch.setattr(write, "_forced", lambda _: ())
    with pytest.raises(GateMismatch):
        write.write_source(source, tmp_path, options)
    assert not list(tmp_path.iterdir())


def test_groups_come_back_from_the_weights_of_a_graph() -> None:
    torch.manual_seed(0)
    grey, small_vit = ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,)), VitSettings(dim=24, depth=3, heads=3)

    def new() -> GatedVit:
        return GatedVit(create_vit(small_vit, grey, 4), (1, 2), grey, 4)

    model, batch = new().train(), torch.randint(256, (32, 28, 28, 1), dtype=torch.uint8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model(batch)  # batch norms have a mean and a variance
    model.eval().requires_grad_(False)
    graph = build(SteeredVit(model, Sae(2, 8, 24)), grey, "dispatch", {}).graph
    weights = {w.name: torch.from_numpy(onnx.numpy_helper.to_array(w).copy()) for w in graph.initializer}
    again = new().eval()
    again.gates = model.gates
    again.load_state_dict(_state(again, weights), strict=False)
    torch.testing.assert_close(again(batch)[0], model(batch)[0], rtol=0, atol=1e-4)


def test_a_run_with_a_dial_goes_the_whole_way(tmp_path: Path) -> None:
    """Every stage up to the report, with the models to compare with, on three classes of stripes. The first `evaluate`
    is killed, and resumed."""
    draw = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "images" / f"c{label}").mkdir(parents=True)
        for index in range(60):
            pixels = draw.integers(0, 120, (16, 16), np.uint8)
            pixels[label * 5 : label * 5 + 5] += 100
            Image.fromarray(pixels).save(tmp_path / "images" / f"c{label}" / f"{index}.png")
    run = tmp_path / "run"
    flags = {
        "data.root": tmp_path / "images", "data.image-size": 16, "data.channels": 1, "vit.mlp-groups": 4,
        "vit.dim": 12, "vit.batch-size": 30, "vit.backbone-epochs": 2, "vit.joint-epochs": 4,
        "vit.gate-learning-rate": 0.2, "sae.epochs": 2,
        "sae.latents": 16, "sae.k": 4, "profiles.steps": 5, "threads": 1, "vit.teacher": "dense",
    }  # fmt: skip
    given = ["--preset=smoke", "--data.dataset=folder", "--vit.dial", *(f"--{k}={v}" for k, v in flags.items())]

    def steps(*names: str) -> dict[str, Any]:
        for name in names:
            assert main([name, "--out", str(run), *given]) == 0
        return Run(run).results() if Run(run).has_results() else {}

    steps("vit", "sae", "profiles")
    with subprocess.Popen([sys.executable, "-m", "training", "evaluate", "--out", run, *given], cwd=ROOT) as process:
        until((run / f"{STATE}.safetensors").is_file)
        process.kill()
    meta = cast(Stored, Run(run).read_tensors(STATE)).meta
    Run(run).write_tensors(STATE, {}, {**meta, "results": {**meta["results"], "before": "the kill"}})
    alone = steps("evaluate")
    assert alone.pop("before") == "the kill", "is resumed, not measured again"
    assert not list(run.glob("*.state.safetensors"))
    Run(run).write_json("results.json", {**alone, "from before": True})
    results = steps("controls", "evaluate", "report")
    assert alone["controls"].keys() == {"dense"}
    added = {"controls": results["controls"], "from before": True}
    assert results == alone | added, "what was measured is kept"
    assert results["controls"]["dense"] == alone["controls"]["dense"]
    macs = results["macs"]
    assert (macs["mlp_groups"], len(macs["per_mlp_group"])) == (4, 2)
    usage = results["neutral"]
    costs = [[head] * 3 + [group] * 4 for head, group in zip(macs["per_head"], macs["per_mlp_group"], strict=True)]
    spent = 1 - (1 - usage["unit_usage"]) * np.sum(costs) / macs["dense"]
    assert usage["compute_fraction"] == pytest.approx(spent, abs=2e-5)
    assert np.shape(results["diagnostics"]["usage"]) == (3, 2, 7)
    for profile in results["profiles"]:
        assert np.shape(profile["head_usage_after"]) == (2, 3)
        assert np.mean(profile["mlp_usage_after"]) == pytest.approx(profile["after"]["mlp_usage"], abs=1e-3)
    assert "random units" in results["rivals"]
    assert "random heads" not in results["rivals"]
    alike = results["class_agnostic"]
    assert alike.keys() == {"one bias for all", "one set of terms for all", "the dial alone"}
    assert alike.keys() | {"greedy static units of the class"} < results["rivals"].keys()
    assert results["success"][0]["criterion"].startswith("unit usage")
    assert load_file(run / "gate_bias.safetensors")["bias"].shape == (3, 2, 7)
    fidelity = json.loads((run / "sae.json").read_text())["result"]
    assert all(0 < site["gate_agreement"] <= 1 for site in fidelity["fidelity"])
    assert fidelity["recovered"].keys() > {f"{k}_usage{r}" for k in ("head", "mlp") for r in ("", "_reconstructed")}
    page = (run / "report.html").read_text()
    assert "MLP usage" in page
    assert '<h2 id="dial">Accuracy along the compute dial</h2>' in page

    made = json.loads((run / "vit.json").read_text())["result"]
    dial = Dial.from_json(made["dial"])
    assert (made["mlp_groups"], dial.gate_bias.shape[1:]) == (4, (2, 7))
    assert results["dials"].keys() == {"", *(profile["name"] for profile in results["profiles"])}
    for name, points in results["dials"].items():
        check_curve([Point(**point) for point in points], name)
    top = results["dial"]["test"][""][-1]
    assert (top["budget"], top["compute_fraction"]) == (1, 1)
    assert top["accuracy"] == pytest.approx(results["ungated"]["accuracy"], abs=1e-5)
    controls = results["controls"]
    assert controls.keys() == {"dense", "plain-100", "plain-75", "plain-55", "plain-40", "static", "heads"}
    assert [name for name, control in controls.items() if "dial" in control] == ["static", "heads"]
    compared = {name: control.get("dial_at_its_compute") for name, control in controls.items()}
    assert (compared["static"], compared["dense"]["margin"], compared["plain-55"]["margin"]) == (None, 0.002, 0.005)
    difference = top["accuracy"] - controls["dense"]["accuracy"]
    assert compared["dense"]["difference"] == pytest.approx(difference, abs=1e-5)
    of_images = load_file(run / "differences.safetensors")
    assert of_images.keys() == controls.keys()
    assert of_images["plain-75"].mean() == pytest.approx(compared["plain-75"]["difference"], abs=1e-6)
    assert of_images["static"].mean() == pytest.approx(controls["static"]["area"]["difference"], abs=1e-6)
    for taught in (run, run / "controls" / "static", run / "controls" / "plain-55"):
        assert json.loads((taught / "vit.json").read_text())["settings"]["vit"]["teacher"] == "dense"
    assert "teacher" not in json.loads((run / "controls" / "dense" / "vit.json").read_text())["settings"]["vit"]
    assert "with a dial of heads alone, mean accuracy over compute" in " ".join(page.split())
    assert (run / "dial.png").stat().st_size < 200_000

    profiles = run / "profiles.json"
    profiles.write_text(profiles.read_text() + "\n")
    anew = steps("evaluate")
    assert anew.pop("made_of") != results.pop("made_of")
    assert anew == {key: value for key, value in results.items() if key != "from before"}, "measured again, and equal"
    assert load_file(run / "differences.safetensors").keys() == of_images.keys()
