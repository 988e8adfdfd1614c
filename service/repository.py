"""The models that are loaded, and which of them serves a request.

Loading happens beside serving: a version replaces another one when it is loaded, checked and warm, and the other one
answers what it had accepted before it goes. One that cannot be loaded is told of and changes nothing.

Threads only load; what is served changes on the event loop, and a change that has begun is carried through.
"""

import asyncio
import contextlib
import ctypes
import logging
import re
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from export.bundle import BundleError, load_bundle
from service import plan
from service.catalogue import DEFAULT_LABEL, Catalogue, Fingerprint, Shelf, scan
from service.config import Settings
from service.errors import InvalidRequest, NotFound, Unavailable
from service.loaded import EngineError
from service.metrics import Metrics
from service.model import Model
from service.profiles import ProfileFolder
from service.tuning import Surroundings
from training.steering import SteeringError

log = logging.getLogger("steervit.repository")
NUMBER = re.compile(r"[0-9]{1,18}")
T = TypeVar("T")


@dataclass
class Loaded:
    """The versions of one model."""

    models: dict[int, Model] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    """Why a version is not loaded."""
    fingerprints: dict[int, Fingerprint] = field(default_factory=dict)
    """Of the last attempt at each version."""

    @property
    def default(self) -> int:
        """The version that a request gets which names none."""
        label = self.labels.get(DEFAULT_LABEL)
        return label if label in self.models else max(self.models)


@dataclass(frozen=True)
class Attempt:
    """At loading a version."""

    version: int
    fingerprint: Fingerprint
    found: Model | str
    """The model, which may be the one that was there already; or why there is none."""


@dataclass(frozen=True)
class Entry:
    """A version in the index."""

    name: str
    version: int
    ready: bool
    reason: str


class Repository:
    """Loads and unloads models as the folder changes or as clients ask, and gives the one that a request names."""

    def __init__(self, settings: Settings, metrics: Metrics, profiles: ProfileFolder):
        """Loads what is to be served. Raises BundleError or EngineError when a model has no version that works; with
        --model-control none already when one of its versions does not."""
        self._settings, self._metrics, self._profiles = settings, metrics, profiles
        self._pool = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        """Under way."""
        self._shelves = Catalogue()
        """As the folder was last seen."""
        self._look_at_folder()
        self._loaded: dict[str, Loaded] = {}
        self._broken: dict[str, Loaded] = {}
        """Models none of whose versions works."""
        versions_to_load = sum(len(plan.wanted(settings.versions, shelf)) for shelf in self._shelves.values())
        self._surroundings = Surroundings(serving=False, spinning=versions_to_load == 1)
        for name, shelf in self._shelves.items():
            loaded = Loaded()
            self._put_in_place(name, shelf, loaded, self._attempt(name, shelf, loaded))
            if not loaded.models or (settings.model_control == "none" and loaded.failures):
                raise BundleError("; ".join(loaded.failures.values()))
        self._surroundings = Surroundings(serving=True, spinning=False)

    @property
    def alive(self) -> bool:
        """Whether the threads of every model's batcher are there and make progress. For any thread."""
        return all(model.batcher.alive for model in self.models)

    @property
    def models(self) -> list[Model]:
        """By name and version. For any thread."""
        return [model for _, loaded in sorted(self._loaded.items()) for _, model in sorted(loaded.models.items())]

    def get(self, name: str, version: str) -> Model:
        """The model that a request names; "" where it names none. version: a number or a label.

        Raises NotFound or InvalidRequest.
        """
        if not name and len(self._loaded) > 1:
            raise InvalidRequest(f"model is empty; allowed: one of {self._names()}")
        if not name and self._loaded:
            name = next(iter(self._loaded))
        if name not in self._loaded:
            raise NotFound(f"model is {name!r}; allowed: {self._names()}")
        loaded = self._loaded[name]
        number = loaded.labels.get(version) or (int(version) if NUMBER.fullmatch(version) else None)
        if not version:
            number = loaded.default
        if number not in loaded.models:
            allowed = ", ".join(repr(str(v)) for v in (*sorted(loaded.models), *sorted(loaded.labels)))
            raise NotFound(f"version of model {name!r} is {version!r}; allowed: {allowed}, or none")
        return loaded.models[number]

    def index(self) -> Iterator[Entry]:
        """Every version that was found, and those that were asked for and were not."""
        tried = {**self._loaded, **self._broken}
        for name in sorted({*self._shelves, *tried}):
            loaded = tried.get(name) or Loaded()
            found = self._shelves[name].versions if name in self._shelves else ()
            for version in sorted({*found, *loaded.models, *loaded.failures}):
                ready = version in loaded.models
                yield Entry(name, version, ready, loaded.failures.get(version, "" if ready else "not loaded"))

    def use_profiles(self) -> None:
        """Give every model what the profile folder has for it now."""
        for model in self.models:
            self._give_profiles(model)

    async def watch(self) -> None:
        """Follow the folder until cancelled."""
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            await self.look()

    async def look(self) -> None:
        """As refresh, but a folder that cannot be read is only told of."""
        try:
            await self.refresh()
        except (BundleError, OSError) as error:
            log.error("the repository cannot be read, so all stays as it is: %s", error)
        except Exception:  # the next look may go well
            log.exception("looking at the repository failed")

    async def refresh(self, only: str | None = None) -> dict[str, Loaded]:
        """Make what is loaded what the folder says. only: this model. Returns what became of each.

        Raises BundleError when the folder cannot be read, NotFound when it has no such model.
        """
        return await self._carried_through(self._refresh(only))

    def _look_at_folder(self) -> Catalogue:
        """Read the repository folder; what is skipped and was not before is logged."""
        found = scan(self._settings.repository)
        for path, reason in found.skipped.items():
            if self._shelves.skipped.get(path) != reason:
                log.warning("skipped in the repository: %s: %s", path, reason)
        self._shelves = found
        return found

    async def _refresh(self, only: str | None) -> dict[str, Loaded]:
        shelves = await asyncio.get_running_loop().run_in_executor(None, self._look_at_folder)
        repository = self._settings.repository
        unclear = {path.relative_to(repository).parts[0]: (path, why) for path, why in shelves.skipped.items()}
        if only is not None and only not in shelves:
            if only in unclear:
                raise BundleError("{}: {}".format(*unclear[only]))
            raise NotFound(f"model is {only!r}; allowed: {', '.join(map(repr, shelves))}")
        followed = {name: await self._follow(name, shelf) for name, shelf in shelves.items() if only in (None, name)}
        if only is None:
            for name in {*self._loaded, *self._broken} - {*shelves, *unclear}:  # rather retained than lost by mistake
                await self._unload(name)
        return followed

    async def load(self, name: str) -> None:
        """As refresh of one model. Raises Unavailable, with the reasons, when a version does not work."""
        if before := self._loaded.get(name) or self._broken.get(name):
            for version in before.failures:  # try again what failed
                before.fingerprints.pop(version, None)
        try:
            failures = (await self.refresh(name))[name].failures
        except (BundleError, OSError) as error:
            raise Unavailable(f"the repository cannot be read: {error}") from error
        if failures:
            raise Unavailable("; ".join(failures.values()))

    async def unload(self, name: str) -> None:
        """Raises NotFound."""

        async def unload() -> None:
            if name not in self._loaded:
                raise NotFound(f"model is {name!r}; allowed: {self._names()}")
            await self._unload(name)

        await self._carried_through(unload())

    def close(self) -> None:
        """Answer what was accepted, and release everything."""
        for model in self.models:
            model.batcher.close()
        self._pool.shutdown()

    async def _carried_through(self, change: Coroutine[Any, Any, T]) -> T:
        """One change at a time, to its end: a client whose deadline passes must not leave half of one behind."""

        async def alone() -> T:
            async with self._changing:
                return await change

        task = asyncio.create_task(alone())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _follow(self, name: str, shelf: Shelf) -> Loaded:
        """Make one model what is on its shelf."""
        loaded = self._loaded.get(name) or self._broken.get(name) or Loaded()
        attempts = await asyncio.get_running_loop().run_in_executor(None, self._attempt, name, shelf, loaded)
        gone = self._put_in_place(name, shelf, loaded, attempts)
        del attempts  # _retire must be the last to hold them
        await _retire(gone)
        return loaded

    async def _unload(self, name: str) -> None:
        self._metrics.failed_versions(name, ())
        self._broken.pop(name, None)
        await _retire(list(self._loaded.pop(name, Loaded()).models.values()))

    def _attempt(self, name: str, shelf: Shelf, loaded: Loaded) -> list[Attempt]:
        """Load the versions that are to be tried. Changes nothing."""
        now, instead = plan.tries(self._settings.versions, shelf, loaded.fingerprints)
        attempts = [self._try(name, version, shelf, loaded) for version in now]
        for version in instead:
            if loaded.models or any(isinstance(attempt.found, Model) for attempt in attempts):
                break
            attempts.append(self._try(name, version, shelf, loaded))
        return attempts

    def _try(self, name: str, version: int, shelf: Shelf, loaded: Loaded) -> Attempt:
        found = shelf.versions[version]
        try:
            model = self._load(name, version, found.folder, loaded.models.get(version))
        except (BundleError, EngineError, OSError) as error:
            self._metrics.load_failed(name, version)
            log.error("model %s version %d is not loaded: %s", name, version, error)
            return Attempt(version, found.fingerprint, str(error))
        log.info(
            "model %s version %d: %s on %s with %d threads, %d profiles, digest %s", name, version,
            model.engine.graph_name, model.engine.provider, model.engine.threads, len(model.bundle.profiles),
            model.bundle.digest,
        )  # fmt: skip
        for warning in model.bundle.manifest.evaluation.get("warnings", []):
            log.warning("model %s version %d: %s", name, version, warning)
        return Attempt(version, found.fingerprint, model)

    def _put_in_place(self, name: str, shelf: Shelf, loaded: Loaded, attempts: list[Attempt]) -> list[Model]:
        """Serve what was loaded, and note what could not be. Returns the models that are served no more."""
        gone = []
        for attempt in attempts:
            loaded.fingerprints[attempt.version] = attempt.fingerprint
            if isinstance(attempt.found, str):
                loaded.failures[attempt.version] = attempt.found
                continue
            self._give_profiles(attempt.found)
            loaded.failures.pop(attempt.version, None)
            there = loaded.models.get(attempt.version)
            if there and there is not attempt.found:
                gone.append(there)
            loaded.models[attempt.version] = attempt.found
        if shelf.problem:
            log.error("labels of %s stay as they are: %s", name, shelf.problem)
        served, loaded.labels, failures = plan.outcome(
            self._settings.versions, shelf, loaded.models, loaded.labels, loaded.failures
        )
        for version, reason in failures.items():
            if loaded.failures.get(version) != reason:
                log.error("%s", reason)
        for version in {*loaded.fingerprints} - served - failures.keys():
            del loaded.fingerprints[version]
        for version in loaded.models.keys() - served:
            gone.append(loaded.models.pop(version))
            loaded.fingerprints.pop(version, None)
        loaded.failures = failures
        self._metrics.failed_versions(name, failures)
        self._broken.pop(name, None)
        (self._loaded if loaded.models else self._broken)[name] = loaded
        return gone

    def _load(self, name: str, version: int, folder: Path, there: Model | None) -> Model:
        """there: this version as it is loaded already; it stays when it is still the same."""
        bundle = load_bundle(folder, self._settings.repository)
        if there and there.bundle.digest == bundle.digest:
            return there
        manifest = bundle.manifest
        if (manifest.name, manifest.version) != (name, version):
            raise BundleError(
                f"{folder}: the manifest says {manifest.name!r} version {manifest.version}; "
                f"allowed: {name!r} version {version}, as the folders are named"
            )
        return Model(bundle, self._settings, self._metrics, self._pool, self._surroundings)

    def _give_profiles(self, model: Model) -> None:
        try:
            model.use(self._profiles.of(model.bundle))
        except SteeringError as error:  # the folder was read before this model was there
            log.error("model %s keeps its profiles: %s", model.bundle.manifest.name, error)

    def _names(self) -> str:
        return ", ".join(repr(name) for name in sorted(self._loaded)) or "none is loaded"


async def _retire(models: list[Model]) -> None:
    """Of these alone there must be no other holder: the list is emptied, and their memory goes back to the system."""
    for model in models:
        await model.retire()
    if models:
        models.clear()
        del model
        with contextlib.suppress(AttributeError):  # C libraries other than glibc do not keep as much
            await asyncio.get_running_loop().run_in_executor(None, ctypes.CDLL(None).malloc_trim, 0)
