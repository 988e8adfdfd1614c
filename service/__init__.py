"""Serves bundles over gRPC, by steering.v1 and the Open Inference Protocol, with metrics and probes over HTTP."""

import os

# Turns off onnxruntime's telemetry before it is imported; see training/__init__.py. Repeated here instead of imported,
# so that service.client needs nothing from training.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
