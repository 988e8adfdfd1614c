"""--vit.weights: a fitting classifier is kept, all usual file formats are read, and omissions are reported."""

import argparse
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models import create_model
from torch import Tensor

from training.config import VitSettings
from training.image_spec import ImageSpec
from training.model.backbone import create_vit
from training.model.gated_vit import UnsupportedModel

NAME, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
SPEC = ImageSpec(32, 32, 3, 32, "bicubic", (0.5,) * 3, (0.5,) * 3)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def trained() -> Tensors:
    torch.manual_seed(5)
    tensors = create_model(NAME, num_classes=4, img_size=32).state_dict()
    tensors["head.bias"] = torch.randn(4)
    return tensors


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: value for key, value in tensors.items()}


def start(path: Path, classes: int = 4, spec: ImageSpec = SPEC, model: str = NAME, **changes: Any) -> Tensors:
    return create_vit(VitSettings(model=model, weights=path, **changes), spec, classes).state_dict()


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda t: {"model": prefixed("module.", t), "optimizer": {"state": {}, "param_groups": []}},
        lambda t: {"state_dict": prefixed("model.", t), "hyper_parameters": {"lr": 0.1}},
        lambda t: prefixed("_orig_mod.module.", t),
        lambda t: {"state_dict": {k: v + 1 for k, v in t.items()}, "state_dict_ema": prefixed("module.", t)},
        lambda t: {"teacher": prefixed("backbone.", t)},
        lambda t: prefixed("vit.", t) | {"gates.0.linear.bias": torch.zeros(3)},
    ],
)
def test_a_model_is_found_wherever_it_lies_in_a_checkpoint(
    wrap: Callable[[Tensors], Any], trained: Tensors, tmp_path: Path
) -> None:
    torch.save(wrap(trained), tmp_path / "model.pth")
    assert_equal(start(tmp_path / "model.pth"), trained)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_safetensors_are_read_whatever_their_name_or_prefix(
    name: str, prefix: str, trained: Tensors, tmp_path: Path
) -> None:
    save_file(prefixed(prefix, trained), tmp_path / name)
    assert_equal(start(tmp_path / name), trained)


def test_a_classifier_of_another_size_is_left_out_and_named(
    trained: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(trained | {"mask": torch.zeros(1)}, path)
    found = start(path, classes=5)
    assert found["head.weight"].shape == (5, 192)
    rest = {key for key in trained if not key.startswith("head.")}
    assert_equal({key: found[key] for key in rest}, {key: trained[key] for key in rest})
    assert capsys.readouterr().out.splitlines() == [
        f"vit: weights of {path}: left out: head (4 classes, the data 5); mask (not part of {NAME})",
        f"vit: weights of {path}: head starts from random numbers",
    ]
    save_file({key: value for key, value in trained.items() if key in rest}, path)
    start(path, backbone_epochs=0)
    assert "vit.backbone_epochs is 0, so the random classifier is the teacher" in capsys.readouterr().out
    save_file(trained, path)
    start(path, backbone_epochs=0)
    kept = f"vit: weights of {path}: head of 4 classes is kept; its classes must be in the order of the labels\n"
    assert capsys.readouterr().out == kept


def test_each_classifier_of_a_distilled_model_is_kept_if_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = create_model(DISTILLED, num_classes=4, img_size=32).state_dict()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(start(tmp_path / "model.safetensors", model=DISTILLED), tensors)
    found = start(tmp_path / "model.safetensors", classes=7, model=DISTILLED)
    assert (len(found["head.weight"]), len(found["head_dist.weight"])) == (7, 7)
    assert "head and head_dist start from random numbers" in capsys.readouterr().out
    with pytest.raises(UnsupportedModel, match=r"pos_embed has the shape \[1, 6, 192\]; allowed: \[1, 5"):
        start(tmp_path / "model.safetensors")


def test_another_image_size_and_channels_are_adapted_as_timm_does(
    trained: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    grey = ImageSpec(48, 48, 1, 48, "bicubic", (0.5,), (0.5,))
    save_file(trained, path)
    found = start(path, spec=grey)
    of_timm = create_model(
        NAME, pretrained=True, num_classes=4, in_chans=1, img_size=48,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 4},
    )  # fmt: skip
    assert_equal(found, of_timm.state_dict())
    assert "pos_embed is adapted from [1, 5, 192] to [1, 10, 192]" in capsys.readouterr().out
    save_file(found, path)
    colour = start(path)["patch_embed.proj.weight"]
    torch.testing.assert_close(colour, found["patch_embed.proj.weight"].repeat(1, 3, 1, 1) / 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: {"state_dict": model.state_dict(), "path": Path("runs")},
        lambda model: {"model": model, "epoch": 3},
        lambda model: model,
    ],
)
def test_a_file_that_would_run_code_is_refused_with_a_command_that_converts_it(
    wrap: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model(NAME, num_classes=4, img_size=32)
    path = tmp_path / "my model.pth"
    torch.save(wrap(model), path)
    with pytest.raises(
        UnsupportedModel, match=r"my model\.pth, which holds more than tensors; allowed: a saf"
    ) as refused:
        start(path)
    command = str(refused.value).partition("(this runs what is in it): ")[2]
    _, flag, code, *arguments = shlex.split(command)
    if wrap(model) is model:
        subprocess.run(["sh", "-c", command], check=True)
    else:  # the same without importing torch again
        monkeypatch.setattr("sys.argv", [flag, *arguments])
        exec(code, {})
    assert_equal(start(Path(arguments[-1])), model.state_dict())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "m.safetensors",
            b"version https://git-lfs.github.com/spec/v1\n",
            r"a pointer of git-lfs \(git lfs pull brings",
        ),
        ("m.pth", b"<html>not found</html>", "a file of another kind; allowed: a safetensors file, or a PyTorch file"),
        ("m.pth", b"PK\x03\x04 cut short", "vit.weights is .*; allowed: a safetensors file"),
        ("m.safetensors", b"\xff\x00\x00\x00\x00\x00\x00\x00{cut short", "vit.weights is .*; allowed: a safetensors"),
        ("m.npz", b"PK\x03\x04", r"a NumPy file; .* To convert it: .*create_model.* vit_tiny_patch16_224 .*m\.npz"),
        ("m.h5", b"\x89HDF\r\n", "a file of another kind"),
        ("m.pth", b"", "a file of another kind"),
    ],
)
def test_files_that_are_no_weights_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedModel, match=message):
        start(tmp_path / name)


def test_weights_of_other_models_are_named(trained: Tensors, tmp_path: Path) -> None:
    def refused(content: Any, message: str) -> None:
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(UnsupportedModel, match=message):
            start(tmp_path / "model.pth")

    refused({"student": trained, "teacher": trained}, r"holds 2 models \('student', 'teacher'\); allowed: one")
    refused({"vit.encoder.layer.0.norm": torch.zeros(1)}, "has the names of Hugging Face's transformers; allowed: timm")
    refused({"layer1.0.conv1.weight": torch.zeros(1)}, r"lacks blocks\.0\.attn\.qkv\.weight and others; allowed: timm")
    refused([1, 2], r"lacks blocks\.0")
    wider = create_model("vit_small_patch16_224", num_classes=4, img_size=32).state_dict()
    refused(wider, r"where blocks\.0\.attn\.proj\.bias has the shape \[384\]; allowed: \[192\]")
    refused(
        create_model(NAME, depth=11).state_dict(), r"lacks blocks\.11\.attn\.proj\.bias and 11 others; allowed: tim"
    )
    with pytest.raises(UnsupportedModel, match=r"vit\.weights is .*nowhere.*; allowed: a safetensors file"):
        start(tmp_path / "nowhere")
