"""A bundle's model and autoencoders in PyTorch, for questions that its graphs have no input for.

The weights are those of `dispatch.fp32.onnx` and `sae.safetensors`. Export multiplied batch norms into convolutions,
dropped the bias of the keys and moved that of the values behind the output projection; the model here gives the same
answers with other parameters.
"""

import reprlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.bundle import Bundle, BundleError, load_bundle, load_golden
from export.certify import run_torch
from export.graph import SteeredVit
from export.verify import check_graph, load_weights
from training.config import Settings, VitSettings
from training.data.splits import Data, load
from training.model.backbone import create_vit
from training.model.gated_vit import GatedVit, UnsupportedModel
from training.model.sae import Sae

GRAPH = "dispatch.fp32.onnx"


@torch.no_grad()
def rebuild(folder: Path, settings: VitSettings) -> tuple[Bundle, SteeredVit]:
    """The bundle and its model, frozen. settings: those that it was trained with; conv_stem models only.

    Raises BundleError when the bundle has no such graph or is compact, its weights do not fit the settings, or the
    model does not give the golden answers.
    """
    bundle, path = load_bundle(folder), folder / GRAPH
    if not path.is_file() or settings.model != "conv_stem":
        raise BundleError(f"{path} of a {settings.model} model cannot be rebuilt; allowed: conv_stem, and {GRAPH}")
    if bundle.manifest.compact is not None:
        raise BundleError(f"{folder} is compact, without the weights of closed units; allowed: a bundle that is not")
    weights = {w.name: torch.from_numpy(numpy_helper.to_array(w).copy()) for w in onnx.load(path).graph.initializer}
    manifest = bundle.manifest
    stored = {name: torch.from_numpy(value) for name, value in load_weights(folder, manifest).items()}
    gates = {name: value for name, value in stored.items() if name.startswith("gates.")}
    sae = Sae(*stored["encoder"].shape)
    try:
        vit = create_vit(settings, manifest.image, len(manifest.labels))
        model = GatedVit(vit, manifest.gated_blocks, manifest.image, manifest.mlp_groups)
        wrong = model.load_state_dict({**_state(model, weights), **gates}, strict=False)
        sae.load_state_dict({name: value for name, value in stored.items() if name not in gates})
    except (KeyError, IndexError, RuntimeError, UnsupportedModel) as error:
        first = " ".join(str(error).split("\n\t")[:2])
        raise BundleError(f"{path} does not fit the settings of its model: {first}") from error
    unset = [name for name in wrong.missing_keys if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert unset == wrong.unexpected_keys == []
    steered = SteeredVit(model, sae).eval().requires_grad_(False)
    check_graph(partial(run_torch, steered), load_golden(folder, "fp32"), path, manifest)
    return bundle, steered


def with_images(folder: Path, settings: Settings) -> tuple[Bundle, SteeredVit, Data]:
    """As rebuild, with the images of the bundle's run. settings: those of the run. Also raises DataError when they
    cannot be read, and BundleError when they have other labels."""
    bundle, steered = rebuild(folder, settings.vit)
    data, labels = load(settings.data, settings.seed), bundle.manifest.labels
    if data.labels != labels:
        shown = reprlib.repr(labels), reprlib.repr(data.labels)
        raise BundleError(f"{folder} has the labels {shown[0]}; those of preset {settings.preset!r} are {shown[1]}")
    return bundle, steered, data


def _state(model: GatedVit, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the model without its gates. Raises KeyError on a weight that the graph lacks."""
    state = {}
    for name, value in weights.items():
        if name.startswith(("stem/model.vit.", "classifier/vit.")):
            state[name[name.index("vit.") :]] = value
    state = {name: value for name, value in state.items() if name in model.state_dict()}
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):  # its factor is in the convolution before it; its shift remains
            before, _, number = name.rpartition(".")
            shift = weights[f"stem/model.{before}.{int(number) - 1}.weight_bias"]
            state[f"{name}.bias"] = shift
            state[f"{name}.weight"] = torch.full_like(shift, (1 + norm.eps) ** 0.5)
    for index in range(len(model.vit.blocks)):
        state |= {f"vit.blocks.{index}.{key}": value for key, value in _block(model, weights, index).items()}
    return state


def _block(model: GatedVit, weights: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The state of a block."""

    def heads(part: str) -> Tensor:
        return torch.stack([weights[f"block{index}/head{head}/{part}"] for head in range(model.heads)])

    def mlp(part: str, neurons: int) -> Tensor:
        """A weight of the MLP, its groups joined. neurons: the dimension of the hidden neurons."""
        groups = [f"group{group}/" for group in range(model.mlp_groups)] if index in model.gated_blocks else []
        return torch.cat([weights[f"block{index}/mlp/{group}{part}"] for group in groups or [""]], neurons)

    scale = (model.dim // model.heads) ** -0.5  # the graph's queries contain it
    query, key, value = heads("query.weight") / scale, heads("key.weight"), heads("value.weight")  # each (H, D, E)
    query_bias = heads("query.bias").flatten() / scale
    value_bias = torch.zeros_like(query_bias)  # in block 0 it is in the bias of the output
    if index in model.gated_blocks:
        output = heads("output.weight")  # (H, E, D)
        added = weights[f"block{index}/value.bias"]  # (H, D): a head's bias behind its output projection
        value_bias = torch.linalg.lstsq(output.mT, added[:, :, None]).solution.flatten()
        projection = output.flatten(0, 1)  # (H * E, D)
    else:
        projection = weights[f"block{index}/output.weight"]
    return {
        "attn.qkv.weight": torch.cat([part.mT.flatten(0, 1) for part in (query, key, value)]),  # (3 * H * E, D)
        "attn.qkv.bias": torch.cat([query_bias, torch.zeros_like(query_bias), value_bias]),
        "attn.proj.weight": projection.T,
        "attn.proj.bias": weights[f"block{index}/output.bias"],
        "mlp.fc1.weight": mlp("fc1.weight", 1).T,
        "mlp.fc1.bias": mlp("fc1.bias", 0),
        "mlp.fc2.weight": mlp("fc2.weight", 0).T,
        "mlp.fc2.bias": weights[f"block{index}/mlp/fc2.bias"],
        **{f"{norm}.{part}": weights[f"block{index}/{norm}.{part}"]
           for norm in ("norm1", "norm2") for part in ("weight", "bias")},
    }  # fmt: skip
