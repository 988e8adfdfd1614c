"""Traces: spans that a collector receives over OTLP, and exemplars that a Prometheus scrapes.

The collector here is the receiving end of the protocol alone: HTTP, and the messages of opentelemetry-proto.
"""

import gzip
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.sdk.trace import TracerProvider
from processes import MODELS, ROOT, start_server, stop_server, until
from prometheus import JOB, running
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from service.client import AsyncClient, Client
from service.config import Settings
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub

PREDICT = "steering.v1.SteeringService/Predict"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
"""Milliseconds between two exports."""


class Collector:
    """Receives spans over OTLP; `spans` are all so far, with their attributes as a dict of Python values."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}

    def take(self, body: bytes) -> None:
        for of in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = attributes(of.resource)
            self.spans += [span for scope in of.scope_spans for span in scope.spans]

    def trace(self, trace_id: str) -> list[Any]:
        return [span for span in self.spans if span.trace_id.hex() == trace_id]


def attributes(of: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in of.attributes}


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector, and its URL."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known = (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
            if known:
                collector.take(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200 if known else 400)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield collector, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def predicted_within_a_span(address: str, files: list[bytes]) -> tuple[Any, str, pb.PredictResponse]:
    """The application's span, its trace ID, and the answer to a call in it."""
    with TracerProvider(shutdown_on_exit=False).get_tracer("app").start_as_current_span("checkout") as span:
        with Client(address) as client:
            answer = client.predict(files, profile="Bag", request_id="order-66")
    return span, f"{span.get_span_context().trace_id:032x}", answer


def test_one_trace_leads_from_the_client_to_the_inference_with_the_times_of_the_receipt(
    samples: dict[str, list[bytes]],
) -> None:
    """40 images in batches of 16: three batches. Parents are checked with times: each span lies within its parent."""
    flags = ("--instances", "1", "--max-batch", "16")
    with collecting() as (collector, url):
        server = start_server(MODELS, "--otlp-endpoint", url, *flags, env=os_environ(SOON))
        files = [file for of_class in samples.values() for file in of_class][:40]
        before = time.time_ns()
        span, trace_id, answer = predicted_within_a_span(server.address, files)
        after = time.time_ns()
        assert stop_server(server) == 0, "and what is left is sent before the end"
        by_id = {found.span_id: found for found in collector.trace(trace_id)}
        (call,) = (found for found in by_id.values() if found.name == PREDICT)
        assert call.parent_span_id.hex() == f"{span.get_span_context().span_id:016x}"
        assert (call.kind, call.status.code) == (call.SPAN_KIND_SERVER, 0)
        (peer_port,) = (attributes(call)["network.peer.port"],)
        assert attributes(call) == {
            "rpc.system.name": "grpc", "rpc.method": PREDICT, "rpc.response.status_code": "OK",
            "network.peer.address": "127.0.0.1", "network.peer.port": peer_port,
            "steervit.model": "fashion_mnist", "steervit.version": "3", "steervit.profile": "Bag",
            "steervit.images": 40, "steervit.request_id": "order-66",
        }  # fmt: skip
        assert before < call.start_time_unix_nano < call.end_time_unix_nano < after
        within = {id_: by_id[found.parent_span_id] for id_, found in by_id.items() if found is not call}
        parents = sorted((by_id[id_].name, parent.name) for id_, parent in within.items())
        each = [("batch", PREDICT), ("decode", PREDICT), ("inference", "batch"), ("queue", PREDICT)]
        assert parents == sorted([*each, *[("batch", PREDICT), ("inference", "batch")] * 2])
        for id_, parent in within.items():
            assert parent.start_time_unix_nano <= by_id[id_].start_time_unix_nano
            assert by_id[id_].end_time_unix_nano <= parent.end_time_unix_nano
        took = {name: [seconds(found) for found in by_id.values() if found.name == name] for name in dict(each)}
        assert took["queue"] == [pytest.approx(answer.receipt.queue_seconds, abs=1e-5)]
        assert sum(took["inference"]) == pytest.approx(answer.receipt.inference_seconds, abs=1e-5)
        batches = sorted((found for found in by_id.values() if found.name == "batch"), key=lambda b: b.start_time_unix_nano)
        assert sorted(attributes(found)["steervit.batch_images"] for found in batches) == [8, 16, 16]
        (decode,) = (found for found in by_id.values() if found.name == "decode")
        assert decode.end_time_unix_nano <= batches[0].start_time_unix_nano
        assert (collector.resource["service.name"], "telemetry.sdk.name" in collector.resource) == ("steervit", True)


def os_environ(extra: dict[str, str]) -> dict[str, str]:
    import os

    return {**os.environ, **extra}


def seconds(span: Any) -> float:
    return float(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
