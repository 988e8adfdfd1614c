"""python -m export.selective deploy/models/fashion_mnist/6 --out runs/selective [--split test]

Finds selective profiles for a bundle: for all traffic, they cut the compute of a context's images and leave other
images alone (training/profiles/selective.py). Compares them with rivals from the same images, prints a table, and
writes <out>/selective.<split>.json; <out>/selective.profiles.json has the profiles for --profiles-dir of the server.

Results, and the strengths chosen on the selection slice, are kept in --out, so that an interrupted run resumes there.
Takes an estimated 20 minutes on one core of an AMD EPYC, and 10 more with --classes.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from export.bundle import Bundle, BundleError
from export.rebuild import with_images
from training.checkpoint import Run, RunError
from training.config import SaeSettings, Settings
from training.data.splits import DataError, subset
from training.evaluation.selective import (
    Method,
    chosen,
    drawn,
    examples,
    judged,
    measured,
    of_probe,
    of_terms,
    table,
    under,
)
from training.evaluation.selective_criteria import EXAMPLES, STRENGTHS
from training.evaluation.selective_rivals import Probe, frozen, principal, probe
from training.model.first_gate import from_first_gate
from training.model.gated_vit import GatedVit
from training.model.macs import Macs, count
from training.model.sae import Sae, from_tensors
from training.presets import PRESETS
from training.profiles.fit import targets_of
from training.profiles.selective import Examples, SelectiveSettings, Task, composed, selective
from training.profiles.strategies import Target
from training.steering import SteeringProfile, Terms, at_strength, profiles_to_json, terms_from_json, terms_to_json
from training.terminal import print_anything

LATENTS, PROBE, PCA, FROZEN = "SAE latents", "linear probe, bias", "PCA", "frozen decoder"
SPLITS = ("selection", "test")
SERVED = 50
"""Number of examples of the profiles that are written for the server, composed, or found for single classes."""
POOL = 8000
"""Number of training images from which examples and background are drawn, with the same share of every class."""
CHOOSING = 3000
"""Number of selection images on which strengths are chosen."""
FROZEN_EPOCHS = 30
"""Epochs of the encoder for the frozen decoder, over the pool's residuals."""
MEASURED = ("compute_before", "saved", "moved", "accuracy_change", "verdict")
"""The fields of a record that a profile's evaluation keeps."""
Key = tuple[str, int, str]
"""(context, examples, method)"""


@dataclass
class Search:
    """Everything that the search for methods needs, and its results so far."""

    bundle: Bundle
    network: GatedVit
    macs: Macs
    pool: Examples
    selection: Examples
    dictionaries: dict[str, Sae]
    targets: dict[str, Target]
    run: Run
    made_of: str
    """Digest of everything else that the results follow from."""
    settings: SelectiveSettings
    seed: int
    bf16: bool
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def entry(self, key: Key) -> dict[str, Any]:
        """The result for a key: its strength, the trials, and its terms or the tensors of its probe."""
        context, images, method = key
        name, target = f"{context}/{images}/{method}", self.targets[context]
        entry = self.found.setdefault(name, {})
        if "value" not in entry:
            own, others = drawn(self.pool, target, images, self.seed)
            task = Task(self.network, self.macs, own, others, self.settings, self.seed, self.bf16)
            entry["value"] = (
                _probe_to_json(probe(task, name))
                if method == PROBE
                else terms_to_json(selective(task, self.dictionaries[method], name))
            )
        if entry.get("strengths") != list(STRENGTHS):  # chosen among other strengths, or not yet chosen
            of_method = self._method(method, entry["value"])
            known = entry.get("tried", ())
            strength, tried = chosen(self.network, self.macs, self.selection, target, of_method, known)
            if strength != entry.get("strength"):
                entry = {"value": entry["value"]}
            self.found[name] = entry = {**entry, "strength": strength, "strengths": list(STRENGTHS), "tried": tried}
            self._save()
        return entry

    def measure(self, key: Key, split: str, images: Examples) -> dict[str, Any]:
        """The effect of a key's method on a split, at the strength chosen before."""
        entry, target = self.entry(key), self.targets[key[0]]
        if split not in entry:
            method = self.method(key)
            after = under(self.network, images, method, entry["strength"])
            entry[split] = {"terms": method.terms, **judged(self.macs, images, after, target)}
            self._save()
        values: dict[str, Any] = entry[split]
        return values

    def _save(self) -> None:
        self.run.write_json("selective.found.json", self.stamped())

    def method(self, key: Key) -> Method:
        """The method of a key, as found."""
        return self._method(key[2], self.entry(key)["value"])

    def terms(self, key: Key) -> Terms:
        """The terms of a key whose method has some, at the chosen strength."""
        entry = self.entry(key)
        return at_strength(terms_from_json(entry["value"]), entry["strength"])

    def stamped(self) -> dict[str, Any]:
        """The content of the file of results."""
        return {"digest": self.made_of, "settings": vars(self.settings), "found": self.found}

    def _method(self, method: str, value: dict[str, Any]) -> Method:
        if method == PROBE:
            weight, offset, bias = (torch.tensor(value[name]) for name in ("weight", "offset", "bias"))
            return of_probe(Probe(weight, offset, bias))
        return of_terms(self.dictionaries[method], terms_from_json(value))


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status: 0, or 1 with the reason on standard error.

    arguments: those after the program's name.
    """
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m export.selective", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a folder <repository>/<model>/<version>")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is found and measured")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="fashion-mnist", help="of the bundle's run; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bundle's run; default: %(default)s")
    parser.add_argument("--split", choices=SPLITS, default="selection", help="default: %(default)s")
    parser.add_argument(
        "--images", type=int, nargs="+", default=EXAMPLES, metavar="N",
        help="images of a context that its profile is found from; default: " + " ".join(map(str, EXAMPLES)),
    )  # fmt: skip
    parser.add_argument("--classes", action="store_true", help="profiles of single classes too")
    options = parser.parse_args(arguments)
    settings = Settings(step="evaluate", out=options.out, preset=options.preset, seed=options.seed)
    try:
        bundle, steered, data = with_images(options.bundle, settings)
        targets = targets_of(data.labels, settings.profiles.contexts)
    except (BundleError, DataError, RunError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    pool, selection = subset(data.train, POOL, settings.seed), subset(data.selection, CHOOSING, settings.seed)
    splits = {"pool": pool, "selection": selection, **({"test": data.test} if options.split == "test" else {})}
    network, tokens = from_first_gate(steered.model, list(splits.values()))
    known = {name: examples(network, split) for name, split in zip(splits, tokens, strict=True)}
    run = Run(options.out)
    made_of = run.digest(also=(bundle.manifest.gates_sae_digest, settings.fingerprint("profiles"), dict(data.digests)))
    search = Search(
        bundle, network, count(steered.model), known["pool"], known["selection"],
        _dictionaries(run, made_of, steered.sae, known["pool"], settings), targets, run, made_of,
        SelectiveSettings(), settings.seed, settings.bf16,
    )  # fmt: skip
    file = options.out / "selective.found.json"
    if file.is_file():
        stored = json.loads(file.read_text())
        if {**search.stamped(), "found": {}} == {**stored, "found": {}}:
            search.found = stored["found"]
    contexts = list(settings.profiles.contexts)
    keys = list(_keys(contexts, options.images, data.labels if options.classes else ()))
    images = known[options.split]
    merged, records = _compositions(search, contexts, images), []
    result = {
        "split": options.split,
        "images": len(images),
        "pool": len(known["pool"]),
        "settings": vars(search.settings),
    }
    for key in tqdm(keys, desc="selective", unit="search", dynamic_ncols=True):
        entry, values = search.entry(key), search.measure(key, options.split, images)
        records.append({**_record(key, entry["strength"], values), "selection": entry["tried"]})
        run.write_json(f"selective.{options.split}.json", {**result, "records": records, "composed": merged})
    _write_profiles(search, contexts, options.split, images)
    print(table([*records, *merged]))
    return 0


def _keys(contexts: Sequence[str], sizes: Sequence[int], labels: Sequence[str]) -> Iterator[Key]:
    """The keys to search, the most important ones for the report first."""
    for size in sizes:
        yield from itertools.product(contexts, (size,), (LATENTS, PROBE))
    yield from itertools.product(contexts, (SERVED,), (PCA, FROZEN))
    yield from itertools.product(labels, (SERVED,), (LATENTS, PROBE))


def _record(key: Key, strength: float, values: dict[str, Any]) -> dict[str, Any]:
    context, images, method = key
    return {"context": context, "images": images, "method": method, "strength": strength, **values}


def _compositions(search: Search, contexts: Sequence[str], images: Examples) -> list[dict[str, Any]]:
    """The profiles of every two contexts combined, each found from its own images only."""
    records = []
    for pair in itertools.combinations(contexts, 2):
        terms = composed([search.terms((context, SERVED, LATENTS)) for context in pair])
        method = of_terms(search.dictionaries[LATENTS], terms)
        after = under(search.network, images, method, 1.0)
        values = judged(search.macs, images, after, tuple(c for context in pair for c in search.targets[context]))
        parts = {context: measured(search.macs, images, after, search.targets[context])["saved"] for context in pair}
        record = _record((" + ".join(pair), SERVED, f"{LATENTS}, merged"), 1.0, values)
        records.append({**record, "terms": method.terms, "saved_by_context": parts})
    return records


def _write_profiles(search: Search, contexts: Sequence[str], split: str, images: Examples) -> None:
    """Write the contexts' profiles for --profiles-dir of the server."""
    profiles = []
    for context in contexts:
        key = (context, SERVED, LATENTS)
        values = search.measure(key, split, images)
        classes = tuple(search.bundle.manifest.labels[c] for c in search.targets[context])
        profiles.append(
            SteeringProfile(
                f"selective: {context}", classes, "selective", search.terms(key),
                {"split": split, **{name: values[name] for name in MEASURED}}, kind="selective",
            )
        )  # fmt: skip
    digest = {"gates_sae_digest": search.bundle.manifest.gates_sae_digest}
    search.run.write_json("selective.profiles.json", {**digest, **profiles_to_json(profiles)})


def _dictionaries(run: Run, made_of: str, sae: Sae, pool: Examples, settings: Settings) -> dict[str, Sae]:
    """The bundle's dictionary and those of the rivals, equally sparse on the pool. The frozen decoder is kept in the
    folder, with `made_of`."""
    active = torch.stack([(sae.encode(s, x) > 0).float().mean() for s, x in enumerate(pool.residuals)]).mean().item()
    stored = run.read_tensors("frozen")
    if stored and stored.meta.get("made_of") == made_of:
        random_decoder = from_tensors(stored.tensors)
    else:
        options = SaeSettings(latents=sae.latents, k=round(active * sae.latents), epochs=FROZEN_EPOCHS)
        train, held_out = pool.residuals[:, ::2], pool.residuals[:, 1::2]
        random_decoder = frozen(train, held_out, options, settings.seed + 1, settings.bf16)
        run.write_tensors("frozen", random_decoder.state_dict(), {"made_of": made_of})
    return {LATENTS: sae, PCA: principal(pool.residuals, active), FROZEN: random_decoder}


def _probe_to_json(value: Probe) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {"weight": value.weight, "offset": value.offset, "bias": value.bias}
    return {name: tensor.tolist() for name, tensor in tensors.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
