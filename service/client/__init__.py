"""Clients of steering.v1, blocking and asyncio. On the command line: steervit predict, compare, ...

Needs grpcio, protobuf and numpy, and nothing of the other packages.
"""
# mypy: no-warn-return-any
# (gRPC's stubs have no types)

import asyncio
import ipaddress
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from service.client.terms import SteeringTerm, Term, Terms
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.pb.steering_pb2_grpc import SteeringServiceStub

__all__ = ["Asked", "AsyncClient", "Client", "Images", "SteeringTerm", "Term", "Terms"]

Images = Sequence[bytes | NDArray[np.uint8]]
"""Encoded files, or uint8 arrays (height, width, channels) of the model's own size."""
UNIT = re.compile(r"([0-9]{1,9})/([hm])([0-9]{1,9})")
Request = TypeVar("Request", pb.PredictRequest, pb.CompareRequest, pb.ExplainRequest)
Filled = TypeVar("Filled", bound=Message)
Answer = TypeVar("Answer")


class Asked(TypedDict, total=False):
    """Options of every call with images. None: not given."""

    profile: str | None
    """Name of a profile of the model; either this or terms."""
    terms: Terms | None
    strength: float | None
    """0: no steering; 1, the default: the profile as it is."""
    gates_sae_digest: str | None
    """Digest of the model that the terms were made for; a server with other gates or autoencoders refuses them."""
    open: Sequence[str] | None
    """Units that run whatever their gates read: 2/h5 is head 5 of block 2, 2/m0 its MLP group 0."""
    closed: Sequence[str] | None
    """Units that do not run, whatever their gates read."""
    budget: float | None
    """The compute fraction that an image may cost on average; by default the gates decide."""
    min_budget: float | None
    """The lowest budget that a busy server may apply, for predict alone; by default the server's setting."""
    model: str | None
    """Name of the model; needed when several are served."""
    version: str | None
    """A version number or label; by default the one that is served."""
    timeout: float | None
    """Seconds for all attempts together; by default the client's."""
    request_id: str | None
    """ID of the call in the server's log: printable ASCII."""


class WrongValue(ValueError):
    """A number or text that a field of the request cannot hold."""


def service_config(attempts: int) -> dict[str, Any]:
    """gRPC's service config: calls go to all serving addresses of a name in turn, and are retried after UNAVAILABLE and
    RESOURCE_EXHAUSTED, when the server says so, unless most calls fail."""
    config: dict[str, Any] = json.loads((Path(__file__).parent / "service_config.json").read_text())
    if attempts > 1:
        config["methodConfig"][0]["retryPolicy"]["maxAttempts"] = attempts
    else:
        del config["methodConfig"]
    return config


def is_loopback(address: str) -> bool:
    """Whether a gRPC address, such as 127.0.0.1:8001, [::1]:8001 or dns:///localhost:8001, is on this machine."""
    target = re.sub(r"^(dns:(//[^/]*/)?|ipv[46]:)", "", address)
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.partition("]")[0].removeprefix("[") if target.startswith("[") else target.rpartition(":")[0] or target
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def opened(kind: Any, address: str, credentials: grpc.ChannelCredentials | None, attempts: int) -> Any:
    """A channel of `kind`: grpc or grpc.aio."""
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),  # the default lets a client wait 2 minutes for a server that is back
        ("grpc.per_rpc_retry_buffer_size", 2**31 - 1),  # larger calls are not retried
        ("grpc.service_config", json.dumps(service_config(attempts))),
    ]
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))  # other addresses obey http_proxy, no_proxy and so on
    if credentials:
        return kind.secure_channel(address, credentials, options)
    return kind.insecure_channel(address, options)


class Client:
    """Blocking calls over one channel. Failed calls raise grpc.RpcError with a status and a sentence."""

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        timeout: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
        attempts: int = 4,
        name: str = "",
    ):
        """address: host:port, or dns:///name:port for all servers of a name. timeout: seconds a call, with all its
        attempts (1 to 5). credentials: grpc.ssl_channel_credentials(...) for a server with TLS. name: of this client,
        for the server's access log and its limits by client, printable ASCII."""
        self._timeout, self._name = timeout, printable("name", name)
        self._channel = opened(grpc, address, credentials, attempts)
        self._stub = SteeringServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._repository = GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def predict(self, images: Images, *, top_k: int = 0, **asked: Unpack[Asked]) -> pb.PredictResponse:
        """top_k: classes to return; 0: five."""
        return self._ask(self._stub.Predict, filled(put(pb.PredictRequest(), top_k=top_k), images, asked), asked)

    def compare(self, images: Images, *, top_k: int = 0, **asked: Unpack[Asked]) -> pb.CompareResponse:
        """The images unsteered and steered, side by side."""
        return self._ask(self._stub.Compare, filled(put(pb.CompareRequest(), top_k=top_k), images, asked), asked)

    def explain(
        self, images: Images, *, latents: int = 0, top_k: int = 0, **asked: Unpack[Asked]
    ) -> pb.ExplainResponse:
        """The active latents and their effects on the gates. latents: number to return for each site, besides those
        that are steered; 0: ten. top_k: classes to return; 0: five."""
        request = put(pb.ExplainRequest(), latents=latents, top_k=top_k)
        return self._ask(self._stub.Explain, filled(request, images, asked), asked)

    def model(self, model: str = "", version: str = "") -> pb.GetModelResponse:
        """The model's labels, gated blocks, units and sites, and its dial without steering."""
        return self._ask(self._stub.GetModel, put(pb.GetModelRequest(), model=model, version=version), {})

    def models(self) -> Sequence[oi.RepositoryIndexResponse.ModelIndex]:
        """Every version in the server's repository. Its state is READY, or it has the reason why it is not served."""
        index: oi.RepositoryIndexResponse = self._ask(self._repository.RepositoryIndex, oi.RepositoryIndexRequest(), {})
        return index.models

    def profile(self, name: str, model: str = "", version: str = "") -> pb.GetProfileResponse:
        """A profile with its terms and the gates_sae_digest that they were made for."""
        return self._ask(
            self._stub.GetProfile, put(pb.GetProfileRequest(), name=name, model=model, version=version), {}
        )

    def profiles(self, model: str = "", version: str = "") -> Iterator[pb.Profile]:
        """All profiles, in the order of their names."""
        request = put(pb.ListProfilesRequest(), model=model, version=version)
        while True:
            page: pb.ListProfilesResponse = self._ask(self._stub.ListProfiles, request, {})
            yield from page.profiles
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _ask(self, call: Callable[..., Any], request: Message, asked: Asked) -> Any:
        timeout = self._timeout if asked.get("timeout") is None else asked["timeout"]
        return call(request, timeout=timeout, metadata=metadata(asked, self._name))

    def close(self) -> None:
        """Close the channel. Calls in progress are cancelled."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio. It may be created before an event loop, and used in several, one after the other."""

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        timeout: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
        attempts: int = 4,
        name: str = "",
    ):
        self._open = partial(opened, grpc.aio, address, credentials, attempts)
        self._timeout, self._name = timeout, printable("name", name)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: Any = None
        self._stubs: tuple[Any, Any] = (None, None)

    @property
    def _stub(self) -> Any:
        return self._connected()[0]

    def _connected(self) -> tuple[Any, Any]:
        """Stubs of steering.v1 and of the Open Inference Protocol. gRPC binds a channel to the running loop: another
        one, as of a second asyncio.run, gets another channel."""
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._channel, self._loop = self._open(), loop
            steering = SteeringServiceStub(self._channel)  # type: ignore[no-untyped-call]
            self._stubs = steering, GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        return self._stubs

    async def predict(self, images: Images, *, top_k: int = 0, **asked: Unpack[Asked]) -> pb.PredictResponse:
        """As Client.predict. top_k: classes to return; 0: five."""
        return await self._ask(self._stub.Predict, filled(put(pb.PredictRequest(), top_k=top_k), images, asked), asked)

    async def compare(self, images: Images, *, top_k: int = 0, **asked: Unpack[Asked]) -> pb.CompareResponse:
        """As Client.compare: the images unsteered and steered, side by side."""
        return await self._ask(self._stub.Compare, filled(put(pb.CompareRequest(), top_k=top_k), images, asked), asked)

    async def explain(
        self, images: Images, *, latents: int = 0, top_k: int = 0, **asked: Unpack[Asked]
    ) -> pb.ExplainResponse:
        """As Client.explain: the active latents and their effects on the gates."""
        request = put(pb.ExplainRequest(), latents=latents, top_k=top_k)
        return await self._ask(self._stub.Explain, filled(request, images, asked), asked)

    async def model(self, model: str = "", version: str = "") -> pb.GetModelResponse:
        """As Client.model: labels, gated blocks, units and sites, and its dial without steering."""
        return await self._ask(self._stub.GetModel, put(pb.GetModelRequest(), model=model, version=version), {})

    async def models(self) -> Sequence[oi.RepositoryIndexResponse.ModelIndex]:
        """As Client.models: every version in the server's repository."""
        _, repository = self._connected()
        index: oi.RepositoryIndexResponse = await self._ask(repository.RepositoryIndex, oi.RepositoryIndexRequest(), {})
        return index.models

    async def profile(self, name: str, model: str = "", version: str = "") -> pb.GetProfileResponse:
        """As Client.profile: a profile with its terms and the gates_sae_digest that they were made for."""
        return await self._ask(
            self._stub.GetProfile, put(pb.GetProfileRequest(), name=name, model=model, version=version), {}
        )

    async def profiles(self, model: str = "", version: str = "") -> AsyncIterator[pb.Profile]:
        """As Client.profiles: all profiles in the order of their names, requested page by page."""
        request = put(pb.ListProfilesRequest(), model=model, version=version)
        while True:
            page: pb.ListProfilesResponse = await self._ask(self._stub.ListProfiles, request, {})
            for profile in page.profiles:
                yield profile
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def _ask(self, call: Callable[..., Awaitable[Answer]], request: Message, asked: Asked) -> Answer:
        timeout = self._timeout if asked.get("timeout") is None else asked["timeout"]
        return await call(request, timeout=timeout, metadata=metadata(asked, self._name))

    async def close(self) -> None:
        """Close the channel of the running loop, if there is one. Calls in progress are cancelled."""
        if self._loop is asyncio.get_running_loop():
            await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def filled(request: Request, images: Images, asked: Asked) -> Request:
    """The request with its images, its steering and its model. Raises TypeError or ValueError for a wrong argument."""
    if unknown := sorted(asked.keys() - Asked.__annotations__):
        raise TypeError(f"{unknown[0]} is not an argument; allowed: {', '.join(Asked.__annotations__)}")
    if isinstance(images, bytes | str | np.ndarray):
        raise TypeError(f"images is a {type(images).__name__}; allowed: a list of images")
    for index, image in enumerate(images):
        if isinstance(image, bytes):
            request.images.add(encoded=image)
        elif isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3:
                kind = f"{image.dtype} {image.shape}"
                raise ValueError(f"images[{index}] is {kind}; allowed: uint8 (height, width, channels)")
            request.images.add(pixels=image.tobytes(), shape=image.shape)
        else:
            raise TypeError(f"images[{index}] is a {type(image).__name__}; allowed: bytes of a file, or a uint8 array")
    put(request, model=asked.get("model"), version=asked.get("version"), budget=asked.get("budget"))
    put(
        request.steering, profile=asked.get("profile"), strength=asked.get("strength"),
        gates_sae_digest=asked.get("gates_sae_digest"),
    )  # fmt: skip
    for site, of_site in (asked.get("terms") or {}).items():
        for term in of_site:
            put(request.steering.terms.add(), site=site, latent=term.latent, scale=term.scale, shift=term.shift)
    for field, units in ((request.steering.open, asked.get("open")), (request.steering.closed, asked.get("closed"))):
        if isinstance(units, str):
            raise TypeError(f"units are {units!r}; allowed: a list, such as ['2/h5']")
        field.extend(map(unit, units or ()))
    if (min_budget := asked.get("min_budget")) is not None:
        if not isinstance(request, pb.PredictRequest):
            raise ValueError(f"min_budget is {min_budget}; allowed: only for predict")
        put(request, min_budget=min_budget)
    return request


def put(message: Filled, **fields: object) -> Filled:
    """The message with these fields; None: left out. Raises TypeError for a value of the wrong type, and
    WrongValue."""
    for name, value in fields.items():
        if value is not None:
            try:
                setattr(message, name, value)
            except TypeError as error:
                kind = type(getattr(message, name)).__name__
                raise TypeError(f"{name} is {value!r}; allowed: {kind}") from error
            except ValueError as error:
                kind = "Unicode text" if isinstance(value, str) else "a number that fits the field"
                raise WrongValue(f"{name} is {value!r}; allowed: {kind}") from error
    return message


def unit(text: str) -> pb.Unit:
    """Parse a unit such as 2/h5 or 2/m0. Raises ValueError for any other text."""
    parts = UNIT.fullmatch(text)
    if parts is None:
        raise ValueError(f"unit is {text!r}; allowed: a block and a head, as in 2/h5, or an MLP group, as in 2/m0")
    block, kind, number = parts.groups()
    return pb.Unit(block=int(block), **{"head" if kind == "h" else "mlp_group": int(number)})


def metadata(asked: Asked, client: str = "") -> tuple[tuple[str, str], ...]:
    """A call's gRPC metadata: its request ID as x-request-id and its client's name as x-client-name, if it has them;
    and the application's active span of OpenTelemetry, if there is one, as traceparent. Raises ValueError for a request
    ID that is not printable ASCII."""
    named = {}
    if request_id := asked.get("request_id"):
        named["x-request-id"] = printable("request_id", request_id)
    if client:
        named["x-client-name"] = client
    if "opentelemetry.trace" in sys.modules:  # otherwise no span can be active
        from opentelemetry.propagate import inject

        inject(named)
    return tuple(named.items())


def printable(field: str, text: str) -> str:
    """The text, which gRPC's metadata can hold. Raises ValueError for one that is not printable ASCII."""
    if not (text.isascii() and text.isprintable()):
        raise ValueError(f"{field} is {text!r}; allowed: printable ASCII")
    return text
