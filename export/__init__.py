"""From a finished training run to a bundle: graphs that are compared with PyTorch, and all else that serving needs."""

import training  # noqa: F401  # turns telemetry off
