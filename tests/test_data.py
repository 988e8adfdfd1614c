"""Data: the same pixels from every source and store, batches that depend only on seed and step, errors with names."""

import gzip
import hashlib
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from photos import IN_PNG, OTHERS, TURNED, encoded, with_exif
from PIL import Image
from small_models import KINDS, model_of
from torchvision.datasets import CIFAR100

from training.config import DataSettings
from training.data import sources
from training.data import splits as of_training
from training.data.pixels import LazyPixels, MappedPixels, Pixels, Split
from training.data.splits import DEBIAN_FASHION_MNIST, Data, DataError, augment, load
from training.data.streams import Batch, seeded, training_batches
from training.image_spec import ImageSpec
from training.model.macs import count as count_macs
from training.presets import PRESETS
from training.profiles.statistics import measure
from training.sae.activations import residuals

Settings = Callable[..., DataSettings]


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (23, 17)) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 JPEG, PNG and BMP files of several modes in three labels; one is turned by EXIF, one lies deeper."""
    root = tmp_path / "images"
    for index in range(24):
        label = root / "abc"[index % 3]
        (label / "deep").mkdir(parents=True, exist_ok=True)
        if index == 5:
            turned = Image.Exif()
            turned[0x0112] = 6
            picture(index).save(label / f"{index:02}.jpg", exif=turned)
        elif index % 4 == 0:
            picture(index, "L").save(label / "deep" / f"{index:02}.jpg")
        elif index % 4 == 1:
            picture(index, "RGBA").save(label / f"{index:02}.png")
        else:
            picture(index, "P").save(label / f"{index:02}.bmp")
    return root


@pytest.fixture
def of_folder(folder: Path, tmp_path: Path) -> Settings:
    defaults = {
        "dataset": "folder", "root": folder, "image_size": 16, "channels": 3, "cache": tmp_path / "cache",
        "selection_fraction": 0.25,
    }  # fmt: skip
    return lambda **changes: DataSettings(**{**defaults, **changes})


def everything(split: Split) -> torch.Tensor:
    return split.images[:]


def assert_same(one: Data, two: Data) -> None:
    assert (one.labels, one.spec) == (two.labels, two.spec)
    for name in ("train", "selection", "test"):
        a, b = getattr(one, name), getattr(two, name)
        assert torch.equal(a.classes, b.classes), name
        assert torch.equal(everything(a), everything(b)), name


def same(one: Batch, two: Batch) -> bool:
    return torch.equal(one.images, two.images) and torch.equal(one.target, two.target)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_same_in_memory_lazy_and_mapped(channels: int, of_folder: Settings) -> None:
    in_memory = load(of_folder(channels=channels), 0)
    lazy = load(of_folder(channels=channels, memory="lazy"), 0)
    mapped = load(of_folder(channels=channels, memory="map"), 0)
    by_limit = load(of_folder(channels=channels, memory_limit=100), 0)
    assert isinstance(in_memory.train.images, torch.Tensor)
    assert isinstance(mapped.train.images, MappedPixels)
    for other in (lazy, mapped, by_limit):
        assert isinstance(other.train.images, Pixels)
        assert_same(in_memory, other)
        index = torch.tensor([3, 0, 3])
        images = in_memory.train.images
        assert torch.equal(other.train.take(index).images[1:], images[index][1:])
        assert torch.equal(other.train.images[torch.arange(len(images)) % 2 == 1], images[1::2])
        assert torch.equal(other.train.images[-1], images[-1])
        assert other.train.images.shape == tuple(images.shape)
        assert torch.equal(pickle.loads(pickle.dumps(other.train)).images[:2], images[:2])
        assert other.train.images[:0].shape == (0, 16, 16, channels)


@pytest.mark.parametrize("memory", ["lazy", "map"])
def test_the_statistics_of_latents_do_not_depend_on_where_the_pixels_are(memory: str, of_folder: Settings) -> None:
    steered = model_of(KINDS["plain"]())
    one, two = (
        measure(steered.model, steered.sae, count_macs(steered.model), residuals(steered.model, split, "test"), split)
        for split in (load(of_folder(), 0).train, load(of_folder(memory=memory), 0).train)
    )
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(two, name)), name


def test_a_mapped_file_is_complete_or_absent(folder: Path, of_folder: Settings) -> None:
    settings = of_folder(memory="map")
    broken = folder / "b" / "01.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"b/01\.png is not a readable image"):
        load(settings, 0)
    assert settings.cache is not None
    assert not [path for path in settings.cache.iterdir() if path.suffix != ".lock"]
    broken.write_bytes(whole)
    first = load(settings, 0)
    made = [path for path in settings.cache.iterdir() if path.is_dir()]
    pixels = made[0] / "pixels.u8"
    written = pixels.stat().st_mtime_ns
    assert_same(first, load(settings, 0))
    assert [pixels.stat().st_mtime_ns] == [written], "made twice"
    load(of_folder(memory="map", image_size=12), 0)
    assert len([path for path in settings.cache.iterdir() if path.is_dir()]) == 2, "other settings, another file"
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(DataError, match="was cut short: remove it"):
        load(settings, 0)


def test_what_was_found_is_the_same_wherever_it_lies_until_an_image_or_label_is_another(
    folder: Path, of_folder: Settings, tmp_path: Path
) -> None:
    found = load(of_folder(), 0).digests
    assert list(found) == ["training images"]
    assert found["training images"].startswith("24 with the digest ")
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # with other modification times
    for changes in ({"memory": "lazy"}, {"memory": "map"}, {"root": tmp_path / "copy"}, {"image_size": 12}):
        assert load(of_folder(**changes), 1).digests == found, changes
    added = folder / "a" / "new.png"
    picture(1).save(added)
    assert load(of_folder(), 0).digests["training images"].startswith("25 with the digest ")
    added.unlink()
    (folder / "a" / "03.bmp").rename(folder / "b" / "03.bmp")
    assert load(of_folder(), 0).digests != found
    shards = write_shards(tmp_path / "shards")
    of_both = load(of_shards(shards), 0).digests
    assert list(of_both) == ["training images", "test images"]
    (shards / "validation-0.tar").write_bytes((shards / "validation-0.tar").read_bytes() + bytes(1024))
    again = load(of_shards(shards), 0).digests
    assert (again["training images"] == of_both["training images"], again == of_both) == (True, False)


def write_shards(root: Path, count: int = 20, said: int | None = None, broken: int | None = None) -> Path:
    """Two shards a split, with timm's _info.json."""
    root.mkdir()
    info: dict[str, Any] = {"splits": {}}
    for split, first in (("train", 0), ("validation", 100)):
        names = [f"{split}-{shard}.tar" for shard in range(2)]
        for shard, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for index in range(first + shard, first + count, 2):
                    content = encoded(picture(index), "PNG")
                    files = {"png": content[:50] if index == broken else content, "cls": str(index % 2).encode()}
                    for suffix, part in files.items():
                        entry = tarfile.TarInfo(f"{index:04}.{suffix}")
                        entry.size = len(part)
                        tar.addfile(entry, io.BytesIO(part))
        lengths = [len(range(shard, count, 2)) for shard in range(2)]
        info["splits"][split] = {
            "name": split, "num_samples": said or count, "filenames": names, "shard_lengths": lengths,
        }  # fmt: skip
    (root / "_info.json").write_text(json.dumps(info))
    return root


def of_shards(root: Path, **changes: Any) -> DataSettings:
    defaults = {"dataset": "wds/own", "root": root, "cache": root.parent / "cache", "image_size": 16, "channels": 3}
    return DataSettings(**{**defaults, **changes})


def test_webdataset_shards_are_read_once_and_in_full(tmp_path: Path) -> None:
    settings = of_shards(write_shards(tmp_path / "shards"), memory="map")
    data = load(settings, 0)
    assert isinstance(data.train.images, MappedPixels)
    assert data.labels == ("0", "1")
    assert (len(data.train), len(data.selection), len(data.test)) == (18, 2, 20)
    assert settings.root is not None
    expected = of_training.eval_transform(data.spec)
    order = [*range(100, 120, 2), *range(101, 120, 2)]  # shard by shard
    assert np.array_equal(everything(data.test).numpy(), np.stack([expected(picture(index)) for index in order]))
    assert data.test.classes.tolist() == [index % 2 for index in order]
    with_names = tmp_path / "labels.txt"
    with_names.write_text("even\nodd\n")
    named = load(of_shards(settings.root, train_split="train-{0..1}.tar", labels=with_names), 0)
    assert named.labels == ("even", "odd")
    assert isinstance(named.train.images, torch.Tensor)
    assert torch.equal(named.train.images, everything(data.train))


@pytest.mark.parametrize(
    ("shards", "changes", "message"),
    [
        ({"broken": 6}, {}, r"train-0\.tar: 0006 is not a readable image"),
        ({"said": 21}, {}, r"wds/own, train: 20 images were read where the set says 21"),
        ({}, {"label_key": "kind"}, r"train-0\.tar: 0000 has no class number: 'kind' in its \.json"),
        ({}, {"image_key": "tiff"}, r"train-0\.tar: 0000 has no image; allowed: tiff"),
        ({}, {"memory": "lazy"}, r"data\.memory is 'lazy'; allowed for 'wds/own': auto, map, memory"),
        (
            {},
            {"train_split": "training"},
            r"'wds/own', data\.root .*, training: split training not found",
        ),
        ({}, {"train_split": "train-7.tar"}, r"train-7\.tar is not a readable shard"),
    ],
)
def test_shards_that_cannot_be_used_are_named(
    shards: dict[str, int], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = of_shards(write_shards(tmp_path / "shards", **shards), **changes)
    with pytest.raises(DataError, match=message):
        load(settings, 0)


def test_hugging_face_data_sets_are_read_from_a_local_folder(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    saved = tmp_path / "saved"
    saved.mkdir()
    for split, first in (("train", 0), ("test", 50)):
        rows = [{"img": {"bytes": encoded(picture(i), "PNG")}, "kind": i % 2} for i in range(first, first + 12)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(saved / f"{split}-00000-of-00001.parquet")
    common: dict[str, Any] = {
        "root": tmp_path / "hf", "test_split": "test", "image_key": "img", "label_key": "kind", "image_size": 16,
        "channels": 3, "cache": tmp_path / "cache", "selection_fraction": 0.25,
    }  # fmt: skip
    data = load(DataSettings(dataset=f"hfds/{saved}", **common), 0)
    assert data.labels == ("cat", "dog")
    transform = of_training.eval_transform(data.spec)
    assert np.array_equal(everything(data.test).numpy(), np.stack([transform(picture(i)) for i in range(50, 62)]))
    assert_same(data, load(DataSettings(dataset=f"hfds/{saved}", memory="lazy", **common), 0))
    assert_same(data, load(DataSettings(dataset=f"hfds/{saved}", memory="map", **common), 0))
    assert_same(data, load(DataSettings(dataset=f"hfids/{saved}", download=True, **common), 0))


def test_cifar100_is_read_lazily_if_its_resized_pixels_exceed_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch/cifar100's format on disk, with the checksums of these files in place of the real ones."""
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    names = [f"label {index:02}" for index in range(100)]
    images = {}
    files: dict[str, dict[str, Any]] = {"meta": {"fine_label_names": names}}
    for part, count in (("train", 400), ("test", 100)):
        images[part] = np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        files[part] = {"data": images[part].reshape(count, -1), "fine_labels": [i % 100 for i in range(count)]}
    for part, content in files.items():
        (base / part).write_bytes(pickle.dumps(content))
        checksum = hashlib.md5((base / part).read_bytes()).hexdigest()
        if part == "meta":
            monkeypatch.setitem(CIFAR100.meta, "md5", checksum)
        else:
            monkeypatch.setattr(CIFAR100, f"{part}_list", [[part, checksum]])
    settings = {"dataset": "torch/cifar100", "root": tmp_path, "channels": 3, "selection_fraction": 0.25}
    native = load(DataSettings(**settings, image_size=32), 0)
    resized = load(DataSettings(**settings, image_size=64, memory_limit=2**20), 0)
    assert native.labels == tuple(names)
    assert isinstance(native.train.images, torch.Tensor)
    assert np.array_equal(everything(native.test).numpy(), images["test"].transpose(0, 2, 3, 1))
    assert isinstance(resized.train.images, Pixels)
    larger = Image.fromarray(images["test"][7].transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(resized.test.images[7].numpy(), np.asarray(larger))
    assert resized.train.picture(0).size == (32, 32), "augmentation starts from the stored pixels"
    other = tmp_path / "other"
    shutil.copytree(base, other / base.name)
    for root in (tmp_path, other, other):
        mapped = DataSettings(**{**settings, "root": root}, image_size=32, memory="map", cache=tmp_path / "cache")
        assert_same(load(mapped, 0), native)
    made = [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(made) == 4, "a file for each split of each root, made once"


def test_a_data_set_of_timm_is_read_as_our_own(tmp_path: Path) -> None:
    """torch/fashion_mnist needs the files unpacked."""
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


def test_labels_of_imagenet_are_told_apart(tmp_path: Path) -> None:
    """In torch/imagenet's format on disk: names of a class are synonyms, and two classes may share the first one."""
    names = {"n1": ("crane",), "n2": ("maillot",), "n3": ("crane",), "n4": ("ox", "cattle")}
    torch.save((names, []), tmp_path / "meta.bin")
    for split in ("train", "val"):
        for index, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            for copy in range(3):
                picture(5 * index + copy).save(tmp_path / split / name / f"{copy}.png")
    found = load(DataSettings(dataset="torch/imagenet", root=tmp_path, channels=3, image_size=16), 0)
    assert found.labels == ("crane (0)", "maillot", "crane (2)", "ox")
    assert found.digests["test images"].startswith("12 with the digest ")


def test_mean_and_deviation_are_those_of_the_training_pixels() -> None:
    found = load(DataSettings(max_train=2500), 0)
    pixels = found.train.images[:].double() / 255
    assert found.spec.mean == (round(pixels.mean().item(), 4),)
    assert found.spec.std == (round(pixels.std().item(), 4),)


IDX = b"\0\0\x08"
PAIR = IDX + b"\3" + bytes([0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28])
"""The header of two images."""
TWO = bytes(2 * 784)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (gzip.compress(PAIR + TWO)[:-9], b"", r"images-idx3-ubyte\.gz is not a whole IDX .*: Compressed file ended"),
        (gzip.compress(PAIR + bytes(784)), b"", r"images-idx3-ubyte\.gz is not a whole IDX .* cannot reshape"),
        (gzip.compress(b"other"), b"", r"images-idx3-ubyte\.gz is not a whole IDX .*: it begins with b'oth'"),
        (b"", b"", r"images-idx3-ubyte\.gz is not a whole IDX file"),
        (gzip.compress(PAIR + TWO), IDX, r"labels-idx1-ubyte is not a whole IDX file of uint8: index out of range"),
        (gzip.compress(PAIR + TWO), IDX + b"\1\0\0\0\3abc", r"has 2 images and 3 labels of train; allowed: as many"),
    ],
    ids=["cut short", "a body too short", "no IDX file", "empty", "a header too short", "more labels than images"],
)
def test_unusable_files_of_fashion_mnist_are_named(images: bytes, labels: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(DataError, match=message):
        load(DataSettings(root=tmp_path), 0)


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
    assert torch.equal(of_training.subset(one.test, 1000, 7).images, one.test.images), "all, as there are no more"


def test_a_resumed_epoch_sees_the_batches_that_it_would_have_seen() -> None:
    settings = DataSettings(max_train=300)
    data = load(settings, 0)
    whole = {step: batch.target.tolist() for step, batch in training_batches(data, settings, 50, 3, seed=5)}
    assert len(whole) == 15
    rest = {step: batch.target.tolist() for step, batch in training_batches(data, settings, 50, 3, seed=5, start=8)}
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


TIMM = {
    "augmentation": "timm", "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixup": 1.0},
        {"augmentation": "timm", "train_interpolation": "random"},
        TIMM,
        {**TIMM, "channels": 1, "memory": "lazy"},
        {**TIMM, "auto_augment": "augmix-m5-w4-d2", "memory": "map"},
        {**TIMM, "auto_augment": "3a"},
    ],
)
def test_batches_do_not_depend_on_processes_workers_or_interruptions(
    changes: dict[str, Any], of_folder: Settings
) -> None:
    settings = of_folder(**changes)
    data = load(settings, 0)
    torch.manual_seed(1)
    random_state = torch.get_rng_state()

    def run(start: int = 0, rank: int = 0, processes: int = 1, workers: int = 0) -> dict[int, Batch]:
        options = settings.model_copy(update={"workers": workers})
        return dict(training_batches(data, options, 8, 3, 5, start, 0.1, rank, processes))

    whole = run()
    assert torch.equal(torch.get_rng_state(), random_state), "the training's own draws are disturbed"
    assert list(whole) == list(range(3))
    assert whole[0].images.shape == (8, 16, 16, settings.channels)
    assert whole[0].images.dtype == torch.uint8
    assert not torch.equal(whole[0].images, whole[1].images)
    shares = [run(rank=rank, processes=2, workers=rank) for rank in range(2)]
    for step, batch in whole.items():
        for rank, share in enumerate(shares):
            assert same(share[step], Batch(batch.images[rank::2], batch.target[rank::2])), (step, rank)
    rest = run(start=1)
    assert list(rest) == [1, 2]
    assert all(same(rest[step], whole[step]) for step in rest)


def in_memory(images: torch.Tensor, classes: torch.Tensor, labels: int = 2) -> Data:
    _, h, w, c = images.shape
    split = Split(images, classes)
    spec = ImageSpec(h, w, c, max(h, w), "bicubic", (0.5,) * c, (0.5,) * c)
    return Data(tuple(map(str, range(labels))), spec, split, split, split)


def test_mixed_images_and_targets_by_hand() -> None:
    """Eight one-coloured images, one class each: the colours say how they were mixed, and the targets say the same."""
    images = (torch.arange(8) * 30).byte()[:, None, None, None].expand(8, 10, 10, 1).clone()
    data = in_memory(images, torch.arange(8), 8)
    settings = DataSettings(flip=False, shift=0, mixup=1.0, mixup_prob=1.0)
    for _, batch in training_batches(data, settings, 8, 5, 0):
        colours = batch.target @ (torch.arange(8) * 30.0)
        assert torch.allclose(batch.images[:, 5, 5, 0].float(), colours, atol=0.51)
        assert ((batch.target > 0).sum(1) == 2).all()
    cut = settings.model_copy(update={"mixup": 0.0, "cutmix": 1.0})
    for _, batch in training_batches(data, cut, 8, 5, 0):
        means = batch.images.float().mean((1, 2, 3))
        assert torch.allclose(means, batch.target @ (torch.arange(8) * 30.0), atol=0.01)
        assert all(len(image.unique()) <= 2 for image in batch.images)
    never = settings.model_copy(update={"mixup_prob": 0.0})
    batch = dict(training_batches(data, never, 8, 1, 0, label_smoothing=0.4))[0]
    assert torch.allclose(batch.target.max(1).values, torch.tensor(0.65))
    assert torch.allclose(batch.target.min(1).values, torch.tensor(0.05))
    assert torch.equal(images[batch.target.argmax(1)], batch.images)


@given(
    mixup=st.floats(0.1, 2), cutmix=st.just(0.0) | st.floats(0.01, 2), smoothing=st.floats(0, 0.5),
    seed=st.integers(-(2**40), 2**40), half=st.integers(1, 6),
)  # fmt: skip
@examples(max_examples=30, deadline=None)
def test_mixed_targets_sum_to_one(mixup: float, cutmix: float, smoothing: float, seed: int, half: int) -> None:
    data = in_memory(torch.randint(0, 256, (13, 4, 6, 3), dtype=torch.uint8), torch.arange(13) % 3, 3)
    settings = DataSettings(mixup=mixup, cutmix=cutmix)
    for _, batch in training_batches(data, settings, 2 * half, 1, seed, label_smoothing=smoothing):
        assert batch.target.shape == (2 * half, 3)
        assert batch.target.dtype == torch.float32
        assert torch.allclose(batch.target.sum(1), torch.ones(2 * half), atol=1e-5)
        assert batch.target.min() >= smoothing / 3 - 1e-6


def test_erasing_replaces_a_rectangle_and_leaves_the_rest() -> None:
    data = in_memory(torch.full((4, 20, 20, 3), 77, dtype=torch.uint8), torch.arange(4) % 2)
    settings = DataSettings(augmentation="timm", scale=(1, 1), ratio=(1, 1), color_jitter=0, re_prob=1.0)
    for _, batch in training_batches(data, settings, 4, 3, 0):
        for image in batch.images:
            changed = (image != 77).any(-1)
            rows, columns = (torch.nonzero(changed.any(axis)).flatten() for axis in (1, 0))
            box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            assert 0.01 * 400 < box < 0.4 * 400
            assert changed.sum() > 0.9 * box
            assert image.unique().numel() > 3


def test_draws_inside_seeded_leave_the_ones_outside_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(2)
    with seeded(1, 2):
        inside = torch.rand(1), np.random.rand()
    with seeded(1, 2):
        again = torch.rand(1), np.random.rand()
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    assert inside == again


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augmentation", ["shift", "timm"])
def test_a_file_that_breaks_later_is_named_in_training(
    augmentation: str, workers: int, folder: Path, of_folder: Settings
) -> None:
    settings = of_folder(memory="lazy", augmentation=augmentation, workers=workers, mean=(0.5,) * 3, std=(0.5,) * 3)
    data = load(settings, 0)
    images = data.train.images
    assert isinstance(images, LazyPixels)
    broken = Path(images.source.name(int(images.rows[2])))
    broken.write_bytes(encoded(picture(1, size=(300, 200)), "PNG")[:2000])
    with pytest.raises(DataError, match=rf"^{broken} is not a readable image: [^\n]+$"):
        list(training_batches(data, settings, len(data.train), 1, 0))


@pytest.mark.parametrize("memory", ["memory", "lazy", "map"])
def test_all_unreadable_files_are_named_at_once_or_left_out(
    memory: str, folder: Path, of_folder: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = load(of_folder(memory="memory"), 0)
    sound = encoded(picture(1, size=(300, 200)), "PNG")
    broken = {
        "a/cut.png": sound[:2000],
        "b/empty.jpg": b"",
        "c/page.jpg": OTHERS["HTML"],
        "c/phone.jpg": OTHERS["HEIC"],
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(of_folder(memory=memory), 0)
    said = str(caught.value)
    assert said.startswith("4 images are not readable (--data.skip-unreadable leaves out such images):\n  ")
    for line in (
        "a/cut.png is not a readable image: image file is truncated",
        "b/empty.jpg is not a readable image: the file is empty; allowed: JPEG, PNG, WEBP, BMP, GIF",
        "c/page.jpg is not a readable image: the file is HTML; allowed: JPEG",
        "c/phone.jpg is not a readable image: the file is HEIC; allowed: JPEG",
    ):
        assert f"  {folder / line}" in said
    capsys.readouterr()
    assert_same(load(of_folder(memory=memory, skip_unreadable=True), 0), whole)
    out = capsys.readouterr().out
    assert "data: train: 4 images are not readable and left out:\n" in out
    assert all(f"  {folder / name} is not a readable image: " in out for name in broken)


@pytest.mark.parametrize("memory", ["memory", "lazy", "map"])
def test_a_photo_with_broken_metadata_trains_as_without_it(memory: str, folder: Path, of_folder: Settings) -> None:
    image = picture(7)
    (folder / "b" / "odd.png").write_bytes(with_exif(image.rotate(90, expand=True), "PNG", TURNED["width as ASCII"]))
    (folder / "c" / "odd.png").write_bytes(IN_PNG["compressed text over the limit"](encoded(image, "PNG")))
    found = load(of_folder(memory=memory), 0)
    for name in "bc":
        image.save(folder / name / "odd.png")
    assert_same(found, load(of_folder(copies="keep"), 0))


def test_unreadable_images_of_shards_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path / "shards", broken=6)
    data = load(of_shards(shards, skip_unreadable=True), 0)
    assert len(data.train) + len(data.selection) == 19
    assert "train-0.tar: 0006 is not a readable image" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"1 image is not readable .*:\n .*train-0\.tar: 0006"):
        load(of_shards(shards), 0)


def test_unusable_folders_are_named(folder: Path, of_folder: Settings, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(DataError, match=message):
            load(of_folder(**changes), 0)

    for memory in ("memory", "lazy", "map"):
        nonsense = folder / "a" / "nonsense.jpg"
        nonsense.write_bytes(b"nonsense")
        refused(
            r"a/nonsense\.jpg is not a readable image: the file is of an unknown kind; allowed: JPEG, PNG",
            memory=memory,
        )
        nonsense.unlink()
        deep = folder / "a" / "deep.png"
        Image.new("I;16", (20, 20), 40_000).save(deep)
        refused(r"a/deep\.png is not a readable image: the pixel format is I;16; allowed: 8 bits", memory=memory)
        deep.unlink()
    refused(r"label 'a' has too few images: none is left for the train split", test_fraction=0.89, max_train=10)
    refused(r"data\.mean, data\.std: mean has 1 values; allowed: one per channel \(3\)", mean=(0.5,))
    refused(r"data\.root is nowhere; allowed: a folder of images", root=Path("nowhere"))
    (folder / "empty").mkdir()
    refused(r"images/empty has 0 images; allowed: at least 3 a label")
    one = tmp_path / "one" / "only"
    one.mkdir(parents=True)
    picture(0).save(one / "0.png")
    refused(r"one has 1 sub-folders; allowed: one a label, at least 2", root=one.parent)
    for start, (part, label) in enumerate((part, label) for part in ("train", "val") for label in ("a", "b")):
        (tmp_path / "split" / part / label).mkdir(parents=True)
        for index in range(2):
            picture(2 * start + index).save(tmp_path / "split" / part / label / f"{index}.png")
    found = load(of_folder(root=tmp_path / "split"), 0)
    assert (len(found.train), len(found.selection), len(found.test)) == (2, 2, 4)
    for path in (tmp_path / "split" / "val" / "b").iterdir():
        path.unlink()
    refused(r"split/val/b has 0 images; allowed: at least 1 a label", root=tmp_path / "split")


def test_a_label_in_two_unicode_forms_is_one_label_or_refused(
    folder: Path, of_folder: Settings, tmp_path: Path
) -> None:
    composed, decomposed = "caf\xe9", "cafe\u0301"
    for part, name in (("train", composed), ("test", decomposed)):
        shutil.copytree(folder, tmp_path / "split" / part)
        (tmp_path / "split" / part / "c").rename(tmp_path / "split" / part / name)
    found = load(of_folder(root=tmp_path / "split", copies="keep"), 0)
    assert found.labels == ("a", "b", composed)
    assert (found.test.classes == 2).sum() == 8
    (folder / "c").rename(folder / decomposed)
    assert load(of_folder(), 0).labels == ("a", "b", composed)
    shutil.copytree(folder / "a", folder / composed)
    with pytest.raises(DataError, match=r"images has 'cafe\\u0301' and 'caf\\xe9', which are one label; allowed: one"):
        load(of_folder(), 0)
    (tmp_path / "labels.txt").write_text(f"{composed}\n{decomposed}\n")
    with pytest.raises(DataError, match="'wds/own' has the label 'caf\xe9' more than once; allowed: once"):
        load(of_shards(write_shards(tmp_path / "shards"), labels=tmp_path / "labels.txt"), 0)


def test_unusable_classes_are_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    for lines, message in (
        ("even\n", r"'wds/own' has 1 label \(even\); allowed: at least 2"),
        ("even\nodd\todd\n", r"a label of 'wds/own': name is 'odd\\todd'; allowed: no control characters"),
        ("even\nodd\neven\n", r"'wds/own' has the label 'even' more than once; allowed: once"),
        ("even\nodd\nnone\n", r"'wds/own' has no training image of 'none'; allowed: images of every label"),
    ):
        (tmp_path / "labels.txt").write_text(lines)
        with pytest.raises(DataError, match=message):
            load(of_shards(shards, labels=tmp_path / "labels.txt"), 0)
    with pytest.raises(DataError, match=r"'wds/own' has 1 label \(0\)"):
        load(of_shards(write_shards(tmp_path / "single", count=1)), 0)


def test_unusable_batches_are_named() -> None:
    data = in_memory(torch.zeros(12, 8, 8, 3, dtype=torch.uint8), torch.arange(12) % 2)
    mixed = DataSettings(mixup=1.0)
    with pytest.raises(DataError, match="a batch has 10 images; allowed for 4 processes: a multiple of 4"):
        training_batches(data, DataSettings(), 10, 1, 0, processes=4)
    with pytest.raises(DataError, match="a batch has 12 images; allowed for 4 processes, which mix images in pairs"):
        training_batches(data, mixed, 100, 1, 0, processes=4)
    for policy in ("no-such-policy", "rand-x9"):
        with pytest.raises(DataError, match=f"data.auto_augment is '{policy}'; timm cannot read it"):
            training_batches(data, DataSettings(augmentation="timm", auto_augment=policy), 4, 1, 0)


@pytest.mark.parametrize("name", [*sources.SOURCES, *(f"{prefix}/any" for prefix in sources.PACKAGES)])
def test_the_name_of_every_data_set_is_allowed(name: str) -> None:
    assert DataSettings(dataset=name).dataset == name


def test_a_missing_package_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs the package 'webdataset': pip install 'steervit\[train\]'"):
        load(of_shards(tmp_path), 0)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_settings_that_batches_can_be_made_with(name: str) -> None:
    """Presets for real photographs: their augmentation runs on their image size."""
    settings = DataSettings(**PRESETS[name].get("data", {})).model_copy(update={"workers": 0})
    size, channels = settings.image_size, settings.channels
    data = in_memory(torch.randint(0, 256, (4, size, size, channels), dtype=torch.uint8), torch.arange(4) % 2)
    (_, batch), *_ = training_batches(data, settings, 4, 1, 0)
    assert batch.images.shape == (4, size, size, channels)
    assert (batch.target.ndim == 2) == (settings.mixup > 0)
