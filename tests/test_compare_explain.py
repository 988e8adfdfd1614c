"""Compare, Explain, GetModel, GetProfile and shadow sampling, on the real server."""

import re
from pathlib import Path

import grpc
import numpy as np
import pytest
from masks import unit_mask
from numpy.typing import NDArray
from processes import MODELS, ServerProcess, run_main, serving
from refusals import refusal

from export.bundle import Bundle
from service.client import Client
from service.client.__main__ import main
from service.engine import Engine, usable_cpus
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from training.steering import SteeringTerm, at_strength, to_arrays


def test_compare_gives_both_answers_and_their_differences(
    client: Client, bundle: Bundle, samples: dict[str, list[bytes]]
) -> None:
    files = [file for label in ("Shirt", "Coat", "Bag") for file in samples[label]]
    found = client.compare(files, profile="Shirt", top_k=10)
    unsteered, steered = client.predict(files, top_k=10), client.predict(files, profile="Shirt", top_k=10)
    before, after = ([getattr(c, side) for c in found.comparisons] for side in ("unsteered", "steered"))
    np.testing.assert_array_equal(unit_mask(before), unit_mask(unsteered.predictions))
    np.testing.assert_array_equal(unit_mask(after), unit_mask(steered.predictions))
    assert found.receipt.steering_digest == steered.receipt.steering_digest
    assert found.receipt.head_usage == pytest.approx(unit_mask(after)[:, :, : bundle.manifest.heads].mean())
    changed = 0
    for row, comparison in enumerate(found.comparisons):
        logits = np.array([comparison.unsteered_logits, comparison.steered_logits])
        labels = [side.classes[0].index for side in (comparison.unsteered, comparison.steered)]
        assert logits.argmax(1).tolist() == labels
        assert comparison.same_label == (labels[0] == labels[1])
        mask = unit_mask([comparison.unsteered, comparison.steered])
        blocks = bundle.manifest.gated_blocks
        heads = bundle.manifest.heads
        expected = [(blocks[b], unit, bool(mask[1, b, unit])) for b, unit in np.argwhere(mask[0] != mask[1]).tolist()]
        changed_heads = [(c.block, c.head, c.opened) for c in comparison.head_changes]
        assert changed_heads == [change for change in expected if change[1] < heads]
        changed_groups = [(c.block, heads + c.mlp_group, c.opened) for c in comparison.mlp_changes]
        assert changed_groups == [change for change in expected if change[1] >= heads]
        change = found.comparisons[row].steered.compute_fraction - found.comparisons[row].unsteered.compute_fraction
        assert comparison.compute_fraction_change == pytest.approx(change, abs=1e-6)
        changed += len(expected)
    assert changed > len(files)


def test_explain_says_what_the_graph_computes(
    client: Client, bundle: Bundle, samples: dict[str, list[bytes]], sample_pixels: NDArray[np.uint8]
) -> None:
    """Gate logits computed on the host equal the graph's; the profile's terms are applied as documented."""
    engine = Engine(bundle, "cpu", 1)
    terms = at_strength(bundle.profiles["Shirt"].terms, 0.5)
    files = samples["Shirt"][:4]
    first = 10 * sorted(samples).index("Shirt")
    shirts = sample_pixels[first : first + 4]
    rows = to_arrays([terms] * 4, len(bundle.manifest.sites))
    graph = engine.run(shirts, rows)
    found = client.explain(files, profile="Shirt", strength=0.5, latents=5)
    assert [e.prediction for e in found.explanations] == list(
        client.predict(files, profile="Shirt", strength=0.5).predictions
    )
    for image, explanation in enumerate(found.explanations):
        assert [site.block for site in explanation.sites] == [site.block for site in bundle.manifest.sites]
        for site in explanation.sites:
            np.testing.assert_allclose(site.gate_logits, graph.gate_logit[image, site.site], atol=1e-3)
            assert site.active_latents >= sum(latent.value != 0 for latent in site.latents)
            of_site = {term.latent: term for term in terms.get(site.site, ())}
            assert len(site.latents) <= 5 + len(of_site)
            assert {latent.latent for latent in site.latents} >= set(of_site)
            for latent in site.latents:
                term = of_site.get(latent.latent, SteeringTerm(latent.latent))
                assert latent.steered_value == pytest.approx(term.scale * latent.value + term.shift, abs=1e-4)


def test_an_effect_is_what_happens_without_the_latent(
    client: Client, bundle: Bundle, samples: dict[str, list[bytes]]
) -> None:
    """A term that turns a latent off (scale 0) moves the gates of its site by minus the latent's effect."""
    (plain,) = client.explain(samples["Bag"][:1], latents=3).explanations
    for site in plain.sites:
        for latent in site.latents:
            off = {site.site: (SteeringTerm(latent.latent, 0.0, 0.0),)}
            (without,) = client.explain(samples["Bag"][:1], terms=off, latents=1).explanations
            change = np.array(site.gate_logits) - np.array(without.sites[site.site].gate_logits)
            np.testing.assert_allclose(latent.gate_effects, change, atol=2e-3)


def test_getmodel_has_all_that_a_client_needs(server: ServerProcess, bundle: Bundle) -> None:
    """It suffices for pixels of the right shape, a term of each site's last latent, and to understand the answer."""
    stub = SteeringServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    model = stub.GetModel(pb.GetModelRequest(), timeout=10)
    assert (model.model, model.bundle_digest) == ("fashion_mnist", bundle.digest)
    assert (model.graph, model.provider, model.profiles) == ("dispatch.fp32", "cpu", len(bundle.profiles))
    assert model.instances.instances * model.instances.threads == usable_cpus()
    assert (model.instances.max_batch, model.instances.source) == (32, "default")
    request = pb.PredictRequest(top_k=len(model.labels))
    request.images.add(pixels=bytes(model.height * model.width * model.channels))
    request.steering.gates_sae_digest = model.gates_sae_digest
    for index, site in enumerate(model.sites):
        request.steering.terms.add(site=index, latent=site.latents - 1, shift=1.0)
    answer = stub.Predict(request, timeout=10)
    assert {(c.index, c.label) for c in answer.predictions[0].classes} == set(enumerate(model.labels))
    assert [block.block for block in answer.predictions[0].head_mask] == list(model.gated_blocks)
    assert {len(block.kept) for block in answer.predictions[0].head_mask} == {model.heads}
    request.steering.terms.add(site=len(model.sites), shift=1.0)
    assert refusal(stub.Predict, request, timeout=10)[0] == "INVALID_ARGUMENT"
    assert refusal(stub.GetModel, pb.GetModelRequest(version="9"), timeout=10)[0] == "NOT_FOUND"


def test_a_profile_is_given_with_its_terms(server: ServerProcess, bundle: Bundle) -> None:
    stub = SteeringServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    found = stub.GetProfile(pb.GetProfileRequest(name="Coat"), timeout=10)
    expected = bundle.profiles["Coat"]
    assert found.profile.name == "Coat"
    assert found.gates_sae_digest == bundle.manifest.gates_sae_digest
    given = {(t.site, t.latent): (t.scale, t.shift) for t in found.terms}
    assert given == {(s, t.latent): (t.scale, t.shift) for s, terms in expected.terms.items() for t in terms}
    code, said = refusal(stub.GetProfile, pb.GetProfileRequest(name="Hat"), timeout=10)
    assert code == "NOT_FOUND"
    assert said.startswith("name is 'Hat'; allowed: 'Ankle boot'")
    request = pb.ExplainRequest(latents=101)
    request.images.add(pixels=bytes(784))
    assert "latents is 101; allowed: 0 (10) to 100" in refusal(stub.Explain, request, timeout=10)[1]


def test_shadowed_images_are_counted_and_do_not_change_the_answers(
    client: Client, bundle: Bundle, samples: dict[str, list[bytes]]
) -> None:
    flags = ("--shadow-fraction", "1", "--max-profile-series", "3")
    with serving(MODELS, *flags) as running, Client(running.address) as shadowed:
        answers = {label: shadowed.predict(files, profile=label) for label, files in samples.items()}
        shadowed.predict(samples["Bag"])
        pairs = {label: client.compare(files, profile=label) for label, files in samples.items()}
        for label, answer in answers.items():
            assert [p.head_mask for p in answer.predictions] == [c.steered.head_mask for c in pairs[label].comparisons]
        own = sorted(bundle.profiles)[:3]
        for label in samples:
            series = label if label in own else "other"
            assert running.count("steervit_shadow_images_total", profile=series) == (10 if label in own else 70)
        every = [c for answer in pairs.values() for c in answer.comparisons]
        assert running.count("steervit_shadow_agreed_total") == sum(c.same_label for c in every)
        for side in ("steered", "unsteered"):
            kept = unit_mask(getattr(c, side) for c in every)[:, :, : bundle.manifest.heads].sum()
            assert running.count("steervit_shadow_heads_kept_total", steering=side) == kept
        assert running.count("steervit_images_total", profile="other") == 70
        assert running.count("steervit_images_total", profile="none") == 10
        assert running.count("steervit_gated_heads") == 30
        stated = bundle.profiles[own[0]].evaluation["after"]["head_usage"]
        assert running.count("steervit_profile_expected_head_usage", profile=own[0]) == pytest.approx(stated)
        assert 'profile="Trouser"' not in running.page()


def test_the_command_line_shows_them(server: ServerProcess, samples: dict[str, list[bytes]], tmp_path: Path) -> None:
    (tmp_path / "bag.png").write_bytes(samples["Bag"][0])
    ask = ("--profile", "Bag", "--address", server.address, str(tmp_path / "bag.png"))
    done = run_main(main, "compare", *ask)
    assert done.returncode == 0, done.stderr
    assert "unsteered  " in done.stdout
    assert " -> " in done.stdout
    done = run_main(main, "explain", "--latents", "2", *ask)
    assert done.returncode == 0, done.stderr
    assert "block 5" in done.stdout
    assert "unsteered gate" in done.stdout
    assert "value  steered     h0     h1     h2     h3     h4     h5     m0     m1     m2     m3\n" in done.stdout
    latents = [line.split()[2:4] for line in done.stdout.splitlines() if line.startswith("latent ")]
    assert latents
    assert ["0.00", "+0.00"] not in latents
    assert re.search(r"site 0 \(block 1\), \d+ latents active; \d+ inactive ones left out\n", done.stdout)
