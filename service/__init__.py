"""Serves bundles over gRPC, by steering.v1 and the Open Inference Protocol, with metrics and probes over HTTP."""

import training  # noqa: F401  # turns telemetry off
