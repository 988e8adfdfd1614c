"""The server on gRPC's core behaves like grpc.aio's: each test runs with both."""

import asyncio
import contextlib
import gc
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc
from processes import ROOT

from service import transport

METHODS = {
    "echo": ("unary_unary", b"hello"),
    "refuse": ("unary_unary", b""),
    "fail": ("unary_unary", b""),
    "left": ("unary_unary", b""),
    "wait": ("unary_unary", b""),
    "count": ("unary_stream", b"3"),
    "write": ("unary_stream", b"3"),
    "repeat": ("stream_stream", b""),
    "total": ("stream_unary", b""),
}


class Handlers(grpc.GenericRpcHandler):
    """One method of each kind; `ended` has the results of cancelled calls."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.waiting = threading.Semaphore(0)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name = details.method.rpartition("/")[2]
        if name not in METHODS:
            return None
        kind = METHODS[name][0]
        return getattr(grpc, f"{kind}_rpc_method_handler")(getattr(self, name))

    async def echo(self, message: bytes, context: Any) -> bytes:
        sent = dict(context.invocation_metadata())
        context.set_trailing_metadata((("said", sent.get("say", "nothing")), ("raw-bin", b"\0\xff")))
        left = context.time_remaining()
        return message + (b"" if left is None else b" in %d s" % round(left))

    async def refuse(self, message: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "niente: \u00e8 vuoto", (("why", "because"),))

    async def fail(self, message: bytes, context: Any) -> None:
        raise KeyError("a fault of the handler")

    async def left(self, message: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("kept", "yes"),))
        await context.abort(grpc.StatusCode.ABORTED, "with the trailers set before")
        raise AssertionError("abort does not return")

    async def wait(self, message: bytes, context: Any) -> bytes:
        self.waiting.release()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        return b""

    async def count(self, message: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(message)):
            yield b"%d" % number

    async def write(self, message: bytes, context: Any) -> None:
        for number in range(int(message)):
            await context.write(b"%d" % number)

    async def repeat(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield 2 * message

    async def total(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([message async for message in messages])


class Running:
    """A server in a thread with an event loop of its own."""

    def __init__(self, make: Callable[[list[tuple[str, int]]], Any]):
        self.handlers, started = Handlers(), threading.Event()
        self._stop: Callable[[float], Awaitable[None]]

        async def run() -> None:
            self.loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
            server = make([("grpc.max_receive_message_length", 1000), ("grpc.so_reuseport", 0)])
            server.add_generic_rpc_handlers((self.handlers,))
            self.port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            self._stop = server.stop
            started.set()
            await self._ended.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()))
        self._thread.start()
        assert started.wait(30)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")

    def call(self, name: str, **options: Any) -> Any:
        kind, message = METHODS[name]
        method = getattr(self.channel, kind)(f"/test.Calls/{name}")
        return method(iter([b"a", b"b"]) if kind.startswith("stream") else message, **options)

    def stop(self, grace: float) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(grace), self.loop).result(30)  # type: ignore[arg-type]

    def close(self) -> None:
        self.channel.close()
        with contextlib.suppress(Exception):
            self.stop(0)
        self.loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(params=[transport.Server, lambda options: grpc.aio.server(options=options)], ids=["core", "aio"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    server = Running(request.param)
    yield server
    server.close()


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("file", ["service/server.py", "service/client/__init__.py"])
def test_grpc_knows_the_names_of_our_options(file: str) -> None:
    """gRPC ignores unknown options silently. The known ones are in its library."""
    names = re.findall(r'"(grpc\.[a-z0-9_.]+)"', (ROOT / file).read_text())
    library = Path(cygrpc.__file__).read_bytes()
    assert len(names) > 5
    assert [name for name in names if name.encode() not in library] == []


def test_calls_of_every_kind(running: Running) -> None:
    answer, call = running.channel.unary_unary("/test.Calls/echo").with_call(
        b"hello", timeout=40, metadata=(("say", "ciao"),)
    )
    assert answer == b"hello in 40 s"
    assert {key: value for key, value in call.trailing_metadata() if key in ("said", "raw-bin")} == {
        "said": "ciao",
        "raw-bin": b"\0\xff",
    }
    assert running.call("echo") == b"hello", "without a deadline"
    assert list(running.call("count")) == [b"0", b"1", b"2"]
    assert list(running.call("write")) == [b"0", b"1", b"2"]
    assert list(running.call("repeat")) == [b"aa", b"bb"]
    assert running.call("total") == b"ab"


def test_refusals(running: Running) -> None:
    error: Any = refused(lambda: running.call("refuse"))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "niente: \u00e8 vuoto")
    assert ("why", "because") in [tuple(pair) for pair in error.trailing_metadata()]
    error = refused(lambda: running.call("left"))
    assert error.code() is grpc.StatusCode.ABORTED
    assert ("kept", "yes") in [tuple(pair) for pair in error.trailing_metadata()]
    error = refused(lambda: running.call("fail"))
    assert error.code() is grpc.StatusCode.UNKNOWN
    assert "KeyError" in error.details()
    error = refused(lambda: running.channel.unary_unary("/test.Calls/other")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    error = refused(lambda: running.channel.unary_unary("/test.Calls/echo")(b"x" * 1001))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert running.call("echo") == b"hello", "and the server continues"


def test_a_call_that_its_client_leaves_is_cancelled(running: Running) -> None:
    waiting = running.channel.unary_unary("/test.Calls/wait").future(b"")
    assert running.handlers.waiting.acquire(timeout=10)
    waiting.cancel()
    late: Any = refused(lambda: running.call("wait", timeout=0.2))
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    end = time.monotonic() + 10
    while len(running.handlers.ended) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert running.handlers.ended == ["cancelled", "cancelled"]


def test_stop_waits_for_calls_under_way_and_then_cancels_them(running: Running) -> None:
    waiting = running.channel.unary_unary("/test.Calls/wait").future(b"")
    assert running.handlers.waiting.acquire(timeout=10)
    start = time.monotonic()
    running.stop(0.5)
    assert 0.4 < time.monotonic() - start < 10
    assert waiting.exception(timeout=10).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    assert running.handlers.ended == ["cancelled"]


def test_many_calls_at_a_time(running: Running) -> None:
    """More calls than the core is asked for in advance, each answered with its own message."""
    echo = running.channel.unary_unary("/test.Calls/echo")
    calls = [echo.future(b"%d" % number) for number in range(500)]
    assert [call.result(timeout=30) for call in calls] == [b"%d" % number for number in range(500)]


def test_calls_leave_nothing_behind() -> None:
    """No call object of ours outlives its answer."""
    running = Running(transport.Server)
    before = len(_calls())  # the log that a test keeps has those that failed
    try:
        for name in ("echo", "refuse", "count", "repeat"):
            with contextlib.suppress(grpc.RpcError):
                list(running.call(name))
        end = time.monotonic() + 10
        while (left := len(_calls()) - before) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left
    finally:
        running.close()


def _calls() -> list[object]:
    gc.collect()
    return [value for value in gc.get_objects() if type(value) is transport._Call]


async def test_another_grpcio_serves_by_grpc_aio(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grpcio whose core has another interface."""
    monkeypatch.setattr(transport, "AVAILABLE", False)
    assert isinstance(transport.server([]), grpc.aio.Server)


def test_a_port_that_is_taken() -> None:
    running = Running(transport.Server)
    try:
        with pytest.raises(RuntimeError, match=f"127.0.0.1:{running.port}"):
            transport.Server([("grpc.so_reuseport", 0)]).add_insecure_port(f"127.0.0.1:{running.port}")
    finally:
        running.close()


def test_calls_that_no_handler_gets_are_reported() -> None:
    """Not one that is cancelled while its message is on its way."""
    reported: list[tuple[str, str, str]] = []

    def unserved(why: str, method: str, context: Any) -> None:
        reported.append((why, method, dict(context.invocation_metadata()).get("say", context.peer())))

    running = Running(lambda options: transport.Server(options, unserved))
    try:
        named = {"timeout": 10, "metadata": (("say", "who"),)}
        for path, message in (("/test.Calls/echo", bytes(1001)), ("/test.Calls/nothing", b""), ("/test", bytes(5000))):
            refused(lambda path=path, message=message: running.channel.unary_unary(path)(message, **named))
        halfway = running.channel.stream_unary("/test.Calls/echo").future(iter(lambda: time.sleep(5) or b"", None))
        time.sleep(0.2)
        halfway.cancel()
        assert running.call("echo", timeout=10) == b"hello in 10 s"
    finally:
        running.close()
    assert reported == [
        ("oversized", "/test.Calls/echo", "who"), ("unknown_method", "/test.Calls/nothing", "who"),
        ("unknown_method", "/test", "who"),
    ]  # fmt: skip
