"""Pulls a bundle into a repository folder, where it appears complete, once all of it has been checked."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from export.bundle import Bundle, BundleError, FileEntry, Manifest, is_bundle, load_bundle, new_bundle
from service.catalogue import check_label, set_label
from service.delivery.artefact import files_of
from service.delivery.errors import DeliveryError, Interrupted, retried
from service.delivery.reference import Reference
from service.delivery.registry import Registry

LONGEST_MANIFEST = 64 << 20
"""Largest manifest.json in bytes; it is read into memory."""


class Source(Protocol):
    """A source of bundles."""

    def manifest(self) -> bytes:
        """The content of manifest.json. Raises DeliveryError."""

    def check(self, files: Mapping[str, FileEntry]) -> None:
        """Raise DeliveryError if the source is known to lack these files."""

    def read(self, name: str, start: int) -> Iterator[bytes]:
        """The content of a file from byte `start` on, as it arrives. Raises Interrupted or DeliveryError."""


class Artefact:
    """A bundle or profiles in a registry. Raises DeliveryError when there is none, or when it is something else."""

    def __init__(self, reference: Reference, plain_http: bool = False):
        if not reference.selector:
            raise DeliveryError(f"reference is {str(reference)!r}; allowed: one with a tag or a digest")
        self._registry = Registry(reference, plain_http)
        document = self._registry.manifest(reference.selector)
        if document is None:
            raise DeliveryError(f"{reference} does not exist")
        self._where = replace(reference, digest=document.digest)
        self.digest = document.digest
        self.kind, self.files = files_of(document)

    def manifest(self) -> bytes:
        """As of Source."""
        entry = self.files.get("manifest.json")
        if entry is None or entry.size > LONGEST_MANIFEST:
            raise DeliveryError(f"layers: manifest.json is {entry}; allowed: at most {LONGEST_MANIFEST} bytes")
        content = retried(lambda: _limited(self.read("manifest.json", 0), entry.size))
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise DeliveryError(f"{self._where}: manifest.json does not have the digest of its layer")
        return content

    def check(self, files: Mapping[str, FileEntry]) -> None:
        """As of Source."""
        own = {name: entry for name, entry in self.files.items() if name != "manifest.json"}
        differing = sorted({*own.items()} ^ {*files.items()}, key=lambda item: item[0])
        if differing:
            names = sorted({name for name, _ in differing})
            raise DeliveryError(f"{self._where}: layers differ from files of manifest.json: {', '.join(names)}")

    def read(self, name: str, start: int) -> Iterator[bytes]:
        """As of Source."""
        return self._registry.blob(f"sha256:{self.files[name].sha256}", start)


class Store:
    """A bundle's folder in any store that fsspec reads: s3://, hf://, file:// and others."""

    def __init__(self, url: str):
        self._url = url
        try:
            import fsspec

            self._files, self._path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise DeliveryError(f"{url}: {error}; install: pip install 'steervit[delivery]'") from error
        except (ValueError, OSError) as error:
            raise DeliveryError(f"{url}: {error}") from error

    def manifest(self) -> bytes:
        """As of Source."""
        return retried(lambda: _limited(self.read("manifest.json", 0), LONGEST_MANIFEST))

    def check(self, files: Mapping[str, FileEntry]) -> None:
        """Does nothing: each file is checked when it is read."""

    def read(self, name: str, start: int) -> Iterator[bytes]:
        """As of Source."""
        address = f"{self._url.rstrip('/')}/{name}"
        try:
            with self._files.open(f"{self._path.rstrip('/')}/{name}", "rb") as file:
                file.seek(start)
                while part := file.read(1 << 20):
                    yield part
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
            raise DeliveryError(f"{address}: {type(error).__name__}: {error}") from error
        except Exception as error:  # errors of many libraries
            kind = Interrupted if isinstance(error, OSError) else DeliveryError
            raise kind(f"{address}: {type(error).__name__}: {error}") from error


def source_of(text: str, plain_http: bool = False) -> Source:
    """The source that a text names: a reference in a registry (also with oci://), or the URL of a bundle's folder.

    Raises DeliveryError when it is neither.
    """
    scheme = urlsplit(text).scheme if "://" in text else "oci"
    if scheme == "oci":
        return Artefact(Reference.parse(text), plain_http)
    if scheme == "http" and not plain_http:
        raise DeliveryError(f"source is {text!r}; allowed: https, or http with --plain-http")
    return Store(text)


def pull(source: Source, repository: Path, digest: str = "", label: str = "") -> tuple[Bundle, bool]:
    """Pull a bundle into the repository. Returns it, and whether it is new there.

    digest: if given, the required digest of the bundle. label: if given, a label to set to this version afterwards. An
    interrupted pull is resumed. Raises BundleError when the version exists with other content, or when the bundle or
    the label is invalid; and DeliveryError.
    """
    content = source.manifest()
    own = hashlib.sha256(content).hexdigest()[:16]
    if digest and own != digest:
        raise DeliveryError(f"digest of the bundle is {own}; allowed: {digest}")
    try:
        manifest = Manifest.from_json(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json: not JSON: {error}") from error
    source.check(manifest.files)
    if is_bundle(repository):
        raise BundleError(f"repository is {repository}, which is a bundle; allowed: a folder of bundles")
    if label:
        check_label(repository, manifest.name, label)
    folder = repository / manifest.name / str(manifest.version)
    bundle, new = _there(folder, own), False
    if bundle is None:
        bundle, new = _arrive(source, repository, manifest, content)
    if label:
        set_label(repository, manifest.name, label, manifest.version)
    return bundle, new


def _there(folder: Path, digest: str) -> Bundle | None:
    """The bundle in a folder, or None. Raises BundleError when it has another digest, or is broken."""
    if not folder.exists():
        return None
    bundle = load_bundle(folder)
    if bundle.digest != digest:
        raise BundleError(f"{folder} has the digest {bundle.digest}, not {digest}; allowed: a new version")
    return bundle


def _arrive(source: Source, repository: Path, manifest: Manifest, content: bytes) -> tuple[Bundle, bool]:
    digest = hashlib.sha256(content).hexdigest()[:16]
    folder = repository / manifest.name / str(manifest.version)
    try:
        with new_bundle(repository, manifest.name, manifest.version, resumed=f"pull-{digest}") as arriving:
            fetch_all(source, manifest.files, arriving)
            _write(arriving / "manifest.json", content)
            bundle = load_bundle(arriving, arriving)
    except BundleError:
        if another := _there(folder, digest):  # pulled by another process, while this one waited
            return another, False
        raise
    return replace(bundle, folder=folder), True


def fetch_all(source: Source, files: Mapping[str, FileEntry], folder: Path) -> None:
    """Write these files, or their missing parts. Raises DeliveryError when a file cannot be read or has another
    digest."""
    for name, entry in files.items():
        retried(lambda name=name, entry=entry: _fetch(source, name, entry, folder / name))  # type: ignore[misc]


def _fetch(source: Source, name: str, entry: FileEntry, path: Path) -> None:
    """Write a file, or the rest of it. Raises Interrupted; DeliveryError when it has another digest; and OSError."""
    sha256 = hashlib.sha256()
    with _naming(path), open(path, "a+b") as file:
        file.seek(0)
        while part := file.read(1 << 20):
            sha256.update(part)
        start = file.tell()
        if start < entry.size:
            for part in source.read(name, start):
                if file.tell() + len(part) > entry.size:
                    break
                file.write(part)
                sha256.update(part)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if size < entry.size:
        raise Interrupted(f"{name} ended after {size} of {entry.size} bytes")
    if size > entry.size or sha256.hexdigest() != entry.sha256:
        path.unlink()
        raise DeliveryError(f"{name} has {size} bytes and the SHA-256 {sha256.hexdigest()}; allowed: {entry}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The system's errors within, such as a full disk, with the path, which those of writing lack."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, content: bytes) -> None:
    with _naming(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _limited(parts: Iterator[bytes], most: int) -> bytes:
    content = bytearray()
    for part in parts:
        content += part
        if len(content) > most:
            raise DeliveryError(f"manifest.json has more than {most} bytes")
    return bytes(content)
