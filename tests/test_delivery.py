"""Bundles through a real registry and out of a store, to a running server: tests/registries.py has the registry."""

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import oras.client
import pytest
import trustme
from processes import ROOT, SMALL, run_main, run_module, serving, until
from registries import (
    BASIC,
    HTPASSWD,
    PASSWORD,
    USER,
    Registry,
    files_at,
    hub_mirror,
    line_to,
    registry,
    tokens,
)

from export.bundle import Bundle, BundleError, load_bundle, write_bundle
from service.catalogue import scan
from service.cli import main
from service.client import Client
from service.delivery import errors
from service.delivery.artefact import ARTEFACT, TITLE, files_of
from service.delivery.credentials import IDENTITY, Credentials, credentials
from service.delivery.errors import DeliveryError
from service.delivery.reference import Reference
from service.delivery.registry import Document, digest_of

FOLDER = SMALL / "small" / "1"
POLL = ("--model-control", "poll", "--poll-seconds", "0.1")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's own credentials, and no long waits."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.01)


def steervit(*arguments: object) -> str:
    """What a command that must succeed prints."""
    done = run_main(main, *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return str(done.stdout).strip()


def refusal(*arguments: object) -> str:
    """Why a command fails."""
    done = run_main(main, *map(str, arguments))
    assert done.returncode == 1, done.stdout
    return str(done.stderr).strip()


def second(folder: Path) -> Path:
    """Version 2 of the small model, with another profile."""
    bundle = load_bundle(FOLDER)
    files = {name: (FOLDER / name).read_bytes() for name in bundle.manifest.files}
    profiles = json.loads(files["profiles.json"])
    profiles["profiles"][0]["name"] = "new"
    return write_bundle(
        folder, replace(bundle.manifest, version=2), {**files, "profiles.json": json.dumps(profiles).encode()}
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_goes_through_a_registry_and_is_served(hub: Registry, tmp_path: Path) -> None:
    pinned = steervit("push", FOLDER, f"{hub.host}/models/small")
    assert re.fullmatch(rf"{hub.host}/models/small:1@sha256:[0-9a-f]{{64}}", pinned)
    assert steervit("push", FOLDER, f"oci://{hub.host}/models/small") == pinned, (
        "the digest depends on the bundle alone"
    )
    digest = load_bundle(FOLDER).digest
    for state in ("pulled", "already there"):
        pulled = steervit("pull", pinned, tmp_path / "models", "--digest", digest)
        assert pulled == f"{tmp_path}/models/small/1: {state}, digest {digest}"
    assert contents(tmp_path / "models") == {f"small/1/{name}": content for name, content in contents(FOLDER).items()}
    with serving(tmp_path / "models") as server, Client(server.address) as client:
        assert [model.name for model in client.models()] == ["small"]


def test_other_clients_read_it_and_mirrors_keep_its_digest(hub: Registry, tmp_path: Path) -> None:
    pinned = steervit("push", FOLDER, f"{hub.host}/models/read")
    oras.client.OrasClient(insecure=True).pull(pinned, outdir=str(tmp_path / "oras"))
    assert contents(tmp_path / "oras") == contents(FOLDER)
    mirror = pinned.replace("models/read:1@", "mirror/small@")
    copy = ["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", f"docker://{hub.host}/models/read:1"]
    subprocess.run([*copy, f"docker://{hub.host}/mirror/small:1"], check=True, capture_output=True)
    steervit("pull", mirror, tmp_path / "models")
    assert contents(tmp_path / "models" / "small" / "1") == contents(FOLDER)


def test_an_image_has_the_files_at_its_root(hub: Registry, tmp_path: Path) -> None:
    pinned = steervit("push", "--image", FOLDER, f"{hub.host}/models/small")
    assert ":1-image@" in pinned
    for architecture in ("amd64", "arm64"):
        place = tmp_path / architecture
        source = f"docker://{pinned.replace(':1-image', '')}"
        arguments = ["--override-arch", architecture, "copy", "--src-tls-verify=false", source, f"dir:{place}"]
        subprocess.run(["skopeo", *arguments], check=True, capture_output=True)
        for layer in json.loads((place / "manifest.json").read_bytes())["layers"]:
            with tarfile.open(place / layer["digest"].removeprefix("sha256:"), "r:") as archive:
                assert {entry.mode for entry in archive} == {0o444}
                archive.extractall(place / "root", filter="data")
        assert contents(place / "root") == contents(FOLDER)
        assert list(scan(place / "root")) == ["small"], "mounted as the repository it is a single bundle"
    assert "an image for volumes; allowed: application/vnd.steervit.bundle.v1," in refusal("pull", pinned, tmp_path)


def test_a_tag_is_moved_only_on_request_and_a_digest_stays(hub: Registry, tmp_path: Path) -> None:
    stable, new = f"{hub.host}/models/tagged:stable", second(tmp_path)
    first = steervit("push", FOLDER, stable)
    assert f"tag {stable} is sha256:" in refusal("push", new, stable)
    steervit("push", new, stable, "--move-tag")
    assert "/small/2: pulled" in steervit("pull", stable, tmp_path / "now")
    assert "/small/1: pulled" in steervit("pull", first, tmp_path / "pinned")
    assert steervit("push", FOLDER, stable, "--move-tag") == first
    assert "/small/1: pulled" in steervit("pull", stable, tmp_path / "back")


def test_rollback_and_canary_are_a_pull_with_a_label(hub: Registry, tmp_path: Path) -> None:
    reference, repository = f"{hub.host}/models/labelled", tmp_path / "models"
    steervit("push", FOLDER, reference)
    steervit("push", second(tmp_path / "made"), reference)
    canary = ("pull", f"{reference}:2", repository, "--label", "canary")
    assert "no 'stable', so the newest version serves requests that name none; allowed: 'stable' first" in refusal(
        *canary
    )
    assert not repository.exists()
    steervit("pull", f"{reference}:1", repository, "--label", "stable")
    with serving(repository, *POLL) as server, Client(server.address) as client:

        def profiles(label: str) -> set[str]:
            try:
                return {profile.name for profile in client.profiles("small", label)}
            except grpc.RpcError:  # the bundle is seen before its label
                return set()

        old = profiles("stable")
        steervit(*canary)
        until(lambda: "new" in profiles("canary"))
        assert profiles("") == profiles("stable") == old
        steervit("pull", f"{reference}:2", repository, "--label", "stable")
        until(lambda: "new" in profiles(""))
        steervit("pull", f"{reference}:1", repository, "--label", "stable")
        until(lambda: profiles("") == old)
        assert "new" in profiles("canary")
    assert json.loads((repository / "small" / "labels.json").read_text()) == {"stable": 1, "canary": 2}
    (repository / "small" / "labels.json").write_text("{")
    assert "labels.json" in refusal("pull", f"{reference}:1", repository, "--label", "stable")
    assert "label is 'Stable'; allowed: [a-z]" in refusal("pull", f"{reference}:1", repository, "--label", "Stable")


def test_nothing_is_overwritten_and_only_the_bundle_that_is_named_is_taken(hub: Registry, tmp_path: Path) -> None:
    reference = f"{hub.host}/models/other"
    made = load_bundle(second(tmp_path))
    files = {name: (FOLDER / name).read_bytes() for name in made.manifest.files}
    write_bundle(tmp_path / "models", made.manifest, files)
    steervit("push", made.folder, reference)
    before = contents(tmp_path / "models")
    assert f"not {made.digest}; allowed: a new version" in refusal("pull", f"{reference}:2", tmp_path / "models")
    wrong = refusal("pull", f"{reference}:2", tmp_path / "empty", "--digest", "0" * 16)
    assert wrong == f"DeliveryError: digest of the bundle is {made.digest}; allowed: {'0' * 16}"
    assert contents(tmp_path / "models") == before
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        (b"steervit.bundle.digest", b"steervit.bundle.digesT", "manifests/sha256:"),
        (b'"schema_version"', b'"schema_Version"', "manifest.json does not have the digest of its layer"),
        (b"node_Shape_0", b"node_shape_0", "dispatch.fp32.onnx has 125470 bytes and the SHA-256 "),
    ],
)
def test_what_was_changed_on_the_way_does_not_arrive_and_a_later_pull_does(
    hub: Registry, tmp_path: Path, right: bytes, wrong: bytes, reason: str
) -> None:
    pinned = Reference.parse(steervit("push", FOLDER, f"{hub.host}/models/small"))
    models = tmp_path / "models"
    with line_to(hub.host) as line:
        line.changes = lambda part: part.replace(right, wrong)
        assert reason in refusal("pull", replace(pinned, host=line.host), models)
        assert not [path for path in models.rglob("*") if not path.name.startswith(".") and path.parent.name == "small"]
        line.changes = lambda part: part
        assert "/small/1: pulled" in steervit("pull", replace(pinned, host=line.host), models)
    assert [path.name for path in (models / "small").iterdir()] == ["1"], "nothing is left beside it"


def test_a_pull_over_a_bad_line_loads_no_byte_twice(hub: Registry, bundle: Bundle, tmp_path: Path) -> None:
    """Cut on every connection after 5 MB, killed, and started again."""
    reference = Reference.parse(steervit("push", bundle.folder, f"{hub.host}/models/large"))
    size = sum(entry.size for entry in bundle.manifest.files.values())
    with line_to(hub.host) as line:
        line.limit = 5e6
        pulled = replace(reference, host=line.host)
        steervit("pull", pulled, tmp_path / "cut")
        assert size < line.sent < size * 1.01
        assert (
            load_bundle(tmp_path / "cut" / bundle.manifest.name / str(bundle.manifest.version)).digest == bundle.digest
        )

        line.sent, line.limit = 0, float("inf")
        line.wait = lambda sent: time.sleep(3600 if sent > 8e6 else 0)
        models = tmp_path / "killed"
        command = [sys.executable, "-m", "service.cli", "pull", str(pulled), str(models)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
            until(lambda: sum(path.stat().st_size for path in models.rglob("*")) > 5e6)
            process.send_signal(signal.SIGKILL)
        with pytest.raises(BundleError):
            scan(models)
        there = sum(path.stat().st_size for path in models.rglob("*") if path.is_file())
        line.sent, line.wait = 0, lambda sent: None
        steervit("pull", pulled, models)
        manifest = (bundle.folder / "manifest.json").stat().st_size  # is asked for again
        assert line.sent < size - there + manifest + 5e4
    assert list(scan(models)) == [bundle.manifest.name]


def test_two_pulls_of_one_bundle_wait_for_each_other(hub: Registry, tmp_path: Path) -> None:
    pinned = steervit("push", FOLDER, f"{hub.host}/models/small")
    command = [sys.executable, "-m", "service.cli", "pull", pinned, str(tmp_path)]
    pulls = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    states = sorted(pull.communicate(timeout=60)[0].split(": ")[1].split(",")[0] for pull in pulls)
    assert states == ["already there", "already there", "pulled"]


def test_a_registry_is_asked_with_the_credentials_of_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    with registry(tmp_path, auth={"htpasswd": {"realm": "here", "path": str(tmp_path / "htpasswd")}}) as own:
        push = ("push", FOLDER, f"{own.host}/small")
        assert f"asks for credentials; allowed: `docker login {own.host}`" in refusal(*push)
        configure({"auths": {own.host: {"auth": "d3Jvbmc6d3Jvbmc="}}})
        assert "401 UNAUTHORIZED authentication required" in refusal(*push)
        configure({"auths": {f"https://{own.host}/v2/": {"auth": BASIC}}})
        steervit(*push)
        helper = tmp_path / "bin" / "docker-credential-vault"
        helper.parent.mkdir()
        secret = json.dumps({"ServerURL": own.host, "Username": USER, "Secret": PASSWORD})
        helper.write_text(f"#!/bin/sh\nread -r host; [ $host = {own.host} ] && echo '{secret}'\n")
        helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(helper.parent), prepend=os.pathsep)
        configure({"credHelpers": {own.host: "vault"}})
        steervit("pull", f"{own.host}/small:1", tmp_path / "models")
    configure({"auths": {"a.example": {"identitytoken": "t"}, "b.example": {"auth": "?"}}, "credsStore": "../sh"})
    assert credentials("a.example") == Credentials(IDENTITY, "t")
    for host in ("b.example", "c.example"):
        with pytest.raises(DeliveryError, match=r"config\.json"):
            credentials(host)


def configure(value: object) -> None:
    folder = Path(os.environ["DOCKER_CONFIG"])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(value))


def test_tokens_are_asked_for_with_what_the_command_needs(tmp_path: Path) -> None:
    with tokens(tmp_path) as service, registry(tmp_path, auth=service.settings) as own:
        push = ("push", FOLDER, f"{own.host}/models/small")
        assert "401 UNAUTHORIZED" in refusal(*push)
        configure({"auths": {own.host: {"auth": BASIC}}})
        service.asked.clear()
        steervit(*push)
        assert service.asked == [("repository:models/small:pull,push", True)], "one token for all requests"
        configure({})
        service.asked.clear()
        steervit("pull", f"{own.host}/models/small:1", tmp_path / "models")
        assert service.asked == [("repository:models/small:pull", False)]


def test_a_store_to_which_a_registry_redirects_gets_no_credentials(tmp_path: Path) -> None:
    """As registries do that keep blobs in an object store."""
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = {"htpasswd": {"realm": "here", "path": str(tmp_path / "htpasswd")}}
    with files_at(tmp_path / "data") as (address, requests):
        middleware = {"storage": [{"name": "redirect", "options": {"baseurl": address}}]}
        with registry(tmp_path, auth=auth, middleware=middleware) as own:
            configure({"auths": {own.host: {"auth": BASIC}}})
            steervit("push", FOLDER, f"{own.host}/small")
            steervit("pull", f"{own.host}/small:1", tmp_path / "models")
    assert len(requests) == len(list(FOLDER.iterdir()))
    assert not any("Authorization" in headers for headers in requests)


def test_plain_http_is_for_this_machine_or_by_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 is this machine too, but it is not called localhost."""
    with registry(tmp_path, "127.0.0.2:0") as own:
        assert "without TLS: --plain-http" in refusal("push", FOLDER, f"{own.host}/small")
        steervit("push", FOLDER, f"{own.host}/small", "--plain-http")
        steervit("pull", f"{own.host}/small:1", tmp_path / "models", "--plain-http")
    authority = trustme.CA()
    (tmp_path / "tls").mkdir()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.2").private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    keys = {"tls": {"certificate": str(tmp_path / "own.pem"), "key": str(tmp_path / "own.pem")}}
    with registry(tmp_path / "tls", "127.0.0.2:0", http=keys) as own:
        push = ("push", FOLDER, f"{own.host}/small")
        assert "certificate verify failed" in (untrusted := refusal(*push))
        assert "SSL_CERT_FILE" in untrusted
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        steervit(*push)
    with files_at(tmp_path / "tls" / "data", "127.0.0.3") as (address, requests):
        middleware = {"storage": [{"name": "redirect", "options": {"baseurl": address}}]}
        with registry(tmp_path / "tls", "127.0.0.2:0", http=keys, middleware=middleware) as own:
            assert f"leads to '{address}" in refusal("pull", f"{own.host}/small:1", tmp_path / "other")
    assert not requests


def test_a_bundle_comes_from_a_folder_that_fsspec_reads(tmp_path: Path) -> None:
    steervit("pull", f"file://{FOLDER}", tmp_path / "models")
    assert contents(tmp_path / "models" / "small" / "1") == contents(FOLDER)
    shutil.copytree(FOLDER, tmp_path / "wrong")
    (tmp_path / "wrong" / "sae.safetensors").write_bytes(bytes(6968))
    assert "sae.safetensors has 6968 bytes and the SHA-256" in refusal(
        "pull", f"file://{tmp_path}/wrong", tmp_path / "no"
    )
    assert "FileNotFoundError" in refusal("pull", f"file://{tmp_path}/none", tmp_path / "no")
    assert "Protocol not known: ftps" in refusal("pull", "ftps://example.com/small/1", tmp_path / "no")
    assert "allowed: https, or http with --plain-http" in refusal("pull", "http://example.com/1", tmp_path / "no")


def test_a_pull_that_cannot_write_names_the_file_and_is_resumed(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        message = refusal("pull", f"file://{FOLDER}", tmp_path / "models")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.fullmatch(r"OSError: .*File too large: '.*/models/small/\.1\.pull-\w+/dispatch\.fp32\.onnx'", message)
    assert not (tmp_path / "models" / "small" / "1").exists()
    steervit("pull", f"file://{FOLDER}", tmp_path / "models")
    assert contents(tmp_path / "models" / "small" / "1") == contents(FOLDER)


def test_a_bundle_comes_from_a_mirror_of_hugging_face_hub(tmp_path: Path) -> None:
    with hub_mirror(SMALL) as address:
        source, digest = "hf://org/models/small/1", load_bundle(FOLDER).digest
        done = run_module("service.cli", "pull", source, str(tmp_path), "--digest", digest, HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "small" / "1") == contents(FOLDER)


def test_the_commands_of_the_page_do_what_it_says(hub: Registry, tmp_path: Path) -> None:
    """In their order, with a registry and folders of this machine; of digests that it shortens, none."""
    small = load_bundle(FOLDER)
    files = {name: (FOLDER / name).read_bytes() for name in small.manifest.files}
    for version in (3, 4):
        write_bundle(tmp_path, replace(small.manifest, name="fashion_mnist", version=version), files)
    steervit("push", tmp_path / "fashion_mnist" / "4", f"{hub.host}/models/fashion_mnist")
    page = (ROOT / "docs" / "delivery.md").read_text()
    commands = re.findall(r"^steervit (pu[^#\n]*)", page, re.M)
    commands += re.findall(r"`steervit (pu[^`]+ [^`]+)`", page)
    assert len(commands) >= 8
    places = {
        "registry.example.com": hub.host,
        " models/": f" {tmp_path}/",
        "s3://bucket": f"file://{tmp_path}",
        "file:///media/disk": f"file://{tmp_path}",
        " /models": f" {tmp_path}/models",
        " deploy/profiles": f" {ROOT}/deploy/profiles",
        " /profiles": f" {tmp_path}/profiles",
    }
    for command in commands:
        for name, place in places.items():
            command = command.replace(name, place)
        if not command.endswith("--image"):
            steervit(*re.sub(r"(@sha256:|--digest )\S+", "", command).split())
    labels = json.loads((tmp_path / "models" / "fashion_mnist" / "labels.json").read_text())
    assert labels == {"stable": 3, "canary": 4}, "the rollback comes last"


def test_profiles_go_through_a_registry_to_running_servers(hub: Registry, tmp_path: Path) -> None:
    bundle, reference, folder = load_bundle(FOLDER), f"{hub.host}/profiles/small", tmp_path / "served" / "profiles"
    value = json.loads((FOLDER / "profiles.json").read_bytes())
    for tag in ("one", "two"):
        profiles = [{**value["profiles"][0], "name": tag}]
        (tmp_path / tag).mkdir()
        content = {**value, "gates_sae_digest": bundle.manifest.gates_sae_digest, "profiles": profiles}
        (tmp_path / tag / "own.json").write_text(json.dumps(content))
        steervit("push", tmp_path / tag, f"{reference}:{tag}")
    assert "allowed for profiles: one with a tag" in refusal("push", tmp_path / "one", reference)
    steervit("pull", f"{reference}:one", folder)
    flags = ("--profiles-dir", str(folder), "--poll-seconds", "0.1")
    with serving(SMALL, *flags) as server, Client(server.address) as client:
        for tag, other in (("one", "two"), ("two", "one"), ("one", "two")):
            steervit("pull", f"{reference}:{tag}", folder)
            until(lambda: tag in {profile.name for profile in client.profiles()})  # noqa: B023
            assert other not in {profile.name for profile in client.profiles()}
    assert "neither --digest nor --label" in refusal("pull", f"{reference}:one", folder, "--label", "stable")
    assert "is not a link; allowed: a new name, or the link" in refusal("pull", f"{reference}:one", tmp_path / "one")
    (tmp_path / "two" / "own.json").write_text("{}")
    assert "schema_version is missing" in refusal("push", tmp_path / "two", f"{reference}:three")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({TITLE: "../manifest.json"}, "'../manifest.json'; allowed: [A-Za-z0-9]"),
        ({TITLE: "manifest.json"}, "once"),
        ({}, "KeyError"),
        ({"digest": "md5:0"}, "'md5:0'"),
        ({"digest": f"sha256:{'g' * 64}"}, "sha256:ggg"),
        ({"size": -1}, "size -1"),
        ({"size": True}, "size True"),
    ],
)
def test_a_hostile_manifest_is_refused(layer: dict[str, object], reason: str) -> None:
    right = {"digest": f"sha256:{'0' * 64}", "size": 1, "annotations": {TITLE: "manifest.json"}}
    wrong = {**right, "annotations": {TITLE: "other.json"}}
    wrong |= {"annotations": layer} if TITLE in layer or not layer else layer
    content = json.dumps({"artifactType": ARTEFACT, "layers": [right, wrong]}).encode()
    with pytest.raises(DeliveryError, match=re.escape(reason)):
        files_of(Document(content, digest_of(content)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fashion_mnist:1", "reference is 'fashion_mnist:1'"),
        ("models/fashion_mnist:1", "registry is 'models'; allowed: a name with a dot or a port, or localhost"),
        ("r.example/Models/small", "the path in lower case"),
        ("r.example/small@sha256:12", "64 hexadecimal digits"),
        ("r.example/../small", "reference is"),
        ("r.example/small", "allowed: one with a tag or a digest"),
    ],
)
def test_a_reference_names_its_registry(text: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal("pull", text, tmp_path)


def test_references_are_read_as_they_are_written() -> None:
    digest = f"sha256:{'0' * 64}"
    for text in (
        "localhost/a",
        "r.example:5000/a/b__c/d-e.f:1.0-x",
        f"[::1]:5000/a:1@{digest}",
        f"r.example/a@{digest}",
    ):
        assert str(Reference.parse(text)) == text
