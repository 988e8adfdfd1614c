"""A rolling restart, rehearsed: two real servers, a client that balances over them, each server stopped and started
again under load. The client does what deploy/kubernetes/README.md tells users to do, and nothing more."""

import signal
import threading
from collections import Counter

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import ROOT, SMALL, ServerProcess, start_server, stop_server, until

from service.client import Client
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub

SERVICE_CONFIG = (ROOT / "service" / "client" / "service_config.json").read_text()
CALLERS = 64
"""Enough for calls to be in flight at any moment. Without the client's health check, 13 of 24 stops failed calls."""
FLAGS = ("--threads", "1", "--max-connection-age-seconds", "1", "--drain-delay-seconds", "0.5")
"""Connections also end by age, far more often than in production."""


class Load:
    """Calls without a pause, from several threads over one channel. The result of each call is counted."""

    def __init__(self, channel: grpc.Channel, requests: list[pb.PredictRequest], labels: list[str]):
        self._stub = SteeringServiceStub(channel)  # type: ignore[no-untyped-call]
        self._work = list(zip(requests, labels, strict=True))
        self._stop = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(CALLERS)]

    def _run(self, index: int) -> None:
        while not self._stop.is_set():
            request, label = self._work[index % len(self._work)]
            index += 1
            try:
                answer = self._stub.Predict(request, timeout=10)
                outcome = "right" if answer.predictions[0].classes[0].label == label else "wrong"
            except grpc.RpcError as error:
                outcome = f"{error.code().name}: {error.details()}"
            self.outcomes[outcome] += 1

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def answered(server: ServerProcess) -> float:
    return server.count("steervit_requests_total", method="/steering.v1.SteeringService/Predict", code="OK")


def start_again(server: ServerProcess) -> ServerProcess:
    """On the same port."""
    stop_server(server)
    return start_server(SMALL, *FLAGS, "--port", server.address.rpartition(":")[2])


@pytest.mark.slow
def test_a_rolling_restart_under_load_fails_no_call(samples: dict[str, list[bytes]]) -> None:
    servers = [start_server(SMALL, *FLAGS) for _ in range(2)]
    try:
        files = [files[0] for files in samples.values()]
        with Client(servers[0].address) as client:
            labels = [prediction.classes[0].label for prediction in client.predict(files).predictions]
        requests = [pb.PredictRequest(images=[pb.Image(encoded=file)], top_k=1) for file in files]
        addresses = "ipv4:" + ",".join(server.address for server in servers)
        options = [("grpc.service_config", SERVICE_CONFIG)]
        with grpc.insecure_channel(addresses, options) as channel, Load(channel, requests, labels) as load:
            until(lambda: all(answered(server) > 100 for server in servers))
            for index in range(2):
                servers[index] = start_again(servers[index])
                # A deployment starts new pods before it stops old ones; here a port waits until its client reconnects.
                until(lambda found=servers[index]: answered(found) > 100, 60)
        assert set(load.outcomes) == {"right"}, load.outcomes
        assert load.outcomes["right"] > 400
    finally:
        for server in servers:
            stop_server(server)


def test_a_stopping_server_tells_watchers_before_it_refuses_calls(
    samples: dict[str, list[bytes]],
) -> None:
    server = start_server(SMALL, "--drain-delay-seconds", "3")
    request = pb.PredictRequest(images=[pb.Image(encoded=samples["Bag"][0])])
    with grpc.insecure_channel(server.address) as channel:  # without a service config, so it ignores the health
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        answer = SteeringServiceStub(channel).Predict(request, timeout=10)  # type: ignore[no-untyped-call]
        assert len(answer.predictions) == 1
        assert list(watched) == [], "ended, so that it does not hold up the server for drain_seconds"
        server.process.communicate(timeout=15)
    assert server.process.returncode == 0
