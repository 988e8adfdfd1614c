"""The loaded models, and the choice of the one that serves a request.

Loading happens while the server serves. A version replaces another one once it is loaded, checked and warm; the
replaced one first answers the calls that it has accepted. A version that cannot be loaded is logged and changes
nothing.

Threads only load. The served models change on the event loop, and a change that has started is always completed.
"""

import asyncio
import contextlib
import ctypes
import logging
import re
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from export.bundle import BundleError, load_bundle
from service import plan
from service.access_log import current
from service.catalogue import DEFAULT_LABEL, Catalogue, Fingerprint, Shelf, scan
from service.config import Settings
from service.errors import InvalidRequest, NotFound, Unavailable
from service.limits import permit
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
    """The reason why a version is not loaded."""
    fingerprints: dict[int, Fingerprint] = field(default_factory=dict)
    """The fingerprint at the last attempt to load each version."""
    labels_problem: str = ""
    """What is wrong with labels.json, as logged."""

    @property
    def default(self) -> int:
        """The version that serves requests without a version."""
        label = self.labels.get(DEFAULT_LABEL)
        return label if label in self.models else max(self.models)


@dataclass(frozen=True)
class Attempt:
    """An attempt to load a version."""

    version: int
    fingerprint: Fingerprint
    result: Model | str
    """The model, which may be the already loaded one, or the reason why it could not be loaded."""


@dataclass(frozen=True)
class Entry:
    """A version in the index."""

    name: str
    version: int
    ready: bool
    reason: str


class Repository:
    """Loads and unloads models when the folder changes or clients ask for it, and returns the model for a request."""

    def __init__(self, settings: Settings, metrics: Metrics, profiles: ProfileFolder):
        """Loads the models. Raises BundleError or EngineError when no version of a model loads, or its labels are
        invalid; with --model-control none, when any of its versions does not load."""
        self._settings, self._metrics, self._profiles = settings, metrics, profiles
        self._pool = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        """Changes in progress."""
        self.problem = ""
        """What was wrong with the folder or with a labels.json at the last scan; "" if nothing was."""
        self._shelves = Catalogue()
        """The state of the folder at the last scan."""
        self._scan()
        self._loaded: dict[str, Loaded] = {}
        self._broken: dict[str, Loaded] = {}
        """Models without a version that loads."""
        versions_to_load = sum(len(plan.selected(settings.versions, shelf)) for shelf in self._shelves.values())
        self._surroundings = Surroundings(serving=False, spinning=versions_to_load == 1)
        if self.problem:  # without its labels, another version would serve requests that name none
            raise BundleError(self.problem)
        for name, shelf in self._shelves.items():
            loaded = Loaded()
            self._put_in_place(name, shelf, loaded, self._attempt(name, shelf, loaded))
            if not loaded.models or (settings.model_control == "none" and loaded.failures):
                raise BundleError("; ".join(loaded.failures.values()))
        self._surroundings = Surroundings(serving=True, spinning=False)

    @property
    def alive(self) -> bool:
        """Whether the threads of every model's batcher run and make progress. Thread-safe."""
        return all(model.batcher.alive for model in self.models)

    @property
    def models(self) -> list[Model]:
        """The loaded models by name and version. Thread-safe."""
        return [model for _, loaded in sorted(self._loaded.items()) for _, model in sorted(loaded.models.items())]

    def get(self, name: str, version: str) -> Model:
        """The model that serves a request. name: "" for the only model; version: a number, a label, or "" for the
        default.

        Raises NotFound, InvalidRequest, or ModelNotAllowed if the current call's client may not call it.
        """
        if not name and len(self._loaded) > 1:
            raise InvalidRequest(f"model is empty; allowed: one of {self._names()}")
        if not name and self._loaded:
            name = next(iter(self._loaded))
        permit(name)
        if name not in self._loaded:
            raise NotFound(f"model is {name!r}; allowed: {self._names()}")
        loaded = self._loaded[name]
        number = loaded.labels.get(version) or (int(version) if NUMBER.fullmatch(version) else None)
        if not version:
            number = loaded.default
        if number not in loaded.models:
            allowed = ", ".join(repr(str(v)) for v in (*sorted(loaded.models), *sorted(loaded.labels)))
            raise NotFound(f"version of model {name!r} is {version!r}; allowed: {allowed}, or none")
        record = current()
        record.model, record.version = name, str(number)
        return loaded.models[number]

    def index(self) -> Iterator[Entry]:
        """Every version in the folder, and every requested version that is missing."""
        tried = {**self._loaded, **self._broken}
        for name in sorted({*self._shelves, *tried}):
            loaded = tried.get(name) or Loaded()
            versions = self._shelves[name].versions if name in self._shelves else ()
            for version in sorted({*versions, *loaded.models, *loaded.failures}):
                ready = version in loaded.models
                yield Entry(name, version, ready, loaded.failures.get(version, "" if ready else "not loaded"))

    def use_profiles(self) -> None:
        """Update the profiles of every model from the profile folder."""
        for model in self.models:
            self._give_profiles(model)

    async def watch(self) -> None:
        """Scan the folder every poll_seconds until cancelled."""
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            await self.look()

    async def look(self) -> None:
        """As refresh, but logs errors."""
        try:
            await self.refresh()
        except (BundleError, OSError) as error:
            log.error("the repository cannot be read; nothing changes: %s", error)
        except Exception:  # the next scan may succeed
            log.exception("scanning the repository failed")

    async def refresh(self, only: str | None = None) -> dict[str, Loaded]:
        """Load and unload models so that they match the folder. only: one model. Returns the state of each.

        Raises BundleError when the folder cannot be read, NotFound when it has no such model.
        """
        return await self._completed(self._refresh(only))

    def _scan(self) -> Catalogue:
        """Scan the repository folder; newly skipped paths are logged. Raises BundleError or OSError."""
        try:
            shelves = scan(self._settings.repository)
            self.problem = next((shelf.problem for shelf in shelves.values() if shelf.problem), "")
        except (BundleError, OSError) as error:
            self.problem = str(error)
            raise
        finally:
            self._metrics.repository_right = not self.problem
        for path, reason in shelves.skipped.items():
            if self._shelves.skipped.get(path) != reason:
                log.warning("skipped in the repository: %s: %s", path, reason)
        self._shelves = shelves
        return shelves

    async def _refresh(self, only: str | None) -> dict[str, Loaded]:
        shelves = await asyncio.get_running_loop().run_in_executor(None, self._scan)
        repository = self._settings.repository
        unclear = {path.relative_to(repository).parts[0]: (path, why) for path, why in shelves.skipped.items()}
        if only is not None and only not in shelves:
            if only in unclear:
                raise BundleError("{}: {}".format(*unclear[only]))
            raise NotFound(f"model is {only!r}; allowed: {', '.join(map(repr, shelves))}")
        followed = {name: await self._follow(name, shelf) for name, shelf in shelves.items() if only in (None, name)}
        if only is None:  # models in a folder that cannot be read are retained
            for name in {*self._loaded, *self._broken} - {*shelves, *unclear}:
                await self._unload(name)
        return followed

    async def load(self, name: str) -> None:
        """Refresh one model. Raises Unavailable, with the reasons, when a version cannot be loaded."""
        if before := self._loaded.get(name) or self._broken.get(name):
            for version in before.failures:  # so that failed versions are tried again
                before.fingerprints.pop(version, None)
        try:
            failures = (await self.refresh(name))[name].failures
        except (BundleError, OSError) as error:
            raise Unavailable(f"the repository cannot be read: {error}") from error
        if failures:
            raise Unavailable("; ".join(failures.values()))

    async def unload(self, name: str) -> None:
        """Unload a model. Raises NotFound."""

        async def unload() -> None:
            if name not in self._loaded:
                raise NotFound(f"model is {name!r}; allowed: {self._names()}")
            await self._unload(name)

        await self._completed(unload())

    def close(self) -> None:
        """Answer the accepted calls, then release everything."""
        for model in self.models:
            model.batcher.close()
        self._pool.shutdown()

    async def _completed(self, change: Coroutine[Any, Any, T]) -> T:
        """Run changes one at a time, each to its end even if the client that requested it is gone."""

        async def alone() -> T:
            async with self._changing:
                return await change

        task = asyncio.create_task(alone())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _follow(self, name: str, shelf: Shelf) -> Loaded:
        """Load and unload versions of a model so that they match its shelf."""
        loaded = self._loaded.get(name) or self._broken.get(name) or Loaded()
        attempts = await asyncio.get_running_loop().run_in_executor(None, self._attempt, name, shelf, loaded)
        gone = self._put_in_place(name, shelf, loaded, attempts)
        del attempts  # _retire must hold the last references
        await _retire(gone)
        return loaded

    async def _unload(self, name: str) -> None:
        self._metrics.failed_versions(name, ())
        self._broken.pop(name, None)
        await _retire(list(self._loaded.pop(name, Loaded()).models.values()))

    def _attempt(self, name: str, shelf: Shelf, loaded: Loaded) -> list[Attempt]:
        """Try to load the planned versions. Changes nothing."""
        now, instead = plan.tries(self._settings.versions, shelf, loaded.fingerprints)
        attempts = [self._try(name, version, shelf, loaded) for version in now]
        for version in instead:
            if loaded.models or any(isinstance(attempt.result, Model) for attempt in attempts):
                break
            attempts.append(self._try(name, version, shelf, loaded))
        return attempts

    def _try(self, name: str, version: int, shelf: Shelf, loaded: Loaded) -> Attempt:
        folder = shelf.versions[version]
        try:
            if shelf.settings_problem:
                raise BundleError(shelf.settings_problem)
            model = self._load(name, version, folder.path, shelf.settings, loaded.models.get(version))
        except (BundleError, EngineError, OSError) as error:
            self._metrics.load_failed(name, version)
            log.error("model %s version %d is not loaded: %s", name, version, error)
            return Attempt(version, folder.fingerprint, str(error))
        log.info(
            "model %s version %d: %s on %s with %d threads, %d profiles, digest %s", name, version,
            model.engine.graph_name, model.engine.provider, model.engine.threads, len(model.bundle.profiles),
            model.bundle.digest,
        )  # fmt: skip
        for warning in model.bundle.manifest.evaluation.get("warnings", []):
            log.warning("model %s version %d: %s", name, version, warning)
        return Attempt(version, folder.fingerprint, model)

    def _put_in_place(self, name: str, shelf: Shelf, loaded: Loaded, attempts: list[Attempt]) -> list[Model]:
        """Serve the loaded versions and record the failures. Returns the models to unload."""
        gone = []
        for attempt in attempts:
            loaded.fingerprints[attempt.version] = attempt.fingerprint
            if isinstance(attempt.result, str):
                loaded.failures[attempt.version] = attempt.result
                continue
            self._give_profiles(attempt.result)
            loaded.failures.pop(attempt.version, None)
            there = loaded.models.get(attempt.version)
            if there and there is not attempt.result:
                gone.append(there)
            loaded.models[attempt.version] = attempt.result
        for version in loaded.failures.keys() & shelf.versions.keys():
            if shelf.versions[version].fingerprint != loaded.fingerprints.get(version):  # of the files before loading
                del loaded.failures[version]
        if shelf.problem and shelf.problem != loaded.labels_problem:
            log.error("labels of %s are unchanged: %s", name, shelf.problem)
        loaded.labels_problem = shelf.problem
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

    def _load(self, name: str, version: int, folder: Path, settings: Mapping[str, Any], there: Model | None) -> Model:
        """Load a version. settings: the model's own; there: the loaded model of this version, if any, which is returned
        if its bundle and settings are unchanged."""
        bundle = load_bundle(folder, self._settings.repository)
        if there and (there.bundle.digest, there.own_settings) == (bundle.digest, settings):
            return there
        manifest = bundle.manifest
        if (manifest.name, manifest.version) != (name, version):
            raise BundleError(
                f"{folder}: the manifest says {manifest.name!r} version {manifest.version}; "
                f"allowed: {name!r} version {version}, as the folders are named"
            )
        if self._surroundings.serving:  # at startup the profile folder has not been read yet
            self._profiles.check_default(bundle, settings.get("default_profile", self._settings.default_profile))
        return Model(bundle, self._settings, self._metrics, self._pool, self._surroundings, settings)

    def _give_profiles(self, model: Model) -> None:
        try:
            model.use(self._profiles.of(model.bundle))
        except SteeringError as error:  # the profile folder was read before this model was loaded
            log.error("profiles of model %s are unchanged: %s", model.bundle.manifest.name, error)

    def _names(self) -> str:
        return ", ".join(repr(name) for name in sorted(self._loaded)) or "none is loaded"


async def _retire(models: list[Model]) -> None:
    """Close the models and return their memory to the system. Empties the list, which must hold the only references."""
    for model in models:
        await model.retire()
    if models:
        models.clear()
        del model
        with contextlib.suppress(AttributeError):  # other C libraries than glibc retain less
            await asyncio.get_running_loop().run_in_executor(None, ctypes.CDLL(None).malloc_trim, 0)
