"""The gated ViT against timm's own model, against heads that are really removed, and against hand counts."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Mlp, SwiGLU, set_fused_attn
from timm.models import create_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.config import VitSettings
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.gated_vit import (
    GatedVit,
    UnsupportedModel,
    check_supported,
    keep_all,
    mlp,
    parse_gated_blocks,
    straight_through,
)
from training.model.inference import Outcome, steered_by
from training.model.macs import Macs, count, head_macs
from training.model.sae import Sae
from training.steering import SteeringTerm

GREY = ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,))


@pytest.fixture(scope="module", params=[0, 8], ids=["heads", "heads and MLP groups"])
def model(request: pytest.FixtureRequest) -> GatedVit:
    """A small model with gates that really decide: about half of the units are closed."""
    torch.manual_seed(0)
    settings = VitSettings(dim=32, depth=3, heads=4)
    model = GatedVit(create_vit(settings, GREY, 10), (1, 2), GREY, request.param)
    for gate in model.gates:
        nn.init.normal_(gate.linear.weight)
        nn.init.zeros_(gate.linear.bias)
    for _ in range(3):  # let the running statistics of the stem settle
        model.train()(images(32))
    return model.eval().requires_grad_(False)


def images(count: int) -> Tensor:
    return torch.randint(256, (count, 28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def test_with_every_head_on_it_is_timms_model(model: GatedVit) -> None:
    batch = images(6)
    logits, _ = model(batch, decide=keep_all)
    normal = (batch.permute(0, 3, 1, 2) / 255 - 0.3) / 0.4
    torch.testing.assert_close(logits, model.vit(normal), rtol=1e-4, atol=1e-5)


def test_a_closed_unit_is_the_same_as_a_removed_unit(model: GatedVit) -> None:
    batch = images(64)
    logits, out = model(batch)
    gates, of_mlp = out["head_gate"], out["mlp_gate"]
    assert 0.2 < gates.mean() < 0.8
    assert of_mlp.shape == (64, 2, model.mlp_groups)
    width, neurons = model.vit.blocks[0].attn.head_dim, 128 // max(model.mlp_groups, 1)
    row = 5
    assert not model.mlp_groups or 0 < of_mlp[row].mean() < 1
    alone = {k: v.clone() for k, v in model.vit.state_dict().items()}
    try:
        for index, block in enumerate(model.gated_blocks):
            for head in torch.nonzero(gates[row, index] == 0).flatten().tolist():
                model.vit.blocks[block].attn.proj.weight[:, head * width : (head + 1) * width] = 0
            for group in torch.nonzero(of_mlp[row, index] == 0).flatten().tolist():
                model.vit.blocks[block].mlp.fc2.weight[:, group * neurons : (group + 1) * neurons] = 0
        removed, _ = model(batch[row : row + 1], decide=keep_all)
    finally:
        model.vit.load_state_dict(alone)
    torch.testing.assert_close(removed[0], logits[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("open_units", [(0, 2, 5), (1, 3), (6, 8, 11), tuple(range(12)), ()])
def test_what_no_image_of_a_batch_runs_is_not_computed(model: GatedVit, open_units: tuple[int, ...]) -> None:
    """Some heads and groups, heads alone, groups alone, all, none."""
    batch, units = images(7), model.heads + model.mlp_groups
    kept = [unit for unit in open_units if unit < units]
    gate = torch.zeros(7, units)
    gate[::2, kept] = 1

    def decide(_site: int, _logit: Tensor) -> Tensor:
        return gate

    with FlopCounterMode(display=False) as all_computed:
        expected, _ = model(batch, decide=decide)
    skipping = copy.deepcopy(model)
    skipping.skipping = True
    with FlopCounterMode(display=False) as fewer, torch.no_grad():
        logits, _ = skipping(batch, decide=decide)
    assert torch.equal(skipping(batch, decide=decide)[0], expected), "not where gradients are needed"
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    macs, heads = count(model), [unit for unit in kept if unit < model.heads]
    skipped = sum(macs.per_head) * (model.heads - max(len(heads), 1))
    if model.mlp_groups:  # one unit is computed where none is open
        skipped += sum(macs.per_mlp_group) * (model.mlp_groups - max(len(kept) - len(heads), 1))
    assert all_computed.get_total_flops() - fewer.get_total_flops() == 2 * 7 * skipped


def test_rows_do_not_depend_on_their_neighbours(model: GatedVit) -> None:
    batch = images(9)
    together, out = model(batch)
    for row in range(9):
        alone, out_alone = model(batch[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
        assert torch.equal(out_alone["head_gate"][0], out["head_gate"][row])


def test_neutral_steering_equals_no_steering_exactly(model: GatedVit) -> None:
    sae = Sae(2, 16, 32).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.normal_()
    neutral = {0: (SteeringTerm(3), SteeringTerm(5)), 1: (SteeringTerm(15),)}
    batch = images(4)
    plain, steered = model(batch), model(batch, steered_by(sae, neutral))
    assert torch.equal(plain[0], steered[0])
    assert torch.equal(plain[1]["gate_logit"], steered[1]["gate_logit"])


def test_straight_through_gates_are_hard_forwards_and_soft_backwards() -> None:
    logit = torch.tensor([[-1.0, 0.5]], requires_grad=True)
    gate = straight_through(temperature=2.0)(0, logit)
    assert gate.tolist() == [[0.0, 1.0]]
    gate.sum().backward()
    sigmoid = torch.sigmoid(logit.detach() / 2)
    torch.testing.assert_close(logit.grad, sigmoid * (1 - sigmoid) / 2)


def test_macs_agree_with_torchs_flop_counter(model: GatedVit) -> None:
    was_fused = model.vit.blocks[0].attn.fused_attn
    set_fused_attn(False)
    try:
        with FlopCounterMode(display=False) as counter:
            model(images(1), decide=keep_all)
    finally:
        set_fused_attn(was_fused)
    units = model.heads + model.mlp_groups
    gates = 2 * len(model.gated_blocks) * model.dim * units  # the only thing that we leave out
    assert counter.get_total_flops() - gates == 2 * count(model).dense


def test_macs_of_a_head_by_hand() -> None:
    # 3 tokens, width 4, head width 2: q, k, v and output 3*4*2 each, scores and sum 3*3*2 each
    assert head_macs(dim=4, head_dim=2, tokens=3, queries=3) == 4 * 24 + 2 * 18
    # one query: q and output 1*4*2, k and v 3*4*2, scores and sum 1*3*2
    assert head_macs(dim=4, head_dim=2, tokens=3, queries=1) == 2 * 8 + 2 * 24 + 2 * 6


def test_macs_of_a_group_are_those_of_an_mlp_with_its_neurons_alone() -> None:
    model = GatedVit(create_vit(VitSettings(dim=32, depth=3, heads=4), GREY, 10), (1, 2), GREY, mlp_groups=8)
    with FlopCounterMode(display=False) as counter:
        Mlp(32, 128 // 8)(torch.zeros(1, 50, 32))
    assert count(model).per_mlp_group == (counter.get_total_flops() // 2, counter.get_total_flops() // 2 // 50)


def test_compute_fraction_is_dense_less_the_closed_units(model: GatedVit) -> None:
    macs = count(model)
    gates, of_mlp = torch.ones(2, 2, 4), torch.ones(2, 2, model.mlp_groups)
    gates[1, 0, 1] = gates[1, 1, 3] = 0
    closed = macs.per_head[0] + macs.per_head[1]
    if model.mlp_groups:
        of_mlp[1, 1, :3] = 0
        closed += 3 * macs.per_mlp_group[1]
    assert macs.fraction(gates, of_mlp).tolist() == pytest.approx([1.0, 1 - closed / macs.dense])


def test_unit_usage_by_hand() -> None:
    macs = Macs(1000, (10, 4), (20, 3), mlp_groups=2)
    # open: two heads and a group of the first block, a head and a group of the second; all units cost 88
    gate = torch.tensor([[[1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0]]])
    assert macs.usage(gate).tolist() == pytest.approx([(10 + 10 + 20 + 4 + 3) / 88])
    assert macs.weights(3)[1].tolist() == pytest.approx([4 / 88, 4 / 88, 4 / 88, 3 / 88, 3 / 88])
    assert macs.fraction(gate[:, :, :3], gate[:, :, 3:]).tolist() == pytest.approx([1 - (88 - 47) / 1000])
    assert macs.to_json() == {"dense": 1000, "per_head": (10, 4), "per_mlp_group": (20, 3), "mlp_groups": 2}


@given(images=st.integers(1, 40), seed=st.integers(0, 1000))
def test_unit_usage_of_heads_alone_is_head_usage_exactly(images: int, seed: int) -> None:
    """Its gradient too, and its value by image, which bisections compare."""
    gate = torch.rand(images, 2, 3, generator=torch.Generator().manual_seed(seed))
    one, other = gate.clone().requires_grad_(), gate.clone().requires_grad_()
    usage, mean = Macs(1000, (10, 4)).usage(one), other.mean((1, 2))
    assert torch.equal(usage, mean)
    for value in (usage, mean):
        (value * gate[:, 0, 0]).mean().backward()
    assert one.grad is not None
    assert torch.equal(one.grad, other.grad)
    assert Macs(1000, (10, 4)).weights(3).tolist() == [[1 / 6] * 3] * 2
    decided = gate > 0.5
    assert Outcome(gate, decided, gate, 3).usage(Macs(1000, (10, 4))) == decided.double().mean().item()


def test_a_group_is_multiplied_after_its_activation() -> None:
    """At 0 and 1 the order would not matter, but training learns from gates in between."""
    module, x = Mlp(8, 16), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    closed, half, open_ = (mlp(module, x, torch.full((2, 4), gate)) for gate in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (closed + open_) / 2)
    torch.testing.assert_close(closed, module.fc2.bias.expand_as(closed))


def test_a_gate_bias_is_added_and_none_is_zero_exactly(model: GatedVit) -> None:
    batch, units = images(5), model.heads + model.mlp_groups
    logits, out = model(batch)
    zero, same = model(batch, gate_bias=torch.zeros(5, 2, units))
    assert torch.equal(logits, zero)
    assert torch.equal(out["gate_logit"], same["gate_logit"])
    bias = torch.zeros(5, 2, units)
    bias[2, 0], bias[3, :, 1] = 100.0, -100.0
    _, moved = model(batch, gate_bias=bias)
    assert moved["head_gate"][2, 0].all()
    assert moved["mlp_gate"][2, 0].all()
    assert not moved["head_gate"][3, :, 1].any()
    assert torch.equal(moved["gate_logit"][2, 0], out["gate_logit"][2, 0] + 100)


@pytest.mark.parametrize(
    ("make", "groups", "message"),
    [
        ({}, 3, "vit.mlp_groups is 3; allowed: a divisor of the 128 hidden neurons of block 1, or 0"),
        ({"mlp_layer": SwiGLU}, 4, "the MLP of block 1 is a SwiGLU; allowed with vit.mlp_groups above 0: timm's Mlp"),
    ],
)
def test_mlps_without_such_groups_are_refused(make: dict[str, type], groups: int, message: str) -> None:
    vit = VisionTransformer(img_size=28, patch_size=7, in_chans=1, embed_dim=32, depth=2, num_heads=4, **make)
    with pytest.raises(UnsupportedModel, match=message):
        GatedVit(vit, (1,), GREY, groups)
    assert GatedVit(vit, (1,), GREY).mlp_groups == 0


@pytest.mark.parametrize(
    ("text", "blocks"), [("all", (1, 2, 3, 4, 5)), ("last", (5,)), ("2,4-5", (2, 4, 5)), ("1", (1,))]
)
def test_gated_blocks(text: str, blocks: tuple[int, ...]) -> None:
    assert parse_gated_blocks(text, 6) == blocks


@pytest.mark.parametrize("text", ["0", "0-3", "6", "x", "", "3-1", "-1"])
def test_gated_blocks_that_are_not_allowed(text: str) -> None:
    with pytest.raises(UnsupportedModel, match="allowed: 'all', 'last', or numbers and ranges from 1 to 5"):
        parse_gated_blocks(text, 6)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}


def test_a_timm_model_by_name_is_gated() -> None:
    spec = ImageSpec(32, 32, 3, 32, "bicubic", (0.5,) * 3, (0.5,) * 3)
    vit = create_vit(VitSettings(model="vit_tiny_patch16_224"), spec, 4)
    logits, out = GatedVit(vit, (1, 11), spec)(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert logits.shape == (2, 4)
    assert out["gate_logit"].shape == (2, 2, 3)
    assert out["residual"].shape == (2, 2, 192)


TIMM = {
    "distillation token": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_wee_patch16_reg1_gap_256", {"global_pool": "token", "class_token": True}),
    "layer scale": ("deit3_small_patch16_224", {"depth": 3}),
    "qk-norm": ("vit_tiny_patch16_224", {"depth": 3, "qk_norm": True}),
    "class token without position": ("vit_tiny_patch16_224", {"depth": 3, "no_embed_class": True}),
    "norm before the blocks": ("vit_tiny_patch16_224", {"depth": 3, "pre_norm": True}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_timms_variants_are_gated_and_counted(kind: str) -> None:
    """With every head on, the gated model gives timm's own answers, and the counter agrees with torch's."""
    name, options = TIMM[kind]
    torch.manual_seed(0)
    vit = create_model(name, num_classes=5, img_size=64, **options).eval().requires_grad_(False)
    for block in vit.blocks:
        block.attn.fused_attn = False
    spec = ImageSpec(64, 64, 3, 64, "bicubic", (0.5,) * 3, (0.25,) * 3)
    last = len(vit.blocks) - 1
    model = GatedVit(vit, (1, last), spec).eval().requires_grad_(False)
    batch = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    logits, out = model(batch, decide=keep_all)
    torch.testing.assert_close(logits, vit((batch.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25), rtol=1e-3, atol=1e-4)
    assert out["gate_logit"].shape == (2, 2, model.heads)
    with FlopCounterMode(display=False) as counter:
        model(batch[:1], decide=keep_all)
    assert counter.get_total_flops() - 2 * 2 * model.dim * model.heads == 2 * count(model).dense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionTransformer(**SMALL, global_pool="avg"), "pooling 'avg'"),
        (lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"), "the class token"),
        (lambda: VisionTransformer(**SMALL, qk_norm=True, scale_attn_norm=True), "scale_attn_norm in block 0"),
        (lambda: create_model("resnet18"), "type ResNet"),
    ],
)
def test_models_that_cannot_be_gated_are_refused(make: object, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        check_supported(make())  # type: ignore[operator]
