"""The bundle: a versioned folder with everything that serving needs. This module owns its format.

```
<repository>/<model>/<version>/
  dispatch.fp32.onnx   graphs of one model, <attention>.<precision>.onnx; the first one in the manifest is the default
  manifest.json        what it is (Manifest)
  profiles.json        steering profiles (training/steering.py)
  sae.safetensors      autoencoders and gates, for explanations
  golden.npz           a few inputs and the outputs expected of them
```
Standard library, numpy and pydantic only: the server imports this module.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from training.dial import Dial, DialError, Point, check_curve
from training.fields import AS_INTEGER, Count, Natural, Number, checked_as, read, read_as
from training.image_spec import ImageSpec
from training.steering import Name, SteeringError, SteeringProfile, check, check_gate_bias, digest, profiles_from_json

SCHEMA_VERSION: Final = 3
ATTENTIONS = ("dispatch", "masked", "compact", "fused")
PRECISIONS = ("fp32", "int8", "fp16")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,17}")
INPUTS = ("image", "steering_latent", "steering_scale", "steering_shift")
OUTPUTS = ("logits", "head_gate", "gate_logit", "residual")
GATE_BIAS = "gate_bias"
"""Another input, float32 (B, gated blocks, units), that is added to the gate logits. Manifest.takes_biases tells which
graphs have it."""
MLP_GATE = "mlp_gate"
"""Another output of models with MLP groups, bool (B, gated blocks, MLP groups)."""
MAX_KNOT = 1000.0
"""Limit of a dial's gate biases: far above what opens or closes a unit, far below what forces it (service/dial.py)."""

FileName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Attention = Annotated[str, read_as(Literal[ATTENTIONS])]
Precision = Annotated[str, read_as(Literal[PRECISIONS])]


class BundleError(Exception):
    """The bundle cannot be used; the message names the file or field, the value and what is allowed."""


@dataclass(frozen=True)
class Site:
    """A gated block whose gate can be steered: it has an autoencoder."""

    block: Count
    """The gated block whose gate is steered."""
    latents: Count


@dataclass(frozen=True)
class Graph:
    """A graph for all profiles: the steering is an input."""

    file: str
    attention: Attention
    precision: Precision
    opset: Count
    certificate: Mapping[str, Any]
    """How far its answers were from PyTorch's when it was exported."""


@dataclass(frozen=True)
class Specialised:
    """A graph for one profile: it contains the profile's terms, and omits units that the profile's classes almost never
    keep. Its only input is the image; omitted units report 0."""

    file: str
    precision: Precision
    profile: str
    digest: str
    """Digest of the profile's terms (training/steering.py), the only ones that the graph is for."""
    kept: tuple[tuple[Natural, ...], ...]
    """The remaining units of each gated block: heads from 0 on, MLP groups after them."""
    threshold: Number
    """Units kept by a smaller share of the classes' images than this are omitted."""
    before: Mapping[str, Any]
    """Effect of the profile on held-out images with all units; `after`: with the remaining ones."""
    after: Mapping[str, Any]
    certificate: Mapping[str, Any]
    """As in Graph."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image, by the counter of training/model/macs.py."""

    dense: Count
    """With every unit open."""
    per_head: tuple[Natural, ...]
    """Cost of one head, by gated block."""
    per_mlp_group: tuple[Natural, ...] = ()
    """Cost of one MLP group, by gated block; empty in a model without MLP groups."""


@dataclass(frozen=True)
class Knot:
    """A knot of the dial: a budget and the gate biases that reach it (training/dial.py)."""

    budget: Number
    gate_bias: tuple[tuple[Number, ...], ...]
    """By gated block and unit, heads first."""


@dataclass(frozen=True)
class FileEntry:
    """The size and digest that a file of the bundle must have."""

    sha256: str
    size: Natural
    """Bytes."""


@dataclass(frozen=True)
class Measured:
    """The part of a model's evaluation that is read; it may have more fields."""

    head_usage: Number = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: the model, its graphs, its evaluation, and every other file of the bundle."""

    schema_version: Literal[2, 3]
    name: FileName
    version: Annotated[int, Field(strict=True, ge=1, lt=10**18), AS_INTEGER]
    labels: Annotated[tuple[Name, ...], Field(min_length=2)]
    image: ImageSpec
    gated_blocks: Annotated[tuple[Count, ...], Field(min_length=1)]
    heads: Count
    """Heads of each block."""
    dim: Count
    """Width of the residual stream."""
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    macs: Macs
    graphs: Annotated[tuple[Graph, ...], Field(min_length=1)]
    """The first one is the default."""
    evaluation: Annotated[Mapping[str, Any], checked_as(Measured)]
    """Evaluation of the unsteered model on the test split (not in a compact bundle), and the `warnings` of its run."""
    compact: Mapping[str, Any] | None
    """For a compact bundle: its profile, the remaining units, and the effect of omitting the others on held-out
    images."""
    gates_sae_digest: str
    """Digest of the weights that give a steering term its meaning; profiles are bound to it."""
    files: Mapping[FileName, FileEntry]
    """Every file but the manifest itself."""
    specialised: tuple[Specialised, ...] = ()
    """Graphs for one profile each. Not in older bundles."""
    mlp_groups: Natural = 0
    """MLP groups of each gated block; 0: only heads have gates, as in every bundle before schema version 3."""
    dial: tuple[Knot, ...] = ()
    """The dial of a model that takes budgets; else empty."""
    dials: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    """Measurements of the dial, by profile; "": without steering. Accuracy: on the selection slice; compute: also on as
    many training images."""

    @property
    def units(self) -> int:
        """The units of a gated block: its heads, then its MLP groups."""
        return self.heads + self.mlp_groups

    @property
    def takes_biases(self) -> bool:
        """Whether its graphs, except for specialised ones, have the input GATE_BIAS. Older and compact graphs do not
        have it: in a compact graph, a bias could open a unit that does not exist."""
        return self.schema_version >= 3 and self.compact is None

    @property
    def latents(self) -> tuple[int, ...]:
        """Number of latents of each site."""
        return tuple(site.latents for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json, which from_json reads."""
        value = asdict(self)
        for name in ("specialised", "mlp_groups", "dial", "dials"):
            if not value[name]:
                del value[name]  # as in bundles from before this field
        if not self.macs.per_mlp_group:
            del value["macs"]["per_mlp_group"]
        return value

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """The manifest in a JSON value. Raises BundleError, naming the field, when it is not a manifest that is read
        here."""
        manifest = read(cls, value, BundleError, "manifest.json: ")
        manifest._validate()
        return manifest

    def _validate(self) -> None:
        """Check that the fields agree with each other."""

        def require(condition: bool, field: str, value: object, allowed: str) -> None:
            if not condition:
                raise BundleError(f"manifest.json: {field} is {value!r}; allowed: {allowed}")

        require(len(set(self.labels)) == len(self.labels), "labels", self.labels, "different ones")
        blocks, sites = self.gated_blocks, tuple(site.block for site in self.sites)
        require(list(blocks) == sorted(set(blocks)), "gated_blocks", blocks, "block numbers in ascending order")
        allowed = "gated blocks in ascending order"
        require(set(sites) <= set(blocks) and list(sites) == sorted(set(sites)), "sites", sites, allowed)
        per_head = self.macs.per_head
        require(len(per_head) == len(blocks), "macs.per_head", per_head, "one number a gated block")
        per_group = self.macs.per_mlp_group
        allowed = "one number a gated block" if self.mlp_groups else "none, as mlp_groups is 0"
        require(len(per_group) == len(blocks) * bool(self.mlp_groups), "macs.per_mlp_group", per_group, allowed)
        least = self.heads * sum(per_head) + self.mlp_groups * sum(per_group)
        require(least <= self.macs.dense, "macs.dense", self.macs.dense, f"{least} or more, as all units together")
        new = [name for name in ("mlp_groups", "dial", "dials") if getattr(self, name)]
        require(self.schema_version >= 3 or not new, "schema_version", self.schema_version, f"3, with {new}")
        for graph in self.graphs:
            file = f"{graph.attention}.{graph.precision}.onnx"
            require(graph.file == file, "graphs.file", graph.file, file)
        for index, entry in enumerate(self.specialised):
            file = specialised_file(index, entry.precision)
            require(entry.file == file, "specialised.file", entry.file, file)
            require(
                len(entry.kept) == len(blocks) and all(unit < self.units for of in entry.kept for unit in of),
                "specialised.kept", entry.kept, "some of the units of each gated block",
            )  # fmt: skip
        self._validate_dial(require)
        graphs = [*(graph.file for graph in self.graphs), *(entry.file for entry in self.specialised)]
        for required in ("profiles.json", "sae.safetensors", "golden.npz", *graphs):
            require(required in self.files, "files", sorted(self.files), f"a list with {required}")

    def _validate_dial(self, require: Callable[[bool, str, object, str], None]) -> None:
        dial = read_dial(self.dial)
        if dial is None:
            require(not self.dials, "dials", sorted(self.dials), "none, as there is no dial")
            return
        budgets = [knot.budget for knot in self.dial]
        require(self.takes_biases, "dial.budget", budgets, "none in a compact bundle")
        for name, curve in self.dials.items():
            try:
                check_curve(curve, f"dials[{name!r}]")
            except DialError as error:
                raise BundleError(f"manifest.json: {error}") from error
        shape, allowed = dial.gate_bias.shape[1:], (len(self.gated_blocks), self.units)
        require(shape == allowed, "dial.gate_bias", shape, f"the shape {allowed}, gated blocks and units")
        most = float(np.abs(dial.gate_bias).max())
        require(most <= MAX_KNOT, "dial.gate_bias", most, f"-{MAX_KNOT:g} to {MAX_KNOT:g}")
        require("" in self.dials, "dials", sorted(self.dials), "'' (without steering) among them")
        for name, curve in self.dials.items():
            first = curve[0].budget
            require(first >= dial.lowest, f"dials[{name!r}].budget", first, f"{dial.lowest} or more, as on the dial")


def read_dial(knots: Sequence[Knot]) -> Dial | None:
    """The dial with these knots; None if there are none. Raises BundleError when they are not a dial."""
    try:
        return Dial.from_json([vars(knot) for knot in knots]) if knots else None
    except DialError as error:
        raise BundleError(f"manifest.json: {error}") from error


def specialised_file(index: int, precision: str) -> str:
    """The file name of a specialised graph. index: its position in Manifest.specialised; precision: one of
    PRECISIONS."""
    return f"specialised-{index}.{precision}.onnx"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked. The graphs are still on disk."""

    folder: Path
    manifest: Manifest
    profiles: Mapping[str, SteeringProfile]
    """Profiles by name."""
    digest: str
    """SHA-256 of manifest.json, which names the SHA-256 of everything else; 16 hexadecimal digits."""
    dial: Dial | None = None
    """The dial of a model that takes budgets."""
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    """Manifest.dials for the profiles in this bundle."""


@dataclass(frozen=True)
class Golden:
    """Inputs of a few rows and their expected outputs: PyTorch's for fp32, else the graph's own at export."""

    inputs: Mapping[str, NDArray[Any]]
    """Inputs by the names in INPUTS, and GATE_BIAS if graphs take biases."""
    outputs: Mapping[str, NDArray[Any]]
    """logits and gate_logit."""
    tolerance: float
    """Largest allowed absolute difference of a logit."""
    margin: float
    """Gates with |gate logit| above it must decide alike; also the largest allowed difference of a gate logit."""


def load_bundle(folder: Path, root: Path | None = None) -> Bundle:
    """Read and check a bundle: schema, file sizes and checksums, profiles. root: where all of it must lie, links
    followed.

    Raises BundleError naming the folder, the file or field, and what is allowed.
    """
    try:
        check_inside(folder / "manifest.json", root)
        content = (folder / "manifest.json").read_bytes()
        manifest = Manifest.from_json(_json("manifest.json", content))
        for name, entry in manifest.files.items():
            check_inside(folder / name, root)
            _check_file(folder, name, entry)
        profiles = profiles_from_json(_json("profiles.json", (folder / "profiles.json").read_bytes()))
        for profile in profiles:
            check_profile(profile, manifest, f"profile {profile.name!r}")
        digests = {profile.name: digest(profile.terms, profile.gate_bias) for profile in profiles}
        if unknown := manifest.dials.keys() - digests.keys() - {""}:
            raise BundleError(f"manifest.json: dials has {sorted(unknown)}; allowed: '' and names of profiles.json")
        for own in manifest.specialised:
            if digests.get(own.profile) != own.digest:
                raise BundleError(
                    f"manifest.json: specialised.digest of profile {own.profile!r} is {own.digest!r}; "
                    f"allowed: {digests.get(own.profile)!r}, as its terms in profiles.json"
                )
    except OSError as error:
        raise BundleError(f"{folder}: {error.strerror}: {error.filename}") from error
    except BundleError as error:
        raise BundleError(f"{folder}: {error}") from error
    except SteeringError as error:
        raise BundleError(f"{folder / 'profiles.json'}: {error}") from error
    by_name = {profile.name: profile for profile in profiles}
    name = hashlib.sha256(content).hexdigest()[:16]
    return Bundle(folder, manifest, by_name, name, read_dial(manifest.dial), manifest.dials)


def _json(name: str, content: bytes) -> Any:
    """The JSON value of a file. Raises BundleError."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: not JSON: {error}") from error


def check_profile(profile: SteeringProfile, manifest: Manifest, where: str) -> None:
    """Raise SteeringError unless the model has the sites, latents and units of the profile."""
    check(profile.terms, manifest.latents, where)
    if profile.gate_bias and not manifest.takes_biases:
        raise SteeringError(f"{where}: gate_bias is given; allowed: none, as the model's graphs take no gate biases")
    check_gate_bias(profile.gate_bias, manifest.gated_blocks, manifest.units, f"{where}: gate_bias")


def load_golden(folder: Path, key: str) -> Golden:
    """The golden rows of the graphs of one precision, or of a specialised graph. key: precision or file name.

    Raises BundleError when golden.npz cannot be read or has no rows.
    """
    try:
        with np.load(folder / "golden.npz", allow_pickle=False) as arrays:
            if not len(arrays["image"]):
                raise BundleError(f"{folder / 'golden.npz'}: image has 0 rows; allowed: 1 or more")
            limits = {name: float(arrays[f"{key}.{name}"]) for name in ("tolerance", "margin")}
            for name, limit in limits.items():
                if not 0 <= limit < np.inf:
                    path = folder / "golden.npz"
                    raise BundleError(f"{path}: {key}.{name} is {limit}; allowed: a finite number, 0 or more")
            return Golden(
                {name: arrays[name] for name in (*INPUTS, *[GATE_BIAS] * (GATE_BIAS in arrays))},
                {name: arrays[f"{key}.{name}"] for name in ("logits", "gate_logit")},
                **limits,
            )
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{folder / 'golden.npz'}: {type(error).__name__}: {error}") from error


def golden_bytes(golden: Mapping[str, Golden]) -> bytes:
    """The bytes of golden.npz. golden: by precision, and for specialised graphs by file name; all have the same
    inputs."""
    arrays: dict[str, NDArray[Any]] = dict(next(iter(golden.values())).inputs)
    for key, rows in golden.items():
        arrays |= {f"{key}.{name}": value for name, value in rows.outputs.items()}
        arrays[f"{key}.tolerance"] = np.array(rows.tolerance)
        arrays[f"{key}.margin"] = np.array(rows.margin)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def is_bundle(folder: Path) -> bool:
    """Whether the folder has a manifest.json. Its content is not read."""
    return os.path.isfile(folder / "manifest.json")  # also False if the folder may not be read


def versions(model_folder: Path) -> list[int]:
    """The versions in a model's folder, in ascending order. Only folders named by a positive integer count."""
    names = [path.name for path in model_folder.iterdir() if os.path.isdir(path)] if model_folder.is_dir() else []
    return sorted(int(name) for name in names if VERSION.fullmatch(name))


def new_folder(repository: Path, name: str, version: int) -> Path:
    """The folder of a new bundle. Raises BundleError unless name and version are allowed, the version is new, and the
    folder can be written."""
    if not NAME.fullmatch(name):
        raise BundleError(f"name is {name!r}; allowed: {NAME.pattern}")
    if not VERSION.fullmatch(str(version)):
        raise BundleError(f"version is {version}; allowed: a positive integer of at most 18 digits")
    folder = repository / name / str(version)
    if os.path.exists(folder):
        raise BundleError(f"{folder} already exists; allowed: another version")
    there = next(path for path in folder.parents if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise BundleError(f"{folder} cannot be written: {there} is not a folder that may be changed")
    return folder


def write_bundle(repository: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a new bundle, as new_bundle does. Returns its folder. manifest.files is filled in here.

    Raises BundleError when that version exists.
    """
    entries = {name: FileEntry(hashlib.sha256(content).hexdigest(), len(content)) for name, content in files.items()}
    value = {**manifest.to_json(), "files": {name: asdict(entry) for name, entry in entries.items()}}
    Manifest.from_json(json.loads(json.dumps(value)))
    with new_bundle(repository, manifest.name, manifest.version) as folder:
        for name, content in [*files.items(), ("manifest.json", (json.dumps(value, indent=1) + "\n").encode())]:
            with open(folder / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    return repository / manifest.name / str(manifest.version)


@contextlib.contextmanager
def new_bundle(repository: Path, name: str, version: int, resumed: str = "") -> Iterator[Path]:
    """A folder to write a bundle into; at the end of the block it gets the version's name, so a bundle appears whole.

    One writer of a model at a time: others wait. After an error the folder is removed; with `resumed` it is kept, and
    the next writer with the same word continues in it. Raises BundleError when that version exists.
    """
    folder = new_folder(repository, name, version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent):
        new_folder(repository, name, version)  # not written by another one meanwhile
        temporary = folder.parent / f".{folder.name}.{resumed or os.getpid()}"
        for abandoned in folder.parent.glob(f".{folder.name}.*"):  # by a writer that was killed
            if not (resumed and abandoned == temporary):
                shutil.rmtree(abandoned, ignore_errors=True)
        temporary.mkdir(exist_ok=bool(resumed))
        try:
            yield temporary
            os.rename(temporary, folder)
        finally:
            if not resumed:
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a model's folder; others wait. The kernel releases it when a writer dies."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def gates_sae_digest(tensors: Mapping[str, NDArray[Any]], blocks: Sequence[int]) -> str:
    """Digest of the gate and autoencoder weights and the blocks they belong to: 16 hexadecimal digits."""
    sha = hashlib.sha256(json.dumps(list(blocks)).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]


def check_inside(path: Path, root: Path | None) -> None:
    """Raise BundleError when the path leads out of `root` once links are followed. Links within it are fine."""
    real = os.path.realpath(path)
    if root is not None and not Path(real).is_relative_to(os.path.realpath(root)):
        raise BundleError(f"{path} resolves to {real}, outside {os.path.realpath(root)}")


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{name} is not a file")
    size = status.st_size
    if size != entry.size:
        raise BundleError(f"{name} has {size} bytes; the manifest says {entry.size}")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != entry.sha256:
        raise BundleError(f"{name} has the SHA-256 {sha256}; the manifest says {entry.sha256!a:.80}")
