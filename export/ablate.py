"""python -m export.ablate deploy/models/fashion_mnist/6 --out runs/ablation [--split test]

Measures what the class profiles of a bundle owe to the latents' activations, and to knowing the class
(training/evaluation/ablation.py). Prints two tables and writes <out>/ablation.<split>.json. Takes 15 minutes on one
core of an AMD EPYC; what it learns is kept in --out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.bundle import BundleError
from export.rebuild import with_images
from training.checkpoint import Run
from training.config import Settings
from training.data.splits import Data, DataError, subset
from training.evaluation.ablation import Learned, compare_variants, learn, table, variants
from training.model.first_gate import from_first_gate
from training.model.gated_vit import GatedVit
from training.model.macs import count
from training.model.sae import Sae
from training.presets import PRESETS
from training.steering import terms_from_json, terms_to_json
from training.terminal import print_anything


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status: 0, or 1 with the reason on standard error.

    arguments: those after the program's name.
    """
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m export.ablate", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a folder <repository>/<model>/<version>")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is learned and measured")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="fashion-mnist", help="of the bundle's run; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bundle's run; default: %(default)s")
    parser.add_argument("--split", choices=("selection", "test"), default="selection", help="default: %(default)s")
    options = parser.parse_args(arguments)
    settings = Settings(step="evaluate", out=options.out, preset=options.preset, seed=options.seed)
    try:
        bundle, steered, data = with_images(options.bundle, settings)
        if missing := [label for label in data.labels if label not in bundle.profiles]:
            raise BundleError(f"{options.bundle} has no profile {missing[0]!r}; allowed: one for each label")
    except (BundleError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    model, sae, run = steered.model, steered.sae, Run(options.out)
    learnt = _learned_once(settings, run, bundle.manifest.gates_sae_digest, data, model, sae)
    profiles = [bundle.profiles[label].terms for label in data.labels]
    macs = count(model)
    later, (selection, split) = from_first_gate(
        model, [data.selection, data.test if options.split == "test" else data.selection]
    )
    steerings = variants(later, macs, sae, selection, profiles, learnt)
    records = compare_variants(later, macs, split, data.labels, steerings)
    run.write_json(
        f"ablation.{options.split}.json", {"split": options.split, "images": len(split), "variants": records}
    )
    print(table(records))
    return 0


def _learned_once(settings: Settings, run: Run, digest: str, data: Data, model: GatedVit, sae: Sae) -> Learned:
    made_of = run.digest(also=(digest, settings.fingerprint("profiles"), dict(data.digests)))
    stored = run.read_tensors("ablation")
    if stored and stored.meta["digest"] == made_of:
        tensors, meta = stored
        return Learned(tensors["class_bias"], tensors["bias"], terms_from_json(meta["terms"]))
    pool = subset(data.train, settings.profiles.pool, settings.seed)
    learnt = learn(settings.profiles, model, sae, pool, len(data.labels), settings.seed + 3, settings.bf16)
    tensors = {"class_bias": learnt.class_bias, "bias": learnt.bias}
    run.write_tensors("ablation", tensors, {"digest": made_of, "terms": terms_to_json(learnt.terms)})
    return learnt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
