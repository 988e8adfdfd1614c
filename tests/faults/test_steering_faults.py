"""Steering that is extreme, mixed, or changed while in use."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from export.bundle import Bundle
from service.client import Client
from service.engine import Engine
from tests.altered import write
from tests.faults.conftest import Undisturbed
from tests.faults.listed import fault
from tests.faults.protocols import PROTOCOLS, UNLIMITED, Alone, Protocol, alone, both
from tests.faults.traffic import Traffic
from tests.processes import MODELS, serving, start_server, stop_server, until
from tests.refusals import refusal
from training.steering import (
    SteeringProfile,
    SteeringTerm,
    Terms,
    at_strength,
    digest,
    profiles_to_json,
)


@pytest.fixture(scope="module")
def closing(bundle: Bundle) -> Terms:
    """Terms for each site that are so strong that they alone decide the gates of its block, and close all of them.

    A gate reads the layer norm of the shifted residual, so its logits follow what each decoder row adds to them: the
    shifts are solved for a little less than minus the bias of each gate.
    """
    weights, found = load_file(bundle.folder / "sae.safetensors"), {}
    for site, latents in enumerate(bundle.manifest.latents):
        rows = weights["decoder"][site] - weights["decoder"][site].mean(1, keepdims=True)  # (latents, dim)
        adds = (
            rows * weights[f"gates.{site}.norm.weight"] @ weights[f"gates.{site}.linear.weight"].T
        )  # (latents, heads)
        bias = weights[f"gates.{site}.linear.weight"] @ weights[f"gates.{site}.norm.bias"]
        bias += weights[f"gates.{site}.linear.bias"]
        wanted = -np.maximum(bias, 0) - 0.05
        strongest = np.argsort(-np.abs(np.linalg.lstsq(adds.T, wanted, rcond=None)[0]))[: latents // 8]
        shifts = np.linalg.lstsq(adds[strongest].T, wanted, rcond=None)[0]
        shifts *= 1e5 / np.abs(shifts).max()
        found[site] = tuple(
            SteeringTerm(int(latent), 0.0, float(shift)) for latent, shift in zip(strongest, shifts, strict=True)
        )
    return found


@both("steering: every head off in a block", "an answer as any other, with a head usage of 0 there")
def test_every_head_off_in_one_block_or_in_all_is_answered(
    protocol: Protocol,
    channel: grpc.Channel,
    traffic: Traffic,
    closing: Terms,
    engine: Engine,
    bundle: Bundle,
    sample_pixels: NDArray[np.uint8],
) -> None:
    images, rows = sample_pixels[::9], range(len(sample_pixels[::9]))
    blocks = [bundle.manifest.gated_blocks.index(site.block) for site in bundle.manifest.sites]
    for sites in (*([site] for site in closing), list(closing)):
        terms = {site: closing[site] for site in sites}
        answer = protocol.read(protocol.call(channel)(protocol.request(images, terms=terms), timeout=30), bundle)
        assert not answer.mask[:, [blocks[site] for site in sites]].any()
        assert answer.probabilities.sum(1) == pytest.approx(1, abs=1e-5)
        assert alone(engine, images, terms).wrong(answer, rows) == []
    assert not answer.mask.any()
    traffic.check()


@both("steering: extreme strengths", "-100 to 100: finite answers; past that INVALID_ARGUMENT, with what is allowed")
def test_extreme_strengths_give_finite_answers_or_a_sentence(
    protocol: Protocol,
    channel: grpc.Channel,
    traffic: Traffic,
    engine: Engine,
    bundle: Bundle,
    sample_pixels: NDArray[np.uint8],
) -> None:
    images, call = sample_pixels[::25], protocol.call(channel)
    for name, profile in bundle.profiles.items():
        for strength in (-100.0, 100.0):
            answer = protocol.read(call(protocol.request(images, name, strength=strength), timeout=30), bundle)
            assert np.isfinite(answer.probabilities).all()
            wanted = alone(engine, images, at_strength(profile.terms, strength))
            assert wanted.wrong(answer, range(len(images))) == []
    strongest = {0: (SteeringTerm(1, -1e6, 1e6), SteeringTerm(2, 1e6, -1e6))}
    answer = protocol.read(call(protocol.request(images, terms=strongest), timeout=30), bundle)
    assert np.isfinite(answer.probabilities).all()
    for terms, profile_name, strength, sentence in (
        (None, "Shirt", 101.0, "steering.strength is 101.0; allowed: -100 to 100"),
        (strongest, "", 2.0, "scale is -2000001.0; allowed: a finite number from -1e6 to 1e6"),
    ):
        code, said = refusal(call, protocol.request(images, profile_name, terms, strength), timeout=30)
        assert code == "INVALID_ARGUMENT"
        assert sentence in said
    traffic.check()


@both("steering: mixed batch equals single requests", "the answer that the image gets alone")
def test_calls_with_every_profile_share_batches_and_get_their_own_answers(
    protocol: Protocol, engine: Engine, bundle: Bundle, sample_pixels: NDArray[np.uint8], undisturbed: Undisturbed
) -> None:
    with (
        serving(MODELS, "--max-delay-ms", "50", "--threads", "1") as running,
        undisturbed(running),
        grpc.insecure_channel(running.address, UNLIMITED) as channel,
    ):
        call, images = protocol.call(channel), sample_pixels[::10]
        names = ("", *bundle.profiles)
        calls = [
            (name, row, call.future(protocol.request(images[row : row + 1], name), timeout=30))
            for row in range(len(images))
            for name in names
        ]
        expected = {name: alone(engine, images, bundle.profiles[name].terms if name else {}) for name in names}
        for name, row, answer in calls:
            assert expected[name].wrong(protocol.read(answer.result(), bundle), [row]) == [], (name, row)
        batches = running.count("steervit_batch_size_images_count")
        assert running.count("steervit_batch_size_images_sum") > 3 * batches, "hardly anything was batched"


@fault(
    "steering: profile store swapped while in use",
    "the old profile or the new one, as the receipt's steering_digest says; never neither, nor a mixture",
)
def test_a_profile_that_changes_in_use_is_either_the_old_or_the_new_one(
    tmp_path: Path, engine: Engine, bundle: Bundle, sample_pixels: NDArray[np.uint8], undisturbed: Undisturbed
) -> None:
    versions = [bundle.profiles["Shirt"].terms, bundle.profiles["Bag"].terms]
    expected: Mapping[str, Alone] = {digest(terms): alone(engine, sample_pixels[:8], terms) for terms in versions}

    def use(terms: Terms) -> None:
        content = profiles_to_json([SteeringProfile("night", ("Bag",), "by hand", terms)])
        content["gates_sae_digest"] = bundle.manifest.gates_sae_digest
        write(tmp_path / "night.json", json.dumps(content))

    use(versions[0])
    running = start_server(MODELS, "--profiles-dir", str(tmp_path), "--poll-seconds", "0.05")
    done, seen, problems = threading.Event(), [], []

    def ask() -> None:
        with Client(running.address) as client:
            while not done.is_set():
                try:
                    answer = client.predict(list(sample_pixels[:8]), profile="night", top_k=10)
                except grpc.RpcError as error:
                    problems.append(f"{error.code().name}: {error.details()}")
                    continue
                seen.append(answer.receipt.steering_digest)
                read = PROTOCOLS[0].read(answer, bundle)
                problems.extend(expected[answer.receipt.steering_digest].wrong(read, range(8)))

    def answered(terms: Terms) -> bool:
        return bool(seen) and seen[-1] == digest(terms)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    try:
        with undisturbed(running):
            for thread in askers:
                thread.start()
            for turn in range(1, 7):
                use(versions[turn % 2])
                until(lambda turn=turn: answered(versions[turn % 2]))  # type: ignore[misc]
            done.set()
    finally:
        done.set()
        for thread in askers:
            thread.join()
        stop_server(running)
    assert problems == []
    assert set(seen) == set(expected)
