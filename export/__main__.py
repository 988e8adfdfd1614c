"""python -m export <run> <repository> --name <model>: a finished training run becomes a bundle."""

import argparse
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from export.bundle import (
    Bundle,
    BundleError,
    Graph,
    Macs,
    Manifest,
    Site,
    gates_sae_digest,
    load_bundle,
    versions,
    write_bundle,
)
from export.graph import OPSET, SteeredVit, masked_graph
from export.verify import ExportError, Golden, certify, golden, steerings
from training import data
from training.checkpoint import Run, RunError
from training.config import DataSettings
from training.fit_profiles import load_profiles
from training.fit_sae import load_sae
from training.fit_vit import load_vit
from training.image_spec import ImageSpec
from training.steering import SteeringProfile, profiles_to_json


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run folder of python -m training")
    parser.add_argument("repository", type=Path, help="the folder of bundles to add to")
    parser.add_argument("--name", required=True, help="the model's name in the repository")
    parser.add_argument("--version", type=int, help="a positive integer; default: the next one")
    parser.add_argument("--verify-images", type=int, default=40, help="images to compare with PyTorch on (default 40)")
    options = parser.parse_args(arguments)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of every Split that it leaves as it is
    try:
        bundle = export(Run(options.run), options.repository, options.name, options.version, options.verify_images)
    except (BundleError, ExportError, RunError, data.DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in bundle.folder.iterdir()) / 1e6
    print(f"{bundle.folder}: {size:.1f} MB, digest {bundle.digest}, {len(bundle.profiles)} profiles")
    return 0


def export(run: Run, repository: Path, name: str, version: int | None, verify_images: int) -> Bundle:
    """Write the bundle of a run and read it back. Raises ExportError when the graph does not match PyTorch."""
    info = run.info("vit")
    made = info["result"]
    spec, labels = ImageSpec.from_json(made["image"]), tuple(made["labels"])
    model, sae = load_vit(run).cpu(), load_sae(run).cpu()
    profiles = _with_evaluation(run, load_profiles(run))
    images = data.load(DataSettings(**info["settings"]["data"]), info["settings"]["seed"]).selection
    picked = torch.linspace(0, len(images) - 1, min(verify_images, len(images))).long()
    real = images.images[picked].numpy()

    version = version or max(versions(repository / name), default=0) + 1
    steered = SteeredVit(model, sae).eval()
    graph = masked_graph(steered, spec, {"model": name, "version": str(version), "labels": json.dumps(labels)})
    content = graph.SerializeToString()
    tried = steerings([profile.terms for profile in profiles], [sae.latents] * sae.sites)
    certificate = certify(content, steered, real, tried)
    print(
        f"masked.fp32: {certificate.rows} rows, largest logit difference {certificate.max_logit_difference:.2g}, "
        f"{certificate.flipped_gates} gates flipped within {certificate.gate_margin}"
    )
    gates = {f"gates.{key}": value.numpy() for key, value in model.gates.state_dict().items()}
    weights = {key: value.numpy() for key, value in sae.state_dict().items()}
    manifest = Manifest(
        name=name,
        version=version,
        labels=labels,
        image=spec,
        gated_blocks=model.gated_blocks,
        heads=model.heads,
        dim=model.dim,
        sites=tuple(Site(block, sae.latents) for block in model.gated_blocks),
        macs=Macs(made["macs"]["dense"], tuple(made["macs"]["per_head"])),
        graphs=(Graph("masked.fp32.onnx", "masked", "fp32", OPSET, certificate.to_json()),),
        evaluation=_evaluation(run),
        gates_sae_digest=gates_sae_digest({**gates, **weights}, model.gated_blocks),
        files={},
    )
    files = {
        "masked.fp32.onnx": content,
        "profiles.json": (json.dumps(profiles_to_json(profiles), indent=1) + "\n").encode(),
        "sae.safetensors": save(weights),
        "golden.npz": _npz(golden(steered, real, tried)),
    }
    return load_bundle(write_bundle(repository, manifest, files))


def _with_evaluation(run: Run, profiles: Sequence[SteeringProfile]) -> list[SteeringProfile]:
    """The profiles with what `evaluate` measured of them on the test split."""
    results = json.loads(_results(run))
    measured = {entry["name"]: entry for entry in results["profiles"]}
    kept = ("images", "before", "after", "head_usage_before", "head_usage_after")
    return [
        SteeringProfile(
            p.name, p.classes, p.strategy, p.terms,
            {"split": results["split"], **{key: measured[p.name][key] for key in kept}},
        )
        for p in profiles
    ]  # fmt: skip


def _evaluation(run: Run) -> dict[str, object]:
    results = json.loads(_results(run))
    return {"split": results["split"], "images": results["images"], **results["neutral"]}


def _results(run: Run) -> str:
    path = run.folder / "results.json"
    if not path.is_file():
        raise RunError(f"{path} is missing: run the step 'evaluate' first")
    return path.read_text()


def _npz(rows: Golden) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, tolerance=rows.tolerance, margin=rows.margin, **rows.inputs, **rows.outputs)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
