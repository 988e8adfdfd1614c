"""Settings of the server: flags of `python -m service`, each also as STEERVIT_<NAME> in the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Serve bundles over gRPC, with a steering profile per request. Flags win over STEERVIT_* in the environment."""

    model_config = SettingsConfigDict(
        env_prefix="STEERVIT_",
        frozen=True,
        extra="forbid",
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        use_attribute_docstrings=True,
    )

    repository: Path
    """A repository (<model>/<version>/ folders) or a single bundle folder."""
    host: str = "127.0.0.1"
    """Address to listen on, of both ports."""
    port: int = Field(8001, ge=0, le=65535)
    """gRPC; 0: any free port."""
    metrics_port: int = Field(8002, ge=0, le=65535)
    """HTTP: /metrics, /livez, /readyz; 0: any free port."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the graphs run. `auto`: CUDA where there is a device. One that is asked for and missing is an error."""
    threads: int = Field(0, ge=0)
    """Threads of an inference; 0: as many as the CPUs this process may use."""
    max_batch: int = Field(32, ge=1, le=4096)
    """Images in a batch at most."""
    max_delay_ms: float = Field(2.0, ge=0, le=1000)
    """How long a batch that is not full waits for more, milliseconds."""
    max_queue: int = Field(1024, ge=1)
    """Images waiting for inference, for each model, at most; more are refused with RESOURCE_EXHAUSTED."""
    max_images: int = Field(256, ge=1)
    """Images in a call at most."""
    max_message_mb: int = Field(64, ge=1, le=1024)
    """Size of a request at most, MiB."""
    max_image_mb: int = Field(16, ge=1)
    """Size of an encoded image at most, MiB."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Width x height of an encoded image at most."""
    max_terms: int = Field(512, ge=1)
    """Inline steering terms in a call at most."""
    decode_threads: int = Field(2, ge=1)
    """Threads that decode images."""
    drain_seconds: float = Field(20, ge=0)
    """After SIGTERM, how long accepted requests may still take."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of the log on standard error."""
