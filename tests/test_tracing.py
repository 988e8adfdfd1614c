"""Traces: spans that a collector receives over OTLP, and exemplars that a Prometheus scrapes.

The collector is the sink of oteltest, the test tool of OpenTelemetry's Python developers.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from oteltest import sink
from oteltest.sink.handler import RequestHandler
from processes import COMMITTED, MODELS, ROOT, SMALL, run_main, serving, start_server, stop_server, until
from prometheus import JOB, running
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from service.__main__ import main
from service.client import AsyncClient, Client
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.pb.steering_pb2_grpc import SteeringServiceStub

PREDICT = "steering.v1.SteeringService/Predict"
EXEMPLARS = "--enable-feature=exemplar-storage"
"""Prometheus keeps none without it."""


class Collector(RequestHandler):  # type: ignore[misc]
    """Receives spans over OTLP. `spans` has all so far, with their attributes as a dict of Python values."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}

    def handle_trace(self, request: Any, headers: dict[str, str]) -> None:
        for of in request.resource_spans:
            self.resource = attributes(of.resource)
            self.spans += [span for scope in of.scope_spans for span in scope.spans]

    def handle_metrics(self, request: Any, headers: dict[str, str]) -> None:
        raise AssertionError("the server sends traces alone")

    handle_logs = handle_metrics

    def trace(self, trace_id: int) -> list[Any]:
        return [span for span in self.spans if span.trace_id == trace_id.to_bytes(16)]


class Local(HTTPServer):
    """What the sink listens with, on this machine alone and on a free port."""

    def __init__(self, address: tuple[str, int], handler: Any):
        super().__init__(("127.0.0.1", 0), handler)


def attributes(of: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in of.attributes}


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector, and its URL."""
    collector = Collector()
    with patch("oteltest.sink.HTTPServer", Local):
        receiver = sink.HttpSink(collector, logging.getLogger("oteltest"))
        receiver.start()
        until(lambda: receiver.httpd is not None)
    yield collector, f"http://127.0.0.1:{receiver.httpd.server_port}"
    receiver.stop()


def application() -> Any:
    """The tracer of an application that calls the server. It does not send its own spans."""
    return TracerProvider(shutdown_on_exit=False).get_tracer("application")


def seconds(span: Any) -> float:
    return float(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_trace_spans_client_to_inference_with_the_times_of_the_receipt(
    samples: dict[str, list[bytes]],
) -> None:
    """40 images in batches of 16, so three batches."""
    files = [file for of_class in samples.values() for file in of_class][:40]
    with (
        collecting() as (collector, url),
        serving(MODELS, "--otlp-endpoint", url, "--instances", "1", "--max-batch", "16") as server,
        Client(server.address) as client,
    ):
        before = time.time_ns()
        with application().start_as_current_span("checkout") as span:
            answer = client.predict(files, profile="Bag", request_id="order-66")
        after = time.time_ns()
    trace = collector.trace(span.get_span_context().trace_id)
    assert len(trace) == 9, "what was left was sent before the end"
    (call,) = (found for found in trace if found.name == PREDICT)
    assert call.parent_span_id == span.get_span_context().span_id.to_bytes(8)
    assert before < call.start_time_unix_nano < call.end_time_unix_nano < after
    assert (call.kind, call.status.code) == (call.SPAN_KIND_SERVER, call.status.STATUS_CODE_UNSET)
    known = attributes(call)
    assert known.pop("network.peer.port") > 0
    assert known == {
        "rpc.system.name": "grpc", "rpc.method": PREDICT, "rpc.response.status_code": "OK",
        "network.peer.address": "127.0.0.1", "steervit.model": "fashion_mnist", "steervit.version": COMMITTED.name,
        "steervit.profile": "Bag", "steervit.images": 40, "steervit.request_id": "order-66",
    }  # fmt: skip
    by_id = {found.span_id: found for found in trace}
    within = [(found, by_id[found.parent_span_id]) for found in trace if found is not call]
    names = sorted((found.name, parent.name) for found, parent in within)
    a_batch = [("batch", PREDICT), ("inference", "batch")]
    assert names == sorted([("decode", PREDICT), ("queue", PREDICT), *3 * a_batch])
    for found, parent in within:
        assert parent.start_time_unix_nano <= found.start_time_unix_nano
        assert found.end_time_unix_nano <= parent.end_time_unix_nano
    by_name = {name: [found for found in trace if found.name == name] for name, _ in names}
    (decode,), (queue,), batches = by_name["decode"], by_name["queue"], by_name["batch"]
    assert seconds(queue) == pytest.approx(answer.receipt.queue_seconds, abs=1e-3)
    assert sum(map(seconds, by_name["inference"])) == pytest.approx(answer.receipt.inference_seconds, abs=1e-5)
    assert decode.end_time_unix_nano <= min(found.start_time_unix_nano for found in batches)
    assert queue.end_time_unix_nano == pytest.approx(max(found.start_time_unix_nano for found in batches), abs=1e6)
    assert sorted(attributes(found)["steervit.batch_images"] for found in batches) == [8, 16, 16]
    assert collector.resource["service.name"] == "steervit"


async def ask_in_every_way(address: str, files: list[bytes]) -> dict[str, int]:
    """The trace IDs of calls within spans: answered, refused, and late; by the request IDs of the calls."""
    traces = {}
    async with AsyncClient(address, attempts=1) as client:
        for request_id, image, timeout in (
            ("good", files[0], 30.0),
            ("bad", b"no image", 30.0),
            ("late", files[0], 0.2),
        ):
            with application().start_as_current_span("page") as span:
                traces[request_id] = span.get_span_context().trace_id
                with contextlib.suppress(grpc.RpcError):
                    await client.predict([image], request_id=request_id, timeout=timeout)
    return traces


def test_traces_and_exemplars_of_every_kind_of_call(samples: dict[str, list[bytes]], tmp_path: Path) -> None:
    """An answer, a refusal, a call that is late in the queue, where batches that are not full wait, one whose client
    does not want it sampled, one without a trace, and a probe."""
    soon = os.environ | {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_RESOURCE_ATTRIBUTES": "service.name=shop"}
    with collecting() as (collector, url):
        server = start_server(MODELS, "--otlp-endpoint", url, "--access-log", "1", "--max-delay-ms", "600", env=soon)
        with running(tmp_path, {JOB: urlsplit(server.metrics_url).netloc}, EXEMPLARS) as prometheus:
            until(lambda: bool(prometheus.query("steervit_ready")))
            begun = time.time()
            traces = asyncio.run(ask_in_every_way(server.address, samples["Bag"]))
            with grpc.insecure_channel(server.address) as channel:
                stub = SteeringServiceStub(channel)  # type: ignore[no-untyped-call]
                image = pb.PredictRequest(images=[pb.Image(encoded=samples["Bag"][0])])
                unwanted = f"00-{5:032x}-{6:016x}-00"
                stub.Predict(image, metadata=(("traceparent", unwanted), ("x-request-id", "unwanted")))
                stub.Predict(image, metadata=(("traceparent", "nonsense"), ("x-request-id", "alone")))
                assert GRPCInferenceServiceStub(channel).ServerReady(oi.ServerReadyRequest()).ready  # type: ignore[no-untyped-call]
            until(lambda: sum(found.name == PREDICT for found in collector.spans) == 4)

            def exemplars(name: str) -> list[Any]:
                expr = f"steervit_{name}_duration_seconds_bucket"
                found = prometheus.get("query_exemplars", query=expr, start=begun, end=time.time() + 1)
                return [(of["seriesLabels"], exemplar) for of in found for exemplar in of["exemplars"]]

            until(lambda: all(map(exemplars, ("request", "queue", "inference", "decode"))))
            shown = {name: exemplars(name) for name in ("request", "queue", "inference", "decode")}
        accept = urllib.request.Request(server.metrics_url, headers={"Accept": "application/openmetrics-text"})
        with urllib.request.urlopen(accept) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        assert families[-1].name.startswith("process_"), "the whole page, as its own parser reads it"
        assert "trace_id" not in server.page(), "the other format has no exemplars"
        errors = stop_server(server)
    calls = {attributes(found)["steervit.request_id"]: found for found in collector.spans if found.name == PREDICT}
    assert calls.keys() == {"good", "bad", "late", "alone"}
    assert {found.name for found in collector.spans} == {PREDICT, "decode", "queue", "batch", "inference"}
    assert collector.resource["service.name"] == "shop"
    assert [found.name for found in collector.trace(traces["bad"])] == [PREDICT], "it was refused before the queue"
    refused = attributes(calls["bad"])
    assert refused["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert "error.type" not in refused, "an error of the client is none of the server"
    late = {found.name: found for found in collector.trace(traces["late"])}
    assert late.keys() == {PREDICT, "decode", "queue"}, "that is where it was when its time was over"
    assert late["queue"].end_time_unix_nano == late[PREDICT].end_time_unix_nano
    assert seconds(late["queue"]) > 0.1
    assert attributes(late[PREDICT])["error.type"] == "DEADLINE_EXCEEDED"
    assert late[PREDICT].status.code == late[PREDICT].status.STATUS_CODE_ERROR
    assert (len(calls["alone"].trace_id), calls["alone"].parent_span_id) == (16, b"")
    lines = [json.loads(line.partition(": ")[2]) for line in errors.splitlines() if " steervit.requests: " in line]
    logged = {line["request_id"]: line["trace_id"] for line in lines}
    assert logged == {name: call.trace_id.hex() for name, call in calls.items()} | {"unwanted": f"{5:032x}"}
    for name, found in shown.items():
        by_span = {exemplar["labels"]["span_id"]: (of, exemplar) for of, exemplar in found}
        assert by_span.keys() <= {call.span_id.hex() for call in calls.values()}
        for of, exemplar in by_span.values():
            assert float(exemplar["value"]) <= float(of["le"])
            assert name != "request" or of["method"] == f"/{PREDICT}"
            (call,) = (call for call in calls.values() if call.span_id.hex() == exemplar["labels"]["span_id"])
            assert exemplar["labels"]["trace_id"] == call.trace_id.hex()
            assert name != "request" or float(exemplar["value"]) == pytest.approx(seconds(call), abs=1e-6)


def test_a_stopping_server_does_not_wait_for_a_missing_collector(samples: dict[str, list[bytes]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts connections and never answers
        server = start_server(SMALL, "--otlp-endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with Client(server.address) as client:
            assert client.model().model == "small"
        begun = time.monotonic()
        stop_server(server)
    assert time.monotonic() - begun < 10


def test_without_the_flag_nothing_of_opentelemetry_is_imported(samples: dict[str, list[bytes]]) -> None:
    """Neither by the server nor by a client whose application has no spans."""
    code = (
        "import asyncio, sys; from service.config import Settings; from service.server import Server\n"
        "async def main():\n"
        f"    server = Server(Settings(repository={str(SMALL)!r}, port=0, metrics_port=0, drain_delay_seconds=0))\n"
        "    await server.start()\n"
        "    from service.client import AsyncClient\n"
        "    async with AsyncClient(f'127.0.0.1:{server.port}') as client: await client.model()\n"
        "    await server.stop()\n"
        "asyncio.run(main()); print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("url", ["collector:4317", "grpc://collector", "http://collector/?key=1", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(url: str) -> None:
    done = run_main(main, "--repository", str(SMALL), "--otlp-endpoint", url)
    assert done.returncode == 2
    assert done.stderr.startswith(f"--otlp-endpoint is {url!r}: ")
