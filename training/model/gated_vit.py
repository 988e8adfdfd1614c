"""A timm VisionTransformer whose attention heads and MLP groups are switched on and off for each image.

A gate reads the class token of the residual stream that enters its block and decides for each unit whether it runs:
`logit = Linear(LayerNorm(residual))`; the unit is open when its logit is above 0 (the policy head of AdaViT,
arXiv:2111.15668). A unit is an attention head or an MLP group, an equal slice of the hidden neurons of the block's MLP.
A closed head contributes exactly zero before the output projection, a closed group exactly zero before the second
layer's bias, which is always added.

Letters: B images, N tokens, D residual width, H heads, E head width, M MLP groups, U = H + M units, G gated blocks,
Q query tokens.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol, TypedDict, cast

import torch
from timm.layers import Attention, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from training.image_spec import ImageSpec
from training.model.dial import LearnedDial
from training.steering import GATE_BOUND, GATE_EPSILON

Decide = Callable[[int, Tensor], Tensor]
"""(index among the gated blocks, gate logits (B, U)) -> gates (B, U), 0 to 1. Heads come first, then MLP groups."""
Steer = Callable[[int, Tensor], Tensor]
"""(index among the gated blocks, residual (B, D)) -> the gate's input in its place, (B, D)."""


class UnsupportedModel(Exception):
    """The model cannot be gated; the message names the unsupported part and what is supported."""


class Intermediates(TypedDict):
    """The inputs and decisions of the gates."""

    residual: Tensor
    """float32 (B, G, D): the class token that enters each gated block."""
    gate_logit: Tensor
    """float32 (B, G, U), including the gate bias."""
    head_gate: Tensor
    """float32 (B, G, H): 0 or 1 in the forward pass."""
    mlp_gate: Tensor
    """float32 (B, G, M): 0 or 1 in the forward pass."""


class GatedNetwork(Protocol):
    """A network with gates: a GatedVit, or its replacement for a single gated block (profiles/last_block.py)."""

    @property
    def gates(self) -> nn.ModuleList:
        """One Gate for each gated block."""

    @property
    def heads(self) -> int:
        """Heads per block."""

    @property
    def mlp_groups(self) -> int:
        """MLP groups per gated block; 0 if only heads are gated."""

    @property
    def dim(self) -> int:
        """Width of the residual stream."""

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""

    def __call__(
        self, image: Tensor, steer: Steer | None = None, decide: Decide = ..., gate_bias: Tensor | None = None, /
    ) -> tuple[Tensor, Intermediates]:
        """Logits (B, classes) and the intermediates, as of GatedVit.forward."""


def keep_positive(_: int, logit: Tensor) -> Tensor:
    """The decision at inference: a unit is open when its logit is above 0."""
    return (logit > 0).to(logit.dtype)


def keep_all(_: int, logit: Tensor) -> Tensor:
    """Every unit open: the ungated model."""
    return torch.ones_like(logit)


def straight_through(temperature: float, noise: float = 0.0) -> Decide:
    """0/1 forward, sigmoid(logit / temperature) backward (arXiv:1308.3432).

    noise: share of Gumbel noise (the difference of two Gumbels is logistic), as in arXiv:1611.01144.
    """

    def decide(_: int, logit: Tensor) -> Tensor:
        if noise:
            uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            logit = logit + noise * torch.logit(uniform)
        soft = torch.sigmoid(logit / temperature)
        return (logit > 0).to(logit.dtype) + (soft - soft.detach())

    return decide


def lowered(decide: Decide, offset: Tensor) -> Decide:
    """`decide` with all gate logits of an image lowered by its offset (B, 1)."""
    return lambda site, logit: decide(site, logit - offset)


class Gate(nn.Module):
    """(B, D) -> gate logits (B, U), softly bounded to +-GATE_BOUND so that training can still reverse every gate.
    Starts open."""

    def __init__(self, dim: int, units: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, GATE_EPSILON)
        self.linear = nn.Linear(dim, units)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 2.0)

    def forward(self, residual: Tensor) -> Tensor:
        """residual: (B, D). Returns gate logits (B, U)."""
        return GATE_BOUND * torch.tanh(self.linear(self.norm(residual)) / GATE_BOUND)


class GatedVit(nn.Module):
    """The model of this project: pixels in, logits and named intermediates out.

    The last block's only output is the class token (and the distillation token of a distilled model), so its query,
    output projection and MLP are computed for these tokens only.
    """

    mean: Tensor
    std: Tensor
    heads: int
    skipping: bool = False
    """Without gradients, do not compute the units that no image of a batch runs: faster where images of one class come
    together, but the last bits of an answer then depend on the other images of its batch."""

    def __init__(
        self,
        vit: VisionTransformer,
        gated_blocks: tuple[int, ...],
        spec: ImageSpec,
        mlp_groups: int = 0,
        dial: float | None = None,
    ):
        """mlp_groups: the groups of each gated block's MLP; 0: MLPs have no gates. dial: the usage at which all biases
        of the dial are 0; None: no dial. Raises UnsupportedModel."""
        super().__init__()
        check_supported(vit)
        check_mlps(vit, gated_blocks, mlp_groups)
        self.vit = vit
        self.gated_blocks = gated_blocks
        self.heads, self.mlp_groups = cast(Attention, vit.blocks[0].attn).num_heads, mlp_groups
        self.dim = vit.embed_dim
        self.leaving = 2 if isinstance(vit, VisionTransformerDistilled) else 1  # tokens that the classifier reads
        self.gates = nn.ModuleList(Gate(self.dim, self.heads + mlp_groups) for _ in gated_blocks)
        self.dial = None if dial is None else LearnedDial(len(gated_blocks), self.heads + mlp_groups, dial)
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1) * 255, persistent=False)

    def forward(
        self,
        image: Tensor,
        steer: Steer | None = None,
        decide: Decide = keep_positive,
        gate_bias: Tensor | None = None,
        usage: Tensor | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """image: uint8 (B, height, width, channels). gate_bias: float32 (B, G, U), added to the bounded gate logits.
        usage (B,), for a model with a dial: the gate bias is that of the dial at this usage.

        Returns logits (B, classes) and the intermediates.
        """
        if usage is not None:
            assert self.dial is not None
            gate_bias = self.dial(usage)
        vit, x = self.vit, self.embed(image)
        residuals, logits, gates = [], [], []
        last = len(vit.blocks) - 1
        for index, block in enumerate(cast(Iterable[Block], vit.blocks)):
            head_gate = mlp_gate = None
            if index in self.gated_blocks:
                site = self.gated_blocks.index(index)
                with torch.autocast(x.device.type, enabled=False):
                    residual = x[:, 0].float()
                    logit = self.gates[site](residual if steer is None else steer(site, residual))
                    if gate_bias is not None:
                        logit = logit + gate_bias[:, site]
                    gate = decide(site, logit)
                head_gate, mlp_gate = gate[:, : self.heads], gate[:, self.heads :]
                residuals.append(residual)
                logits.append(logit)
                gates.append(gate)
            queries = self.leaving if index == last else x.shape[1]
            mixed = attention(cast(Attention, block.attn), block.norm1(x), head_gate, queries, self.skipping)
            x = x[:, :queries] + block.drop_path1(block.ls1(mixed))
            x = x + block.drop_path2(block.ls2(mlp(cast(Mlp, block.mlp), block.norm2(x), mlp_gate, self.skipping)))
        gates_of_units = torch.stack(gates, 1)
        out: Intermediates = {
            "residual": torch.stack(residuals, 1),
            "gate_logit": torch.stack(logits, 1),
            "head_gate": gates_of_units[:, :, : self.heads],
            "mlp_gate": gates_of_units[:, :, self.heads :],
        }
        return vit.forward_head(vit.norm(x)), out

    @property
    def device(self) -> torch.device:
        """The device of the parameters and buffers."""
        return self.mean.device

    def embed(self, image: Tensor) -> Tensor:
        """uint8 (B, height, width, channels) -> the tokens that enter the first block, (B, N, D)."""
        vit, image = self.vit, image.to(self.mean.device, non_blocking=True)
        x = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        return tokens


def attention(attn: Attention, x: Tensor, gate: Tensor | None, queries: int, skipping: bool = False) -> Tensor:
    """Attention of the first `queries` tokens over all tokens, each head multiplied by its gate.

    x (B, N, D), gate (B, H) or None for all open. skipping: as of GatedVit. Returns (B, Q, D).
    """
    b, n, d = x.shape
    h, e = attn.num_heads, attn.head_dim
    qkv: Tensor = attn.qkv.weight
    qkv_bias: Tensor | None = attn.qkv.bias
    out: Callable[[Tensor], Tensor] = attn.proj
    if gate is not None and skipping and (ran := units_that_run(gate)) is not None:
        weight = attn.proj.weight.unflatten(1, (h, e))[:, ran].flatten(1)
        out = partial(F.linear, weight=weight, bias=attn.proj.bias)
        qkv = qkv.view(3, h, e, d)[:, ran].view(-1, d)
        qkv_bias = None if qkv_bias is None else qkv_bias.view(3, h, e)[:, ran].flatten()
        gate, h = gate[:, ran], len(ran)
    if queries == n:
        q, k, v = F.linear(x, qkv, qkv_bias).reshape(b, n, 3, h, e).permute(2, 0, 3, 1, 4)  # each (B, H, N, E)
    else:
        w_q, w_kv = qkv.split([h * e, 2 * h * e])
        b_q, b_kv = (None, None) if qkv_bias is None else qkv_bias.split([h * e, 2 * h * e])
        q = F.linear(x[:, :queries], w_q, b_q).reshape(b, queries, h, e).transpose(1, 2)  # (B, H, Q, E)
        k, v = F.linear(x, w_kv, b_kv).reshape(b, n, 2, h, e).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if x.is_cuda:
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    else:  # with few tokens on a CPU, three times as fast as the fused form, forward and backward
        weights = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(-1)  # (B, H, Q, N)
        mixed = attn.attn_drop(weights).to(v.dtype) @ v  # (B, H, Q, E)
    if gate is not None:
        mixed = mixed * gate[:, :, None, None].to(mixed.dtype)
    projected: Tensor = attn.proj_drop(out(mixed.transpose(1, 2).reshape(b, queries, h * e)))
    return projected


def mlp(module: Mlp, x: Tensor, gate: Tensor | None, skipping: bool = False) -> Tensor:
    """The MLP of tokens x (B, N, D), each group of hidden neurons multiplied by its gate (B, M); None or M = 0: all.
    skipping: as of GatedVit."""
    if gate is None or not gate.shape[1]:
        whole: Tensor = module(x)
        return whole
    first: Callable[[Tensor], Tensor] = module.fc1
    second: Callable[[Tensor], Tensor] = module.fc2
    if skipping and (ran := units_that_run(gate)) is not None:
        kept = torch.arange(len(module.fc1.weight)).unflatten(0, (gate.shape[1], -1))[ran].flatten()
        bias = None if module.fc1.bias is None else module.fc1.bias[kept]
        first = partial(F.linear, weight=module.fc1.weight[kept], bias=bias)
        second = partial(F.linear, weight=module.fc2.weight[:, kept], bias=module.fc2.bias)
        gate = gate[:, ran]
    hidden = module.drop1(module.act(first(x))).unflatten(-1, (gate.shape[1], -1))  # (B, N, M, neurons)
    out: Tensor = module.drop2(second((hidden * gate[:, None, :, None].to(hidden.dtype)).flatten(-2)))
    return out


def units_that_run(gate: Tensor) -> Tensor | None:
    """The indices of the units that run for any image of the batch, one at least; None: compute all units, because all
    run or gradients are needed. gate: (B, H) or (B, M)."""
    if torch.is_grad_enabled():
        return None
    ran = gate.any(0)
    ran[0] |= ~ran.any()
    return None if ran.all() else ran.nonzero()[:, 0]


def check_supported(vit: nn.Module) -> None:
    """Raise UnsupportedModel unless closing a head of `vit` by its gate is the same as removing the head."""

    def require(condition: bool, feature: str, allowed: str) -> None:
        if not condition:
            raise UnsupportedModel(f"the model has {feature}; allowed: {allowed}")

    known = (VisionTransformer, VisionTransformerDistilled)
    require(type(vit) in known, f"type {type(vit).__name__}", "a timm VisionTransformer, distilled or not")
    require(vit.cls_token is not None and vit.global_pool == "token", f"pooling {vit.global_pool!r}", "the class token")
    require(vit.attn_pool is None, "attention pooling", "the class token")
    for index, block in enumerate(cast(Iterable[Block], vit.blocks)):
        require(type(block) is Block, f"block {index} of type {type(block).__name__}", "timm's Block")
        attn = cast(Attention, block.attn)
        require(
            type(attn) is Attention, f"attention of type {type(attn).__name__} in block {index}", "timm's Attention"
        )
        require(
            isinstance(attn.norm, nn.Identity), f"scale_attn_norm in block {index}", "none: a closed head must add 0"
        )
        require(attn.gate is None, f"an attention gate of its own in block {index}", "none")


def check_mlps(vit: VisionTransformer, gated_blocks: tuple[int, ...], groups: int) -> None:
    """Raise UnsupportedModel unless the MLPs of these blocks can be split into this many groups that can each be
    removed."""
    for index in gated_blocks if groups else ():
        module = vit.blocks[index].mlp
        if type(module) is not Mlp or not isinstance(module.norm, nn.Identity) or not isinstance(module.fc1, nn.Linear):
            raise UnsupportedModel(
                f"the MLP of block {index} is a {type(module).__name__}{' with a norm' * (type(module) is Mlp)}; "
                "allowed with vit.mlp_groups above 0: timm's Mlp, two linear layers without a norm between them"
            )
        if module.fc1.out_features % groups:
            raise UnsupportedModel(
                f"vit.mlp_groups is {groups}; allowed: a divisor of the {module.fc1.out_features} hidden neurons of "
                f"block {index}, or 0"
            )


def parse_gated_blocks(text: str, depth: int) -> tuple[int, ...]:
    """`all`, `last` or `2,4-5` -> block indices. Block 0 cannot be gated: its class token is the same for all images.

    Raises UnsupportedModel naming the text and what is allowed.
    """
    if text == "all":
        return tuple(range(1, depth))
    if text == "last":
        return (depth - 1,)
    blocks: set[int] = set()
    try:
        for part in text.split(","):
            first, _, final = part.partition("-")
            blocks |= set(range(int(first), int(final or first) + 1))
    except ValueError:
        blocks = {-1}
    if not blocks or min(blocks) < 1 or max(blocks) >= depth:
        raise UnsupportedModel(
            f"vit.gated_blocks is {text!r}; allowed: 'all', 'last', or numbers and ranges from 1 to {depth - 1}, "
            "such as '2,4-5' (block 0 sees the same class token for every image)"
        )
    return tuple(sorted(blocks))
