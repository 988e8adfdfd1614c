"""Settings of the server: flags of `python -m service`, each also as STEERVIT_<NAME> in the environment."""

import argparse
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from training.terminal import HelpFormatter, make_readable

PREFIX = "STEERVIT_"
DOCTOR = """Report versions, machine, settings, models, profiles, certificates, and the state of a server that runs with
the same settings. Loads nothing and changes nothing. Lines that begin with `!` are problems; they make the exit
status 1. Takes the server's flags and STEERVIT_* in the environment."""
Source = CliSettingsSource[argparse.ArgumentParser]


class Settings(BaseSettings):
    """Serve bundles over gRPC, with a steering profile per request. Flags win over STEERVIT_* in the environment."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
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
    """Interval of scanning the repository folder, the profile folder and the limits of clients, seconds."""
    profiles_dir: Path | None = None
    """A folder of more profiles: JSON files, each for one gates_sae_digest. Changes apply while the server runs."""
    default_profile: str = ""
    """The profile of requests that name none and have no terms, such as a selective one; strength 0 still means no
    steering. Every served model must have it."""
    versions: str = Field("latest", pattern=r"^(latest|latest:[1-9][0-9]?|all|[1-9][0-9]*(,[1-9][0-9]*)*)$")
    """Versions of each model to serve: `latest`, `latest:2`, `all` or `1,3`. Versions in labels.json are served too."""
    host: str = "127.0.0.1"
    """Address to listen on, for both ports. IPv6 too, such as ::1, or :: for all addresses."""
    port: int = Field(8001, ge=0, le=65535)
    """gRPC; 0: any free port."""
    metrics_port: int = Field(8002, ge=0, le=65535)
    """HTTP: /metrics, /livez, /readyz; 0: any free port."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the graphs run. `auto`: CUDA if there is a device. `cuda` without a device is an error."""
    device: int = Field(0, ge=0)
    """Index of the GPU, with CUDA."""
    gpu_memory_mb: int = Field(0, ge=0)
    """Limit of GPU memory for all models together, MiB; 0: no limit."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """Whether batches run as CUDA graphs, captured at the start: faster, small batches most. If a graph cannot be
    captured, the log has the reason."""
    tf32: bool = False
    """On a GPU, keep 10 bits of each factor in products of float32. Faster, but gates near their threshold may decide
    differently from the certificate."""
    specialised: Literal["auto", "on", "off"] = "auto"
    """Whether to load graphs for one profile alone. They run batches of that profile when that is faster. `auto`: on a
    GPU."""
    graph: str = Field("auto", pattern=r"^(auto|(dispatch|masked|compact|fused)\.(fp32|int8|fp16))$")
    """The graph of each bundle to run, such as `masked.fp32`. `auto`: the bundle's default; on a GPU the fastest one
    for GPUs, fused.fp16 first."""
    instances: int = Field(0, ge=0, le=1024)
    """Concurrent batches; 0: as suits the model and the CPUs of this process."""
    threads: int = Field(0, ge=0, le=1024)
    """Threads of each instance; 0: as suits the model and the CPUs."""
    max_batch: int = Field(0, ge=0, le=4096)
    """Limit of images in a batch; 0: as suits the model, at most 32."""
    tune: str = Field("auto", pattern=r"^(auto|off|[0-9]{1,3}(\.[0-9]+)?)$")
    """How to choose those of the last three settings that are 0: measure for so many seconds at the start (`auto`: 2)
    and save the result beside the bundle, or `off`: an instance of one thread for each CPU, batches of 32."""
    max_delay_ms: float = Field(0.0, ge=0, le=1000)
    """How long a batch that is not full waits for more, milliseconds. 0: it starts as soon as an instance is free."""
    max_queue: int = Field(1024, ge=1, le=1_000_000_000)
    """Limit of images waiting for inference, for each model. One with a budget counts as that fraction of an image;
    with brownout, as the least that it may be lowered to. More are refused with RESOURCE_EXHAUSTED."""
    target_latency_ms: float = Field(0.0, ge=0, le=3_600_000)
    """Brownout: when calls would take longer than so many milliseconds, lower the budgets of those that allow it, and
    refuse calls that would be late even so. 0: neither."""
    default_budget: float | None = Field(None, gt=0, le=1)
    """The budget of requests that name none, for models with a dial; at least the dial's lowest. Without it their gates
    decide alone."""
    min_budget: float = Field(1.0, gt=0, le=1)
    """The lowest budget that brownout may give to calls that name no min_budget. 1: they are never lowered."""
    max_images: int = Field(256, ge=1, le=1_000_000)
    """Limit of images in a call."""
    max_message_mb: int = Field(64, ge=1, le=1024)
    """Limit of the size of a request, MiB."""
    max_image_mb: int = Field(16, ge=1)
    """Limit of the size of an encoded image, MiB."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Limit of width x height of an encoded image."""
    jpeg_draft: bool = False
    """Decode large JPEG photos at an eighth, a quarter or half of their size, never below twice the model's. Several
    times faster, with pixels that differ a little from those of training."""
    max_terms: int = Field(512, ge=1)
    """Limit of inline steering terms in a call; in steering tensors, of each image."""
    max_streams: int = Field(1024, ge=1)
    """Limit of concurrent calls on one connection. More wait at the client."""
    shadow_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the steered images that are also run unsteered, to monitor whether the answers agree; and of the images
    at a budget lowered by brownout, which are also run at their own once no budgets are lowered."""
    max_profile_series: int = Field(200, ge=0)
    """Limit of the profiles of a model with metrics of their own: those with the most images recently. The others share
    `other`."""
    head_series: Literal["all", "top", "none"] = "all"
    """Which of those have series for each head and MLP group: all, the 10 of a model with the most images recently, or
    none. The others have one of all heads and one of all groups, without block and head."""
    decode_threads: int = Field(2, ge=1)
    """Threads that decode images, and make explanations and large answers."""
    drain_delay_seconds: float = Field(0.5, ge=0)
    """How long calls are accepted after SIGTERM, while clients that watch the server's health switch to others."""
    drain_seconds: float = Field(20, ge=0)
    """How long accepted calls may take after that."""
    tls_certificate: Path | None = None
    """PEM file with the server's certificate and its chain, for gRPC over TLS. Read again when it changes."""
    tls_key: Path | None = None
    """PEM file with the key of that certificate."""
    tls_client_ca: Path | None = None
    """PEM file with the authorities of clients' certificates. Clients without a certificate are refused."""
    client_limits: Path | None = None
    """JSON file with limits by client: which models, images a second, images and calls in flight. Read again when it
    changes. Clients are known by their certificate, else by their metadata x-client-name."""
    max_connection_age_seconds: float = Field(0, ge=0)
    """Time after which clients must reconnect, so that connections spread over new pods; 0: never."""
    max_connection_age_grace_seconds: float = Field(30, ge=0)
    """How long calls on such a connection may take after that."""
    keepalive_seconds: float = Field(60, gt=0)
    """Interval of pings on a silent connection, seconds."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of the log on standard error; debug: with a line for each call."""
    access_log: float = Field(0.0, ge=0, le=1)
    """Share of the calls with a line in the log at level info, as JSON: who asked for what, how it ended, and how long
    it took. Without health probes."""
    log_format: Literal["text", "json"] = "text"
    """json: one object a line, for the whole log."""
    otlp_endpoint: str = Field("", pattern=r"^(https?://[^\s?#]+)?$")
    """URL of an OpenTelemetry collector that takes OTLP over HTTP, such as http://collector:4318, for a trace of each
    call; also exemplars at /metrics. Needs the extra `otel`. OpenTelemetry's own variables, such as
    OTEL_TRACES_SAMPLER, set everything else."""
    revision: str = "unknown"
    """Revision of the source, for steervit_build_info; the image sets it."""

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host.removeprefix("[").removesuffix("]")

    @field_validator("otlp_endpoint")
    @classmethod
    def _can_be_sent_to(cls, url: str) -> str:
        try:
            if url:
                package_version("opentelemetry-exporter-otlp-proto-http")
        except PackageNotFoundError as error:
            raise ValueError(
                "OpenTelemetry is not installed; allowed: with it, pip install 'steervit[otel]'"
            ) from error
        return url.rstrip("/")

    @property
    def url_host(self) -> str:
        """The host as in a URL, before the port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key belong together; allowed: both or none")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("--tls-client-ca is given without --tls-certificate and --tls-key; allowed: with them")
        return self


def unknown_in_environment(names: Iterable[str]) -> list[str]:
    """Names that begin like a setting but are none: typing errors that would otherwise go unnoticed."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in names if name.upper().startswith(PREFIX) and name.upper() not in known)


def problems(error: ValidationError) -> list[str]:
    """What is wrong with settings, a line for each: the flag, its value, what is allowed."""
    lines = []
    for problem in error.errors():
        name = "-".join(map(str, problem["loc"])).replace("_", "-")
        value = "missing" if problem["type"] == "missing" else repr(problem["input"])
        shown = f"--{name} is {value}: {problem['msg']}" if name else problem["msg"]
        lines.append(shown.removeprefix("Value error, "))
    return lines


def source(prog: str = "python -m service", does: str = Settings.__doc__ or "") -> Source:
    """The command line as a source of Settings. prog: what a user types. does: what that does with them."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --repository FOLDER [--SETTING VALUE ...]",
        description=does,
        formatter_class=HelpFormatter,
    )
    filled: Source = CliSettingsSource(Settings, root_parser=parser)
    make_readable(parser)
    return filled


def parser(prog: str = "python -m service") -> argparse.ArgumentParser:
    """The parser of the settings, as in `source`."""
    return source(prog).root_parser


def doctor_parser(prog: str = "python -m service.doctor") -> argparse.ArgumentParser:
    """The parser of service.doctor, which has the server's flags."""
    return source(prog, DOCTOR).root_parser
