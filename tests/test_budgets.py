"""The dial in bundles and in the server: budgets, forced units and gate biases, beside bundles that have no dial."""

import asyncio
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
import torch
from browser import chromium, playground
from masks import unit_mask
from numpy.typing import NDArray
from PIL import Image
from processes import SMALL, ServerProcess, serving
from refusals import refusal
from small_models import SPEC, STEERED, dial_of, images, of_kind, source_of

from export.bundle import GATE_BIAS, INPUTS, MLP_GATE, Bundle, BundleError, load_bundle, load_golden
from export.certify import run_torch
from export.graph import SteeredVit, build
from export.session import Arrays, inputs_of, open_session, run_onnx
from export.verify import verify
from export.write import ExportSettings, _dial, _ranges, write_source
from service.buckets import Buckets
from service.calls import Call, CallQueue, Piece
from service.client import Asked, AsyncClient, Client
from service.client.__main__ import main
from service.dial import Forced, Unit
from service.engine import Engine
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.pb.steering_pb2_grpc import SteeringServiceStub
from service.steering import Steering, resolve, stack, with_bias
from tests.faults.listed import OPEN_INFERENCE, STEERING, fault
from training.checkpoint import RunError
from training.dial import Dial
from training.model.macs import count
from training.steering import (
    NEUTRAL,
    SteeringArrays,
    SteeringProfile,
    SteeringTerm,
    Terms,
    at_strength,
    digest,
    profiles_to_json,
)

pytestmark = pytest.mark.slow

SETTINGS = ExportSettings("dial", attentions=("dispatch", "masked", "fused"), verify_images=8, accuracy_images=8)
BIAS = {2: (0.0, 1.5, 0.0, -20.0, 0.0, 20.0, 0.0)}
PROFILES = (
    SteeringProfile("b", ("b",), "by hand", STEERED, {"after": {"head_usage": 0.5}}),
    SteeringProfile("own", ("c",), "by hand", {1: (SteeringTerm(3, 2.0, 1.0),)}, gate_bias=BIAS),
    SteeringProfile("replaced", ("d",), "by hand", {}, gate_bias=BIAS),
)
FROM_FOLDER = (
    SteeringProfile("night", ("b", "c"), "by hand", {}, gate_bias={1: (3.0, -3.0, 0.0, 2.0, -2.0, 4.0, -4.0)}),
    SteeringProfile("replaced", ("d",), "by hand", STEERED),
)
"""Profiles of --profiles-dir, for which the dial has no measurements."""


@pytest.fixture(scope="module")
def steered() -> SteeredVit:
    return of_kind("plain", 4)


@pytest.fixture(scope="module")
def bundle(steered: SteeredVit, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    source = source_of(steered, PROFILES, dial_of(steered))
    return write_source(source, tmp_path_factory.mktemp("models"), SETTINGS)


def test_the_dial_comes_from_the_run_folder(bundle: Bundle, steered: SteeredVit) -> None:
    made = json.loads(json.dumps({"dial": dial_of(steered).to_json(), "macs": {}}))
    results = json.loads(json.dumps({"dials": {name: list(map(vars, of)) for name, of in bundle.curves.items()}}))
    assert _dial(made, results) == (bundle.manifest.dial, bundle.curves)
    assert _dial({}, {}) == ((), {})
    with pytest.raises(RunError, match=r"results.json has no dials, but the model has a dial: evaluate again"):
        _dial(made, {})


def test_a_bundle_has_the_dial_and_the_curves_that_it_was_written_from(bundle: Bundle, steered: SteeredVit) -> None:
    manifest, dial = bundle.manifest, dial_of(steered)
    assert (manifest.schema_version, manifest.mlp_groups, manifest.units) == (3, 4, 7)
    assert bundle.dial is not None
    assert bundle.dial.to_json() == dial.to_json()
    assert bundle.curves.keys() == {"", "b", "own", "replaced"}
    assert bundle.profiles["own"] == PROFILES[1]
    assert verify(bundle.folder).manifest == manifest
    forced = 3  # all open, all closed, either
    assert [graph.certificate["biases"] for graph in manifest.graphs] == [len(manifest.dial) + 2 + forced] * 3
    golden = load_golden(bundle.folder, "fp32")
    assert (golden.inputs["gate_bias"] != 0).any((1, 2)).sum() == len(golden.inputs["image"]) // 3


def test_int8_is_calibrated_with_and_without_budgets(steered: SteeredVit) -> None:
    """A dial that closes every unit below budget 1: without budgets the tokens of block 2 have other ranges, and with
    budgets alone there are no hidden neurons."""
    closing = np.full((7, 2, 7), -1000, np.float32)
    closing[-1] = 8
    with_dial, without = (
        _ranges(source_of(steered, PROFILES[:1], dial)) for dial in (Dial(np.linspace(0.3, 1, 7), closing), None)
    )
    assert with_dial["block1/attention/in"] == without["block1/attention/in"]
    assert with_dial["block2/attention/in"] != without["block2/attention/in"]
    assert with_dial["block1/mlp/hidden"][1] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own", "--specialise: profile 'own' has a gate_bias; allowed: profiles of terms alone"),
        ("hats", "--specialise is 'hats'; allowed: "),
    ],
)
def test_what_gets_a_graph_of_its_own_is_checked_before_any_graph_is_written(
    steered: SteeredVit, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        write_source(source_of(steered, PROFILES), tmp_path, replace(SETTINGS, specialise=(name,)))
    assert capsys.readouterr().out == ""  # a graph that is written prints its certificate


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no groups": (lambda m: m.update(mlp_groups=0), "macs.per_mlp_group is (1"),
    "version 2": (lambda m: m.update(schema_version=2), "schema_version is 2; allowed: 3, with ['mlp_groups', 'dial'"),
    "few knots": (lambda m: m.update(dial=m["dial"][2:]), "dial: budget is [0.5"),
    "falling bias": (lambda m: m["dial"][3]["gate_bias"][1].__setitem__(6, -9), "falling at (knot, gated block, unit)"),
    "a unit less": (lambda m: [row.pop() for k in m["dial"] for row in k["gate_bias"]], "gate_bias is (2, 6)"),
    "not all open": (
        lambda m: [k["gate_bias"][1].__setitem__(6, min(k["gate_bias"][1][6], 7.5)) for k in m["dial"]],
        "8.0], [8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 7.5]]; allowed: 8.0 or more at budget 1",
    ),
    "too large": (lambda m: m["dial"][-1]["gate_bias"][0].__setitem__(0, 1e4), "gate_bias is 10000.0; allowed: -1000"),
    "text": (lambda m: m["dial"][0].update(budget="0.3"), "dial[0].budget is '0.3'; allowed: a valid number"),
    "no curve": (lambda m: m["dials"].pop(""), "dials is ['b', 'own', 'replaced']; allowed: '' (without"),
    "no dial": (lambda m: m.pop("dial"), "dials is ['', 'b', 'own', 'replaced']; allowed: none"),
    "short curve": (lambda m: m["dials"].update(b=m["dials"]["b"][:8]), "dials['b'] is 8 points; allowed: 9 or more"),
    "unknown profile": (lambda m: m["dials"].update(x=m["dials"]["b"]), "dials has ['x']; allowed: '' and"),
    "off the dial": (lambda m: m["dials"]["b"][0].update(budget=0.2), "dials['b'].budget is 0.2; allowed: 0.3 or more"),
    "compact": (lambda m: m.update(compact={}), "1.0]; allowed: none in a compact bundle"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_dial_is_refused(name: str, bundle: Bundle, tmp_path: Path) -> None:
    change, message = WRONG[name]
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "1"))
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the bundle and one of schema version 2."""
    repository = bundle.folder.parents[1]
    shutil.copytree(SMALL / "small", repository / "small")
    content = {**profiles_to_json(FROM_FOLDER), "gates_sae_digest": bundle.manifest.gates_sae_digest}
    (folder := tmp_path_factory.mktemp("profiles")).joinpath("night.json").write_text(json.dumps(content))
    flags = ("--max-delay-ms", "20", "--max-batch", "16", "--instances", "1", "--profiles-dir", str(folder))
    with serving(repository, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


PIXELS = images(64, 5)
"""The images on which the curves were measured."""
FORCED: Asked = {"open": ["1/h2", "2/m0"], "closed": ["1/m3", "2/h0"]}
ASKED: tuple[Asked, ...] = (
    {},
    {"budget": 1.0},
    {"budget": 0.3},
    {"budget": 0.62},
    {"profile": "b"},
    {"profile": "b", "budget": 0.5},
    {"profile": "own"},
    {"profile": "own", "budget": 0.8, "strength": 0.5},
    {"profile": "night", "budget": 0.7, "strength": 2.0},
    {"profile": "replaced", "budget": 0.55},
    {"terms": STEERED},
    {"terms": STEERED, "budget": 0.45},
    FORCED,
    {**FORCED, "profile": "b", "budget": 0.7},
)


def expected(bundle: Bundle, steered: SteeredVit, pixels: NDArray[np.uint8], asked: Asked) -> Arrays:
    """PyTorch's answers with hand-made inputs: the terms at the strength, and for each unit the biases of the dial, the
    profile and forced units (1e4)."""
    served = {**bundle.profiles, **{profile.name: profile for profile in FROM_FOLDER}}
    profile, strength = served.get(asked.get("profile", "")), asked.get("strength", 1.0)
    terms = at_strength(profile.terms if profile else asked.get("terms", NEUTRAL), strength)
    bias = np.zeros((2, 7), np.float32)
    if "budget" in asked:
        assert bundle.dial
        curve = bundle.curves["" if profile in FROM_FOLDER or profile is None else profile.name]
        spent, places = [p.compute_fraction for p in curve], [p.budget for p in curve]
        bias += bundle.dial.at(np.interp([np.float32(asked["budget"])], spent, places))[0]
    for block, of_block in (profile.gate_bias if profile else {}).items():
        bias[block - 1] += strength * np.array(of_block, np.float32)
    for units, value in ((asked.get("open", ()), 1e4), (asked.get("closed", ()), -1e4)):
        for block, kind, number in (re.fullmatch(r"(.)/(.)(.)", unit).groups() for unit in units):  # type: ignore[union-attr]
            bias[int(block) - 1, int(number) + 3 * (kind == "m")] = value
    inputs = inputs_of(pixels, [terms] * len(pixels), 2)
    return run_torch(steered, {**inputs, GATE_BIAS: np.repeat(bias[None], len(pixels), 0)})


async def test_a_mixed_batch_of_budgets_profiles_and_terms_equals_single_requests(
    server: ServerProcess, client: Client, bundle: Bundle, steered: SteeredVit
) -> None:
    """Both equal PyTorch's answers."""
    before = server.count("steervit_batch_size_images_count", model="dial")
    macs = count(steered.model)
    async with AsyncClient(server.address) as other:
        calls = (
            other.predict([PIXELS[3 * i + j]], model="dial", top_k=5, **asked)
            for i, asked in enumerate(ASKED)
            for j in range(3)
        )
        answers = await asyncio.gather(*calls)
    batches = server.count("steervit_batch_size_images_count", model="dial") - before
    assert batches <= len(answers) / 3, "they shared batches"
    for index, answer in enumerate(answers):
        asked, pixels = ASKED[index // 3], PIXELS[index : index + 1]
        single = client.predict(list(pixels), model="dial", top_k=5, **asked)
        assert answer.receipt.steering_digest == single.receipt.steering_digest
        assert answer.predictions[0].head_mask == single.predictions[0].head_mask
        assert answer.predictions[0].mlp_mask == single.predictions[0].mlp_mask
        outputs = expected(bundle, steered, pixels, asked)
        np.testing.assert_array_equal(unit_mask(answer.predictions), outputs["gate_logit"] > 0, err_msg=str(asked))
        logits, shown = outputs["logits"][0], {c.index: c.probability for c in answer.predictions[0].classes}
        likely = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        np.testing.assert_allclose([shown[i] for i in range(5)], likely, atol=1e-4)
        gates = (torch.from_numpy(outputs[name]) for name in ("head_gate", MLP_GATE))
        assert answer.receipt.compute_fraction == pytest.approx(float(macs.fraction(*gates)), rel=1e-6)
        assert answer.receipt.mlp_usage == pytest.approx(outputs[MLP_GATE].mean())
        assert answer.receipt.HasField("budget") == ("budget" in asked)
        assert answer.receipt.budget == pytest.approx(asked.get("budget", 0.0))


@pytest.mark.parametrize("profile", ["", "b", "own"])
def test_the_mean_compute_spent_is_the_budget(profile: str, client: Client, bundle: Bundle) -> None:
    """Within the curve's range, on the images on which it was measured."""
    spent = [point.compute_fraction for point in bundle.curves[profile]]
    for budget in np.linspace(0.3, 1.0, 9):
        receipt = client.predict(list(PIXELS), model="dial", profile=profile, budget=budget).receipt
        assert receipt.compute_fraction == pytest.approx(np.clip(budget, min(spent), max(spent)), abs=0.04)


def test_without_a_budget_the_answers_are_those_of_graphs_without_the_input(
    bundle: Bundle, steered: SteeredVit
) -> None:
    """To the bit, in every graph, and where batches have fixed shapes."""
    for kind in ("dispatch", "masked", "fused"):
        session = open_session(build(steered, SPEC, kind, {}).SerializeToString(), kind, 1)
        inputs = inputs_of(PIXELS[:8], [STEERED if row % 2 else {} for row in range(8)], 2)
        plain = run_onnx(session, inputs)
        arrays = SteeringArrays(*(inputs[name] for name in INPUTS[1:]))
        for bounded in (False, True):
            if bounded:
                plain = dict(zip(plain, Buckets(session, 8, 16, None).run(list(plain), inputs), strict=True))
            engine = Engine(bundle, "cpu", 1, f"{kind}.fp32", max_batch=8, bounded=bounded)
            outputs = engine.run(PIXELS[:8], arrays, residual=True)
            for name, value in plain.items():
                np.testing.assert_array_equal(getattr(outputs, name), value, err_msg=f"{kind} {name}")
            biased = with_bias(arrays, np.full((2, 7), 8, np.float32))
            assert engine.run(PIXELS[:8], biased).mlp_gate.all()
            assert not bounded or engine.run(np.repeat(PIXELS[:9], 2, 0), stack_of(biased, 18)).head_gate.all()


def stack_of(arrays: SteeringArrays, rows: int) -> SteeringArrays:
    first = Steering(SteeringArrays(*(value[:1] for value in vars(arrays).values())), "", True, "")
    return stack([first, replace(first)], [rows - 1, 1])


REFUSED: tuple[tuple[str, Asked, str, str], ...] = (
    *(
        ("dial", {"budget": budget}, "INVALID_ARGUMENT", f"budget is {budget:g}; allowed: 0.3 to 1")
        for budget in (0.0, -0.5, 1.01, float("nan"), float("inf"), 0.29)
    ),
    ("small", {"budget": 0.5}, "FAILED_PRECONDITION",
     "budget is 0.5, but model 'small' version 1 has no dial; allowed: no budget"),
    ("small", {"open": ["1/h0"]}, "FAILED_PRECONDITION",
     "steering.open and steering.closed name 1 units, but the graphs of model 'small' version 1 have no input "
     "gate_bias: its bundle is of schema version 2; allowed: none"),
    ("dial", {"open": ["1/m4"]}, "INVALID_ARGUMENT", "steering.open[0].mlp_group is 4; allowed: 0 to 3"),
    ("dial", {"closed": ["1/h0", "0/h0"]}, "INVALID_ARGUMENT",
     "steering.closed[1].block is 0; allowed: a gated block, 1, 2"),
    ("dial", {"open": ["1/h0", "2/m1"], "closed": ["2/m1"]}, "INVALID_ARGUMENT",
     "steering.open and steering.closed both have block 2 mlp_group 1; allowed: one of them"),
)  # fmt: skip


@fault("steering: budget out of range", "INVALID_ARGUMENT: budget is 0.29; allowed: 0.3 to 1", STEERING)
@fault(
    "steering: budget for a model without a dial",
    "FAILED_PRECONDITION: budget is 0.5, but model 'small' version 1 has no dial; allowed: no budget",
    STEERING,
)
@fault(
    "steering: gate biases for graphs without the input",
    "FAILED_PRECONDITION: steering.open and steering.closed name 1 units, but the graphs of model 'small' version 1 "
    "have no input gate_bias: its bundle is of schema version 2; allowed: none",
    STEERING,
)
@fault(
    "steering: unit that does not exist",
    "INVALID_ARGUMENT: steering.open[0].mlp_group is 4; allowed: 0 to 3",
    STEERING,
)
@fault(
    "steering: unit forced both ways",
    "INVALID_ARGUMENT: steering.open and steering.closed both have block 2 mlp_group 1; allowed: one of them",
    STEERING,
)
@pytest.mark.parametrize(("model", "asked", "code", "sentence"), REFUSED)
def test_what_is_refused_and_why(client: Client, model: str, asked: Asked, code: str, sentence: str) -> None:
    for call in (client.predict, client.compare, client.explain):
        assert refusal(call, [PIXELS[0]], model=model, **asked) == (code, sentence)


def test_a_unit_that_names_nothing_is_refused(server: ServerProcess) -> None:
    stub = SteeringServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    steering, image = pb.Steering(open=[pb.Unit(block=1)]), pb.Image(pixels=PIXELS[0].tobytes())
    _, sentence = refusal(stub.Predict, pb.PredictRequest(model="dial", images=[image], steering=steering))
    assert sentence == "steering.open[0] names no unit; allowed: head or mlp_group"


@fault("bundle: older schema", "the answers as ever; FAILED_PRECONDITION to a budget, which needs a dial")
def test_a_bundle_of_version_2_is_served_as_before(client: Client, server: ServerProcess) -> None:
    manifest = load_bundle(SMALL / "small" / "1").manifest
    assert (manifest.schema_version, manifest.mlp_groups, manifest.takes_biases) == (2, 0, False)
    steered, pixels = of_kind("plain"), images(4, 9)
    terms: Terms
    for asked, terms in (({}, {}), ({"profile": "b"}, STEERED)):
        answer = client.predict(list(pixels), model="small", **asked)
        outputs = run_torch(steered, inputs_of(pixels, [terms] * 4, 2))
        assert [[list(block.kept) for block in p.head_mask] for p in answer.predictions] == outputs[
            "head_gate"
        ].tolist()
        assert [p.classes[0].index for p in answer.predictions] == outputs["logits"].argmax(1).tolist()
        assert not any(p.mlp_mask for p in answer.predictions)
    described = client.model("small")
    assert (described.mlp_groups, len(described.dial), described.lowest_budget) == (0, 0, 0)


def test_a_default_budget_of_the_model_is_that_of_requests_without_one(
    client: Client, bundle: Bundle, tmp_path: Path
) -> None:
    """As serving.json has it; at least the dial's lowest. A request's own wins."""
    shutil.copytree(bundle.folder.parent, tmp_path / "dial")
    (tmp_path / "dial" / "serving.json").write_text(json.dumps({"default_budget": 0.1, "min_budget": 0.2}))
    with serving(tmp_path) as running, Client(running.address) as other:
        assert other.model().settings.default_budget == 0.3
        pairs: Sequence[tuple[Asked, Asked]] = (
            ({}, {"budget": 0.3}),
            ({"profile": "b"}, {"profile": "b", "budget": 0.3}),
            ({"budget": 0.8}, {"budget": 0.8}),
        )
        for asked, equal in pairs:
            answer, same = other.predict(list(PIXELS), **asked), client.predict(list(PIXELS), **equal, model="dial")
            np.testing.assert_array_equal(unit_mask(answer.predictions), unit_mask(same.predictions))
            assert answer.receipt.budget == same.receipt.budget
            assert answer.receipt.budget_applied == same.receipt.budget_applied


def test_compare_and_explain_are_at_the_budget(client: Client, bundle: Bundle, steered: SteeredVit) -> None:
    asked: Asked = {"profile": "own", "budget": 0.6}
    pair = client.compare(list(PIXELS[:8]), model="dial", **asked)
    before, after = (expected(bundle, steered, PIXELS[:8], of) for of in ({"budget": 0.6}, asked))
    np.testing.assert_array_equal(unit_mask([c.unsteered for c in pair.comparisons]), before["gate_logit"] > 0)
    np.testing.assert_array_equal(unit_mask([c.steered for c in pair.comparisons]), after["gate_logit"] > 0)
    changed = np.argwhere(before[MLP_GATE] != after[MLP_GATE]).tolist()
    told = [(i, c.block - 1, c.mlp_group) for i, of in enumerate(pair.comparisons) for c in of.mlp_changes]
    assert told == [tuple(place) for place in changed] != []
    explained = client.explain(list(PIXELS[:8]), model="dial", **asked).explanations
    logits = np.array([[site.gate_logits for site in of.sites] for of in explained])
    np.testing.assert_allclose(logits, after["gate_logit"], atol=1e-3)


def test_units_and_budgets_are_counted(server: ServerProcess, client: Client) -> None:
    """Counts by block and unit, under the profile; and the compute that is saved."""

    def counts() -> NDArray[np.float64]:
        def of(name: str, **labels: str) -> float:
            return server.count(f"steervit_{name}", model="dial", **labels)

        units = [of(f"{kind}_kept_total", profile="own", block=str(block), **{label: str(number)})
                 for block in (1, 2) for kind, label, count in (("heads", "head", 3), ("mlp_groups", "group", 4))
                 for number in range(count)]  # fmt: skip
        macs = [of(f"macs_{which}_total", profile="own") for which in ("spent", "dense")]
        return np.array(
            [*units, *macs, of("budget_count"), of("budget_bucket", le="0.3"), of("budget_bucket", le="0.7")]
        )

    before = counts()
    answer = client.predict(list(PIXELS[:8]), model="dial", profile="own", budget=0.3)
    client.predict(list(PIXELS[:5]), model="dial", budget=0.7)
    client.predict(list(PIXELS[:5]), model="dial")
    added = counts() - before
    np.testing.assert_array_equal(added[:14], unit_mask(answer.predictions).sum(0).ravel())
    assert added[14] / added[15] == pytest.approx(answer.receipt.compute_fraction, rel=1e-6)
    assert added[16:].tolist() == [13, 8, 13]
    assert server.count("steervit_gated_mlp_groups", model="dial") == 8
    assert server.count("steervit_gated_mlp_groups", model="small") == 0


def test_the_dial_is_told_and_printed(
    server: ServerProcess, client: Client, bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    described, of_profile = client.model("dial"), client.profile("own", "dial")
    assert (described.mlp_groups, described.lowest_budget) == (4, pytest.approx(0.3))
    for told, name in ((described.dial, ""), (of_profile.dial, "own")):
        assert [p.compute_fraction for p in told] == pytest.approx([p.compute_fraction for p in bundle.curves[name]])
    assert {of.block: tuple(of.biases) for of in of_profile.gate_biases} == BIAS
    assert not client.profile("replaced", "dial").dial
    flags = ("--address", server.address, "--model", "dial")
    for more in ((), ("--profile", "own")):
        assert main(["dial", *flags, *more]) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80
        assert printed.count("\n") > len(described.dial) + 14
        assert "budgets: 0.3 to 1" in printed
    assert main(["dial", *flags, "--json"], "steervit") == 0
    printed_dial = json.loads(capsys.readouterr().out)["dial"]
    assert [p["compute_fraction"] for p in printed_dial] == pytest.approx([p.compute_fraction for p in described.dial])
    assert main(["dial", "--address", server.address, "--model", "small"]) == 1
    assert capsys.readouterr().err == "model 'small' version 1 has no dial: it takes no budgets\n"
    picture = tmp_path / "picture.png"
    Image.fromarray(PIXELS[0]).save(picture)
    steering = ("--profile", "b", "--budget", "0.5", "--open", "1/h2,2/m0", "--closed", "1/m3")
    for command in ("predict", "compare", "explain"):
        assert main([command, *flags, *steering, str(picture)]) == 0, command
    printed = capsys.readouterr().out
    assert "profile b, budget 0.5 (spent 0." in printed
    assert "            h0 h1 h2 m0 m1 m2 m3\n" in printed
    assert main(["load", *flags, "--budget", "0.5", "--seconds", "0.2", str(picture)]) == 0


def test_the_open_inference_protocol_has_budgets_and_biases_per_row(
    server: ServerProcess, client: Client, bundle: Bundle, steered: SteeredVit
) -> None:
    stub = GRPCInferenceServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    bias = np.random.default_rng(3).normal(0, 3, (4, 2, 7)).astype(np.float32)

    def infer(parameters: dict[str, oi.InferParameter], **tensors: NDArray[Any]) -> oi.ModelInferResponse:
        return stub.ModelInfer(infer_request("dial", parameters, **tensors), timeout=20)

    def gates(answer: oi.ModelInferResponse) -> NDArray[np.bool_]:
        assert [output.name for output in answer.outputs] == ["logits", "head_gate", "gate_logit", MLP_GATE]
        head, mlp = (np.frombuffer(answer.raw_output_contents[i], bool).reshape(4, 2, -1) for i in (1, 3))
        return np.concatenate([head, mlp], 2)

    for budget in (oi.InferParameter(double_param=0.6), oi.InferParameter(string_param="0.6")):
        answer = infer({"budget": budget, "profile": oi.InferParameter(string_param="b")})
        same = client.predict(list(PIXELS[:4]), model="dial", profile="b", budget=0.6)
        np.testing.assert_array_equal(gates(answer), unit_mask(same.predictions))
        assert answer.parameters["budget"].double_param == 0.6
        assert answer.parameters["mlp_usage"].double_param == pytest.approx(same.receipt.mlp_usage)
    inputs = inputs_of(PIXELS[:4], [{}] * 4, 2)
    outputs = run_torch(steered, {**inputs, GATE_BIAS: bias})
    np.testing.assert_array_equal(gates(infer({}, gate_bias=bias)), outputs["gate_logit"] > 0)
    assert bundle.dial
    both = bias + bundle.dial.at(np.array([1.0]))
    outputs = run_torch(steered, {**inputs, GATE_BIAS: both})
    one = infer({"budget": oi.InferParameter(double_param=1.0)}, gate_bias=bias)
    np.testing.assert_array_equal(gates(one), outputs["gate_logit"] > 0)
    alike = infer({}, gate_bias=np.repeat(bias[:1], 4, 0))
    forced = client.predict([PIXELS[0]], model="dial", open=["1/h0"]).receipt.steering_digest
    as_forced = np.zeros((4, 2, 7), np.float32)
    as_forced[:, 0, 0] = 1e4
    assert infer({}, gate_bias=as_forced).parameters["steering_digest"].string_param == forced
    assert alike.parameters["steering_digest"].string_param != forced
    metadata = stub.ModelMetadata(oi.ModelMetadataRequest(name="dial"))
    shapes = {output.name: list(output.shape) for output in metadata.outputs}
    assert shapes == {"logits": [-1, 5], "head_gate": [-1, 2, 3], "gate_logit": [-1, 2, 7], "mlp_gate": [-1, 2, 4]}


def infer_request(
    model: str, parameters: dict[str, oi.InferParameter], **tensors: NDArray[Any]
) -> oi.ModelInferRequest:
    """A request for the first four images."""
    request = oi.ModelInferRequest(model_name=model, parameters=parameters)
    for name, value in {"image": PIXELS[:4], **tensors}.items():
        request.inputs.add(name=name, datatype="UINT8" if name == "image" else "FP32", shape=value.shape)
        request.raw_input_contents.append(value.tobytes())
    return request


ZEROS = np.zeros((4, 2, 7), np.float32)
REFUSED_TENSORS: tuple[tuple[str, dict[str, Any], dict[str, NDArray[np.float32]], str, str], ...] = (
    ("dial", {"double_param": 0.1}, {}, "INVALID_ARGUMENT", "budget is 0.1; allowed: 0.3 to 1"),
    ("dial", {"bool_param": True}, {}, "INVALID_ARGUMENT", "parameter budget is True; allowed: a number"),
    ("dial", {"string_param": "nan"}, {}, "INVALID_ARGUMENT", "parameter budget is 'nan'; allowed: a number"),
    ("small", {"double_param": 0.5}, {}, "FAILED_PRECONDITION",
     "budget is 0.5, but model 'small' version 1 has no dial; allowed: no budget"),
    ("small", {}, {"gate_bias": ZEROS[:, :, :3]}, "FAILED_PRECONDITION",
     "input 'gate_bias' is given, but the graphs of model 'small' version 1 have no input gate_bias: its bundle is of "
     "schema version 2; allowed: none"),
    ("dial", {}, {"gate_bias": ZEROS[:3]}, "INVALID_ARGUMENT",
     "input 'gate_bias' has the shape [3, 2, 7]; allowed: [4, 2, 7]"),
    ("dial", {}, {"gate_bias": ZEROS[:, 0]}, "INVALID_ARGUMENT",
     "input 'gate_bias' has the shape [4, 7]; allowed: [4, 2, 7]"),
    ("dial", {}, {"gate_bias": ZEROS + np.float32(np.nan)}, "INVALID_ARGUMENT",
     "input 'gate_bias' of image 0 has the value nan at strength 1; allowed: -1e6 to 1e6"),
)  # fmt: skip


@fault("steering: budget out of range", "INVALID_ARGUMENT: budget is 0.1; allowed: 0.3 to 1", OPEN_INFERENCE)
@fault(
    "steering: budget for a model without a dial",
    "FAILED_PRECONDITION: budget is 0.5, but model 'small' version 1 has no dial; allowed: no budget",
    OPEN_INFERENCE,
)
@fault(
    "steering: gate biases for graphs without the input",
    "FAILED_PRECONDITION: input 'gate_bias' is given, but the graphs of model 'small' version 1 have no input "
    "gate_bias: its bundle is of schema version 2; allowed: none",
    OPEN_INFERENCE,
)
@pytest.mark.parametrize(("model", "budget", "tensors", "code", "sentence"), REFUSED_TENSORS)
def test_what_is_refused_of_tensors_and_parameters(
    server: ServerProcess,
    model: str,
    budget: dict[str, Any],
    tensors: dict[str, NDArray[np.float32]],
    code: str,
    sentence: str,
) -> None:
    stub = GRPCInferenceServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    parameters = {"budget": oi.InferParameter(**budget)} if budget else {}
    assert refusal(stub.ModelInfer, infer_request(model, parameters, **tensors), timeout=20) == (code, sentence)


def test_a_call_with_biases_never_runs_on_the_graph_of_its_profile(bundle: Bundle) -> None:
    own = digest(STEERED)
    specialists = cast(Any, SimpleNamespace(specialised={own}, seconds=lambda rows, digest="": 0.0 if digest else 1.0))
    queue = CallQueue(specialists, lambda *_: None)

    def piece(**asked: Any) -> Piece:
        steering = resolve(bundle, "b", NEUTRAL, 1.0, **asked)
        return Piece(Call(PIXELS[:1], steering, False, math.inf, 0.0, cast(Any, None)), 0, 1)

    assert queue.common_digest([piece(), piece()]) == own
    assert queue.common_digest([piece(), piece(budget=0.5)]) == ""
    assert queue.common_digest([piece(budget=0.5)]) == ""
    assert queue.common_digest([piece(forced=Forced(open=[Unit(1, "head", 0)]))]) == ""


def test_the_playground_shows_what_a_budget_does(server: ServerProcess, client: Client, tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "noise.png")
    content = (tmp_path / "noise.png").read_bytes()
    lowest = math.ceil(100 * client.model("dial").lowest_budget) / 100
    with chromium() as driver, playground(driver, server.address, "--model", "dial") as page:
        page.open()
        page.upload(tmp_path / "noise.png")
        page.shows("No budget is set", "figcaption")
        assert {place for _, place in page.states()} == set(range(7)), "3 heads, then 4 MLP groups"
        assert not page.one("#budget").is_enabled()
        page.one("[name=limited]").click()
        page.press("#budget", "HOME")
        page.shows(f"Budget {lowest:.2f}, without steering", "figcaption")
        before, after = (
            client.predict([content], model="dial", **of).predictions[0] for of in ({}, {"budget": lowest})
        )
        assert f"This image costs {after.compute_fraction:.2f}" in page.text("figcaption")
        assert "closed by the budget" in page.text(".legend")
        kept = unit_mask([before, after])
        shut = np.logical_and(kept[0], np.logical_not(kept[1])).sum()
        assert list(page.states().values()).count("shut") == shut > 0
        assert page.one(".dial path.budget").is_displayed()
