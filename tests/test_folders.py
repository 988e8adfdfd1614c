"""Real folders: names of splits, skipped files and their report, links, copies, file names, labels files."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training import soundness
from training.config import DataSettings
from training.data.sources import _read_labels
from training.data.splits import Data, DataError, load


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)


def label_folders(root: Path, labels: Iterable[str] = "ab", each: int = 5, seed: int = 0) -> Path:
    for position, label in enumerate(labels):
        for index in range(each):
            write(root / label / f"{index}.png", seed + 100 * position + index)
    return root


def split_folders(root: Path, train: str = "train", test: str = "test") -> Path:
    label_folders(root / train)
    label_folders(root / test, each=2, seed=1000)
    return root


def read(root: Path, **changes: Any) -> Data:
    return load(DataSettings(dataset="folder", root=root, image_size=12, channels=3, **changes), 0)


def sizes(data: Data) -> tuple[int, int]:
    return len(data.train) + len(data.selection), len(data.test)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"), ("Train", "Test"), ("Training", "Testing"), ("TRAIN", "VAL"), ("train", "Valid"),
        ("training", "validation"),
    ],
)  # fmt: skip
def test_splits_are_known_by_their_usual_names(train: str, test: str, tmp_path: Path) -> None:
    data = read(split_folders(tmp_path, train, test))
    assert (data.labels, sizes(data)) == (("a", "b"), (10, 4))


def test_the_first_folder_of_test_images_is_read_and_the_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split_folders(tmp_path)
    label_folders(tmp_path / "Valid", each=3, seed=2000)
    (tmp_path / "annotations").mkdir()
    assert sizes(read(tmp_path)) == (10, 4)
    assert "beside the labels, skipped: 2 beside the splits (Valid, ...)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: split_folders(root, "train", "dev"), "train has folders of its own; allowed: in .* one sub-fold"),
        (lambda root: split_folders(root, "learn", "Valid"), "Valid has folders of its own; allowed: in"),
        (lambda root: label_folders(split_folders(root) / "Training"), "has 'Training' and 'train'; allowed: one of"),
        (
            lambda root: split_folders(root, "seg_train/seg_train", "seg_test/seg_test"),
            "'seg_test', 'seg_train', which",
        ),
        (lambda root: label_folders(root, ("train", "test")), "'test', 'train', which are splits, not labels"),
        (lambda root: split_folders(root / "archive"), r"has 1 sub-folders; .* 2 \(--data\.root .*/archive\?\)"),
    ],
)
def test_folders_that_could_be_splits_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_labels_that_share_their_sub_folders_are_warned_of(tmp_path: Path) -> None:
    data = read(split_folders(tmp_path, "learn", "prova"))
    assert "the labels learn, prova all have the sub-folders a, b: if those are the labels" in data.warnings[0]


def test_a_label_may_bear_the_name_of_a_split(tmp_path: Path) -> None:
    assert read(label_folders(tmp_path, ("bus", "train"))).labels == ("bus", "train")
    for index in range(3):
        write(tmp_path / "test" / f"{index}.png", 500 + index)
    assert read(tmp_path).labels == ("bus", "test", "train")


JUNK = (
    "a/.ipynb_checkpoints/0-checkpoint.png", "a/._0.png", "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "a/__MACOSX/a/0.png",
    ".git/x.png", "__MACOSX/a/0.png", "@eaDir/0.png", "$RECYCLE.BIN/0.png",
)  # fmt: skip


def test_hidden_and_system_files_are_skipped_and_every_skipped_file_is_counted_by_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_folders(tmp_path)
    plain = read(tmp_path)
    capsys.readouterr()
    for name in JUNK:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tmp_path / "a" / "0.png", tmp_path / name)
    for name in ("b/Thumbs.db", "b/scan.TIF", "b/deep.tif", "b/notes", "loose.png"):
        (tmp_path / name).touch()
    assert read(tmp_path).digests == plain.digests
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"data: {tmp_path}: 10 images of 2 labels, 5 each",
        "data:   a: 5 images; skipped: 2 hidden (._0.png, ...), 2 of the system (@eaDir, ...)",
        "data:   b: 5 images; skipped: 2 .tif (deep.tif, ...), 1 .db (Thumbs.db), 1 without a suffix (notes)",
        "data:   beside the labels, skipped: 3 of the system ($RECYCLE.BIN, ...), 1 beside the labels (loose.png), "
        "1 hidden (.git)",
        "data: 6 train, 2 selection, 2 test",
    ]


def test_links_are_followed_and_circles_and_dangling_links_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = label_folders(tmp_path / "images")
    label_folders(tmp_path / "elsewhere", ("c", "more"), seed=3000)
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "gone.png").symlink_to(tmp_path / "gone.png")
    data = read(root)
    assert (data.labels, sum(sizes(data))) == (("a", "b", "c"), 20)
    out = capsys.readouterr().out
    assert "a: 10 images; skipped: 1 links in a circle (self)" in out
    assert "b: 5 images; skipped: 1 dangling links (gone.png), 1 links in a circle (up)" in out
    for path in (root / "b").glob("?.png"):
        path.unlink()
        path.symlink_to("nowhere")
    with pytest.raises(DataError, match=r"b has 0 images; allowed: .* a label; skipped: 6 dangling links \(0\.png, "):
        read(root)


def test_a_test_image_that_is_also_in_training_is_refused_dropped_or_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split_folders(tmp_path)
    whole = read(tmp_path).digests["test images"]
    shutil.copyfile(tmp_path / "test" / "a" / "0.png", tmp_path / "train" / "a" / "again.png")
    shutil.copyfile(tmp_path / "test" / "a" / "1.png", tmp_path / "train" / "b" / "other.png")
    message = (
        r"where 2 test images are exact copies of training images \(test/a/0\.png = train/a/again\.png, "
        r"test/a/1\.png = train/b/other\.png\); allowed: none, or data\.copies 'drop' \(leave them out of training\)"
    )
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    capsys.readouterr()
    dropped = read(tmp_path, copies="drop")
    assert (sizes(dropped), dropped.digests["test images"]) == ((10, 4), whole)
    assert "a: 5 images; skipped: 1 copies (again.png)" in capsys.readouterr().out
    kept = read(tmp_path, copies="keep")
    assert sizes(kept) == (12, 4)
    assert kept.warnings[:2] == (
        "1 images have several labels (test/a/1.png = train/b/other.png)",
        "2 test images are exact copies of training images (test/a/0.png = train/a/again.png, "
        "test/a/1.png = train/b/other.png)",
    )


def test_copies_in_a_folder_without_splits_are_refused_dropped_or_reported(tmp_path: Path) -> None:
    label_folders(tmp_path)
    plain = read(tmp_path)
    for name in ("0 - Copy.png", "0 (1).png"):
        shutil.copyfile(tmp_path / "a" / "0.png", tmp_path / "a" / name)
    with pytest.raises(DataError, match=r"2 images are exact copies of others, so one could be .*\(a/0 \(1\)\.png = "):
        read(tmp_path)
    assert sizes(read(tmp_path, copies="drop")) == sizes(plain)
    kept = read(tmp_path, copies="keep")
    assert sum(sizes(kept)) == 12
    assert kept.warnings[0].startswith("2 images are exact copies of others")


def test_files_that_are_as_long_and_end_alike_are_no_copies(tmp_path: Path) -> None:
    label_folders(tmp_path)
    for label, value in (("a", 0), ("b", 255)):
        image = Image.new("RGB", (64, 64), 99)
        image.putpixel((0, 63), (value, 0, 0))  # the first pixel in a file of this format
        image.save(tmp_path / label / "large.bmp")
    assert sum(sizes(read(tmp_path))) == 12
    shutil.copyfile(tmp_path / "a" / "large.bmp", tmp_path / "b" / "large.bmp")
    with pytest.raises(DataError, match=r"1 images are exact copies of others.*a/large\.bmp = b/large\.bmp"):
        read(tmp_path)


def test_files_that_cannot_be_read_are_no_copies_but_named(tmp_path: Path) -> None:
    label_folders(tmp_path)
    for name in ("x.png", "y.png"):  # opened by anyone, read by nobody
        (tmp_path / "a" / name).symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"2 images are not readable(.|\n)*a/x\.png is not a readable image"):
        read(tmp_path)
    assert sum(sizes(read(tmp_path, skip_unreadable=True))) == 10


def test_settings_remember_copies_only_where_they_matter() -> None:
    """Earlier runs have no such setting; an export reads the data as the run did."""
    assert "copies" not in DataSettings().model_dump(mode="json")
    assert DataSettings(**DataSettings(copies="keep").model_dump(mode="json")).copies == "keep"


@pytest.mark.parametrize("memory", ["memory", "map"])
def test_files_whose_names_are_not_utf8_are_read(
    memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = label_folders(tmp_path / "images")
    os.rename(root / "a" / "0.png", os.fsencode(root / "a") + b"/caf\xe9.png")
    with open(os.fsencode(root / "a") + b"/caf\xe9.txt", "wb"):
        pass
    assert sum(sizes(read(root, memory=memory, cache=tmp_path / "cache"))) == 10
    assert r"skipped: 1 .txt (caf\xe9.txt)" in capsys.readouterr().out


def test_labels_whose_names_are_not_utf8_or_alike_are_refused(tmp_path: Path) -> None:
    root = label_folders(tmp_path / "latin")
    os.rename(root / "a", os.fsencode(root) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"caf\\xe9 has a name that is not UTF-8; allowed: labels in UTF-8, so rename"):
        read(root)
    with pytest.raises(DataError, match=r"has 'cafe\\u0301' and 'caf\\xe9', which are one label; allowed: one folder"):
        read(label_folders(tmp_path / "alike", ("caf\u00e9", "cafe\u0301")))


def test_a_label_is_found_in_the_test_folder_however_its_accent_is_written(tmp_path: Path) -> None:
    label_folders(tmp_path / "train", ("caf\u00e9", "b"))
    label_folders(tmp_path / "test", ("cafe\u0301", "b"), each=2, seed=1000)
    data = read(tmp_path)
    assert (data.labels, sizes(data)) == (("b", "caf\u00e9"), (10, 4))
    label_folders(tmp_path / "test", ("d",), seed=2000)
    with pytest.raises(DataError, match=r"test has the folder 'd', which .*train lacks; allowed: the same labels"):
        read(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_labels_files_are_read_in_any_marked_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("café\r\n\r\nľaľa\r\n".encode(encoding))
    assert _read_labels(path) == ("café", "ľaľa")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-16-be"])
def test_labels_files_in_other_encodings_are_refused_with_a_command_that_converts_them(
    encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / "my labels.txt"
    path.write_bytes("café\nthé\n".encode(encoding))
    with pytest.raises(DataError, match=r"my labels\.txt, which is not UTF-8") as refused:
        _read_labels(path)
    command = str(refused.value).rpartition(": ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert _read_labels(Path(shlex.split(command)[-1])) == ("café", "thé")


def test_few_and_unbalanced_images_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label_folders(tmp_path, ("a", "b"), each=4)
    label_folders(tmp_path, ("c",), each=60, seed=500)
    warnings = read(tmp_path).warnings
    assert warnings[0] == "few train images of 'a': 2, 'b': 2; advised: 20 or more of each label"
    assert warnings[1] == "unbalanced labels: 43 train images of 'c', 2 of 'a'; advised: at most 10 times as many"
    assert f"data: warning: {warnings[1]}\n" in capsys.readouterr().err


def run_info(accuracy: float, usage: float, fvu: float, images: int = 1000, **sae: float) -> tuple[dict, dict, dict]:
    vit = {
        "settings": {"vit": {"usage_target": 0.5, "gate_epochs": 1, "joint_epochs": 1}},
        "result": {
            "labels": ["a", "b"],
            "selection": {
                "ungated_accuracy": accuracy, "accuracy": accuracy, "head_usage": usage, "images": images,
                "most_common_label": 0.5,
            },
        },
    }  # fmt: skip
    site = {"fvu": fvu, "dead_training": 0.0, "gate_agreement": 1.0, **sae}
    results = {"labels": ["a", "b"], "split": "test", "images": images, "neutral": {"accuracy": accuracy}}
    return vit, {"result": {"fidelity": [site]}}, results


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (run_info(0.9, 0.5, 0.01), []),
        (run_info(0.52, 0.5, 0.01), ["ungated accuracy is 0.5200", "accuracy is 0.5200 on the test"]),
        (run_info(0.6, 0.5, 0.01, images=36), ["ungated accuracy is 0.6000", "accuracy is 0.6000"]),
        (run_info(0.6, 0.5, 0.01, images=360), []),
        (run_info(0.9, 1.0, 0.01), ["head usage is 1.0000, target 0.5: the gates did not learn"]),
        (run_info(0.9, 0.5, 29.0), ["an autoencoder leaves a fraction of variance unexplained of 29.0000"]),
        (run_info(0.9, 0.5, float("nan")), ["an autoencoder leaves a fraction of variance unexplained of nan"]),
        (run_info(0.9, 0.5, 0.01, dead_training=0.95), ["an autoencoder has a share of dead latents of 0.9500"]),
        (run_info(0.9, 0.5, 0.01, gate_agreement=0.7), ["gates agree behind an autoencoder in a share of 0.7000"]),
    ],
)
def test_runs_that_did_not_train_are_warned_of(run: tuple[dict, dict, dict], expected: list[str]) -> None:
    vit, sae, results = run
    found = [*soundness.of_vit(vit), *soundness.of_sae(sae), *soundness.of_results(results)]
    assert len(found) == len(expected), found
    assert all(warning.startswith(start) for warning, start in zip(found, expected, strict=True)), found
