"""Profiles from a folder that changes while the server runs, as a ConfigMap or a checkout does."""

import json
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from processes import (
    COMMITTED,
    MODELS,
    SAMPLES,
    SMALL,
    ServerProcess,
    run_main,
    serving,
    start_server,
    stop_server,
    until,
)
from refusals import refusal

from export.bundle import Bundle
from service import check_profiles
from service.__main__ import main as service_main
from service.client import Client
from service.client.__main__ import main
from service.pb import open_inference_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.faults.listed import OPEN_INFERENCE, STEERING, fault
from tests.faults.protocols import OIP
from training.steering import SteeringProfile, SteeringTerm, digest, profiles_to_json

DARK = {1: (SteeringTerm(7, 0.0, 40.0),), 3: (SteeringTerm(2, 2.0, -3.0),)}


def content(bundle: Bundle, *profiles: SteeringProfile, **changes: Any) -> str:
    made_for = {"gates_sae_digest": bundle.manifest.gates_sae_digest}
    return json.dumps({**profiles_to_json(profiles), **made_for, **changes})


def profile(name: str, terms: Any = DARK, head_usage: float | None = None) -> SteeringProfile:
    evaluation = {} if head_usage is None else {"after": {"head_usage": head_usage}}
    return SteeringProfile(name, ("Bag",), "by hand", terms, evaluation)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles") / "followed"


@pytest.fixture(scope="module")
def server(followed: Path) -> Iterator[ServerProcess]:
    followed.mkdir()
    with serving(MODELS, "--profiles-dir", str(followed), "--poll-seconds", "0.1") as running:
        yield running


@pytest.fixture
def folder(followed: Path, client: Client, bundle: Bundle) -> Iterator[Path]:
    """The folder that the server follows; it is emptied after the test."""
    yield followed
    for path in followed.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    until(lambda: names(client) == set(bundle.profiles))


def names(client: Client) -> set[str]:
    return {p.name for p in client.profiles()}


def failed_reads(server: ServerProcess) -> float:
    return server.count("steervit_profile_reads_total", result="failed")


@fault("process: file change", "what the profile folder holds now")
def test_profiles_come_change_and_go_beside_the_bundles_own(
    server: ServerProcess, client: Client, bundle: Bundle, folder: Path, samples: dict[str, list[bytes]]
) -> None:
    own, failed = set(bundle.profiles), failed_reads(server)
    assert names(client) == own
    (folder / "night.json").write_text(content(bundle, profile("night", head_usage=0.3)))
    until(lambda: names(client) == own | {"night"})
    steered, inline = client.predict(samples["Bag"], profile="night"), client.predict(samples["Bag"], terms=DARK)
    assert steered.predictions == inline.predictions
    assert steered.receipt.steering_digest == inline.receipt.steering_digest == digest(DARK)
    assert server.count("steervit_images_total", profile="night") == 10
    assert server.count("steervit_profile_expected_head_usage", profile="night") == 0.3
    assert server.count("steervit_profiles") == len(own) + 1
    (folder / "night.json").write_text(content(bundle, profile("Shirt"), profile("dusk")))
    until(lambda: names(client) == own | {"dusk"})
    assert client.predict(samples["Bag"], profile="Shirt").receipt.steering_digest == digest(DARK)
    for gone in ("night", "Shirt"):  # no profile any more; one without an evaluation
        series = (
            f'steervit_profile_expected_head_usage{{model="fashion_mnist",version="{COMMITTED.name}",profile="{gone}"'
        )
        assert series not in server.page()
    (folder / "night.json").unlink()
    until(lambda: names(client) == own)
    assert client.predict(samples["Bag"], profile="Shirt").receipt.steering_digest == digest(
        bundle.profiles["Shirt"].terms
    )
    assert failed_reads(server) == failed


@fault("process: file change", "the default profile is gone: the profiles as they were before")
def test_the_default_profile_steers_requests_that_ask_for_nothing(
    bundle: Bundle, tmp_path: Path, samples: dict[str, list[bytes]]
) -> None:
    always = replace(bundle.profiles["Bag"], name="always", kind="selective")
    file, files = tmp_path / "a.json", samples["Bag"]
    file.write_text(content(bundle, always))
    flags = ("--profiles-dir", str(tmp_path), "--poll-seconds", "0.1", "--default-profile")
    with serving(MODELS, *flags, "always") as running, Client(running.address) as client:
        kinds = {p.name: p.kind for p in client.profiles()}
        assert (kinds["Bag"], kinds["footwear"], kinds["always"]) == ("class", "context", "selective")
        named, nothing = client.predict(files, profile="always"), client.predict(files)
        assert nothing.predictions == named.predictions
        assert nothing.receipt.profile == "always"
        compared = client.compare(files)
        of_kind = "steervit_profile_request_duration_seconds_count"
        assert running.count(of_kind, profile_group="selective") == 3
        assert [c.steered for c in compared.comparisons] == list(nothing.predictions)
        plain = client.predict(files, strength=0.0)
        assert (plain.receipt.profile, plain.receipt.steering_digest) == ("", digest({}))
        assert list(plain.predictions) == [c.unsteered for c in compared.comparisons] != list(named.predictions)
        assert client.predict(files, strength=0.5).receipt.profile == "always"
        assert client.predict(files, profile="Bag").receipt.profile == "Bag"
        assert client.predict(files, terms=DARK).receipt.profile == ""
        with grpc.insecure_channel(running.address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            request = pb.ModelInferRequest(model_name="fashion_mnist")
            image = request.inputs.add(name="encoded_image", datatype="BYTES", shape=[1])
            image.contents.bytes_contents.append(files[0])
            assert stub.ModelInfer(request).parameters["profile"].string_param == "always"
            request.parameters["strength"].int64_param = 0
            assert "profile" not in stub.ModelInfer(request).parameters
        file.write_text(content(bundle, profile("dusk")))
        until(lambda: failed_reads(running) >= 1)
        assert client.predict(files).receipt.profile == "always"
    done = run_main(service_main, "--repository", str(SMALL), "--default-profile", "nobody", "--port", "0")
    assert done.returncode == 1
    assert "model small version 1: default_profile is 'nobody'; allowed: " in done.stderr


ODD = (
    "caf\xe9",
    "cr\xe8me br\xfbl\xe9e",
    "\uac00\ub098",
    "-rf",
    'a, "b"',
    "\u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f52c",
    "a/b",
    " x ",
    "x" * 200,
)


@fault("request: profile name in another Unicode form", "the answer, which names the composed form", STEERING)
@fault("request: profile name in another Unicode form", "the answer, which names the composed form", OPEN_INFERENCE)
def test_a_profile_is_found_by_its_name_in_either_form(
    server: ServerProcess, client: Client, bundle: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Profiles with names in decomposed form (NFD), as some file systems write them."""
    decomposed = [unicodedata.normalize("NFD", name) for name in ODD]
    assert sum(map(str.__ne__, ODD, decomposed)) == 3
    (folder / "odd.json").write_text(content(bundle, *map(profile, decomposed)))
    until(lambda: names(client) == {*bundle.profiles, *ODD})
    image = SAMPLES / "Bag" / "00134.png"
    stub = GRPCInferenceServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    for name, other in zip(ODD, decomposed, strict=True):
        for form in {name, other}:
            receipt = client.predict([image.read_bytes()], profile=form).receipt
            assert (receipt.profile, receipt.steering_digest) == (name, digest(DARK))
            assert client.profile(form).profile.name == name
            request = OIP.request([image.read_bytes()], form)
            assert stub.ModelInfer(request, timeout=10).parameters["profile"].string_param == name
            assert main(["predict", "--address", server.address, "--profile", form, str(image)]) == 0
            assert f"profile {name}, steering {digest(DARK)}" in capsys.readouterr().out
    flags = [flag for name in decomposed for flag in ("--profile", name)]
    few = ["--seconds", "0.3", "--concurrency", "2", "--json"]
    assert main(["load", "--address", server.address, *flags, *few, str(image)]) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == {}
    for name in ODD:
        label = name.replace('"', r"\"")
        assert server.count("steervit_images_total", profile=label) >= 4, name
    for name, nearest in (("CAF\xc9", "caf\xe9"), ("x", " x "), ("shirt ", "Shirt")):
        assert refusal(client.profile, name)[1].startswith(f"name is {name!r}; allowed: {nearest!r}, ")


WRONG: dict[str, Callable[[Bundle], str]] = {
    "not JSON": lambda _: "{",
    "no digest": lambda bundle: content(bundle, profile("x"), gates_sae_digest=""),
    "another schema": lambda bundle: content(bundle, profile("x"), schema_version=9),
    "a latent that is not there": lambda bundle: content(bundle, profile("x", {0: (SteeringTerm(512, 0.0, 1.0),)})),
    "a site that is not there": lambda bundle: content(bundle, profile("x", {5: (SteeringTerm(1, 0.0, 1.0),)})),
    "a name twice": lambda bundle: content(bundle, profile("night")),
    "a name in two forms": lambda bundle: content(bundle, profile("caf\xe9"), profile("cafe\u0301")),
    "a number that is none": lambda bundle: content(bundle, profile("x")).replace("40.0", "NaN"),
}


@fault("process: file change", "a file that is wrong at the start: NOT_SERVING until it is corrected")
def test_an_invalid_profile_folder_at_the_start_keeps_the_server_not_ready(bundle: Bundle, tmp_path: Path) -> None:
    """The default profile is in the folder too."""
    (tmp_path / "a.json").write_text(content(bundle, profile("night")))
    (tmp_path / "b.json").write_text("{")
    flags = ("--profiles-dir", str(tmp_path), "--poll-seconds", "0.1", "--default-profile", "night")
    running = start_server(MODELS, *flags)
    try:
        with grpc.insecure_channel(running.address) as channel:
            health = HealthStub(channel)

            def served() -> bool:
                return bool(health.Check(HealthCheckRequest()).status == HealthCheckResponse.SERVING)

            with pytest.raises(HTTPError) as refused:
                running.page("readyz")
            assert refused.value.code == 503
            said = f"{tmp_path / 'b.json'}: "
            assert refused.value.read().decode().startswith(f"Service Unavailable\n{said}")
            assert running.page("livez") == "OK\n"
            assert running.count("steervit_ready") == running.count("steervit_profiles_last_read_successful") == 0
            assert not served()
            (tmp_path / "b.json").unlink()
            until(lambda: running.count("steervit_ready") == 1)
            assert running.page("readyz") == "OK\n"
            until(served)
            (tmp_path / "b.json").write_text("{")  # later, the last valid set is retained
            until(lambda: running.page("readyz").startswith(f"OK\ndegraded, as profiles are unchanged: {said}"))
            assert served()
            with Client(running.address) as client:
                assert "night" in names(client)
    finally:
        log = stop_server(running)
    assert f"not ready: {said}" in log
    assert f"profiles are unchanged: {said}" in log


def test_a_folder_is_checked_without_a_server(bundle: Bundle, tmp_path: Path) -> None:
    def checked(*flags: str) -> tuple[int, str, list[str]]:
        done = run_main(check_profiles.main, str(tmp_path), "--bundle", str(MODELS), *flags)
        return done.returncode, done.stdout, done.stderr.splitlines()

    file, model = tmp_path / "a.json", f"{bundle.manifest.name} {bundle.manifest.version}"
    assert checked() == (1, "", [f"{tmp_path} has no .json file"])
    file.write_text(content(bundle, profile("night"), profile("dusk")))
    assert checked("--default-profile", "dusk") == (0, f"{file}: night, dusk; for {model}\n", [])
    code, _, (problem,) = checked("--default-profile", "dawn")
    assert code == 1
    assert "default_profile is 'dawn'; allowed: " in problem
    wrong = {tmp_path / f"{number}.json": of(bundle) for number, of in enumerate(WRONG.values())}
    for path, text in wrong.items():
        path.write_text(text)
    (tmp_path / "z.json").write_text(content(bundle, profile("next"), gates_sae_digest="0123456789abcdef"))
    code, _, problems = checked()
    assert code == 1
    alone = {path for path, text in wrong.items() if text != WRONG["a name twice"](bundle)}
    assert {Path(problem.partition(": ")[0]) for problem in problems} == alone | {tmp_path / "z.json"}, "all of them"
    assert problems[-1].endswith(f"which no bundle has; allowed: {bundle.manifest.gates_sae_digest}")
    for path in (*alone, tmp_path / "z.json"):
        path.unlink()
    ((problem),) = checked()[2]
    assert problem.endswith("profile 'night' is in another file too; allowed: once")


@fault("process: file change", "one wrong file: the profiles as they were before")
@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_file_keeps_the_whole_old_set(
    wrong: str, server: ServerProcess, client: Client, bundle: Bundle, folder: Path
) -> None:
    before, failed = names(client) | {"night"}, failed_reads(server)
    (folder / "a.json").write_text(content(bundle, profile("night")))
    until(lambda: names(client) == before)
    (folder / "b.json").write_text(WRONG[wrong](bundle))
    (folder / "c.json").write_text(content(bundle, profile("dusk")))
    until(lambda: failed_reads(server) > failed)
    time.sleep(0.3)
    assert names(client) == before
    assert server.count("steervit_profiles_last_read_successful") == 0
    (folder / "b.json").unlink()
    until(lambda: names(client) == before | {"dusk"})
    assert server.count("steervit_profiles_last_read_successful") == 1


@fault("process: file change", "a profile folder that is gone: the profiles as they were before")
def test_a_folder_that_is_gone_keeps_the_old_set(
    server: ServerProcess, client: Client, bundle: Bundle, folder: Path
) -> None:
    elsewhere = folder.with_name("elsewhere")
    done = run_main(service_main, "--repository", str(MODELS), "--profiles-dir", str(elsewhere))
    assert done.returncode == 1
    assert f"profiles_dir is {elsewhere}; allowed: a folder" in done.stderr
    (folder / "a.json").write_text(content(bundle, profile("night")))
    until(lambda: "night" in names(client))
    failed = failed_reads(server)
    folder.rename(elsewhere)
    until(lambda: server.count("steervit_profiles_last_read_successful") == 0)
    time.sleep(0.3)
    assert "night" in names(client)
    assert failed_reads(server) == failed + 1, "logged once"
    elsewhere.rename(folder)
    until(lambda: server.count("steervit_profiles_last_read_successful") == 1)
    assert "night" in names(client)


def test_profiles_of_another_model_are_left_alone(
    server: ServerProcess, client: Client, bundle: Bundle, folder: Path
) -> None:
    """As in a rollout, when the profiles of the next version arrive before it."""
    (folder / "next.json").write_text(content(bundle, profile("next"), gates_sae_digest="0123456789abcdef"))
    (folder / "now.json").write_text(content(bundle, profile("now")))
    until(lambda: "now" in names(client))
    assert "next" not in names(client)
    assert server.count("steervit_profiles_unused") == 1
    assert refusal(client.predict, [bytes(0)], profile="next")[0] == "NOT_FOUND"


def test_a_mounted_config_map_is_followed_through_its_links(
    server: ServerProcess, client: Client, bundle: Bundle, folder: Path
) -> None:
    """Kubernetes writes a new folder and points the link `..data` to it; the files are links through `..data`."""
    for number, name in enumerate(("one", "two")):
        (folder / f"..{number}").mkdir()
        (folder / f"..{number}" / "profiles.json").write_text(content(bundle, profile(name)))
    (folder / "..data").symlink_to("..0")
    (folder / "profiles.json").symlink_to("..data/profiles.json")
    until(lambda: "one" in names(client))
    (folder / "..data_tmp").symlink_to("..1")
    (folder / "..data_tmp").rename(folder / "..data")
    until(lambda: "two" in names(client))
    assert "one" not in names(client)


def test_thousands_of_profiles_do_not_make_thousands_of_series(
    server: ServerProcess, client: Client, bundle: Bundle, folder: Path, samples: dict[str, list[bytes]]
) -> None:
    before = len(server.page().splitlines())
    many = [profile(f"p{number:05d}") for number in range(5000)]
    (folder / "many.json").write_text(content(bundle, *many))
    until(lambda: server.count("steervit_profiles") == len(bundle.profiles) + 5000)
    for name in ("p00000", "p04999"):
        client.predict(samples["Bag"], profile=name)
    own, each = 200, before / (len(bundle.profiles) + 2)
    assert len(server.page().splitlines()) < before + (own + 1) * each
    assert server.count("steervit_images_total", profile="p00000") == 10
    assert server.count("steervit_images_total", profile="other") == 10
