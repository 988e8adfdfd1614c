"""A bundle or profiles as an OCI artefact, by the conventions of oras: a layer per file, with its name as the title.

`oras pull`, other clients and CRI-O's image volumes can thus read the files, and every registry stores the artefact.
containerd mounts only images, so a bundle can also be written as one, with a tar per file. The output depends only on
the bundle: pushing it twice gives the same digest.
"""

import base64
import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from export.bundle import NAME, Bundle, FileEntry
from service.delivery.errors import DeliveryError
from service.delivery.registry import INDEX, MANIFEST, Document, digest_of

ARTEFACT = "application/vnd.steervit.bundle.v1"
PROFILES = "application/vnd.steervit.profiles.v1"
EMPTY = "application/vnd.oci.empty.v1+json"
EMPTY_CONFIG = b"{}"
TAR = "application/vnd.oci.image.layer.v1.tar"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
DIGEST = "steervit.bundle.digest"
PLATFORMS = ("amd64", "arm64")
"""Architectures of an image's entries, which all have the same layers: a node uses the entry for its architecture."""
SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
Json = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """A blob, and its description in the artefact's manifest."""

    descriptor: Json
    path: Path
    tar: bool = False
    """Whether the blob is a tar of the file."""

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the blob's content."""
        if not self.tar:
            with open(self.path, "rb") as file:
                yield file
            return
        with tempfile.TemporaryFile() as archive:
            _write_tar(self.path, archive)
            archive.seek(0)
            yield archive


@dataclass(frozen=True)
class Artefact:
    """The blobs and manifests to write into a registry."""

    layers: Sequence[Layer]
    blobs: Sequence[bytes]
    manifests: Sequence[bytes]
    """Manifests that only their digests name."""
    top: bytes
    """The manifest that a tag names."""
    media_type: str

    @property
    def digest(self) -> str:
        """The digest of the manifest that a tag names."""
        return digest_of(self.top)


def artefact(bundle: Bundle) -> Artefact:
    """The bundle as an artefact."""
    return _artefact(ARTEFACT, bundle.folder, _entries(bundle), _annotations(bundle))


def profiles_artefact(paths: Sequence[Path]) -> Artefact:
    """Profile files, all of one folder, as an artefact."""
    return _artefact(PROFILES, paths[0].parent, {path.name: _entry(path.read_bytes()) for path in paths}, {})


def _artefact(kind: str, folder: Path, entries: Mapping[str, FileEntry], annotations: Json) -> Artefact:
    layers = [Layer(_described(name, entry), folder / name) for name, entry in entries.items()]
    config = {**_descriptor(EMPTY, EMPTY_CONFIG), "data": base64.b64encode(EMPTY_CONFIG).decode()}
    top = _manifest({"artifactType": kind, "config": config}, layers, annotations)
    return Artefact(layers, [EMPTY_CONFIG], [], top, MANIFEST)


def image(bundle: Bundle) -> Artefact:
    """The bundle as an image with its files at the root, with an entry for each of PLATFORMS."""
    layers = []
    for name in _entries(bundle):
        layer = Layer({}, bundle.folder / name, tar=True)
        with layer.opened() as file:
            sha256 = hashlib.sha256()
            while part := file.read(1 << 20):
                sha256.update(part)
            described = _described(f"{name}.tar", FileEntry(sha256.hexdigest(), file.tell()))
        layers.append(Layer(described, layer.path, tar=True))
    diffs = [layer.descriptor["digest"] for layer in layers]
    configs = [
        _json({"architecture": platform, "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diffs}})
        for platform in PLATFORMS
    ]
    annotations = _annotations(bundle)
    manifests = [_manifest({"config": _descriptor(IMAGE_CONFIG, config)}, layers, annotations) for config in configs]
    entries = [
        {**_descriptor(MANIFEST, manifest), "platform": {"architecture": platform, "os": "linux"}}
        for platform, manifest in zip(PLATFORMS, manifests, strict=True)
    ]
    top = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries, "annotations": annotations}
    return Artefact(layers, configs, manifests, _json(top), INDEX)


def files_of(document: Document) -> tuple[str, Mapping[str, FileEntry]]:
    """The kind of an artefact, ARTEFACT or PROFILES, and its files by name. Raises DeliveryError for any other kind."""
    value = document.value
    kind = value.get("artifactType") or value.get("mediaType") if isinstance(value, dict) else type(value).__name__
    if kind not in (ARTEFACT, PROFILES):
        why = ", an image for volumes" if kind == INDEX else ""
        raise DeliveryError(f"artifactType of {document.digest} is {kind!r}{why}; allowed: {ARTEFACT}, {PROFILES}")
    files: dict[str, FileEntry] = {}
    try:
        for layer in value["layers"]:
            name, digest, size = layer["annotations"][TITLE], layer["digest"], layer["size"]
            if not NAME.fullmatch(name) or name in files:
                raise DeliveryError(f"layers: {TITLE} is {name!r}; allowed: {NAME.pattern}, once")
            if not SHA256.fullmatch(digest) or type(size) is not int or size < 0:
                raise DeliveryError(f"layers: {name} has digest {digest!r} and size {size!r}; allowed: sha256, bytes")
            files[name] = FileEntry(digest.removeprefix("sha256:"), size)
    except (KeyError, TypeError, AttributeError) as error:
        raise DeliveryError(f"layers of {document.digest}: {type(error).__name__}: {error}") from error
    return kind, files


def _entries(bundle: Bundle) -> dict[str, FileEntry]:
    """All files of the bundle, the manifest first."""
    return {"manifest.json": _entry((bundle.folder / "manifest.json").read_bytes()), **bundle.manifest.files}


def _entry(content: bytes) -> FileEntry:
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def _described(name: str, entry: FileEntry) -> Json:
    kind = {".json": "application/json", ".tar": TAR}.get(Path(name).suffix, "application/octet-stream")
    return {
        "mediaType": kind, "digest": f"sha256:{entry.sha256}", "size": entry.size, "annotations": {TITLE: name},
    }  # fmt: skip


def _manifest(fields: Json, layers: Sequence[Layer], annotations: Json) -> bytes:
    described = {"layers": [layer.descriptor for layer in layers], "annotations": annotations}
    return _json({"schemaVersion": 2, "mediaType": MANIFEST, **fields, **described})


def _annotations(bundle: Bundle) -> Json:
    return {TITLE: bundle.manifest.name, VERSION: str(bundle.manifest.version), DIGEST: bundle.digest}


def _descriptor(media_type: str, content: bytes) -> Json:
    return {"mediaType": media_type, "digest": digest_of(content), "size": len(content)}


def _write_tar(path: Path, archive: IO[bytes]) -> None:
    """Write a tar of one file, readable by all, without time or owner."""
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar, open(path, "rb") as file:
        entry = tarfile.TarInfo(path.name)
        entry.size, entry.mode = file.seek(0, io.SEEK_END), 0o444
        file.seek(0)
        tar.addfile(entry, file)


def _json(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
