"""A gRPC server for coroutines with the interface of grpc.aio's, at a third of its CPU time a call.

grpc.aio wakes the event loop through a socket for each step of each call, four or five times. Here one thread follows
the completion queue of gRPC's core, takes the steps that need no decision, and wakes the event loop once for all
messages that have arrived meanwhile. Answers go to the core directly. Measurements: NOTES.md, "Instances".

It uses the classes that grpc's own two servers use, grpc._cython.cygrpc, which are not public. `server` returns
grpc.aio's server where they are missing.

Context has the methods of grpc.aio's that the services here use. Handlers are grpc.RpcMethodHandler of coroutines or,
for streams, of asynchronous generators.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal, NamedTuple

import grpc

try:
    from grpc._cython.cygrpc import (
        CompletionQueue,
        CompletionType,
        ReceiveCloseOnServerOperation,
        ReceiveMessageOperation,
        SendInitialMetadataOperation,
        SendMessageOperation,
        SendStatusFromServerOperation,
        auth_context,
    )
    from grpc._cython.cygrpc import Server as CoreServer

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

log = logging.getLogger("steervit.transport")
Metadata = Sequence[tuple[str, str | bytes]]
PENDING_REQUESTS = 8
"""Number of requests for a call that the core always holds, so that it can hand over as many calls at once."""
FOR_EVER = 1e12
"""Seconds; a later deadline counts as none."""
FLAGS = 0
NO_METHOD = "Method not found!"
OK = grpc.StatusCode.OK
Unserved = Callable[[Literal["oversized", "unknown_method"], str, Any], None]
"""Called on the event loop for a call that no handler gets: why, its method, its Context."""


def _unheeded(*_: Any) -> None:
    pass


def server(options: Sequence[tuple[str, int]], unserved: Unserved = _unheeded) -> Any:
    """A server with the methods of grpc.aio.Server that this project calls. options: gRPC's channel arguments.
    unserved: not called by grpc.aio's own, which reports no such calls."""
    return Server(options, unserved) if AVAILABLE else grpc.aio.server(options=options)


class Aborted(Exception):
    """A handler ended its call; the arguments are those of Context.abort."""


class _Details(NamedTuple):
    """The details of a new call, as grpc.HandlerCallDetails."""

    method: str
    invocation_metadata: Metadata


class Context:
    """A call, as its handler sees it."""

    def __init__(self, call: "_Call"):
        self._call = call

    def time_remaining(self) -> float | None:
        """Seconds to the deadline, or None without one."""
        deadline = self._call.deadline
        return None if deadline > FOR_EVER else max(0.0, deadline - time.time())

    def invocation_metadata(self) -> Metadata:
        """The metadata of the client, as pairs of key and value."""
        return self._call.metadata

    def peer(self) -> str:
        """The address of the client, such as ipv4:127.0.0.1:51234."""
        peer: bytes = self._call.core.peer()
        return peer.decode(errors="replace")

    def auth_context(self) -> dict[str, list[bytes]]:
        """What TLS knows about the client, such as x509_common_name."""
        return {key.decode(): values for key, values in (auth_context(self._call.core) or {}).items()}

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """Set the metadata to send with the status; those of `abort` replace it."""
        self._call.trailers = tuple(metadata)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """End the call with a status. Always raises."""
        raise Aborted(code, details, tuple(trailing_metadata) or self._call.trailers)

    async def write(self, message: Any) -> None:
        """Send one message of a streaming answer."""
        await self._call.write(message)


class _Call:
    """A call in progress. `closed` and `received` run in the server's thread, all others on the event loop."""

    __slots__ = (
        "_cancelled",
        "_handler",
        "_headers_sent",
        "_server",
        "_task",
        "core",
        "deadline",
        "metadata",
        "method",
        "trailers",
    )

    def __init__(self, server: "Server", core: Any, handler: Any, details: _Details, deadline: float):
        self._server, self.core, self._handler, self.deadline = server, core, handler, deadline
        self.method, self.metadata = details
        self.trailers = tuple[tuple[str, str | bytes], ...]()
        self._headers_sent = self._cancelled = False
        self._task: asyncio.Task[None] | None = None
        core.start_server_batch((ReceiveCloseOnServerOperation(FLAGS),), self.closed)
        if handler is None or handler.request_streaming:
            server.later(self.start, None)
        else:
            core.start_server_batch((ReceiveMessageOperation(FLAGS),), self.received)

    def received(self, event: Any) -> None:
        message = event.batch_operations[0].message()
        if message is not None:  # otherwise the call was cancelled
            self._server.later(self.start, message)
        elif not event.success:  # the core has sent the status
            self._server.later(self.oversized, None)

    def closed(self, event: Any) -> None:
        """Handle the end of the call: it was cancelled if it has not been answered."""
        if event.batch_operations[0].cancelled():
            self._server.later(self.cancel, None)

    def oversized(self, _: None) -> None:
        self._server.unserved("oversized", self.method, Context(self))

    def start(self, message: bytes | None) -> None:
        if not self._cancelled:
            self._task = self._server.loop.create_task(self._serve(message))

    def cancel(self, _: None) -> None:
        self._cancelled = True
        if self._task:
            self._task.cancel()

    async def _serve(self, message: bytes | None) -> None:
        handler = self._handler
        try:
            if handler is None:
                self._server.unserved("unknown_method", self.method, Context(self))
                raise Aborted(grpc.StatusCode.UNIMPLEMENTED, NO_METHOD, ())
            read = handler.request_deserializer or _as_it_is
            request = self._requests(read) if handler.request_streaming else read(message)
            del message
            if handler.response_streaming:
                await self._stream(request)
                self._end(OK, "", self.trailers)
                return
            behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
            answer = await behaviour(request, Context(self))
            self._end(OK, "", self.trailers, (handler.response_serializer or _as_it_is)(answer))
        except Aborted as end:
            code, details, trailers = end.args
            self._end(code, details, trailers)
        except asyncio.CancelledError:
            pass  # the core has sent the status
        except Exception as error:
            log.exception("a call failed")
            self._end(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error).__name__}", ())

    async def _stream(self, request: Any) -> None:
        handler = self._handler
        behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
        answers = behaviour(request, Context(self))
        if hasattr(answers, "__aiter__"):
            async for answer in answers:
                await self.write(answer)
        else:
            await answers

    async def _requests(self, read: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        while True:
            (received,) = await self._batch(ReceiveMessageOperation(FLAGS))
            if (message := received.message()) is None:
                return
            yield read(message)

    async def write(self, answer: Any) -> None:
        message = SendMessageOperation((self._handler.response_serializer or _as_it_is)(answer), FLAGS)
        await self._batch(*self._headers(), message)

    def _end(self, code: grpc.StatusCode, details: str, trailers: Metadata, *messages: bytes) -> None:
        """Send the status, preceded by the headers if they have not been sent, and by messages."""
        status = SendStatusFromServerOperation(trailers, code.value[0], details.encode(), FLAGS)
        sent = (*self._headers(), *(SendMessageOperation(message, FLAGS) for message in messages), status)
        self.core.start_server_batch(sent, _nothing)

    def _headers(self) -> list[Any]:
        """The operation that sends the headers, at the first call; later none."""
        first, self._headers_sent = not self._headers_sent, True
        return [SendInitialMetadataOperation((), FLAGS)] * first

    async def _batch(self, *operations: Any) -> Sequence[Any]:
        """Run operations and wait for them."""
        done: asyncio.Future[Any] = self._server.loop.create_future()

        def settle(event: Any) -> None:
            if not done.done():
                done.set_result(event.batch_operations)

        self.core.start_server_batch(operations, lambda event: self._server.later(settle, event))
        completed: Sequence[Any] = await done
        return completed


class Server:
    """The server; its methods have the names of grpc.aio.Server's."""

    def __init__(self, options: Sequence[tuple[str, int]], unserved: Unserved = _unheeded):
        """As `server`."""
        self.unserved = unserved
        self._queue = CompletionQueue()
        self._core = CoreServer(tuple(options), False)
        self._core.register_completion_queue(self._queue)
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._arrived: deque[tuple[Callable[[Any], None], Any]] = deque()
        """Functions to call on the event loop, with their arguments."""
        self._woken = False
        """Whether the event loop has been woken to call them."""
        self._thread = threading.Thread(target=self._follow, name="transport", daemon=True)
        self._stopping = False
        self.loop: asyncio.AbstractEventLoop

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add handlers. The first one that knows a method handles its calls."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Does nothing: the generated code adds the same handlers as generic ones."""

    def add_insecure_port(self, address: str) -> int:
        """Bind the address; returns the port. Raises RuntimeError when that fails."""
        return _bound(address, self._core.add_http2_port(address.encode()))

    def add_secure_port(self, address: str, credentials: grpc.ServerCredentials) -> int:
        """Bind the address; returns the port. Raises RuntimeError when that fails, or the credentials cannot be
        used."""
        return _bound(address, self._core.add_http2_port(address.encode(), credentials._credentials))  # type: ignore[attr-defined]

    async def start(self) -> None:
        """Start taking calls. Handlers run on the running event loop."""
        self.loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._core.start()
        for _ in range(PENDING_REQUESTS):
            self._core.request_call(self._queue, self._queue, self._called)
        self._thread.start()

    async def stop(self, grace: float) -> None:
        """Refuse new calls, wait `grace` seconds for those in progress, and cancel the rest."""
        self._stopping = True
        self._core.shutdown(self._queue, lambda _: self.later(lambda _: self._stopped.set(), None))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), grace)
        self._core.cancel_all_calls()
        await self._stopped.wait()
        self._core.destroy()
        self._queue.shutdown()
        await self.loop.run_in_executor(None, self._thread.join)

    def later(self, do: Callable[[Any], None], argument: Any) -> None:
        """Call `do` on the event loop. Called from the server's thread."""
        self._arrived.append((do, argument))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._turn)

    def _turn(self) -> None:
        self._woken = False  # first: later arrivals wake the loop again
        while self._arrived:
            do, argument = self._arrived.popleft()
            do(argument)

    def _follow(self) -> None:
        """Handle the events of the core, in the server's thread, until the queue is shut down."""
        while True:
            event = self._queue.poll()
            if event.completion_type == CompletionType.queue_shutdown:
                return
            try:
                event.tag(event)
            except Exception:  # one call is lost; the others need the thread
                log.exception("a call failed and got no answer")
            del event  # it references its call, which references the core

    def _called(self, event: Any) -> None:
        """Handle a new call, or the shutdown of the server."""
        if not self._stopping:
            with contextlib.suppress(ValueError):  # raised while it shuts down
                self._core.request_call(self._queue, self._queue, self._called)
        if event.success:
            details = _Details(event.call_details.method.decode("latin1"), event.invocation_metadata)
            known = (handler.service(details) for handler in self._handlers)  # type: ignore[arg-type]
            handler = next((handler for handler in known if handler is not None), None)
            _Call(self, event.call, handler, details, event.call_details.deadline)


def _bound(address: str, port: int) -> int:
    if not port:
        raise RuntimeError(f"Failed to bind to address {address}")
    return port


def _as_it_is(message: Any) -> Any:
    return message


def _nothing(_: Any) -> None:
    pass
