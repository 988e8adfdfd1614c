"""Expected answers, and the other client beside a test."""

from collections.abc import Callable, Iterator, Mapping

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from service.engine import Engine
from tests.faults.protocols import UNLIMITED, Alone, alone
from tests.faults.traffic import Traffic
from tests.processes import ServerProcess

Undisturbed = Callable[..., Traffic]
"""(server, refusals=()) -> the other client, to be used as `with`."""


@pytest.fixture(scope="session")
def engine(bundle: Bundle) -> Engine:
    return Engine(bundle, "cpu", 1)


@pytest.fixture(scope="session")
def expected(engine: Engine, bundle: Bundle, sample_pixels: NDArray[np.uint8]) -> Mapping[str, Alone]:
    """The answers for all sample images, by profile; "": no steering."""
    profiles = {"": {}, **{name: bundle.profiles[name].terms for name in ("Shirt", "Bag", "footwear")}}
    return {name: alone(engine, sample_pixels, terms) for name, terms in profiles.items()}


@pytest.fixture(scope="session")
def undisturbed(expected: Mapping[str, Alone], bundle: Bundle, sample_pixels: NDArray[np.uint8]) -> Undisturbed:
    def other_client(server: ServerProcess, refusals: tuple[str, ...] = ()) -> Traffic:
        return Traffic(server.address, sample_pixels, expected, bundle, refusals)

    return other_client


@pytest.fixture(scope="module")
def traffic(server: ServerProcess, undisturbed: Undisturbed) -> Iterator[Traffic]:
    """The other client, beside all tests of a module, on the shared server."""
    with undisturbed(server) as running:
        yield running


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, UNLIMITED) as channel:
        yield channel
