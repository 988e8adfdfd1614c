"""Turns a run folder into a bundle."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as safetensors

from export.builder import OPSET, save
from export.bundle import (
    GATE_BIAS,
    SCHEMA_VERSION,
    Bundle,
    BundleError,
    Golden,
    Graph,
    Knot,
    Macs,
    Manifest,
    Site,
    Specialised,
    gates_sae_digest,
    golden_bytes,
    load_bundle,
    new_folder,
    read_dial,
    specialised_file,
    versions,
    write_bundle,
)
from export.calibration import calibrate
from export.certify import LIMITS, Reference, run_torch, steerings
from export.compact import Compact, compact
from export.fused import build_fused
from export.graph import SteeredVit, build
from export.precision import Arithmetic, Float, Int8, Range
from export.session import Arrays, inputs_of, open_session, run_onnx
from training import soundness
from training.checkpoint import Run, RunError
from training.config import DataSettings
from training.data import splits
from training.data.splits import Split
from training.dial import ALL_OPEN, Point
from training.fields import read
from training.image_spec import ImageSpec
from training.model.gated_vit import GatedVit
from training.profiles.fit import load_profiles
from training.sae.fit import load_sae
from training.steering import SteeringProfile, Terms, bias_array, canonical, digest, profiles_to_json
from training.vit.fit import check_images, load_vit

CALIBRATION_IMAGES = 256
SPECIALISED_IMAGES = 200
"""Number of images on which a graph for one profile is compared."""
FLOATS: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class ExportSettings:
    """The flags of python -m export."""

    name: str
    version: int | None = None
    """Version of the bundle; None: the next one."""
    attentions: tuple[str, ...] = ("dispatch", "masked")
    precisions: tuple[str, ...] = ("fp32",)
    compact_for: str | None = None
    compact_threshold: float = 0.01
    """Compact and specialised graphs omit units that a smaller share of the images keeps."""
    specialise: tuple[str, ...] | None = ()
    """Profiles that get a graph of their own; None: all."""
    verify_images: int = 40
    accuracy_images: int = 2000

    def __post_init__(self) -> None:
        """Raises BundleError when no graph is of these kinds."""
        if not any(_fit_for(precision, self.attentions) for precision in self.precisions):
            raise BundleError(
                f"--precision is {','.join(self.precisions)} with --attention {','.join(self.attentions)}; "
                "allowed with fused: fp32 or fp16 too, or --attention dispatch or masked too"
            )


@dataclass(frozen=True)
class Source:
    """The contents of a bundle, before it is written."""

    spec: ImageSpec
    labels: tuple[str, ...]
    macs: Macs
    steered: SteeredVit
    profiles: Sequence[SteeringProfile]
    evaluation: Mapping[str, Any]
    selection: Split
    compacted: Compact | None = None
    dial: tuple[Knot, ...] = ()
    dials: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)

    @property
    def terms(self) -> list[Terms]:
        """The terms of each profile."""
        return [profile.terms for profile in self.profiles]


def write(run: Run, repository: Path, settings: ExportSettings) -> Bundle:
    """Write the bundle of a run and read it back.

    Raises BundleError when name or version are not allowed or taken, ExportError when a graph does not match PyTorch.
    """
    version = _version(repository, settings)  # checked before any work
    return write_source(_read(run, settings), repository, replace(settings, version=version))


def write_source(source: Source, repository: Path, settings: ExportSettings) -> Bundle:
    """As `write`, from contents in memory."""
    version = _version(repository, settings)
    model, sae, compacted = source.steered.model, source.steered.sae, source.compacted
    metadata = {"model": settings.name, "version": str(version), "labels": json.dumps(source.labels)}
    special = _to_specialise(source.profiles, settings)
    with TemporaryDirectory() as folder:
        graphs, golden = _graphs(source, settings, metadata, Path(folder))
        specialised = _specialised(source, settings, special, metadata, Path(folder), golden)
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    weights = {key: value.numpy() for key, value in sae.state_dict().items()}
    weights |= {f"gates.{key}": value.numpy() for key, value in model.gates.state_dict().items()}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=settings.name,
        version=version,
        labels=source.labels,
        image=source.spec,
        gated_blocks=model.gated_blocks,
        heads=model.heads,
        dim=model.dim,
        sites=tuple(Site(block, sae.latents) for block in model.gated_blocks),
        macs=source.macs,
        graphs=tuple(graphs),
        evaluation=source.evaluation,
        compact=compacted.to_json() | {"profile": source.profiles[0].name} if compacted else None,
        gates_sae_digest=gates_sae_digest(weights, model.gated_blocks),
        files={},
        specialised=specialised,
        mlp_groups=model.mlp_groups,
        dial=source.dial,
        dials=source.dials,
    )
    contents["profiles.json"] = (json.dumps(profiles_to_json(source.profiles), indent=1) + "\n").encode()
    contents["sae.safetensors"] = safetensors(weights)
    contents["golden.npz"] = golden_bytes(golden)
    return load_bundle(write_bundle(repository, manifest, contents))


def _version(repository: Path, settings: ExportSettings) -> int:
    """The version to write. Raises BundleError when name or version are not allowed or taken."""
    last = max(versions(repository / settings.name), default=0)
    version = last + 1 if settings.version is None else settings.version
    new_folder(repository, settings.name, version)
    return version


def _read(run: Run, settings: ExportSettings) -> Source:
    info, results = run.info("vit"), run.results()
    made = info["result"]
    labels, macs = tuple(made["labels"]), read(Macs, made["macs"], BundleError, "macs: ")
    model, sae = load_vit(run).cpu(), load_sae(run).cpu()
    profiles = _with_evaluation(results, load_profiles(run))
    evaluation = {"split": results["split"], "images": results["images"], **results["neutral"]}
    images = splits.load(DataSettings(**info["settings"]["data"]), info["settings"]["seed"])
    check_images(run, images)
    of_run = [*soundness.of_vit(info), *soundness.of_sae(run.info("sae")), *soundness.of_results(results)]
    soundness.show("export", of_run)
    warnings = {"warnings": [*images.warnings, *of_run]} if images.warnings or of_run else {}
    selection = images.selection
    dial, dials = _dial(made, results)
    compacted, units = None, model.heads + model.mlp_groups
    if settings.compact_for is not None:
        profile = _of_terms_alone(_named(profiles, settings.compact_for))
        compacted = compact(model, sae, profile, labels, selection, settings.compact_threshold)
        profiles = [replace(profile, evaluation={"split": "selection", "after": compacted.after.to_json()})]
        model, evaluation, dial, dials = compacted.model, {}, (), {}
        _show(compacted, profile, units)
    evaluation |= warnings
    spec, steered = ImageSpec(**made["image"]), SteeredVit(model, sae).eval()
    return Source(spec, labels, macs, steered, profiles, evaluation, selection, compacted, dial, dials)


def _dial(made: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[tuple[Knot, ...], dict[str, tuple[Point, ...]]]:
    """The dial of the stage `vit`, if it made one, and the dial's curves by profile, which `evaluate` measured.

    Raises BundleError when they cannot be read.
    """
    if not made.get("dial"):
        return (), {}
    if "dials" not in results:
        raise RunError("results.json has no dials, but the model has a dial: evaluate again")
    knots = read(tuple[Knot, ...], made["dial"], BundleError, "dial: ")
    return knots, read(dict[str, tuple[Point, ...]], results["dials"], BundleError, "dials: ")


def _graphs(
    source: Source, settings: ExportSettings, metadata: dict[str, str], folder: Path
) -> tuple[list[Graph], dict[str, Golden]]:
    """Write every graph into the folder and compare it with PyTorch; golden rows by precision."""
    selection, sae = source.selection, source.steered.sae
    real, labelled = (_spread(len(selection), count) for count in (settings.verify_images, settings.accuracy_images))
    reference = Reference(
        source.steered,
        selection.images[real].numpy(),
        steerings(source.terms, [sae.latents] * sae.sites),
        selection.images[labelled].numpy(),
        selection.classes[labelled].numpy(),
        biases=_biases(source),
    )
    graphs: list[Graph] = []
    first: dict[str, Path] = {}
    for precision in settings.precisions:
        ranges = _ranges(source) if precision == "int8" else {}
        for attention in _fit_for(precision, settings.attentions):
            kind = "compact" if source.compacted and attention == "masked" else attention
            arithmetic: Arithmetic = Int8(ranges) if ranges else Float(FLOATS[precision])
            kept = source.compacted.kept if source.compacted else None
            path = folder / f"{kind}.{precision}.onnx"
            biases = source.compacted is None  # as in Manifest.takes_biases
            save(build(source.steered, source.spec, kind, metadata, arithmetic, kept, biases), path)
            certificate = reference.certify(path, kind, precision)
            print(f"{path.name}: {certificate}", flush=True)
            graphs.append(Graph(path.name, kind, precision, OPSET, certificate.to_json()))
            first.setdefault(precision, path)
    golden = reference.golden(first)
    return graphs, golden if source.compacted else _with_biases(golden, source.steered, first)


def _biases(source: Source) -> list[NDArray[np.float32]]:
    """The gate biases (G, U) to compare: the dial's knots, those of profiles, and those that force units: all open, all
    closed, and every one at random. None for a compact model."""
    if source.compacted:
        return []
    model, dial = source.steered.model, read_dial(source.dial)
    biased = [profile.gate_bias for profile in source.profiles if profile.gate_bias]
    units = model.heads + model.mlp_groups
    of_profiles = [bias_array(bias, model.gated_blocks, units).astype(np.float32) for bias in biased]
    return [*([] if dial is None else dial.gate_bias), *of_profiles, *_forced(model)]


def _forced(model: GatedVit) -> NDArray[np.float32]:
    """(3, G, U): gate biases that open all units, close all, and do either with each."""
    shape = len(model.gated_blocks), model.heads + model.mlp_groups
    opened = np.stack([np.ones(shape), np.zeros(shape), np.random.default_rng(0).random(shape) < 0.5])
    return np.where(opened, np.float32(ALL_OPEN), np.float32(-ALL_OPEN))


def _with_biases(golden: Mapping[str, Golden], steered: SteeredVit, graphs: Mapping[str, Path]) -> dict[str, Golden]:
    """The same rows, with gate biases in every third one that open half of the units and close the others."""
    model = steered.model
    shape = len(model.gated_blocks), model.heads + model.mlp_groups
    biased = {}
    for precision, rows in golden.items():
        opened = np.random.default_rng(0).random((len(rows.inputs["image"]), *shape)) < 0.5
        bias = np.where(opened, np.float32(ALL_OPEN), np.float32(-ALL_OPEN))
        bias[np.arange(len(bias)) % 3 != 2] = 0
        inputs = {**rows.inputs, GATE_BIAS: bias}
        outputs = (
            run_torch(steered, inputs) if precision == "fp32" else run_onnx(open_session(graphs[precision]), inputs)
        )
        biased[precision] = replace(rows, inputs=inputs, outputs={name: outputs[name] for name in rows.outputs})
    return biased


def _fit_for(precision: str, attentions: Sequence[str]) -> Sequence[str]:
    """The attentions that have graphs of a precision. float16 is for GPUs, so not for dispatch; fused operators have no
    int8."""
    if precision == "fp16":
        return [attention for attention in attentions if attention != "dispatch"] or ["masked"]
    return [attention for attention in attentions if (attention, precision) != ("fused", "int8")]


def _to_specialise(profiles: Sequence[SteeringProfile], settings: ExportSettings) -> list[SteeringProfile]:
    """The profiles that get graphs of their own. Raises BundleError for unknown ones and those with gate biases."""
    names = [profile.name for profile in profiles] if settings.specialise is None else settings.specialise
    return [_of_terms_alone(_named(profiles, name, "--specialise"), "--specialise") for name in names]


def _specialised(
    source: Source,
    settings: ExportSettings,
    profiles: Sequence[SteeringProfile],
    metadata: dict[str, str],
    folder: Path,
    golden: dict[str, Golden],
) -> tuple[Specialised, ...]:
    """Write the graphs for one profile each, compared with PyTorch under it; their golden rows join the others."""
    precision = "fp16" if "fp16" in settings.precisions else "fp32"
    model, sae, selection = source.steered.model, source.steered.sae, source.selection
    compared, labelled = (_spread(len(selection), count) for count in (SPECIALISED_IMAGES, settings.accuracy_images))
    specialised = []
    for index, profile in enumerate(profiles):
        compacted = compact(model, sae, profile, source.labels, selection, settings.compact_threshold)
        _show(compacted, profile, model.heads + model.mlp_groups, "specialised")
        steered = SteeredVit(compacted.model, sae).eval()
        path = folder / specialised_file(index, precision)
        real = FLOATS[precision]
        save(build_fused(compacted.model, sae, source.spec, metadata, real, compacted.kept, profile.terms), path)
        reference = Reference(
            steered,
            selection.images[compared].numpy(),
            [profile.terms],
            selection.images[labelled].numpy(),
            selection.classes[labelled].numpy(),
            profile.terms,
        )
        certificate = reference.certify(path, "fused", precision)
        print(f"{path.name} ({profile.name}): {certificate}", flush=True)
        inputs = next(iter(golden.values())).inputs
        outputs = run_onnx(open_session(path, "fused"), dict(inputs))
        answers = {key: outputs[key] for key in ("logits", "gate_logit")}
        golden[path.name] = Golden(inputs, answers, LIMITS[precision].logit, LIMITS[precision].gate_margin)
        measured = compacted.to_json()
        specialised.append(
            Specialised(path.name, precision, profile.name, digest(profile.terms), compacted.kept, compacted.threshold,
                        measured["before"], measured["after"], certificate.to_json())
        )  # fmt: skip
    return tuple(specialised)


def _ranges(source: Source) -> dict[str, Range]:
    """The ranges for int8, from held-out images without steering and under every profile in turn, half of them at some
    budget or, in a model without a dial, with units forced."""
    images = source.selection.images[_spread(len(source.selection), CALIBRATION_IMAGES)].numpy()
    tried = [{}, *source.terms]
    rows = [tried[index % len(tried)] for index in range(len(images))]
    biases, drawn = None, np.random.default_rng(0)
    if not source.compacted:
        dial, forced = read_dial(source.dial), _forced(source.steered.model)
        biases = (
            dial.at(drawn.uniform(dial.lowest, 1, len(images))) if dial else forced[drawn.integers(3, size=len(images))]
        )
        biases[drawn.random(len(images)) < 0.5] = 0

    def batch(part: NDArray[np.int64]) -> Arrays:
        inputs = inputs_of(images[part], [rows[i] for i in part], source.steered.sae.sites)
        return inputs if biases is None else {**inputs, GATE_BIAS: biases[part]}

    parts = np.array_split(np.arange(len(images)), max(1, len(images) // 32))
    return calibrate(source.steered, source.spec, map(batch, parts))


def _spread(of: int, count: int) -> torch.Tensor:
    """`count` indices, evenly spread over 0 to `of`."""
    return torch.linspace(0, of - 1, min(count, of)).long()


def _named(profiles: Sequence[SteeringProfile], name: str, flag: str = "--compact-for") -> SteeringProfile:
    for profile in profiles:
        if profile.name == canonical(name):
            return profile
    raise BundleError(f"{flag} is {name!r}; allowed: {', '.join(repr(p.name) for p in profiles)}")


def _of_terms_alone(profile: SteeringProfile, flag: str = "--compact-for") -> SteeringProfile:
    if profile.gate_bias:
        raise BundleError(f"{flag}: profile {profile.name!r} has a gate_bias; allowed: profiles of terms alone")
    return profile


def _show(compacted: Compact, profile: SteeringProfile, units: int, how: str = "compact") -> None:
    total, left = units * len(compacted.kept), sum(map(len, compacted.kept))
    before, after = compacted.before, compacted.after
    print(f"{how} for {profile.name}: {total - left} of {total} units removed (kept by < {compacted.threshold:.1%})")
    for what in ("recall", "precision", "overall_accuracy", "head_usage", "compute_fraction"):
        was, now = getattr(before, what), getattr(after, what)
        print(f"  {what.replace('_', ' '):17}{was:.4f} -> {now:.4f}   (selection images, profile at strength 1)")


def _with_evaluation(results: Mapping[str, Any], profiles: Sequence[SteeringProfile]) -> list[SteeringProfile]:
    """The profiles with what `evaluate` measured of them on the test split.

    Raises RunError when a profile's terms are not those that were measured. (Older runs do not record them.)
    """
    measured = {entry["name"]: entry for entry in results["profiles"]}
    for profile in profiles:
        if profile.name not in measured:
            raise RunError(f"results.json has no profile {profile.name!r}: evaluate again")
        recorded, allowed = measured[profile.name].get("digest"), digest(profile.terms)
        if recorded not in (None, allowed):
            raise RunError(
                f"results.json measured other terms of profile {profile.name!r}: digest is {recorded!r}; "
                f"allowed: {allowed!r}, so evaluate again"
            )
    usages = [f"{unit}_usage_{when}" for unit in ("head", "mlp") for when in ("before", "after")]

    def kept(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {key: entry[key] for key in ("images", "before", "after", *usages) if key in entry}

    return [replace(p, evaluation={"split": results["split"], **kept(measured[p.name])}) for p in profiles]
