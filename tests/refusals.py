"""Calls that a server must refuse."""

from collections.abc import Callable

import grpc
import pytest


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> tuple[str, str]:
    """The status and the sentence of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    return caught.value.code().name, caught.value.details()
