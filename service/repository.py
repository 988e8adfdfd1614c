"""The models that are loaded, and which of them serves a request.

Loading happens beside serving: a version replaces another one when it is loaded, checked and warm, and the other one
answers what it had accepted before it goes. One that cannot be loaded is told of and changes nothing.
"""

import asyncio
import contextlib
import ctypes
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from export.bundle import BundleError, load_bundle
from service.catalogue import DEFAULT_LABEL, Fingerprint, Found, Shelf, scan, wanted
from service.config import Settings
from service.engine import EngineError
from service.errors import InvalidRequest, NotFound, Unavailable
from service.metrics import Metrics
from service.model import Model
from service.profiles import ProfileFolder
from training.steering import SteeringError

log = logging.getLogger("steervit.repository")
NUMBER = re.compile(r"[0-9]{1,18}")


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
class Entry:
    """A version in the index."""

    name: str
    version: int
    ready: bool
    reason: str


class Repository:
    def __init__(self, settings: Settings, metrics: Metrics, profiles: ProfileFolder):
        """Loads what is to be served. Raises BundleError or EngineError when a model has no version that works; with
        --model-control none already when one of its versions does not."""
        self._settings, self._metrics, self._profiles = settings, metrics, profiles
        self._pool = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._changing = asyncio.Lock()
        self._loaded: dict[str, Loaded] = {}
        self._broken: dict[str, Loaded] = {}
        """Models none of whose versions works."""
        for name, shelf in scan(settings.repository).items():
            self._loaded[name] = loaded = Loaded()
            strict = settings.model_control == "none"
            self._try_all(name, shelf, wanted(settings.versions, shelf), loaded, strict)
            if not loaded.models:
                raise BundleError("; ".join(loaded.failures.values()))
            metrics.failed_versions(name, loaded.failures)
            self._label(name, shelf, loaded)

    @property
    def alive(self) -> bool:
        return all(model.batcher.alive for model in self.models)

    @property
    def models(self) -> list[Model]:
        """By name and version."""
        return [
            loaded.models[version] for _, loaded in sorted(self._loaded.items()) for version in sorted(loaded.models)
        ]

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
        for name, loaded in sorted({**self._loaded, **self._broken}.items()):
            for version in sorted({*loaded.models, *loaded.failures}):
                yield Entry(name, version, version in loaded.models, loaded.failures.get(version, ""))

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

    async def refresh(self, only: str | None = None) -> dict[str, Loaded]:
        """Make what is loaded what the folder says. only: this model. Returns what became of each.

        Raises BundleError when the folder cannot be read, NotFound when it has no such model.
        """
        async with self._changing:
            loop = asyncio.get_running_loop()
            shelves = await loop.run_in_executor(None, scan, self._settings.repository)
            if only is not None and only not in shelves:
                raise NotFound(f"model is {only!r}; allowed: {', '.join(map(repr, shelves))}")
            followed = {
                name: await self._follow(name, shelf) for name, shelf in shelves.items() if only in (None, name)
            }
            if only is None:
                for name in {*self._loaded, *self._broken} - set(shelves):
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
        async with self._changing:
            if name not in self._loaded:
                raise NotFound(f"model is {name!r}; allowed: {self._names()}")
            await self._unload(name)

    def close(self) -> None:
        """Answer what was accepted, and release everything."""
        for model in self.models:
            model.batcher.close()
        self._pool.shutdown()

    async def _follow(self, name: str, shelf: Shelf) -> Loaded:
        """Make one model what is on its shelf."""
        loaded = self._loaded.get(name) or self._broken.get(name) or Loaded()
        loop = asyncio.get_running_loop()
        labelled = set(loaded.labels.values()) & set(shelf.versions) if shelf.problem else set()
        numbers = sorted({*wanted(self._settings.versions, shelf), *labelled})
        before = dict(loaded.models)
        await loop.run_in_executor(None, self._try_all, name, shelf, numbers, loaded, False)
        gone = [model for version, model in before.items() if loaded.models[version] is not model]
        del before  # _retire must be the last to hold them
        self._broken.pop(name, None)
        (self._loaded if loaded.models else self._broken)[name] = loaded
        self._label(name, shelf, loaded)
        if any(version in loaded.models for version in numbers):
            for version in set(loaded.models) - set(numbers):
                gone.append(loaded.models.pop(version))
                loaded.fingerprints.pop(version, None)
        for version in set(loaded.failures) - set(shelf.versions):
            del loaded.failures[version]
            loaded.fingerprints.pop(version, None)
        self._metrics.failed_versions(name, loaded.failures)
        await _retire(gone)
        return loaded

    async def _unload(self, name: str) -> None:
        self._metrics.failed_versions(name, ())
        self._broken.pop(name, None)
        await _retire(list(self._loaded.pop(name, Loaded()).models.values()))

    def _try_all(self, name: str, shelf: Shelf, numbers: list[int], loaded: Loaded, strict: bool) -> None:
        """Load these versions as far as they are new or changed; an older one, rather than none."""
        for version in (*reversed(numbers), *sorted(shelf.versions, reverse=True)):
            found = shelf.versions[version]
            if loaded.fingerprints.get(version) != found.fingerprint and (version in numbers or not loaded.models):
                self._try(name, version, found, loaded, strict)

    def _try(self, name: str, version: int, found: Found, loaded: Loaded, strict: bool) -> None:
        """Load a version and put it in place; or note why not. strict: raise instead."""
        loaded.fingerprints[version] = found.fingerprint
        try:
            model = self._load(name, version, found.folder, loaded.models.get(version))
        except (BundleError, EngineError) as error:
            if strict:
                raise
            loaded.failures[version] = str(error)
            self._metrics.load_failed(name, version)
            log.error("model %s version %d is not loaded: %s", name, version, error)
            return
        loaded.failures.pop(version, None)
        loaded.models[version] = model
        log.info(
            "model %s version %d: %s on %s with %d threads, %d profiles, digest %s", name, version,
            model.engine.graph_name, model.engine.provider, model.engine.threads, len(model.bundle.profiles),
            model.bundle.digest,
        )  # fmt: skip

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
        model = Model(bundle, self._settings, self._metrics, self._pool)
        self._give_profiles(model)
        return model

    def _give_profiles(self, model: Model) -> None:
        try:
            model.use(self._profiles.of(model.bundle))
        except SteeringError as error:  # the folder was read before this model was there
            log.error("model %s keeps its profiles: %s", model.bundle.manifest.name, error)

    def _label(self, name: str, shelf: Shelf, loaded: Loaded) -> None:
        """Follow labels.json; a label whose version is not loaded stays where it was."""
        if shelf.problem:
            log.error("labels of %s stay as they are: %s", name, shelf.problem)
            return
        kept = {label: loaded.labels[label] for label in shelf.labels if label in loaded.labels}
        loaded.labels = kept | {label: version for label, version in shelf.labels.items() if version in loaded.models}

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
