"""Selective profiles: which images keep their answers to the bit, and the search for such profiles."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import SMALL, run_main
from small_models import SPEC, images, of_kind

from export import ablate, dictionaries, rebuild
from export import selective as selective_program
from export.bundle import Bundle
from export.certify import run_torch
from export.graph import SteeredVit, build
from export.session import inputs_of, open_session, run_onnx
from training.checkpoint import Run
from training.config import Settings
from training.data.splits import Data, Split
from training.evaluation.ablation import Learned
from training.evaluation.dictionaries import effects, projection
from training.evaluation.selective import chosen, drawn, examples, measured, of_probe, of_terms, under
from training.evaluation.selective_criteria import verdict
from training.evaluation.selective_rivals import principal, probe
from training.model.macs import count
from training.profiles.selective import Examples, SelectiveSettings, Task, composed, selective, touched
from training.steering import SteeringTerm, Terms, profiles_from_json, profiles_to_json

QUICK = SelectiveSettings(terms=4, leak=0.0, closing=8.0, steps=25, rows=16, learning_rate=0.3)


@pytest.fixture(scope="module")
def steered() -> SteeredVit:
    return of_kind("plain")


@pytest.fixture(scope="module")
def sessions(steered: SteeredVit) -> list[onnxruntime.InferenceSession]:
    return [open_session(build(steered, SPEC, a, {}).SerializeToString(), a, 1) for a in ("masked", "dispatch")]


scales = st.floats(-50, 50, width=32)
of_site = st.dictionaries(st.integers(0, 11), scales, max_size=2)


@settings(deadline=None, max_examples=40)
@given(st.lists(of_site, min_size=2, max_size=2), st.integers(0, 1000))
def test_images_without_the_latents_are_untouched_to_the_bit(
    steered: SteeredVit, sessions: list[onnxruntime.InferenceSession], drawn_terms: list[dict[int, float]], seed: int
) -> None:
    terms: Terms = {s: tuple(SteeringTerm(k, v) for k, v in of.items()) for s, of in enumerate(drawn_terms) if of}
    pixels = images(12, seed)
    before, after = (inputs_of(pixels, [rows] * 12, 2) for rows in ({}, terms))
    plain = run_torch(steered, before)
    free = ~touched(steered.sae, torch.from_numpy(plain["residual"]).transpose(0, 1), terms).numpy()
    for run in (lambda inputs: run_torch(steered, inputs), *(lambda i, s=s: run_onnx(s, i) for s in sessions)):
        neutral, outputs = run(before), run(after)
        for name, value in outputs.items():
            np.testing.assert_array_equal(value[free], neutral[name][free], strict=True)


def of_latent(steered: SteeredVit, latent: int) -> Examples:
    """240 images; class 0 are those with the latent active at the first site."""
    pixels = torch.from_numpy(images(240))
    found = examples(steered.model, Split(pixels, torch.zeros(240, dtype=torch.int64)))
    own = steered.sae.encode(0, found.residuals[0])[:, latent] != 0
    return replace(found, split=Split(pixels, (~own).long()))


def test_the_search_closes_heads_of_its_images_and_leaves_others_unchanged(steered: SteeredVit) -> None:
    known, macs = of_latent(steered, 0), count(steered.model)  # active on 43 of the 240
    own, others = drawn(known, (0,), 20, seed=0)
    fewer, _ = drawn(known, (0,), 5, seed=0)
    assert torch.equal(fewer.split.images, own.split.images[:5])
    terms = selective(Task(steered.model, macs, own, others, QUICK, 0, False), steered.sae)
    assert {term.shift for of in terms.values() for term in of} == {0}
    method = of_terms(steered.sae, terms)
    effect = measured(macs, known, under(steered.model, known, method, 1.0), (0,))
    assert effect["saved"] > 0.03
    assert (effect["moved"], effect["untouched_others"], effect["others_accuracy_change"]) == (0, 1, 0)
    strength, tried = chosen(steered.model, macs, known, (1,), of_terms(steered.sae, {}))
    assert (strength, len(tried), tried[0]["saved"]) == (1.0, 1, 0)


def test_the_probe_fires_on_its_share_of_the_background(steered: SteeredVit) -> None:
    known, macs = of_latent(steered, 3), count(steered.model)
    own, others = drawn(known, (0,), 50, seed=1)
    task = Task(steered.model, macs, own, others, replace(QUICK, leak=0.1, steps=3), 0, False)
    switch = probe(task)
    for site, residuals in enumerate(others.residuals):
        assert switch.fires(site, residuals).double().mean() == pytest.approx(0.1, abs=0.01)
    assert switch.fires(0, own.residuals[0]).double().mean() > 0.3
    method = of_probe(switch)
    after = under(steered.model, known, method, 1.0)
    free = ~method.touches(known.residuals)
    assert torch.equal(after.logits[free], known.unsteered.logits[free])


def test_principal_components_are_as_sparse_as_asked() -> None:
    x = torch.randn(2, 400, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 3, 1, 1, 0.5, 0.1])
    pca = principal(x, 0.25)
    for site in range(2):
        active = (pca.encode(site, x[site]) != 0).double().mean(0)
        assert active.tolist() == pytest.approx([0.25] * 12, abs=0.01)
        assert pca.decoder[site, 0, 0].abs() > 0.99  # the direction of most variance


def test_merging_adds_changes_by_hand() -> None:
    a: Terms = {0: (SteeringTerm(4, 3.0), SteeringTerm(5, 0.0))}
    b: Terms = {0: (SteeringTerm(4, 0.5),), 2: (SteeringTerm(1, 2.0),)}
    assert composed([a, b]) == {0: (SteeringTerm(4, 2.5), SteeringTerm(5, 0.0)), 2: (SteeringTerm(1, 2.0),)}
    with pytest.raises(ValueError, match=r"latent 4 at site 0 has the shift 1.0; allowed: 0"):
        composed([{0: (SteeringTerm(4, 1.0, 1.0),)}])


def test_verdicts_by_hand() -> None:
    assert verdict(0.08, 0.01, 0.001) == "met"
    assert verdict(0.079, 0.011, 0.002) == "not met: others' compute, accuracy, compute saved"


def test_profiles_without_a_kind_are_of_a_class_or_a_context() -> None:
    entry = {"strategy": "learned", "terms": {}}
    one, two = {**entry, "name": "a", "classes": ["a"]}, {**entry, "name": "b", "classes": ["a", "b"]}
    old = profiles_from_json({"schema_version": 1, "profiles": [one, two, {**two, "name": "c", "kind": "selective"}]})
    assert [profile.kind for profile in old] == ["class", "context", "selective"]
    assert profiles_from_json(profiles_to_json(old)) == old


def test_the_effect_of_a_latent_is_predicted_if_it_is_proportional(steered: SteeredVit) -> None:
    """With a linear gate (no norm, logits far below the bound), the effect of a latent is a number times z."""
    model, sae = copy.deepcopy(steered.model), steered.sae
    for gate in model.gates:
        gate.norm = torch.nn.Identity()
        gate.linear.weight.mul_(1e-4)
    residuals = of_latent(steered, 0).residuals
    for site in effects(model, sae, residuals[:, ::2], residuals[:, 1::2]):
        assert site["latents"] > 0
        assert min(site["r2_effect"], site["r2_variation"], site["r2_median"]) > 0.999
    for site in effects(steered.model, sae, residuals[:, ::2], residuals[:, 1::2]):
        assert site["r2_effect"] < 0.99


def test_projections_keep_what_their_components_explain() -> None:
    x = torch.randn(1, 500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    rebuilt = projection(x, 2)(0, x[0])[1]
    unexplained = (x[0] - rebuilt).square().sum() / (x[0] - x[0].mean(0)).square().sum()
    assert unexplained.item() == pytest.approx((1 + 0.25) / (16 + 4 + 1 + 0.25), rel=0.15)


def test_results_are_kept_for_the_same_bundle_seed_and_images_only(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small search on the committed bundle: without the number of examples of the profiles for the server."""
    for name, value in {"POOL": 300, "CHOOSING": 100, "SERVED": 6, "FROZEN_EPOCHS": 1}.items():
        monkeypatch.setattr(selective_program, name, value)
    monkeypatch.setattr(selective_program, "SelectiveSettings", lambda: SelectiveSettings(terms=4, steps=2, rows=4))

    def run(seed: int) -> tuple[bytes, ...]:
        arguments = [str(bundle.folder), "--out", str(tmp_path), "--images", "3", "--seed", str(seed)]
        assert selective_program.main(arguments) == 0
        names = ("frozen.safetensors", "selective.found.json", "selective.profiles.json")
        return tuple((tmp_path / name).read_bytes() for name in names)

    first = run(0)
    written = (tmp_path / "frozen.safetensors").stat().st_mtime_ns
    assert run(0) == first
    assert (tmp_path / "frozen.safetensors").stat().st_mtime_ns == written, "not fitted again"
    assert all(one != other for one, other in zip(run(1), first, strict=True))
    profiles = profiles_from_json({
        key: value for key, value in json.loads(first[2]).items() if key != "gates_sae_digest"
    })  # fmt: skip
    assert [profile.name for profile in profiles] == [f"selective: {name}" for name in ("tops", "footwear", "rest")]
    assert "linear probe" in capsys.readouterr().out


def test_an_ablation_learns_anew_for_another_bundle_seed_or_set_of_images(
    steered: SteeredVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[tuple[Any, ...]] = []

    def learn(*arguments: Any) -> Learned:
        learnt.append(arguments)
        return Learned(torch.zeros(2, 2, 5), torch.zeros(2, 5), {0: (SteeringTerm(len(learnt), 2.0),)})

    monkeypatch.setattr(ablate, "learn", learn)
    split = Split(torch.from_numpy(images(20)), torch.arange(20) % 2)

    def terms(digest: str, seed: int, files: str) -> Terms:
        data = Data(("a", "b"), SPEC, split, split, split, digests={"training images": files})
        made = Settings(step="evaluate", out=tmp_path, preset="smoke", seed=seed)  # type: ignore[call-arg]
        return ablate._learned_once(made, Run(tmp_path), digest, data, steered.model, steered.sae).terms

    kept = ("bundle", 0, "digest")
    first = terms(*kept)
    assert terms(*kept) == first
    for other in (("another", 0, "digest"), ("bundle", 1, "digest"), ("bundle", 0, "another")):
        assert terms(*other) != first
    assert len(learnt) == 4


PROGRAMS = {"ablate": ablate.main, "selective": selective_program.main, "dictionaries": dictionaries.main}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bundle_of_another_run_is_refused(
    program: str, tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(folder: Path, *flags: str) -> str:
        done = run_main(PROGRAMS[program], str(folder), "--out", str(tmp_path), *flags)
        assert done.returncode == 1
        return done.stderr

    assert f"{rebuild.GRAPH} does not fit the settings of its model: " in said(SMALL / "small" / "1")
    assert "of a deit_small_patch16_224 model cannot be rebuilt" in said(bundle.folder, "--preset", "folder")
    assert run_main(PROGRAMS[program], str(bundle.folder), "--out", str(tmp_path), "--preset", "hats").returncode == 2
    monkeypatch.setattr(rebuild, "rebuild", lambda *_: (bundle, None))
    monkeypatch.setattr(rebuild, "load", lambda *_: SimpleNamespace(labels=("left", "right")))
    assert "has the labels ('T-shirt', " in (error := said(bundle.folder))
    assert "those of preset 'fashion-mnist' are ('left', 'right')" in error


def test_an_ablation_needs_a_profile_of_each_label(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = replace(bundle, profiles={name: bundle.profiles[name] for name in bundle.profiles if name != "Coat"})
    images_ = SimpleNamespace(labels=bundle.manifest.labels)
    monkeypatch.setattr(ablate, "with_images", lambda *_: (some, None, images_))
    done = run_main(ablate.main, str(bundle.folder), "--out", str(tmp_path))
    assert done.returncode == 1
    assert "has no profile 'Coat'; allowed: one for each label" in done.stderr
