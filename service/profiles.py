"""Profiles as configuration: a folder of JSON files, such as a mounted ConfigMap, that is polled for changes.

A file is a profiles.json (training/steering.py) with the digest that it was made for, {"gates_sae_digest": "...", ...}.
Its profiles are added to those of every served model with that digest and replace profiles of the same name. If any
file of the folder is wrong, no profile changes.
"""

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export.bundle import Bundle, BundleError, check_inside, check_profile
from service.errors import NotFound
from service.metrics import Metrics
from service.steering import named
from training.steering import SteeringError, SteeringProfile, profiles_from_json

log = logging.getLogger("steervit.profiles")
Profiles = Mapping[str, SteeringProfile]
"""By name."""


@dataclass(frozen=True)
class _File:
    path: Path
    made_for: str
    profiles: tuple[SteeringProfile, ...]


class ProfileFolder:
    """The profiles of the folder in its last valid state."""

    def __init__(self, folder: Path | None, metrics: Metrics, default: str = ""):
        """default: a profile that every model must have, if any. Raises BundleError when there is no such folder."""
        if folder is not None and not folder.is_dir():
            raise BundleError(f"profiles_dir is {folder}; allowed: a folder")
        self._folder, self._metrics, self._default = folder, metrics, default
        self._files: tuple[_File, ...] = ()
        self._seen: tuple[tuple[Path, bytes], ...] | str | None = None
        """The files of the last read, or why they could not be read."""
        self._reading = threading.Lock()

    def of(self, bundle: Bundle) -> Profiles:
        """The profiles for a bundle. Raises SteeringError when one of them does not fit it."""
        return _for(bundle, self._files)

    def check_default(self, bundle: Bundle) -> None:
        """Raises BundleError unless the bundle, as it was loaded, has the default profile or gets it here."""
        try:
            self._check_default(bundle, self.of(bundle))
        except SteeringError as error:
            raise BundleError(str(error)) from error

    def _check_default(self, bundle: Bundle, profiles: Profiles) -> None:
        try:
            if self._default:
                named(replace(bundle, profiles={**bundle.profiles, **profiles}), self._default, "default_profile")
        except NotFound as error:
            raise SteeringError(f"model {bundle.manifest.name} version {bundle.manifest.version}: {error}") from error

    def refresh(self, bundles: Sequence[Bundle]) -> bool:
        """Read the folder if it has changed. Returns whether there are new profiles.

        bundles: those being served, as they were loaded.
        """
        with self._reading:
            return self._folder is not None and self._refresh(self._folder, bundles)

    def _refresh(self, folder: Path, bundles: Sequence[Bundle]) -> bool:
        contents = _contents(folder)
        if contents == self._seen:
            return False
        self._seen = contents
        try:
            if isinstance(contents, str):
                raise SteeringError(contents)
            files = tuple(_read(path, content) for path, content in contents)
            for bundle in bundles:
                self._check_default(bundle, _for(bundle, files))
        except SteeringError as error:
            log.error("profiles are unchanged: %s", error)
            self._metrics.profiles_read(False)
            return False
        known = {bundle.manifest.gates_sae_digest for bundle in bundles}
        for file in files:
            if file.made_for not in known:
                log.warning("%s is for gates_sae_digest %s, which no served model has", file.path, file.made_for)
        self._files = files
        self._metrics.profiles_read(True)
        log.info("%d profiles in %d files of %s", sum(len(f.profiles) for f in files), len(files), folder)
        return True

    async def watch(self, seconds: float, bundles: Callable[[], list[Bundle]], changed: Callable[[], None]) -> None:
        """Read the folder every so many seconds until cancelled; `changed` is called when there are new profiles."""
        loop = asyncio.get_running_loop()
        while self._folder is not None:
            await asyncio.sleep(seconds)
            try:
                if await loop.run_in_executor(None, self.refresh, bundles()):
                    changed()
            except Exception:  # the next read may succeed
                log.exception("reading the profile folder failed")


def _contents(folder: Path) -> tuple[tuple[Path, bytes], ...] | str:
    """The files of the folder, or why they cannot be read."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
        for path in paths:
            check_inside(path, folder)
        return tuple((path, path.read_bytes()) for path in paths)
    except (OSError, BundleError) as error:
        return str(error)


def _read(path: Path, content: bytes) -> _File:
    try:
        value = json.loads(content)
        profiles = profiles_from_json(value)
        made_for = value.get("gates_sae_digest")
        if not isinstance(made_for, str) or not made_for:
            raise SteeringError(f"gates_sae_digest is {made_for!r}; allowed: that of the model it was made for")
    except (ValueError, RecursionError) as error:
        raise SteeringError(f"{path}: {error}") from error
    return _File(path, made_for, profiles)


def _for(bundle: Bundle, files: Iterable[_File]) -> Profiles:
    profiles: dict[str, SteeringProfile] = {}
    for file in files:
        if file.made_for != bundle.manifest.gates_sae_digest:
            continue
        for profile in file.profiles:
            if profile.name in profiles:
                raise SteeringError(f"{file.path}: profile {profile.name!r} is in another file too; allowed: once")
            check_profile(profile, bundle.manifest, f"{file.path}: profile {profile.name!r}")
            profiles[profile.name] = profile
    return profiles
