"""The only reader and writer of a run folder.

```
runs/fm/
  vit.safetensors       gated ViT             sae.safetensors   autoencoders       profiles.json  steering profiles
  vit.json, sae.json, profiles.stage.json     settings and measurements of each stage
  results.json          every number of the report      report.html, *.png
  changes, differences, along   .safetensors: the test images one by one, for intervals over seeds and later controls
  *.state.safetensors   an interrupted stage, to resume from
```
Files are written under a temporary name and then renamed, so a crash leaves either the old file or the new one. The
JSON of a stage is written last: a stage without it is not finished. It holds the digest of the stage's input.
"""

import hashlib
import json
import os
from collections import defaultdict
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer

from training import processes

FORMAT = 2
"""Format version of the run folder; incremented when the meaning of a file changes or something is added."""
MADE_OF = {"sae": "vit", "profiles": "sae"}
"""The stage whose tensors a stage starts from."""
PLACES = ("data.cache", "data.download")
"""Settings that are recorded though no result depends on them."""


class RunError(Exception):
    """The run folder does not fit the request, such as one made with other settings."""


class Stored(NamedTuple):
    """The content of a safetensors file of a run folder."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    """The JSON value beside the tensors."""


class Run:
    """A run folder. The first write creates it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def finished(self, stage: str, settings: dict[str, Any]) -> bool:
        """Whether `stage` is finished, with these settings.

        Raises RunError when it was finished with other settings: nothing is overwritten.
        """
        path = self._stage(stage)
        if not path.is_file():
            return False
        check_same(path, self.info(stage)["settings"], settings)
        return True

    def has(self, stage: str) -> bool:
        """Whether `stage` is finished, with any settings."""
        return self._stage(stage).is_file()

    def info(self, stage: str) -> dict[str, Any]:
        """{"settings": ..., "result": ...} of a finished stage.

        Raises RunError when the stage is not finished, or when its input has changed since.
        """
        path = self._stage(stage)
        if not path.is_file():
            raise RunError(f"{path} is missing: run the step '{stage}' first")
        value: dict[str, Any] = json.loads(path.read_text())
        _check_format(path, value)
        self._check_made_of(stage, path, value)
        return value

    def has_results(self) -> bool:
        """Whether the run is evaluated."""
        return (self.folder / "results.json").is_file()

    def digest(self, *files: str, also: object = None) -> str:
        """The digest of the content of these files, and of a JSON value."""
        value = hashlib.sha256(json.dumps(also, sort_keys=True).encode())
        for file in files:
            value.update(hashlib.sha256((self.folder / file).read_bytes()).digest())
        return value.hexdigest()

    def results(self) -> dict[str, Any]:
        """The content of results.json. Raises RunError when the run is not evaluated."""
        path = self.folder / "results.json"
        if not path.is_file():
            raise RunError(f"{path} is missing: run the step 'evaluate' first")
        value: dict[str, Any] = json.loads(path.read_text())
        return value

    def finish(self, stage: str, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Mark a stage as finished, after its tensors have been written. Deletes the states for resuming it."""
        value = {"format": FORMAT, "settings": settings, "made_of": self._made_of(stage), "result": result}
        self.write_json(self._stage(stage).name, value)
        if processes.is_main():
            for state in self.folder.glob(f"{escape(stage)}.*state.safetensors"):
                state.unlink(missing_ok=True)

    def write_state(
        self, stage: str, settings: dict[str, Any], tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> None:
        """Write the state from which an interrupted stage resumes."""
        known = {"format": FORMAT, "settings": settings, "made_of": self._made_of(stage)}
        self.write_tensors(f"{stage}.state", tensors, {**meta, **known})

    def read_state(self, stage: str, settings: dict[str, Any]) -> Stored | None:
        """The last state of an interrupted stage, or None. Raises RunError when it was written with other settings."""
        state = self.read_tensors(f"{stage}.state")
        if state:
            path = self.folder / f"{stage}.state.safetensors"
            _check_format(path, state.meta)
            check_same(path, state.meta["settings"], settings)
            self._check_made_of(stage, path, state.meta)
        return state

    def _made_of(self, stage: str) -> str | None:
        """The digest of the input of a stage, or of a part of it (`profiles.learned`)."""
        path = self.folder / f"{MADE_OF.get(stage.partition('.')[0])}.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def _check_made_of(self, stage: str, path: Path, meta: dict[str, Any]) -> None:
        made_of = meta.get("made_of")
        if made_of and made_of != self._made_of(stage):
            before = MADE_OF[stage.partition(".")[0]]
            raise RunError(
                f"{path} was made from another {before}.safetensors. "
                "Restore that file, or remove this one and those of later stages, and run the step again"
            )

    def _stage(self, stage: str) -> Path:
        return self.folder / (f"{stage}.stage.json" if stage == "profiles" else f"{stage}.json")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON value to the file of that name. Raises ValueError on NaN and infinity."""
        self.write(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def write_tensors(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None) -> None:
        """Write tensors and a JSON value as one safetensors file."""
        contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
        self.write(f"{name}.safetensors", save(contiguous, {"meta": json.dumps(meta or {})}))

    def read_tensors(self, name: str) -> Stored | None:
        """The content of the file, or None when it does not exist."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
        return Stored(load_file(path), meta)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file that a finished stage has written. Raises RunError when it is missing."""
        stored = self.read_tensors(name)
        if stored is None:
            raise RunError(
                f"{self.folder / name}.safetensors is missing. "
                "Restore it, or remove the JSON file of its stage and run the step again"
            )
        return stored.tensors

    def remove_tensors(self, name: str) -> None:
        """Remove the file of `write_tensors`, if it is there."""
        if processes.is_main():
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Write a file; in processes other than 0, do nothing."""
        if not processes.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)
        for abandoned in self.folder.glob(f".{escape(name)}.*"):  # left by writers that were killed
            abandoned.unlink(missing_ok=True)


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose keys start with `<name>.`, without that prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, by `optimizer.<number of the parameter>.<name>`, without learning rates."""
    states = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": value for i, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state from `optimizer_tensors` into an optimizer of the same parameters. Other tensors are
    ignored."""
    states: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in part(tensors, "optimizer").items():
        index, name = key.split(".")
        states[int(index)][name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_format(path: Path, meta: dict[str, Any]) -> None:
    if meta.get("format") != FORMAT:
        raise RunError(
            f"{path} has the format {meta.get('format')} of another version; this version reads and writes {FORMAT}. "
            "Give another --out, or use the version that wrote it: nothing was changed"
        )


def check_same(path: Path, made: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise RunError unless these are the same settings. path: the file that was made with the first."""
    different = [f"{name}: {stored} stored, {requested} requested" for name, stored, requested in changed(made, asked)]
    if different:
        raise RunError(
            f"{path} was made with other settings ({'; '.join(different)}). "
            "Give the same settings, another --out, or remove that stage and those after it"
        )


def changed(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The name and both values of each setting that differs, by name; of PLACES, none."""
    found = []
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed(a, b, f"{prefix}{key}.")
        elif a != b and f"{prefix}{key}" not in PLACES:
            found.append((f"{prefix}{key}", a, b))
    return found
