"""Loads a file of weights into a timm VisionTransformer; tensors that do not fit are left out and listed.

Supported are safetensors and PyTorch checkpoints, the latter with `weights_only`: tensors, numbers, text and the flags
that timm's own training saves (argparse.Namespace, which runs no code). For other files, the error has a command that
converts them. The model may be nested in the checkpoint (`state_dict`, `model`), and its names may have a prefix
(`module.`, `model.`). Of several models, averaged weights (`state_dict_ema`) are preferred, as in timm.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from training.model.gated_vit import UnsupportedModel

CLASSIFIERS = ("head", "head_dist")
INNER = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which checkpoints store a model, in order of preference."""
MARK = "blocks.0.attn.qkv.weight"
"""A tensor that every timm VisionTransformer has; anything before this name is a prefix."""
STEM, POSITIONS = "patch_embed.proj.weight", "pos_embed"
ALLOWED = "allowed: a safetensors file, or a PyTorch file of tensors"
CONVERT = (
    "import sys, torch, safetensors.torch as s; "
    "plain = lambda x: x if isinstance(x, dict) else x.state_dict(); "
    "c = plain(torch.load(sys.argv[1], 'cpu', weights_only=False)); "
    f"c = plain(next((c[k] for k in {INNER} if c.get(k) is not None), c)); "
    "s.save_file({k: v.contiguous().clone() for k, v in c.items() if isinstance(v, torch.Tensor)}, sys.argv[2])"
)
"""Unpickling can run code from the file. This program never runs the command."""


def load_weights(vit: VisionTransformer, path: Path, model: str) -> tuple[list[str], list[str]]:
    """Load the weights in `path` into `vit`, a new timm model of that name. Returns the classifiers that start from
    random numbers because the file has none for this number of classes, and sentences about what was kept, adapted and
    left out.

    Weights for another image size, patch size or number of channels are adapted as in timm. Raises UnsupportedModel
    when the file cannot be read, or lacks a part other than the classifier.
    """
    where, tensors = _read(path, model)
    expected = vit.state_dict()
    tensors, sentences = _adapted(vit, path, model, tensors)
    absent, apart = [], []
    for name in CLASSIFIERS:
        own = {key: value for key, value in expected.items() if key.rpartition(".")[0] == name}
        if own and any(key not in tensors or tensors[key].shape != value.shape for key, value in own.items()):
            absent.append(name)
            weight = tensors.get(f"{name}.weight")
            if weight is not None:
                apart.append(f"{name} ({len(weight)} classes, the data {len(own[f'{name}.weight'])})")
            tensors = {key: value for key, value in tensors.items() if key not in own}
        elif own:
            classes = len(own[f"{name}.weight"])
            sentences.append(f"{name} of {classes} classes is kept; its classes must be in the order of the labels")
    random = {key for key in expected if key.rpartition(".")[0] in absent}
    missing = sorted(expected.keys() - tensors.keys() - random)
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UnsupportedModel(
            f"vit.weights is {path}, which lacks {missing[0]}{others}; allowed: timm's weights of {model}"
        )
    for key in sorted(expected.keys() & tensors.keys()):
        if tensors[key].shape != expected[key].shape:
            raise UnsupportedModel(
                f"vit.weights is {path}, where {key} has the shape {list(tensors[key].shape)}; "
                f"allowed: {list(expected[key].shape)}, as in timm's {model}"
            )
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        more = f" and {len(unknown) - 3} others" if len(unknown) > 3 else ""
        apart.append(f"{', '.join(unknown[:3])}{more} (not part of {model})")
    vit.load_state_dict({key: value for key, value in tensors.items() if key in expected}, strict=False)
    if apart:
        sentences.append(f"left out: {'; '.join(apart)}")
    if absent:
        sentences.append(f"{' and '.join(absent)} {'start' if len(absent) > 1 else 'starts'} from random numbers")
    source = f"{path} ({where})" if where else str(path)
    return absent, [f"weights of {source}: {sentence}" for sentence in sentences]


def _read(path: Path, model: str) -> tuple[str, dict[str, Tensor]]:
    """The model in a file: its place in the file, and its tensors by their names without the prefix."""
    checkpoint = _checkpoint(path, model)
    models = list(_models(checkpoint))
    if not models:
        foreign = any("encoder.layer.0." in str(name) for name in checkpoint)
        why = "has the names of Hugging Face's transformers" if foreign else f"lacks {MARK} and others"
        raise UnsupportedModel(f"vit.weights is {path}, which {why}; allowed: timm's weights of {model}")
    best = min(_rank(where) for where, _ in models)
    models = [(where, tensors) for where, tensors in models if _rank(where) == best]
    if len(models) > 1:
        names = ", ".join(repr(" ".join(where)) for where, _ in models)
        raise UnsupportedModel(f"vit.weights is {path}, which holds {len(models)} models ({names}); allowed: one")
    where, tensors = models[0]
    return " ".join(where), tensors


def _rank(where: tuple[str, ...]) -> int:
    return INNER.index(where[0]) if where and where[0] in INNER else len(INNER)


def _models(
    checkpoint: dict[Any, Any], where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every VisionTransformer in a checkpoint: the keys and the prefix that lead to it, and its tensors."""
    tensors = {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for prefix in sorted(key.removesuffix(MARK) for key in tensors if key.endswith(MARK)):
        inner = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        yield (*where, prefix) if prefix else where, inner
    for key, value in checkpoint.items():
        if isinstance(value, dict) and len(where) < 3:
            yield from _models(value, (*where, str(key)))


def _checkpoint(path: Path, model: str) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as error:
        raise UnsupportedModel(f"vit.weights is {path}: {error}; {ALLOWED}") from error
    try:
        if start[8:9] == b"{":
            return dict(load_file(path))
        if path.suffix == ".npz":
            raise UnsupportedModel(
                f"vit.weights is {path}, a NumPy file; {ALLOWED}. To convert it: {_of_numpy(path, model)}"
            )
        if not start.startswith((b"PK", b"\x80")):
            lfs = start.startswith(b"version https://git")
            why = "a pointer of git-lfs (git lfs pull brings the file)" if lfs else "a file of another kind"
            raise UnsupportedModel(f"vit.weights is {path}, {why}; {ALLOWED}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnsupportedModel:
        raise
    except Exception as error:  # many types of exceptions for a broken file
        if type(error).__name__ != "UnpicklingError":
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise UnsupportedModel(f"vit.weights is {path}: {why}; {ALLOWED}") from error
        command = shlex.join([sys.executable, "-c", CONVERT, str(path), str(path.with_suffix(".safetensors"))])
        raise UnsupportedModel(
            f"vit.weights is {path}, which holds more than tensors; {ALLOWED}. "
            f"To convert a file that you trust (this runs what is in it): {command}"
        ) from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def _of_numpy(path: Path, model: str) -> str:
    """The command that converts a NumPy file of a JAX model: timm reads it into a model of the right size."""
    code = (
        "import sys, timm, safetensors.torch as s; m = timm.create_model(sys.argv[1]); "
        "m.load_pretrained(sys.argv[2]); s.save_file(m.state_dict(), sys.argv[3])"
    )
    return shlex.join([sys.executable, "-c", code, model, str(path), str(path.with_suffix(".safetensors"))])


def _adapted(
    vit: VisionTransformer, path: Path, model: str, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors adapted to the model's image size, patches and channels, and sentences about the changes."""
    before = {key: tensors[key].shape for key in (STEM, POSITIONS) if key in tensors}
    try:
        adapted: dict[str, Tensor] = checkpoint_filter_fn(tensors, vit, adapt_layer_scale=True)
        if STEM in adapted:
            channels = vit.patch_embed.proj.weight.shape[1]
            adapted[STEM] = adapt_input_conv(channels, adapted[STEM], base_chans=adapted[STEM].shape[1])
    except (AssertionError, RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"vit.weights is {path}, which cannot be adapted to {model}: {error}; allowed: timm's weights of {model}"
        ) from error
    changed = [key for key, shape in before.items() if key in adapted and adapted[key].shape != shape]
    return adapted, [f"{key} is adapted from {list(before[key])} to {list(adapted[key].shape)}" for key in changed]
