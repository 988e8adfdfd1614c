"""Settings of the server: flags of `python -m service`, each also as STEERVIT_<NAME> in the environment."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "STEERVIT_"


class Settings(BaseSettings):
    """Serve bundles over gRPC, with a steering profile per request. Flags win over STEERVIT_* in the environment."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
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
    model_control: Literal["none", "poll", "explicit"] = "none"
    """What changes the models after the start: nothing, the repository folder, or RepositoryModelLoad and -Unload."""
    poll_seconds: float = Field(10.0, gt=0)
    """How often the repository folder and the profile folder are looked at."""
    profiles_dir: Path | None = None
    """A folder of further profiles, JSON files bound to a gates_sae_digest; followed while the server runs."""
    versions: str = Field("latest", pattern=r"^(latest|latest:[1-9][0-9]?|all|[1-9][0-9]*(,[1-9][0-9]*)*)$")
    """Versions of each model to serve: `latest`, `latest:2`, `all` or `1,3`; and those that labels.json names."""
    host: str = "127.0.0.1"
    """Address to listen on, of both ports; IPv6 too, such as ::1, or :: for all."""
    port: int = Field(8001, ge=0, le=65535)
    """gRPC; 0: any free port."""
    metrics_port: int = Field(8002, ge=0, le=65535)
    """HTTP: /metrics, /livez, /readyz; 0: any free port."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the graphs run. `auto`: CUDA where there is a device. One that is asked for and missing is an error."""
    device: int = Field(0, ge=0)
    """Index of the GPU, with CUDA."""
    gpu_memory_mb: int = Field(0, ge=0)
    """GPU memory for all models together at most, MiB; 0: no limit."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """Whether batches run as CUDA graphs, captured at the start: faster, above all small ones. Where a graph cannot be
    captured, the log says why."""
    tf32: bool = False
    """On a GPU, keep 10 bits of each factor in products of float32: faster, and gates near their threshold may decide
    otherwise than the certificate says."""
    specialised: Literal["auto", "on", "off"] = "auto"
    """Whether graphs that a bundle has for one profile alone are loaded, and run batches of that profile where that is
    faster. `auto`: on a GPU."""
    graph: str = Field("auto", pattern=r"^(auto|(dispatch|masked|compact|fused)\.(fp32|int8|fp16))$")
    """The graph of each bundle that runs, such as `masked.fp32`. `auto`: its default; on a GPU the fastest that is fit
    for it, fused.fp16 before all others."""
    instances: int = Field(0, ge=0, le=1024)
    """Batches that run at a time; 0: as many as suit the model and the CPUs this process may use."""
    threads: int = Field(0, ge=0, le=1024)
    """Threads of each instance; 0: as many as suit them."""
    max_batch: int = Field(0, ge=0, le=4096)
    """Images in a batch at most; 0: as many as suit the model, at most 32."""
    tune: str = Field("auto", pattern=r"^(auto|off|[0-9]{1,3}(\.[0-9]+)?)$")
    """How to choose what is left open of these three at the start: measure for so many seconds (`auto`: 2) and keep the
    result beside the bundle, or `off`: an instance of one thread for each CPU, batches of 32."""
    max_delay_ms: float = Field(0.0, ge=0, le=1000)
    """How long a batch that is not full waits for more, milliseconds. 0: it starts as soon as an instance is free."""
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
    jpeg_draft: bool = False
    """Decode JPEG photos of many times the model's size at an eighth, a quarter or half of theirs, never below twice
    the model's: several times faster, with pixels that differ a little from those that training saw."""
    max_terms: int = Field(512, ge=1)
    """Inline steering terms in a call at most; as tensors, of each image."""
    max_streams: int = Field(1024, ge=1)
    """Calls at a time on one connection at most; further ones wait at the client."""
    shadow_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the steered images that are also run unsteered, to watch whether the answers still agree."""
    max_profile_series: int = Field(200, ge=0)
    """Profiles of a model that have metrics of their own; the others, in order of their names, share `other`."""
    decode_threads: int = Field(2, ge=1)
    """Threads that decode images, and make explanations and large answers."""
    drain_delay_seconds: float = Field(0.5, ge=0)
    """After SIGTERM, how long calls are still taken, while clients that watch the server's health turn to others."""
    drain_seconds: float = Field(20, ge=0)
    """After that, how long accepted requests may still take."""
    tls_certificate: Path | None = None
    """PEM file with the server's certificate and its chain: gRPC over TLS. Read again when it changes."""
    tls_key: Path | None = None
    """PEM file with the key of that certificate."""
    tls_client_ca: Path | None = None
    """PEM file with the authorities of clients' certificates: only clients that have one are let in."""
    max_connection_age_seconds: float = Field(0, ge=0)
    """After how long a client is asked to connect anew, so that connections spread over new pods; 0: never."""
    max_connection_age_grace_seconds: float = Field(30, ge=0)
    """How long calls on such a connection may still take."""
    keepalive_seconds: float = Field(60, gt=0)
    """How often a silent connection is asked whether its client is still there."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of the log on standard error; debug: with a line for each request."""
    log_format: Literal["text", "json"] = "text"
    """json: an object a line, that of a request with its method, status, seconds and request_id (x-request-id)."""

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host.removeprefix("[").removesuffix("]")

    @property
    def url_host(self) -> str:
        """In front of a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key belong together; allowed: both or none")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("--tls-client-ca is given without --tls-certificate and --tls-key; allowed: with them")
        return self


def unknown_in_environment(names: Iterable[str]) -> list[str]:
    """Names that begin like a setting and are none: a mistyped one would go unnoticed."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in names if name.upper().startswith(PREFIX) and name.upper() not in known)
