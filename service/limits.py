"""Limits by client: models, images per second, and images and calls in flight.

A client is identified by the name in its certificate (mutual TLS), else by its metadata `x-client-name`, else it is
`anonymous`. The limits are a JSON file:

    {"clients": {"shop": {"images_per_second": 200, "burst": 400, "images_in_flight": 64, "calls_in_flight": 8},
                 "research": {"models": ["fashion_mnist"], "images_per_second": 20}},
     "default": {"images_per_second": 10},
     "gateways": ["envoy"]}

Fields that an entry leaves out are not limited. The default applies to clients that are not listed: separately to each
client with a certificate, and jointly to all clients without one, as anyone can invent names.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from service.access_log import CLIENT, certificate_name, current
from service.counting import ClientCounts
from service.errors import InvalidRequest, ModelNotAllowed, OverLimit
from service.metrics import Metrics
from training import fields

log = logging.getLogger("steervit.limits")
ANONYMOUS, OTHER = "anonymous", "other"
MOST_CERTIFICATES = 10_000
"""Largest number of tracked clients without their own limits; above it, idle ones are dropped."""
LONGEST_WAIT = 5.0
"""Longest retry delay for calls in flight, in seconds."""
A_DAY = 86400.0
"""Longest retry delay of all, in seconds."""
STRICT = ConfigDict(extra="forbid")


class LimitsError(Exception):
    """A file of limits cannot be used; the message names the field, the value and what is allowed."""


@dataclass(frozen=True, config=STRICT)
class Limit:
    """The limits of a client. None: not limited."""

    models: tuple[str, ...] | None = None
    """Names of the allowed models."""
    images_per_second: Annotated[fields.Number, Field(ge=0.001, le=fields.MOST)] | None = None
    """Average rate."""
    burst: fields.Count | None = None
    """Images that it may send at once after a pause; by default those of one second. A larger call is admitted when the
    bucket is full, and uses future images."""
    images_in_flight: fields.Count | None = None
    """Images of calls that are being answered."""
    calls_in_flight: fields.Count | None = None
    """Calls that are being answered."""

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> "Limit":
        if self.burst and not self.images_per_second:
            raise ValueError(f"burst is {self.burst} without images_per_second; allowed: with it")
        return self

    @property
    def capacity(self) -> float:
        """Number of images in a full bucket."""
        return self.burst or max(1.0, self.images_per_second or math.inf)


@dataclass(frozen=True, config=STRICT)
class Limits:
    """The limits by client, as in the file."""

    clients: dict[Annotated[str, Field(pattern=r"^[ -~]{1,128}$")], Limit] = Field(default_factory=dict)
    """By name; `anonymous`: clients without a name."""
    default: Limit = Limit()
    """Limit of all other clients."""
    gateways: tuple[str, ...] = ()
    """Certificate names of gateways, which may name the client that they call for in `x-client-name`."""

    @field_validator("clients")
    @classmethod
    def _other_is_taken(cls, clients: dict[str, Limit]) -> dict[str, Limit]:
        if OTHER in clients:
            raise ValueError(f"a client is named {OTHER!r}; allowed: any other name (it means all other clients)")
        return clients


class _Client:
    """The usage of a client, or of all clients that share the default. For the event loop only."""

    def __init__(self, limit: Limit, counts: ClientCounts, now: float):
        self.limit, self.counts = limit, counts
        self.calls = self.images = 0
        """Calls and images in flight."""
        self.usual_images, self.usual_seconds = 1, 0.1
        """Images of its last call; recent mean duration of its calls."""
        self._free, self._at = math.inf, now
        """Images in its bucket, and the time of that count; below 0 after a call larger than the bucket."""

    def free(self, now: float) -> float:
        """The number of images in its bucket."""
        rate = self.limit.images_per_second
        self._free = min(self.limit.capacity, self._free + rate * (now - self._at)) if rate else math.inf
        self._at = now
        return self._free

    def pour(self, images: int) -> None:
        self._free -= images

    def idle(self, now: float) -> bool:
        """Whether dropping it loses no state."""
        return not self.calls and self.free(now) >= self.limit.capacity


class Admission:
    """A call under the limits of its client, from arrival to answer."""

    def __init__(self, client: _Client, whose: str, clock: Callable[[], float]):
        """whose: the client's name in messages."""
        self._client, self._whose, self._clock, self._start = client, whose, clock, clock()
        self._entered, self._images = 0, 0
        self._outcome = "admitted"

    def enter(self, with_images: bool) -> None:
        """Count the call as in flight. Raises OverLimit if it must be refused regardless of its content."""
        client = self._client
        allowed = client.limit.calls_in_flight
        if allowed and client.calls >= allowed:
            self._refuse("calls", f"{client.calls} calls in flight + 1 new > limit {allowed}", client.usual_seconds)
        if with_images and client.limit.images_per_second:
            self._check_rate(1, client.usual_images)
        client.calls += 1
        self._entered = 1

    def leave(self) -> None:
        """Count the call as answered."""
        client = self._client
        client.calls -= self._entered
        client.images -= self._images
        if self._images:
            client.usual_seconds += 0.1 * (self._clock() - self._start - client.usual_seconds)
        client.counts.calls[self._outcome].inc()

    def permit(self, model: str) -> None:
        """Raise ModelNotAllowed unless the client may call the model."""
        allowed = self._client.limit.models
        if allowed is not None and model not in allowed:
            self._outcome = "model"
            names = ", ".join(map(repr, allowed)) or "none"
            raise ModelNotAllowed(f"model is {model!r}, which {self._whose} may not call; allowed: {names}")

    def take(self, images: int) -> None:
        """Count images that are about to be decoded and run. Raises OverLimit, or InvalidRequest for more images than
        can ever be in flight."""
        client, allowed = self._client, self._client.limit.images_in_flight
        if allowed and images > allowed:
            raise InvalidRequest(
                f"{images} images (in Compare each counts twice) exceed the limit of {allowed} images in flight of "
                f"{self._whose}"
            )
        client.usual_images = images
        if allowed and client.images + images > allowed:
            text = f"{client.images} images in flight + {images} new > limit {allowed}"
            self._refuse("images", text, client.usual_seconds)
        if client.limit.images_per_second:
            self._check_rate(images, images)
            client.pour(images)
        client.images += images
        self._images = images
        client.counts.images.inc(images)

    def _check_rate(self, least: int, images: int) -> None:
        """Raise OverLimit unless there is room for `least` images. Its retry delay is the time until there is room for
        `images`."""
        limit, free = self._client.limit, self._client.free(self._clock())
        if free >= min(least, limit.capacity):
            return
        assert limit.images_per_second
        text = f"over the limit of {limit.images_per_second:g} images a second (burst {limit.capacity:g})"
        wait = (min(images, limit.capacity) - free) / limit.images_per_second
        self._refuse("rate", text, wait, longest=A_DAY)

    def _refuse(self, reason: str, text: str, wait: float, longest: float = LONGEST_WAIT) -> None:
        self._outcome = reason
        wait = min(longest, max(0.01, wait))
        raise OverLimit(f"{self._whose}: {text}. Try again in {wait:.2g} s", wait, reason)


class ClientLimits:
    """The limits in a file, which may change, and the usage of the clients."""

    def __init__(self, path: Path, metrics: Metrics, clock: Callable[[], float] = time.monotonic):
        """Raises LimitsError when the file cannot be used."""
        self._path, self._metrics, self._clock = path, metrics, clock
        self.problem = ""
        """The problem of the current file; "" if it is in use."""
        self._clients: dict[str, _Client] = {}
        """By name; OTHER: all clients that share the default."""
        self._seen = _content(path)
        self._use(_parsed(path, self._seen))

    def arrived(self, context: Any) -> Admission:
        """The admission of a new call, to be entered."""
        name, certified = self._name(context)
        own = name in self._limits.clients
        key = name if own or certified else OTHER
        client = self._clients.get(key) or self._add(key)
        whose = f"client {name!r}" if key != OTHER else f"clients without limits of their own, such as {name!r}"
        return Admission(client, whose, self._clock)

    async def refresh(self) -> None:
        """Read the file if it has changed. If it is invalid, the limits remain unchanged."""
        content = await asyncio.get_running_loop().run_in_executor(None, _content, self._path)
        if content == self._seen:
            return
        self._seen = content
        try:
            self._use(_parsed(self._path, content))
        except LimitsError as error:
            self.problem = str(error)
            self._metrics.limits_right = False
            log.error("the limits of clients are unchanged: %s", error)

    async def watch(self, seconds: float) -> None:
        """Read the file every `seconds` until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except Exception:  # the next read may succeed
                log.exception("reading the limits of clients failed")

    def _name(self, context: Any) -> tuple[str, bool]:
        """The client's name, and whether it comes from a certificate."""
        certificate = certificate_name(context)
        if certificate and certificate not in self._limits.gateways:
            return certificate, True
        said = str(dict(context.invocation_metadata() or ()).get(CLIENT, ""))[:128]
        return said or ANONYMOUS, bool(certificate and said)

    def _add(self, key: str) -> _Client:
        now = self._clock()
        if len(self._clients) >= MOST_CERTIFICATES:
            self._clients = {name: client for name, client in self._clients.items() if not client.idle(now)}
        client = _Client(self._limit(key), self._metrics.of_client(key), now)
        self._clients[key] = client
        return client

    def _limit(self, key: str) -> Limit:
        return self._limits.clients.get(key, self._limits.default)

    def _use(self, limits: Limits) -> None:
        self._limits, self.problem = limits, ""
        self._metrics.use_clients(limits.clients)
        for name, client in self._clients.items():
            client.limit, client.counts = self._limit(name), self._metrics.of_client(name)
        log.info("limits of %d clients in %s", len(limits.clients), self._path)


def read(path: Path) -> Limits:
    """The limits in a file. Raises LimitsError when it cannot be used."""
    return _parsed(path, _content(path))


def _content(path: Path) -> bytes | str:
    """The content of the file, or the reason why it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        return f"{path}: {error.strerror}"


def _parsed(path: Path, content: bytes | str) -> Limits:
    if isinstance(content, str):
        raise LimitsError(content)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LimitsError(f"{path}: {error}") from error
    return fields.read(Limits, value, LimitsError, f"{path}: ")


def permit(model: str) -> None:
    """Raise ModelNotAllowed unless the client of the current call may call the model."""
    if admission := current().admission:
        admission.permit(model)
