"""Turns a finished training run into a bundle: graphs, compared with PyTorch, and everything else that serving
needs."""

import training  # noqa: F401  # turns telemetry off
