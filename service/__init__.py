"""Serves bundles over gRPC, by steering.v1 and the Open Inference Protocol, with metrics and probes over HTTP."""

import os

# onnxruntime's telemetry, before it is imported; training/__init__.py says more. No import, so that service.client
# needs nothing of training.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
