import training  # noqa: F401  # turns telemetry off
