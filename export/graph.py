"""The ONNX graphs of a gated ViT and its autoencoders: pixels and steering terms in, logits and gates out.

`masked`: every head is computed and multiplied by its gate. The reference; any execution provider.
"""

import warnings
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.bundle import INPUTS, OUTPUTS
from training.gated_vit import GatedVit
from training.image_spec import ImageSpec
from training.sae import Sae

OPSET = 20
IR_VERSION = 10


class SteeredVit(nn.Module):
    """The contract of the graph, in PyTorch. Letters: B batch, S sites, T terms, G gated blocks, H heads."""

    def __init__(self, model: GatedVit, sae: Sae):
        super().__init__()
        self.model = model
        self.sae = sae

    def forward(
        self, image: Tensor, steering_latent: Tensor, steering_scale: Tensor, steering_shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """image uint8 (B, height, width, channels); terms (B, S, T), int64 and float32.

        Returns logits (B, classes), head_gate bool (B, G, H), gate_logit (B, G, H), residual (B, S, D).
        """

        def steer(site: int, residual: Tensor) -> Tensor:
            return self.sae.steer(
                site, residual, steering_latent[:, site], steering_scale[:, site], steering_shift[:, site]
            )

        logits, out = self.model(image, steer)
        return logits, out["gate_logit"] > 0, out["gate_logit"], out["residual"]


def masked_graph(steered: SteeredVit, spec: ImageSpec, metadata: dict[str, str]) -> onnx.ModelProto:
    """The `masked` graph, checked by onnx, without stack traces or local paths."""
    sites = steered.sae.sites
    example = (
        torch.zeros(2, *spec.shape, dtype=torch.uint8),
        torch.zeros(2, sites, 3, dtype=torch.int64),
        torch.ones(2, sites, 3),
        torch.zeros(2, sites, 3),
    )
    batch, terms = torch.export.Dim("batch", min=1), torch.export.Dim("terms", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes to itself; what matters is compared in verify.py
        program = torch.onnx.export(
            steered.eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: batch}, *({0: batch, 2: terms},) * 3),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return cleaned(program.model_proto, metadata)


def cleaned(graph: onnx.ModelProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """Without the exporter's notes (stack traces, local paths), with our metadata; checked."""
    graph.ir_version = min(graph.ir_version, IR_VERSION)
    graph.producer_name, graph.producer_version, graph.doc_string = "steervit", "", ""

    def clear(part: Any) -> None:
        part.doc_string = ""
        del part.metadata_props[:]

    clear(graph.graph)
    for part in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        clear(part)
    for tensor in graph.graph.initializer:
        clear(tensor)
    for function in graph.functions:
        clear(function)
        for node in function.node:
            clear(node)
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph, full_check=True)
    return graph
