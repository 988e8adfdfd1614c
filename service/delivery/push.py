"""Pushes a bundle or a folder of profiles into a registry."""

import io
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

from export.bundle import NAME, is_bundle, load_bundle
from service.delivery.artefact import Artefact, Layer, artefact, image, profiles_artefact
from service.delivery.errors import DeliveryError
from service.delivery.reference import Reference
from service.delivery.registry import MANIFEST, Registry, digest_of
from service.profiles import files_in


def push(
    folder: Path, to: Reference, as_image: bool = False, move_tag: bool = False, plain_http: bool = False
) -> Reference:
    """Push a bundle or a folder of profiles. Blobs that the registry has are not sent again. Returns the reference with
    tag and digest.

    to: without a tag, the tag is the bundle's version. as_image: for image volumes. move_tag: move the tag if it names
    something else. Raises BundleError, SteeringError and DeliveryError.
    """
    if to.digest:
        raise DeliveryError(f"reference is {str(to)!r}; allowed: one without a digest, which follows from the content")
    made, version = _made(folder, as_image)
    if not (to.tag or version):
        raise DeliveryError(f"reference is {str(to)!r}; allowed for profiles: one with a tag")
    to = to if to.tag else replace(to, tag=version)
    pinned = replace(to, digest=made.digest)
    registry = Registry(to, plain_http, "pull,push")
    there = registry.manifest(to.tag)
    if there and there.digest == made.digest:
        return pinned
    if there and not move_tag:
        raise DeliveryError(f"tag {to} is {there.digest}, and not {made.digest}; allowed: another tag, or --move-tag")
    _upload(registry, made)
    registry.put_manifest(to.tag, made.top, made.media_type)
    return pinned


def _made(folder: Path, as_image: bool) -> tuple[Artefact, str]:
    """The artefact to write, and its default tag."""
    if not as_image and not is_bundle(folder) and any(folder.glob("*.json")):
        paths = files_in(folder)
        if odd := [path.name for path in paths if not NAME.fullmatch(path.name)]:
            raise DeliveryError(f"{folder}: file is {odd[0]!r}; allowed: {NAME.pattern}")
        return profiles_artefact(paths), ""
    bundle = load_bundle(folder)
    version = str(bundle.manifest.version)
    return (image(bundle), f"{version}-image") if as_image else (artefact(bundle), version)


def _upload(registry: Registry, made: Artefact) -> None:
    """Upload everything except the manifest that the tag names, which must come last."""
    for layer in made.layers:
        if not registry.has_blob(layer.descriptor["digest"]):
            _put_layer(registry, layer)
    for blob in made.blobs:
        if not registry.has_blob(digest_of(blob)):
            registry.put_blob(digest_of(blob), len(blob), lambda blob=blob: io.BytesIO(blob))  # type: ignore[misc]
    for manifest in made.manifests:
        registry.put_manifest(digest_of(manifest), manifest, MANIFEST)


def _put_layer(registry: Registry, layer: Layer) -> None:
    with ExitStack() as stack:

        def opened() -> IO[bytes]:
            return stack.enter_context(layer.opened())

        registry.put_blob(layer.descriptor["digest"], layer.descriptor["size"], opened)
