"""The dial in bundles and in the server: budgets, forced units and gate biases, beside bundles that have no dial."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from small_models import STEERED, dial_of, model_of, small, source_of

from export.bundle import Bundle, BundleError, load_bundle, load_golden
from export.graph import SteeredVit
from export.verify import verify
from export.write import ExportSettings, write_source
from training.steering import SteeringProfile, SteeringTerm

pytestmark = pytest.mark.slow

OLD = ROOT / "tests" / "bundles"
"""A repository with a bundle as the exporter wrote them in version 2, of a small model without MLP groups."""
SETTINGS = ExportSettings("dial", attentions=("dispatch", "masked", "fused"), verify_images=8, accuracy_images=8)
PROFILES = (
    SteeringProfile("b", ("b",), "by hand", STEERED, {"after": {"head_usage": 0.5}}),
    SteeringProfile(
        "own", ("c",), "by hand", {1: (SteeringTerm(3, 2.0, 1.0),)}, gate_bias={2: (0, 1.5, 0, -8, 0, 8, 0)}
    ),
)


@pytest.fixture(scope="module")
def steered() -> SteeredVit:
    return model_of(small(), mlp_groups=4)


@pytest.fixture(scope="module")
def bundle(steered: SteeredVit, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    source = source_of(steered, PROFILES, dial_of(steered))
    return write_source(source, tmp_path_factory.mktemp("models"), SETTINGS)


def test_a_bundle_has_the_dial_and_the_curves_that_it_was_written_from(bundle: Bundle, steered: SteeredVit) -> None:
    manifest, dial = bundle.manifest, dial_of(steered)
    assert (manifest.schema_version, manifest.mlp_groups, manifest.units) == (3, 4, 7)
    assert bundle.dial is not None
    assert bundle.dial.to_json() == dial.to_json()
    assert bundle.curves.keys() == {"", "b", "own"}
    assert bundle.profiles["own"] == PROFILES[1]
    assert verify(bundle.folder).manifest == manifest
    golden = load_golden(bundle.folder, "fp32")
    assert (golden.inputs["gate_bias"] != 0).any((1, 2)).sum() == len(golden.inputs["image"]) // 3


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no groups": (lambda m: m.update(mlp_groups=0), "macs.per_mlp_group is (1"),
    "version 2": (lambda m: m.update(schema_version=2), "schema_version is 2; allowed: 3, with ['mlp_groups', 'dial'"),
    "few knots": (lambda m: m.update(dial=m["dial"][2:]), "dial: budget is [0.5"),
    "falling bias": (lambda m: m["dial"][3]["gate_bias"][1].__setitem__(6, -9), "falling at (knot, gated block, unit)"),
    "a unit less": (lambda m: [row.pop() for k in m["dial"] for row in k["gate_bias"]], "gate_bias is (2, 6)"),
    "too large": (lambda m: m["dial"][-1]["gate_bias"][0].__setitem__(0, 1e4), "gate_bias is 10000.0; allowed: -1000"),
    "text": (lambda m: m["dial"][0].update(budget="0.3"), "dial[0].budget is '0.3'; allowed: a valid number"),
    "no curve": (lambda m: m["dials"].pop(""), "dials is ['b', 'own']; allowed: '' (without steering) among them"),
    "no dial": (lambda m: m.pop("dial"), "dials is ['', 'b', 'own']; allowed: none, as there is no dial"),
    "short curve": (lambda m: m["dials"].update(b=m["dials"]["b"][:8]), "dials['b'] is 8 points; allowed: 9 or more"),
    "unknown profile": (lambda m: m["dials"].update(x=m["dials"]["b"]), "dials has ['x']; allowed: '' and"),
    "off the dial": (lambda m: m["dials"]["b"][0].update(budget=0.2), "dials['b'].budget is 0.2; allowed: 0.3 or more"),
    "compact": (lambda m: m.update(compact={}), "0.9, 1.0]; allowed: none in a compact bundle"),
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
