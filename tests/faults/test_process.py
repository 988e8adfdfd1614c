"""Faults of the server's process: signals, no memory, no descriptors, no rights."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from service.client import Client
from tests.faults.conftest import Undisturbed
from tests.faults.listed import fault
from tests.faults.protocols import V1, Alone
from tests.faults.sigterm import one_round
from tests.processes import MODELS, SMALL, ServerProcess, run_module, serving, start_server, until
from training.steering import SteeringTerm, profiles_to_json

quiet = partial(serving, MODELS, stderr=subprocess.DEVNULL)
"""A full pipe for its log would block it."""


@fault(
    "process: SIGTERM under load",
    "the right answer to every call that was accepted; UNAVAILABLE to the others, or CANCELLED where a call crosses "
    "with the end; the server exits with 0 in time",
)
@pytest.mark.parametrize("seed", range(2))
def test_sigterm_under_full_load_loses_nothing(
    seed: int, bundle: Bundle, sample_pixels: NDArray[np.uint8], expected: Mapping[str, Alone]
) -> None:
    assert one_round(bundle, sample_pixels, expected, seed).failures() == []


def ready(server: ServerProcess) -> bool:
    try:
        return server.page("readyz") == "OK\n"
    except OSError:  # 503, or nobody listens any more
        return False


@fault("process: second SIGTERM", "UNAVAILABLE: the process ends at once, by that signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(number: signal.Signals, sample_pixels: NDArray[np.uint8]) -> None:
    server = start_server(MODELS, "--threads", "1", "--max-batch", "1")
    try:
        with grpc.insecure_channel(server.address) as channel:
            call = V1.call(channel)
            calls = [call.future(V1.request(np.repeat(sample_pixels, 2, 0)), timeout=60) for _ in range(5)]
            until(lambda: server.count("steervit_queue_images") > 400)
            server.process.send_signal(number)
            until(lambda: not ready(server))
            start = time.monotonic()
            server.process.send_signal(number)
            _, errors = server.process.communicate(timeout=30)
            assert time.monotonic() - start < 2
            assert server.process.returncode == -number
            assert "Traceback" not in errors
            assert {each.code() for each in calls} == {grpc.StatusCode.UNAVAILABLE}
    finally:
        server.process.kill()


@fault("process: SIGHUP", "what has changed in the profile folder (and, followed by `poll`, in the repository) at once")
def test_sighup_looks_at_the_folders_at_once(tmp_path: Path, bundle: Bundle, undisturbed: Undisturbed) -> None:
    profiles, models = tmp_path / "profiles", tmp_path / "models"
    profiles.mkdir()
    shutil.copytree(MODELS, models)
    flags = ("--profiles-dir", str(profiles), "--poll-seconds", "3600", "--model-control", "poll")
    with (
        serving(models, *flags, stderr=subprocess.DEVNULL) as running,
        undisturbed(running) as other,
        Client(running.address) as client,
    ):
        new = f"{bundle.manifest.version + 1}"
        own = {"gates_sae_digest": bundle.manifest.gates_sae_digest}
        content = json.dumps({**profiles_to_json([bundle.profiles["Bag"]]), **own}).replace('"Bag"', '"night"')
        (profiles / "night.json").write_text(content)
        shutil.copytree(bundle.folder, models / "fashion_mnist" / new)
        manifest = json.loads((bundle.folder / "manifest.json").read_text()) | {"version": int(new)}
        (models / "fashion_mnist" / new / "manifest.json").write_text(json.dumps(manifest))
        running.process.send_signal(signal.SIGHUP)
        until(lambda: running.count("steervit_model_info", version=new) == 1)
        until(lambda: "night" in {p.name for p in client.profiles()})
        (profiles / "night.json").write_text("{")
        running.process.send_signal(signal.SIGHUP)
        until(lambda: running.count("steervit_profile_reads_total", result="failed") == 1)
        assert "night" in {p.name for p in client.profiles()}
        other.check()


@fault(
    "process: out-of-memory provider error, then recovery",
    "INTERNAL: `the server failed on this request; its log has the cause`, in the call that needs the memory and no "
    "other; then the right answer",
)
def test_a_batch_that_memory_does_not_suffice_for_fails_alone(
    sample_pixels: NDArray[np.uint8], bundle: Bundle, undisturbed: Undisturbed
) -> None:
    """512 terms on each of 256 images take 100 MB for the autoencoder's rows; the process may have 60 MB more."""
    images = np.resize(sample_pixels, (256, *sample_pixels.shape[1:]))
    greedy = V1.request(images, terms={0: tuple(SteeringTerm(latent) for latent in range(512))})  # neutral ones
    with quiet("--max-batch", "256", "--threads", "1") as server:
        pid = server.process.pid
        with undisturbed(server) as other, grpc.insecure_channel(server.address) as channel:
            other.check()
            sizes = Path(f"/proc/{pid}/status").read_text()
            limit = (int(sizes.partition("VmSize:")[2].split()[0]) << 10) + 60 * 2**20
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            for _ in range(2):
                with pytest.raises(grpc.RpcError) as caught:
                    V1.call(channel)(greedy, timeout=60)
                assert caught.value.code() is grpc.StatusCode.INTERNAL
                assert caught.value.details().startswith(
                    "the server failed on this request; its log has the cause under request "
                )
                name = dict(caught.value.trailing_metadata())["x-request-id"]
                assert caught.value.details().endswith(name)
                other.check()
            resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            answer = V1.read(V1.call(channel)(greedy, timeout=60), bundle)
            plain = V1.read(V1.call(channel)(V1.request(images), timeout=60), bundle)
            np.testing.assert_allclose(answer.probabilities, plain.probabilities, atol=1e-4)


def flood(address: str, count: int) -> contextlib.ExitStack:
    """Open this many connections that send nothing."""
    host, port = address.split(":")
    opened = contextlib.ExitStack()
    for _ in range(count):
        connection = opened.enter_context(socket.socket())
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError):  # where nobody accepts, the system's own queue is full at last
            connection.connect((host, int(port)))
    return opened


@fault("process: connection flood", "answers, as before, on old and new connections")
def test_two_thousand_idle_connections_delay_nobody(undisturbed: Undisturbed, sample_pixels: NDArray[np.uint8]) -> None:
    """The process starts with 1,024 descriptors and raises the limit as far as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 5000:
        pytest.skip(f"the system lets a process have {most} descriptors only")
    with (
        quiet(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))) as server,
        undisturbed(server),
        flood(server.address, 2000),
        flood(server.metrics_url.split("/")[2], 200),
        Client(server.address) as client,
    ):
        assert len(client.predict(list(sample_pixels[:3])).predictions) == 3
        assert ready(server)


@fault(
    "process: connection flood",
    "no descriptor left: answers on connections that are there; UNAVAILABLE or a wait on new ones until the flood ends",
)
def test_connected_clients_are_answered_while_no_descriptor_is_left_and_others_later(
    undisturbed: Undisturbed, sample_pixels: NDArray[np.uint8]
) -> None:
    few = quiet(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)))
    with few as server, undisturbed(server) as other:
        with flood(server.address, 400):
            time.sleep(1)
            other.check()
            with Client(server.address, timeout=1) as late, pytest.raises(grpc.RpcError) as caught:
                late.predict(list(sample_pixels[:1]))
            assert caught.value.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        with Client(server.address) as client:
            until(lambda: answers(client, sample_pixels))


def answers(client: Client, images: NDArray[np.uint8]) -> bool:
    try:
        return len(client.predict(list(images[:1])).predictions) == 1
    except grpc.RpcError:
        return False


@fault("process: port in use", "nothing: the server exits with 1 and says `--port is ...: cannot bind 127.0.0.1:...`")
@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_reported_and_its_owner_is_not_disturbed(
    flag: str, server: ServerProcess, undisturbed: Undisturbed
) -> None:
    taken = {"--port": server.address, "--metrics-port": server.metrics_url.removesuffix("/metrics")}[flag].split(":")[
        -1
    ]
    flags = {"--port": "0", "--metrics-port": "0", flag: taken}
    with undisturbed(server):
        done = run_module("service", "--repository", str(SMALL), *(part for pair in flags.items() for part in pair))
    assert done.returncode == 1
    assert f"{flag} is {taken}: cannot bind 127.0.0.1:{taken}" in done.stderr
    assert "Traceback" not in done.stderr


AS_NOBODY = """
import encodings.cp437, encodings.idna, os, resource, sys  # codecs that are else read when they are needed
from service.__main__ import main
os.chdir("/")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""
"""Works even in a checkout that other users cannot read: the process drops its rights after the imports."""


@fault("process: read-only file system", "answers: the process has no right to write anywhere, nor may any file grow")
@fault("process: non-root", "answers")
def test_the_server_runs_as_nobody_and_writes_nothing(bundle: Bundle, undisturbed: Undisturbed) -> None:
    environment = {**os.environ, "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(shutil.copytree(MODELS, Path(folder) / "models"))
        Path(folder).chmod(0o755)
        with serving(models, program=("-c", AS_NOBODY), env=environment, stderr=subprocess.DEVNULL) as running:
            status = Path(f"/proc/{running.process.pid}/status").read_text()
            assert status.partition("Uid:")[2].split()[:4] != ["0"] * 4
            with undisturbed(running) as other:
                other.check()
            assert ready(running)


READ_ONLY = ("unshare", "-m", "sh", "-c", 'mount --bind / / && mount -o remount,bind,ro / && exec "$@"', "sh")
"""A prefix for a command, which then sees every file but cannot change or create any."""


@fault("process: read-only file system", "answers: `/` is mounted read-only")
def test_the_server_runs_on_a_read_only_file_system(undisturbed: Undisturbed) -> None:
    probe = subprocess.run([*READ_ONLY, "touch", "/steervit-probe"], capture_output=True, text=True)
    if "Read-only file system" not in probe.stderr:
        pytest.skip(f"a mount of our own is not allowed here: {probe.stderr.strip()}")
    with quiet(prefix=READ_ONLY) as running, undisturbed(running) as other:
        other.check()
        assert ready(running)
