"""The playground's pages over HTTP: the form with the answer, the answer alone, the state of the server."""

import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.client import AsyncClient
from service.pb import steering_pb2 as pb
from service.playground.asking import Problem, Question, ask
from service.playground.views import result_of

MOST_BYTES = 32 * 2**20
"""Limit of an uploaded file. The server has its own limit, 16 MiB by default."""
MOST_SAMPLES, LABELS_IN_SIGHT = 240, 24
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
HEADERS = {
    # The browser loads nothing from another machine, whatever the page contains.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
GONE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
REFUSED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION}
HERE = Path(__file__).parent


def samples_in(folder: Path) -> dict[str, list[str]]:
    """Image files by label, as paths within the folder. Those directly in it are labelled with their names, without the
    suffix; those in a folder with that folder's name."""
    found: dict[str, list[str]] = {}
    images = (path for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*")) if path.suffix.lower() in SUFFIXES)
    for path in islice(images, MOST_SAMPLES):
        relative = path.relative_to(folder)
        found.setdefault(relative.parent.name or path.stem, []).append(relative.as_posix())
    return found


def serve(listener: socket.socket, client: AsyncClient, address: str, model: str, samples: Path | None) -> None:
    """Serve the pages on a listening socket until SIGINT or SIGTERM. The other arguments: as of app_of."""
    config = uvicorn.Config(
        app_of(client, address, model, samples), http="h11", ws="none", log_level="warning", access_log=False,
        server_header=False, timeout_graceful_shutdown=5,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises again the signal that stopped it
        signal.signal(number, lambda *_: None)
    host, port = listener.getsockname()[:2]
    print(f"ready: http://{f'[{host}]' if ':' in host else host}:{port} (server {address})", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def app_of(client: AsyncClient, address: str, model: str, samples: Path | None) -> ASGIApp:
    """The application. address: of the server, as the page calls it. model: "" for the only one. samples: a folder,
    or None."""
    pages = Pages(client, address, model, samples)
    routes = [
        Route("/", pages.page),
        Route("/result", pages.result, methods=["GET", "POST"]),
        Route("/status", pages.status),
        Route("/healthz", _healthz),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    if samples:
        routes.append(Mount("/samples", StaticFiles(directory=samples)))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await client.close()

    return _with_headers(
        Starlette(routes=routes, lifespan=lifespan, exception_handlers={Problem: pages.problem, Exception: _failed})
    )


class Pages:
    """The handlers of requests. They keep no state between requests."""

    def __init__(self, client: AsyncClient, address: str, model: str, samples: Path | None):
        self._client, self._address, self._model, self._folder = client, address, model, samples
        self._samples = samples_in(samples) if samples else {}
        loader = jinja2.FileSystemLoader(HERE / "templates")
        self._templates = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )

    async def page(self, request: Request) -> Response:
        """The whole page, with the answer if a sample is chosen, or the reason why the server gives none."""
        shown: dict[str, Any] = {"address": self._address, "result": None, "problem": None, "model": None}
        shown |= {"question": Question(), "profiles": {}, "samples": self._samples, "in_sight": LABELS_IN_SIGHT}
        try:
            model, profiles = await self._served()
            kinds: dict[str, list[str]] = {}
            for profile in profiles:
                kinds.setdefault(profile.kind, []).append(profile.name)
            shown |= {"model": model, "profiles": kinds}
            shown["question"] = question = self._question(request, [profile.name for profile in profiles])
            if question.sample:
                shown["result"] = await self._answer(model, self._sample(question.sample), question)
        except Problem as problem:
            shown["problem"] = problem
        status = shown["problem"].status if shown["problem"] else 200
        return HTMLResponse(self._templates.get_template("page.html.jinja").render(shown), status)

    async def result(self, request: Request) -> Response:
        """Only the answer, for the script of the page. The body of a POST is the image."""
        question = Question.of(request.query_params)
        image = await _body(request) if request.method == "POST" else self._sample(question.sample)
        model, _ = await self._served(profiles=False)
        shown = {"result": await self._answer(model, image, question), "question": question}
        return HTMLResponse(self._templates.get_template("result.html.jinja").render(shown))

    async def status(self, _: Request) -> Response:
        """Whether the server answers, and which bundle it serves."""
        try:
            model, _profiles = await self._served(profiles=False)
        except Problem as problem:
            return JSONResponse({"answers": False, "sentence": problem.sentence, "detail": problem.detail})
        return JSONResponse({"answers": True, "bundle": model.bundle_digest})

    async def problem(self, _: Request, error: Exception) -> Response:
        """A Problem, as the script shows it."""
        assert isinstance(error, Problem)
        return JSONResponse({"sentence": error.sentence, "detail": error.detail}, error.status)

    def _question(self, request: Request, profiles: list[str]) -> Question:
        """The question in the URL; by default the first sample, under the profile of its label if there is one."""
        if request.query_params or not self._samples:
            return Question.of(request.query_params)
        label, paths = next(iter(self._samples.items()))
        return Question(paths[0], label if label in profiles else "")

    def _sample(self, path: str) -> bytes:
        if not any(path in paths for paths in self._samples.values()):
            raise Problem(422, f"sample is {path!r}; allowed: one of the samples on the page, or an uploaded image")
        assert self._folder is not None
        return (self._folder / path).read_bytes()

    async def _served(self, profiles: bool = True) -> tuple[pb.GetModelResponse, list[pb.Profile]]:
        try:
            model = await self._client.model(self._model)
            return model, [each async for each in self._client.profiles(self._model)] if profiles else []
        except grpc.aio.AioRpcError as error:
            raise self._problem_of(error) from error

    async def _answer(self, model: pb.GetModelResponse, image: bytes, question: Question) -> Any:
        try:
            return result_of(await ask(self._client, model, image, question))
        except grpc.aio.AioRpcError as error:
            raise self._problem_of(error) from error

    def _problem_of(self, error: grpc.aio.AioRpcError) -> Problem:
        details = error.details() or ""
        if error.code() in GONE:
            sentence = f"The server at {self._address} does not answer."
            return Problem(503, sentence, f"{error.code().name}: {details}")
        if error.code() in REFUSED:
            return Problem(422, details.replace("images[0].encoded", "The image").strip())
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Problem(429, "The server is busy: try again.", details)
        return Problem(502, f"The server failed: {error.code().name}.", details)


async def _failed(_: Request, error: Exception) -> Response:
    """An unexpected error, as the script shows it; the traceback goes to standard error."""
    return JSONResponse({"sentence": "The playground failed; its log says more.", "detail": repr(error)}, 500)


async def _healthz(_: Request) -> Response:
    """The health of this process, whether or not the server answers."""
    return Response("ok\n", media_type="text/plain")


async def _body(request: Request) -> bytes:
    """The body of a request. Raises Problem if it is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise Problem(413, f"The image has more than {MOST_BYTES:,} bytes; allowed: at most that many")
    return bytes(body)


def _with_headers(app: ASGIApp) -> ASGIApp:
    """The application, with HEADERS on every response."""
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        await app(scope, receive, with_headers)

    return wrapped
