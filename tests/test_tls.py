"""TLS of the real server, with certificates that are right, wrong, expired, missing and replaced."""

import datetime
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from processes import SAMPLES, SMALL, ServerProcess, run_main, run_module, serving, until

from service.__main__ import main as service_main
from service.client import Client
from service.client.__main__ import main
from service.config import Settings
from service.tls import Certificates

BAG = next((SAMPLES / "Bag").glob("*.png"))
YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
Mutual = tuple[ServerProcess, Path, trustme.CA]
"""A server that admits clients with a certificate of this authority, and the authority's file."""


def write(folder: Path, certificate: trustme.LeafCert) -> None:
    """Write certificate and key, each file at once."""
    for name, blob in (
        ("server.pem", certificate.cert_chain_pems[0]),
        ("server.key", certificate.private_key_pem),
    ):
        (folder / f"{name}.part").write_bytes(blob.bytes())
        (folder / f"{name}.part").rename(folder / name)


def asks(server: ServerProcess, ca: trustme.CA, own: trustme.LeafCert | None = None) -> str:
    """The status of one call by a client that trusts `ca` and shows its own certificate."""
    shown = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()) if own else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes(), *shown)
    try:
        with Client(server.address, 5, credentials) as client:
            client.predict([BAG.read_bytes()])
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def flags(folder: Path, *names: str) -> list[str]:
    """names: of server.pem, server.key and clients.pem, the files to use."""
    of = {"server.pem": "--tls-certificate", "server.key": "--tls-key", "clients.pem": "--tls-client-ca"}
    return [part for name in names for part in (of[name], str(folder / name))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ca: trustme.CA) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    write(folder, ca.issue_cert("127.0.0.1"))
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[ServerProcess]:
    with serving(SMALL, *flags(folder, "server.pem", "server.key")) as running:
        yield running


@pytest.fixture
def server(running: ServerProcess, folder: Path, ca: trustme.CA) -> ServerProcess:
    """The server with a certificate of `ca`, whatever earlier tests have put in its place."""
    write(folder, ca.issue_cert("127.0.0.1"))
    until(lambda: asks(running, ca) == "OK")
    return running


def test_clients_that_trust_the_authority_get_in_and_others_do_not(server: ServerProcess, ca: trustme.CA) -> None:
    assert asks(server, ca) == "OK"
    assert asks(server, trustme.CA()) == "UNAVAILABLE"
    with Client(server.address, 5) as plain, pytest.raises(grpc.RpcError) as caught:
        plain.predict([BAG.read_bytes()])
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.page("readyz") == "OK\n", "probes need no certificate"


def test_a_replaced_certificate_is_used_and_a_torn_one_is_not(
    server: ServerProcess, folder: Path, ca: trustme.CA
) -> None:
    other = trustme.CA()
    write(folder, other.issue_cert("127.0.0.1"))
    until(lambda: asks(server, other) == "OK")
    assert asks(server, ca) == "UNAVAILABLE"
    (folder / "server.pem").unlink()
    assert asks(server, other) == "OK"


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory, ca: trustme.CA) -> Iterator[Mutual]:
    folder, clients = tmp_path_factory.mktemp("mutual"), trustme.CA()
    write(folder, ca.issue_cert("127.0.0.1"))
    clients.cert_pem.write_to_path(str(folder / "clients.pem"))
    with (
        (folder / "log").open("w") as log,
        serving(
            SMALL, *flags(folder, "server.pem", "server.key", "clients.pem"), "--access-log", "1", stderr=log
        ) as running,
    ):
        yield running, folder / "clients.pem", clients


def test_with_an_authority_of_clients_only_theirs_get_in(mutual: Mutual, tmp_path: Path, ca: trustme.CA) -> None:
    running, authority, clients = mutual
    mine = clients.issue_cert("client")
    assert asks(running, ca, mine) == "OK"
    assert '"certificate": "client"' in (authority.parent / "log").read_text()
    assert running.count("steervit_certificate_expiry_timestamp_seconds", file="client_ca") > time.time()
    assert asks(running, ca) == "UNAVAILABLE", "no certificate"
    assert asks(running, ca, ca.issue_cert("client")) == "UNAVAILABLE", "of another authority"
    assert asks(running, ca, clients.issue_cert("client", not_after=YESTERDAY)) == "UNAVAILABLE", "expired"
    tls = {"--tls-ca": ca.cert_pem, "--tls-certificate": mine.cert_chain_pems[0], "--tls-key": mine.private_key_pem}
    for flag, blob in tls.items():
        blob.write_to_path(str(tmp_path / flag))
    paths = [part for flag in tls for part in (flag, str(tmp_path / flag))]
    done = run_main(main, "predict", str(BAG), "--address", running.address, *paths)
    assert done.returncode == 0, done.stderr
    assert "Bag" in done.stdout


@pytest.mark.parametrize("flag", ["--tls-certificate", "--tls-key"])
def test_a_client_with_half_a_certificate_is_told_so(flag: str) -> None:
    done = run_main(main, "predict", str(BAG), "--tls-ca", str(BAG), flag, str(BAG))
    assert done.returncode == 2
    assert done.stderr.endswith("--tls-certificate and --tls-key belong together; allowed: both or none\n")


def test_a_new_key_is_ignored_until_its_certificate_arrives(
    server: ServerProcess, folder: Path, ca: trustme.CA
) -> None:
    """The two files are replaced one after the other."""
    other = trustme.CA()
    new = other.issue_cert("127.0.0.1")
    new.private_key_pem.write_to_path(str(folder / "server.key"))
    for _ in range(3):
        assert asks(server, ca) == "OK"
    new.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
    until(lambda: asks(server, other) == "OK")
    (folder / "server.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    for _ in range(3):
        assert asks(server, other) == "OK"


def test_clients_refuse_an_expired_server_and_get_in_when_it_is_renewed(
    server: ServerProcess, folder: Path, ca: trustme.CA
) -> None:
    write(folder, ca.issue_cert("127.0.0.1", not_after=YESTERDAY))
    until(lambda: asks(server, ca) == "UNAVAILABLE")
    expiry = "steervit_certificate_expiry_timestamp_seconds"
    assert server.count(expiry, file="certificate") == int(YESTERDAY.timestamp())
    write(folder, ca.issue_cert("127.0.0.1"))
    until(lambda: asks(server, ca) == "OK")
    assert server.count(expiry, file="certificate") > time.time()


def test_the_authority_of_clients_can_be_replaced_while_the_server_runs(mutual: Mutual, ca: trustme.CA) -> None:
    running, path, clients = mutual
    new = trustme.CA()
    assert asks(running, ca, clients.issue_cert("client")) == "OK"
    new.cert_pem.write_to_path(str(path))
    until(lambda: asks(running, ca, new.issue_cert("client")) == "OK")
    assert asks(running, ca, clients.issue_cert("client")) == "UNAVAILABLE", "of the authority before"
    clients.cert_pem.write_to_path(str(path))
    until(lambda: asks(running, ca, clients.issue_cert("client")) == "OK")


def test_a_client_without_a_certificate_reaches_no_service_at_all(mutual: Mutual, ca: trustme.CA) -> None:
    """Not inference, model control, health or reflection."""
    running, _, _ = mutual
    before = running.count("steervit_requests_total")
    with grpc.secure_channel(running.address, grpc.ssl_channel_credentials(ca.cert_pem.bytes())) as channel:
        for call in (
            "/steering.v1.SteeringService/Predict",
            "/inference.GRPCInferenceService/RepositoryModelUnload",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            assert channel.unary_unary(call).future(b"", timeout=5).code() is grpc.StatusCode.UNAVAILABLE
    assert running.count("steervit_requests_total") == before


def test_old_versions_of_tls_are_not_spoken(server: ServerProcess, ca: trustme.CA) -> None:
    host, port = server.address.split(":")
    for version, spoken in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
        context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, version
        context.set_alpn_protocols(["h2"])
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            if spoken:
                context.wrap_socket(plain, server_hostname=host).close()
                continue
            with pytest.raises(OSError, match=r"(?i)eof|reset|alert"):
                context.wrap_socket(plain, server_hostname=host)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tls-key", "x.key"), "--tls-certificate and --tls-key belong together; allowed: both or none"),
        (("--tls-client-ca", "x.pem"), "--tls-client-ca is given without --tls-certificate and --tls-key"),
    ],
)
def test_half_a_setting_is_refused(flags: tuple[str, ...], message: str) -> None:
    done = run_main(service_main, "--repository", str(SMALL), *flags)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    settings = Settings(repository=SMALL, tls_certificate=tmp_path / "none.pem", tls_key=tmp_path / "none.key")
    with pytest.raises(OSError, match=r"none\.pem"):
        Certificates(settings)


@pytest.mark.parametrize("name", ["server.pem", "server.key", "clients.pem"])
def test_an_unusable_tls_file_is_named_instead_of_the_port(name: str, tmp_path: Path, ca: trustme.CA) -> None:
    write(tmp_path, ca.issue_cert("127.0.0.1"))
    ca.cert_pem.write_to_path(str(tmp_path / "clients.pem"))
    (tmp_path / name).write_text("garbage")
    tls = flags(tmp_path, "server.pem", "server.key", "clients.pem")
    done = run_module("service", "--repository", str(SMALL), "--port", "0", "--metrics-port", "0", *tls)
    assert done.returncode == 1
    assert f"{tmp_path / name}" in done.stderr.splitlines()[-1]
    assert "allowed: PEM files that belong together" in done.stderr
    assert "cannot bind" not in done.stderr
    assert "Traceback" not in done.stderr
