"""Limits by client: which models it may call, how many images a second, and how much at a time.

A client is known by the name in its certificate (mutual TLS), else by its metadata `x-client-name`, else it is
`anonymous`. The limits are a JSON file:

    {"clients": {"shop": {"images_per_second": 200, "burst": 400, "images_in_flight": 64, "calls_in_flight": 8},
                 "research": {"models": ["fashion_mnist"], "images_per_second": 20}},
     "default": {"images_per_second": 10},
     "gateways": ["envoy"]}

What an entry leaves out is not limited. The default is for the clients that are not named. Each certificate has it for
itself. The clients without a certificate share it, as anybody can make up names.
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
"""Of clients without limits of their own; beyond, idle ones are forgotten."""
LONGEST_WAIT = 5.0
"""Seconds that a client is told to wait for its calls in flight."""
A_DAY = 86400.0
"""Seconds that it is told to wait at most."""
STRICT = ConfigDict(extra="forbid")


class LimitsError(Exception):
    """A file of limits cannot be used; the message names the field, the value and what is allowed."""


@dataclass(frozen=True, config=STRICT)
class Limit:
    """What a client may do. None: as much as it likes."""

    models: tuple[str, ...] | None = None
    """Names of the models that it may call."""
    images_per_second: Annotated[fields.Number, Field(ge=0.001, le=fields.MOST)] | None = None
    """On average."""
    burst: fields.Count | None = None
    """Images that it may send at once after a pause; as many as in a second unless given. A call of more waits until
    all of them are free, and uses those to come."""
    images_in_flight: fields.Count | None = None
    """Images of calls that are not answered yet."""
    calls_in_flight: fields.Count | None = None
    """Calls that are not answered yet."""

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> "Limit":
        if self.burst and not self.images_per_second:
            raise ValueError(f"burst is {self.burst} without images_per_second; allowed: with it")
        return self

    @property
    def capacity(self) -> float:
        """Images of a full bucket."""
        return self.burst or max(1.0, self.images_per_second or math.inf)


@dataclass(frozen=True, config=STRICT)
class Limits:
    """The file."""

    clients: dict[Annotated[str, Field(pattern=r"^[ -~]{1,128}$")], Limit] = Field(default_factory=dict)
    """By name; `anonymous`: without one."""
    default: Limit = Limit()
    """Of all others."""
    gateways: tuple[str, ...] = ()
    """Names in certificates of those who may say for which client they call, in `x-client-name`."""

    @field_validator("clients")
    @classmethod
    def _other_is_taken(cls, clients: dict[str, Limit]) -> dict[str, Limit]:
        if OTHER in clients:
            raise ValueError(f"a client is named {OTHER!r}; allowed: any other name, as this one is of all the rest")
        return clients


class _Client:
    """A client, or those that share the default, with what they have used. For the event loop."""

    def __init__(self, limit: Limit, counts: ClientCounts, now: float):
        self.limit, self.counts = limit, counts
        self.calls = self.images = 0
        """In flight."""
        self.usual_images, self.usual_seconds = 1, 0.1
        """Of its last call; a recent mean of its calls."""
        self._free, self._at = math.inf, now
        """Images in its bucket, and when; below 0 after a call of more than there were."""

    def free(self, now: float) -> float:
        """Images in its bucket."""
        rate = self.limit.images_per_second
        self._free = min(self.limit.capacity, self._free + rate * (now - self._at)) if rate else math.inf
        self._at = now
        return self._free

    def pour(self, images: int) -> None:
        self._free -= images

    def idle(self, now: float) -> bool:
        """Whether nothing is lost when it is forgotten."""
        return not self.calls and self.free(now) >= self.limit.capacity


class Admission:
    """A call, from its arrival to its answer, under the limits of its client."""

    def __init__(self, client: _Client, whose: str, clock: Callable[[], float]):
        """whose: the client, in sentences."""
        self._client, self._whose, self._clock, self._start = client, whose, clock, clock()
        self._entered, self._images = 0, 0
        self._outcome = "admitted"

    def enter(self, with_images: bool) -> None:
        """Count the call as in flight, unless it must be refused whatever is in it. Raises OverLimit."""
        client = self._client
        allowed = client.limit.calls_in_flight
        if allowed and client.calls >= allowed:
            self._refuse("calls", f"{client.calls} calls in flight + 1 new > limit {allowed}", client.usual_seconds)
        if with_images and client.limit.images_per_second:
            self._check_rate(1, client.usual_images)
        client.calls += 1
        self._entered = 1

    def leave(self) -> None:
        """The call is answered."""
        client = self._client
        client.calls -= self._entered
        client.images -= self._images
        if self._images:
            client.usual_seconds += 0.1 * (self._clock() - self._start - client.usual_seconds)
        client.counts.calls[self._outcome].inc()

    def permit(self, model: str) -> None:
        """Raises ModelNotAllowed unless the client may call the model."""
        allowed = self._client.limit.models
        if allowed is not None and model not in allowed:
            self._outcome = "model"
            names = ", ".join(map(repr, allowed)) or "none"
            raise ModelNotAllowed(f"model is {model!r}, which {self._whose} may not call; allowed: {names}")

    def take(self, images: int) -> None:
        """Count images that are about to be decoded and run. Raises OverLimit, and InvalidRequest for more than may
        ever be in flight."""
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
        """Raises OverLimit unless there is room for the first number; its time is that of room for the second."""
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
    """The limits of a file, which may change, and what their clients have used."""

    def __init__(self, path: Path, metrics: Metrics, clock: Callable[[], float] = time.monotonic):
        """Raises LimitsError when the file cannot be used."""
        self._path, self._metrics, self._clock = path, metrics, clock
        self.problem = ""
        """What is wrong with the file as it is; "" if it is in use."""
        self._clients: dict[str, _Client] = {}
        """By name; OTHER: those that share the default."""
        self._seen = _content(path)
        self._use(_parsed(path, self._seen))

    def arrived(self, context: Any) -> Admission:
        """A call that has arrived, to be entered."""
        name, certified = self._name(context)
        own = name in self._limits.clients
        key = name if own or certified else OTHER
        client = self._clients.get(key) or self._add(key)
        whose = f"client {name!r}" if key != OTHER else f"clients without limits of their own, such as {name!r}"
        return Admission(client, whose, self._clock)

    async def refresh(self) -> None:
        """Read the file if it has changed. If it cannot be used, the limits stay as they are."""
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
        """Read the file every so many seconds until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except Exception:  # the next read may succeed
                log.exception("reading the limits of clients failed")

    def _name(self, context: Any) -> tuple[str, bool]:
        """The client's name, and whether a certificate vouches for it."""
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
    """The limits of a file. Raises LimitsError when it cannot be used."""
    return _parsed(path, _content(path))


def _content(path: Path) -> bytes | str:
    """The file, or why it cannot be read."""
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
    """Raises ModelNotAllowed unless the client of the current call may call the model."""
    if admission := current().admission:
        admission.permit(model)
