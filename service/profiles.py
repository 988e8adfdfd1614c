"""Profiles as configuration: a folder of JSON files, such as a mounted ConfigMap, that is polled for changes.

A file is a profiles.json (training/steering.py) with the digest that it was made for, {"gates_sae_digest": "...", ...}.
Its profiles are added to those of every served model with that digest and replace profiles of the same name. If any
file of the folder is wrong, no profile changes; if one is wrong at the start, the server is not ready until it is
corrected. `service/check_profiles.py` checks a folder without a server.
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
Served = tuple[Bundle, str]
"""A bundle, as it was loaded, and the name of its default profile, which it must have; "" for none."""


@dataclass(frozen=True)
class _File:
    path: Path
    made_for: str
    profiles: tuple[SteeringProfile, ...]


class ProfileFolder:
    """The profiles of the folder in its last valid state."""

    def __init__(self, folder: Path | None, metrics: Metrics):
        """Raises BundleError when there is no such folder."""
        if folder is not None and not folder.is_dir():
            raise BundleError(f"profiles_dir is {folder}; allowed: a folder")
        self._folder, self._metrics = folder, metrics
        self._files: tuple[_File, ...] = ()
        self.pending = folder is not None
        """Whether the folder has not been valid yet, so that its profiles are unknown."""
        self.problem = ""
        """What is wrong with the folder now; "" if its current state is served."""
        self._seen: tuple[tuple[Path, bytes], ...] | str | None = None
        """The files at the last read, or why they could not be read."""
        self._reading = threading.Lock()

    def of(self, bundle: Bundle) -> Profiles:
        """The profiles for a bundle. Raises SteeringError if one of them does not fit it."""
        return _for(bundle, self._files)

    def unused(self, bundles: Iterable[Bundle]) -> int:
        """The number of profiles that are for none of the bundles. For any thread."""
        known = {bundle.manifest.gates_sae_digest for bundle in bundles}
        return sum(len(file.profiles) for file in self._files if file.made_for not in known)

    def check_default(self, bundle: Bundle, default: str) -> None:
        """Raises BundleError unless the bundle, as it was loaded, has the default profile or gets it here. While the
        folder is pending it may still come, and refresh checks that."""
        try:
            if not self.pending:
                _check_default(bundle, self.of(bundle), default)
        except SteeringError as error:
            raise BundleError(str(error)) from error

    def refresh(self, served: Sequence[Served]) -> bool:
        """Read the folder if it has changed. Returns whether there are new profiles."""
        with self._reading:
            return self._folder is not None and self._refresh(self._folder, served)

    def _refresh(self, folder: Path, served: Sequence[Served]) -> bool:
        contents = _contents(folder)
        if contents == self._seen:
            return False
        self._seen = contents
        try:
            if isinstance(contents, str):
                raise SteeringError(contents)
            files = tuple(_read(path, content) for path, content in contents)
            for bundle, default in served:
                _check_default(bundle, _for(bundle, files), default)
        except SteeringError as error:
            self.problem = str(error)
            log.error("not ready: %s" if self.pending else "profiles are unchanged: %s", error)
            self._metrics.profiles_read(False)
            return False
        known = {bundle.manifest.gates_sae_digest for bundle, _ in served}
        for file in files:
            if file.made_for not in known:
                log.warning("%s is for gates_sae_digest %s, which no served model has", file.path, file.made_for)
        self._files, self.pending, self.problem = files, False, ""
        self._metrics.profiles_read(True)
        log.info("%d profiles in %d files of %s", sum(len(f.profiles) for f in files), len(files), folder)
        return True

    async def watch(self, seconds: float, served: Callable[[], list[Served]], changed: Callable[[], None]) -> None:
        """Read the folder every so many seconds until cancelled; `changed` is called when there are new profiles."""
        loop = asyncio.get_running_loop()
        while self._folder is not None:
            await asyncio.sleep(seconds)
            try:
                if await loop.run_in_executor(None, self.refresh, served()):
                    changed()
            except Exception:  # the next read may succeed
                log.exception("reading the profile folder failed")


def check(folder: Path, served: Sequence[Served]) -> tuple[list[str], list[str]]:
    """A line for each file that a server of these bundles would take, and what is wrong: every reason for which it
    would not take the folder, and files that are for none of the bundles."""
    bundles = [bundle for bundle, _ in served]
    contents = _contents(folder)
    if isinstance(contents, str):
        return [], [contents]
    lines, problems, files = list[str](), list[str](), list[_File]()
    if not contents:
        problems.append(f"{folder} has no .json file")
    for path, content in contents:
        try:
            file = _read(path, content)
            fitting = [bundle for bundle in bundles if _for(bundle, [file])]
        except SteeringError as error:
            problems.append(str(error))
            continue
        files.append(file)
        if file.made_for not in {bundle.manifest.gates_sae_digest for bundle in bundles}:
            allowed = ", ".join(sorted({bundle.manifest.gates_sae_digest for bundle in bundles}))
            problems.append(f"{path}: gates_sae_digest is {file.made_for!r}, which no bundle has; allowed: {allowed}")
        models = ", ".join(f"{bundle.manifest.name} {bundle.manifest.version}" for bundle in fitting) or "no model"
        lines.append(f"{path}: {', '.join(profile.name for profile in file.profiles) or 'no profile'}; for {models}")
    if not problems:  # of the files together
        for bundle, default in served:
            try:
                _check_default(bundle, _for(bundle, files), default)
            except SteeringError as error:
                problems.append(str(error))
    return lines, problems


def files_in(folder: Path) -> list[Path]:
    """The files of a folder of profiles. Raises SteeringError unless there are some, and each can be read."""
    contents = _contents(folder)
    if isinstance(contents, str) or not contents:
        raise SteeringError(contents or f"{folder} has no .json file")
    for path, content in contents:
        _read(path, content)
    return [path for path, _ in contents]


def _check_default(bundle: Bundle, profiles: Profiles, default: str) -> None:
    """Raise SteeringError unless a bundle with these profiles has the default profile, if there is one."""
    try:
        if default:
            named(replace(bundle, profiles={**bundle.profiles, **profiles}), default, "default_profile")
    except NotFound as error:
        raise SteeringError(f"model {bundle.manifest.name} version {bundle.manifest.version}: {error}") from error


def _contents(folder: Path) -> tuple[tuple[Path, bytes], ...] | str:
    """The files of the folder, or why they cannot be read."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
        for path in paths:
            check_inside(path, folder)
        return tuple((path, path.read_bytes()) for path in paths)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except BundleError as error:
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
