"""Bundles that are not as they were exported, and files that change while they are read."""

import hashlib
import json
import shutil
from pathlib import Path

from export.bundle import Bundle


def put(bundle: Bundle, repository: Path, version: int, name: str = "fashion_mnist", **files: bytes) -> Path:
    """Write a bundle under another name and version; it appears only when complete. files: contents in place of the
    bundle's own."""
    folder, part = repository / name / str(version), repository / f".{name}.{version}"
    shutil.copytree(bundle.folder, part)
    for file, content in files.items():
        (part / file).write_bytes(content)
    sign(part, name=name, version=version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part.rename(folder)
    return folder


def write(path: Path, text: str) -> None:
    """Write a file, which changes as a whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.rename(path)


def sign(folder: Path, **changes: object) -> None:
    """Change fields of the manifest, and make its entries for the files those of what is there."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
