"""Training: data are split as said, an interrupted run ends as an uninterrupted one, and bad settings are named."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_module

from training import fit_vit
from training.checkpoint import Run, RunError
from training.config import DataSettings, Settings, VitSettings
from training.data import DEBIAN_FASHION_MNIST, DataError, augment, batches, load
from training.evaluate import Outcome, effect
from training.macs import Macs

TINY = VitSettings(
    dim=16, depth=2, heads=2, backbone_epochs=2, gate_epochs=1, joint_epochs=2, batch_size=50, learning_rate=5e-3
)


def tiny(out: Path) -> Settings:
    data = DataSettings(max_train=400, max_test=50)
    return Settings(step="vit", out=out, data=data, vit=TINY)  # type: ignore[call-arg]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [3, 9, 14])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in each of the three phases, right after a state was saved."""
    monkeypatch.setattr(fit_vit, "SAVE_EVERY", 0.0)
    settings = tiny(tmp_path)
    data = load(settings.data, settings.seed)
    whole = fit_vit.fit_vit(settings, data, Run(tmp_path / "whole"))

    class Breaking(Run):
        saved = 0

        def write_state(self, *arguments: Any) -> None:
            super().write_state(*arguments)
            self.saved += 1
            if self.saved == after * 2:
                raise Interrupted

    with pytest.raises(Interrupted):
        fit_vit.fit_vit(settings, data, Breaking(tmp_path / "broken"))
    with pytest.raises(RunError, match="run the step 'vit' first"):
        fit_vit.load_vit(Run(tmp_path / "broken"))
    resumed = fit_vit.fit_vit(settings, data, Run(tmp_path / "broken"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not (tmp_path / "broken" / "vit.state.safetensors").exists()


def test_splits_are_disjoint_balanced_and_the_same_each_time() -> None:
    settings = DataSettings(max_train=1000, max_test=200, selection_fraction=0.2)
    one, two = load(settings, 7), load(settings, 7)
    for name in ("train", "selection", "test"):
        assert torch.equal(getattr(one, name).images, getattr(two, name).images)
    assert (len(one.train), len(one.selection), len(one.test)) == (800, 200, 200)
    assert one.selection.classes.bincount().tolist() == [20] * 10
    train = {image.numpy().tobytes() for image in one.train.images}
    assert not train & {image.numpy().tobytes() for image in one.selection.images}
    assert not torch.equal(one.selection.images, load(settings, 8).selection.images)


def test_a_resumed_epoch_sees_the_batches_that_it_would_have_seen() -> None:
    split = load(DataSettings(max_train=300), 0).train
    whole = {step: batch.classes.tolist() for step, batch in batches(split, 50, 3, seed=5)}
    assert len(whole) == 15
    rest = {step: batch.classes.tolist() for step, batch in batches(split, 50, 3, seed=5, start=8)}
    assert rest == {step: whole[step] for step in range(8, 15)}


def test_augmentation_only_mirrors_and_shifts() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5, 1)
    assert torch.equal(augment(image, flip=False, shift=0), image)
    allowed = set()
    for mirrored in (image, image.flip(2)):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                rows, columns = ((np.arange(5) + d).clip(0, 4) for d in (dy, dx))
                allowed.add(mirrored.numpy()[0][rows][:, columns].tobytes())
    seen = {augment(image, flip=True, shift=1).numpy().tobytes() for _ in range(300)}
    assert seen == allowed


def test_effect_by_hand() -> None:
    classes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2])
    gates = torch.tensor([[[True, False]]] * 4 + [[[True, True]]] * 4)
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    found = effect(Outcome(logits, gates), classes, (0,), Macs(dense=100, per_head=(20,)))
    assert found.recall == 3 / 4
    assert found.precision == 3 / 4
    assert found.false_positive_rate == 1 / 4
    assert found.overall_accuracy == 6 / 8
    assert found.others_accuracy == 3 / 4
    assert found.f1 == pytest.approx(3 / 4)
    assert found.head_usage == 0.5
    assert found.compute_fraction == pytest.approx(0.8)


def test_a_data_set_of_timm_is_read_as_our_own(tmp_path: Path) -> None:
    """torch/fashion_mnist wants the files unpacked."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in DEBIAN_FASHION_MNIST.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    limits = {"max_train": 300, "max_test": 100}
    ours = load(DataSettings(**limits), 0)
    timms = load(DataSettings(dataset="torch/fashion_mnist", root=tmp_path, **limits), 0)
    for name in ("train", "selection", "test"):
        assert torch.equal(getattr(ours, name).images, getattr(timms, name).images)
        assert torch.equal(getattr(ours, name).classes, getattr(timms, name).classes)
    assert timms.labels[:2] == ("T-shirt/top", "Trouser")
    with pytest.raises(DataError, match=r"data\.dataset 'torch/cifar100', data\.root .*, train:"):
        load(DataSettings(dataset="torch/cifar100", root=tmp_path), 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vit", "--vit.dim", "-3"], "--vit.dim is '-3': Input should be greater than or equal to 8"),
        (["vit", "--vit.gated-blocks", "0"], "vit.gated_blocks is '0'; allowed: 'all', 'last', or numbers"),
        (["vit", "--vit.model", "no_such_model"], "vit.model is 'no_such_model'"),
        (["vit", "--data.dataset", "folder", "--data.root", "nowhere"], "data.root is nowhere; allowed: a folder of"),
        (["vit", "--data.image-size", "32"], "fashion-mnist is 28 x 28 and grey; allowed: image_size 28"),
        (["sae"], "vit.json is missing: run the step 'vit' first"),
        (["report"], "results.json is missing: run the step 'evaluate' first"),
    ],
)
def test_bad_settings_are_named(flags: list[str], message: str, tmp_path: Path) -> None:
    done = run_module("training", *flags, "--preset", "smoke", "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_image_in_a_folder_is_named(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(4):
            Image.new("RGB", (9, 9)).save(tmp_path / label / f"{index}.png")
    (tmp_path / "b" / "2.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"b/2.png is not a readable image"):
        load(DataSettings(dataset="folder", root=tmp_path), 0)
