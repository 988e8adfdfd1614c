"""python -m export.dictionaries deploy/models/fashion_mnist/6 --out runs/dictionaries

Compares the autoencoders of a bundle with principal components: FVU and gate agreement over k, stability over seeds,
and how well each latent's effect on each gate is predicted (training/evaluation/dictionaries.py). For typefaces also:
how well a few latents tell what an image was made from (training/evaluation/probing.py). Reads training and selection
images; writes <out>/dictionaries.json. Takes about three minutes on one core of an AMD EPYC.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.bundle import BundleError
from export.rebuild import with_images
from training.checkpoint import Run
from training.config import Settings
from training.data.splits import DataError, subset
from training.evaluation.dictionaries import KS, STABLE_AT, SWEEP, compared, effects, fitted, stabilities
from training.evaluation.probing import can_probe, dictionaries, probed
from training.model.first_gate import from_first_gate
from training.presets import PRESETS
from training.sae.activations import residuals
from training.sae.fidelity import fidelity, reconstruction
from training.sae.fit import Fitting
from training.terminal import print_anything

TRAIN, HELD_OUT = 12_000, 3_000
"""Numbers of images, with the same share of every class."""


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status: 0, or 1 with the reason on standard error.

    arguments: those after the program's name.
    """
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m export.dictionaries", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a folder <repository>/<model>/<version>")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is measured")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="fashion-mnist", help="of the bundle's run; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bundle's run; default: %(default)s")
    options = parser.parse_args(arguments)
    settings = Settings(step="evaluate", out=options.out, preset=options.preset, seed=options.seed)
    try:
        bundle, steered, data = with_images(options.bundle, settings)
    except (BundleError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    splits = [subset(data.train, TRAIN, settings.seed), subset(data.selection, HELD_OUT, settings.seed)]
    model, tokens = from_first_gate(steered.model, splits)
    train, held_out = (residuals(model, split, "dictionaries: residuals") for split in tokens)
    seed, bf16, sae = settings.seed, settings.bf16, steered.sae
    result: dict[str, Any] = {
        "gates_sae_digest": bundle.manifest.gates_sae_digest,
        "images": {"train": len(splits[0]), "held_out": len(splits[1])},
        "fit": {name: getattr(SWEEP, name) for name in ("kind", "latents", "epochs", "batch_size", "learning_rate")},
        "bundle": fidelity(reconstruction(sae), model, held_out, "dictionaries: bundle"),
        "effects": {"bundle": effects(model, sae, train[:, ::4], held_out)},
        "over_k": [],
    }
    run = Run(options.out)
    for k in tqdm(KS, "dictionaries: fits", unit="fit", dynamic_ncols=True):
        fit = fitted(Fitting, train, k, seed, bf16)
        result["over_k"].append(compared(model, train, held_out, fit))
        if k == STABLE_AT:
            result["effects"][f"k {k}"] = effects(model, fit.folded(held_out[:, ::2]), train[:, ::4], held_out)
        run.write_json("dictionaries.json", result)
    result["stability"] = {"k": STABLE_AT, **stabilities(train, held_out[:, ::2], seed, bf16)}
    if can_probe(splits[1]):
        encodings = dictionaries(train, held_out[:, ::2], sae, seed, bf16)
        result["probing"] = probed(encodings, held_out, splits[1])
    run.write_json("dictionaries.json", result)
    print(f"{'k':>4}{'SAE FVU':>10}{'agree':>9}{'PCA FVU':>10}{'agree':>9}")
    for record in result["over_k"]:
        of_kinds = (record[kind][name] for kind in ("sae", "pca") for name in ("fvu", "gate_agreement"))
        fvu, agreement, pca_fvu, pca_agreement = of_kinds
        print(f"{record['k']:4}{fvu:10.5f}{agreement:9.4f}{pca_fvu:10.5f}{pca_agreement:9.4f}")
    for name, values in {**result["stability"], **result["effects"]}.items():
        print(f"{name}: {values}")
    if "probing" in result:
        _print_probing(result["probing"])
    return 0


def _print_probing(probing: Mapping[str, Any]) -> None:
    """Print the mean R2 over the factors for each number of latents, then R2 of each factor with one latent."""
    of_kinds = probing["r2"]
    print(f"{'R2 of factors':>20}" + "".join(f"{name:>16}" for name in of_kinds) + f"{'whole residual':>16}")
    for row, k in enumerate(probing["k"]):
        means = (sum(of[row]) / len(of[row]) for of in of_kinds.values())
        print(f"{f'mean, k {k}':>20}" + "".join(f"{mean:16.3f}" for mean in means))
    for column, factor in enumerate(probing["factors"]):
        values = [of[0][column] for of in of_kinds.values()] + [probing["residual"][column]]
        print(f"{f'{factor}, k 1':>20}" + "".join(f"{value:16.3f}" for value in values))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
