"""Typefaces: splits that share no design, drawings that depend only on their key, correct factors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

from training.config import DataSettings, Settings
from training.data import typefaces
from training.data.degradation import DEGRADATIONS, NO_NEIGHBOUR, DegradedPixels, degraded
from training.data.splits import Data, DataError, load
from training.data.streams import training_batches
from training.evaluation import probing
from training.evaluation.dictionaries import SWEEP
from training.model.backbone import create_vit
from training.model.gated_vit import GatedVit
from training.sae.activations import residuals
from training.sae.fit import Fitting

SERIF = Path("/usr/share/fonts/truetype/liberation/LiberationSerif-Regular.ttf")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    cache = tmp_path_factory.mktemp("cache")
    return DataSettings(dataset="typefaces-small", flip=False, shift=0, max_test=400, cache=cache)


@pytest.fixture(scope="module")
def data(settings: DataSettings) -> Data:
    return load(settings, 0)


def pixels(data: Data) -> DegradedPixels:
    assert isinstance(data.train.images, DegradedPixels)
    return data.train.images


def factors(**changes: float) -> torch.Tensor:
    """The factors of one image: white on black, as large as its outline, sharp, with these changes."""
    neutral = dict.fromkeys(DEGRADATIONS, 0.0) | {
        "size": 1.0, "stretch": 1.0, "blur across": 0.1, "blur down": 0.1, "contrast": 1.0, "brightness": 0.5,
        "left gap": NO_NEIGHBOUR, "right gap": NO_NEIGHBOUR,
    }  # fmt: skip
    return torch.tensor([[*(neutral | {name.replace("_", " "): value for name, value in changes.items()}).values()]])


def squares(*places: tuple[int, int] | None) -> torch.Tensor:
    """Three outlines, each empty or with a white 4 x 4 square this far right of and below the middle."""
    outlines = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    for outline, place in zip(outlines[0], places, strict=True):
        if place:
            outline[18 + place[1] : 22 + place[1], 18 + place[0] : 22 + place[0]] = 255
    return outlines


def middle(image: torch.Tensor) -> list[float]:
    """The centre of the white pixels, right of and below the middle of the image."""
    weight = image[0, :, :, 0].double()
    place = torch.arange(28) - 13.5
    return [float((weight.sum(axis) * place).sum() / weight.sum()) for axis in (0, 1)]


def test_faces_of_one_design_are_linked_by_likeness_or_by_name() -> None:
    """Pixels (2 x 2, each twice as wide and high) at angles whose cosines are the correlations."""

    def face(degrees: float) -> np.ndarray:
        across, down = np.array([1, 1, -1, -1]), np.array([1, -1, 1, -1])
        turned = across * np.cos(np.radians(degrees)) + down * np.sin(np.radians(degrees))
        return (128 + 60 * turned).round().astype(np.uint8).reshape(1, 2, 2).repeat(2, 1).repeat(2, 2)

    outlines = np.stack([face(10), face(90), face(0), face(-10), face(45)])
    likeness = typefaces.likeness(outlines)
    assert likeness[0, 2] == pytest.approx(np.cos(np.radians(10)), abs=0.005)  # 0.985
    assert likeness[0, 3] == pytest.approx(np.cos(np.radians(20)), abs=0.005)  # 0.940: linked through the other
    assert typefaces.designs(outlines, ["a", "b", "c", "d", "e"]).tolist() == [0, 1, 0, 0, 2]
    assert typefaces.designs(outlines, ["a", "b", "c", "d", "b"]).tolist() == [0, 1, 0, 0, 1]


def test_no_face_has_a_likeness_in_another_split() -> None:
    found = [typefaces.outline(file) for file in typefaces.font_files(typefaces.SMALL)]
    outlines = np.stack([outline for _, outline in found if outline is not None])
    spots = np.random.default_rng(0).integers(0, 12, outlines.shape)
    outlines = np.concatenate([outlines, (outlines * 0.75 + spots).astype(np.uint8)])  # each with a twin
    alike = typefaces.likeness(outlines) > typefaces.LIKENESS
    design = typefaces.designs(outlines, [str(number) for number in range(len(outlines))])
    part = typefaces.part_of(design, (0.2, 0.3))
    assert set(part) == {0, 1, 2}
    assert alike.sum() >= 2 * len(outlines)
    assert not alike[part[:, None] != part].any()


def test_a_design_gives_four_faces_at_most_and_is_in_one_split(data: Data) -> None:
    faces = typefaces.faces(typefaces.font_files(typefaces.SMALL))
    counts = np.bincount(faces.design)
    assert len(counts) > 10
    assert counts.max() == 4
    assert data.selection.factors is not None
    assert data.test.factors is not None
    of_selection, of_test = (set(split.factors[:, 0].tolist()) for split in (data.selection, data.test))
    assert of_selection.isdisjoint(of_test)
    train, selection, _ = np.bincount(typefaces.part_of(faces.design, (0.1, 0.2)))
    assert (len(data.train), len(data.selection)) == (62 * train, 62 * selection * typefaces.DRAWINGS)


def test_a_face_that_lacks_a_character_or_draws_two_alike_is_left_out(tmp_path: Path) -> None:
    assert typefaces.outline(SERIF)[1] is not None
    lacking = TTFont(SERIF)
    subsetter = Subsetter(Options(notdef_outline=True))
    subsetter.populate(text=typefaces.CHARACTERS.replace("q", ""))
    subsetter.subset(lacking)
    lacking.save(tmp_path / "lacking.ttf")
    assert typefaces.outline(tmp_path / "lacking.ttf") == ("Liberation Serif", None)
    assert typefaces.outline(tmp_path / "lacking.ttf", "abc")[1] is not None
    alike = TTFont(SERIF)
    for table in alike["cmap"].tables:
        table.cmap[ord("0")] = table.cmap[ord("O")]
    alike.save(tmp_path / "alike.ttf")
    assert typefaces.outline(tmp_path / "alike.ttf") == ("Liberation Serif", None)


def test_letters_that_differ_only_in_size_share_a_merged_label() -> None:
    labels, class_of = typefaces.classes(merged=True)
    assert "".join(labels) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"  # EMNIST ByMerge
    of = {character: labels[index] for character, index in zip(typefaces.CHARACTERS, class_of.tolist(), strict=True)}
    assert (of["c"], of["l"], of["a"], of["A"], of["7"]) == ("C", "L", "a", "A", "7")
    labels, class_of = typefaces.classes(merged=False)
    assert "".join(labels) == typefaces.CHARACTERS
    assert class_of.tolist() == list(range(62))


def test_an_image_is_moved_turned_and_sized_by_its_factors() -> None:
    def drawn(place: tuple[int, int], **changes: float) -> torch.Tensor:
        return degraded(squares(place, None, None), factors(**changes), torch.zeros(1, 784), 28)

    assert middle(drawn((0, 0))) == pytest.approx([0, 0], abs=0.05)
    assert middle(drawn((0, 0), right=3, down=-2)) == pytest.approx([3, -2], abs=0.05)
    assert middle(drawn((8, 0), size=0.5)) == pytest.approx([4, 0], abs=0.05)
    assert middle(drawn((8, 0), rotation=np.pi / 2)) == pytest.approx([0, 8], abs=0.05)
    assert middle(drawn((0, 8), shear=0.5)) == pytest.approx([4, 8], abs=0.1)
    assert drawn((0, 0)).amax() == 255
    faint = drawn((0, 0), contrast=0.2, dark_on_light=1)[0, ..., 0]
    assert (int(faint[0, 0]), int(faint[14, 14])) == (153, 102)


def test_without_degradation_all_drawings_of_an_outline_are_alike(data: Data) -> None:
    clean = replace(pixels(data), strength=0.0, drawings=4, rows=torch.arange(8))[:]
    assert torch.equal(clean[:4], clean[:1].expand(4, -1, -1, -1))
    assert (clean[0] != clean[4]).any()
    outline = np.memmap(pixels(data).path, np.uint8, "r", shape=(pixels(data).total, 40, 40))[0]
    assert np.abs(clean[0, ..., 0].numpy().astype(int) - outline[6:34, 6:34]).max() < 60  # blurred by 0.3 pixels


def test_neighbours_stand_at_their_gaps() -> None:
    both = degraded(squares((0, 0), (0, 0), (0, 0)), factors(left_gap=2, right_gap=4), torch.zeros(1, 784), 28)
    row = both[0, 13, :, 0].tolist()
    assert [column for column, value in enumerate(row) if value > 128] == [6, 7, 8, 9, 12, 13, 14, 15, 20, 21, 22, 23]


def test_a_drawing_depends_on_seed_epoch_and_row_alone(data: Data) -> None:
    images, index = pixels(data), torch.tensor([7, 300, 11, 8])
    drawn = images.draw(index, 3, 5)
    assert torch.equal(drawn[1:3], images.draw(index[1:3], 3, 5))
    assert torch.equal(drawn[2:3], data.train.take(torch.tensor([11])).images.draw(torch.tensor([0]), 3, 5))
    for other in (images.draw(index, 3, 6), images.draw(index, 4, 5), images[index]):
        assert all((one != two).any() for one, two in zip(drawn, other, strict=True))
    assert torch.equal(images[index], images[index])


def test_each_epoch_draws_anew_and_a_resumed_training_draws_the_same(data: Data, settings: DataSettings) -> None:
    small = Data(data.labels, data.spec, data.train.take(torch.arange(0, 620, 10)), data.selection, data.test)
    whole = dict(training_batches(small, settings, 31, 3, seed=9))
    assert len(whole) == 6
    for step, batch in training_batches(small, settings, 31, 3, seed=9, start=3):
        assert torch.equal(batch.images, whole[step].images)
    epochs = [torch.cat([whole[step].images for step in (first, first + 1)]) for first in (0, 2)]
    assert {image.numpy().tobytes() for image in epochs[0]}.isdisjoint(image.numpy().tobytes() for image in epochs[1])
    shares = [dict(training_batches(small, settings, 30, 1, 9, rank=rank, processes=2)) for rank in (0, 1)]
    alone = dict(training_batches(small, settings, 30, 1, 9))
    assert torch.equal(shares[1][1].images, alone[1].images[1::2])


@pytest.mark.parametrize("name", ["selection", "test"])
def test_the_factors_are_those_of_the_images(name: str, data: Data) -> None:
    """Most pixels are background: contrast, brightness and noise determine its level and noise."""
    split = getattr(data, name)
    assert isinstance(split.images, torch.Tensor)
    of = dict(zip(typefaces.FACTORS, split.factors.T, strict=True))
    assert len(split.factors) == len(split.images)
    level = of["brightness"] + of["contrast"] * (of["dark on light"] - 0.5)
    ground = split.images.flatten(1).float().quantile(0.5, dim=1) / 255
    assert ((ground - level).abs() < 0.1).float().mean() > 0.9
    rough = split.images[:, :3, :3, 0].flatten(1).float().std(1) / 255
    alone = (of["left gap"] == NO_NEIGHBOUR) & (of["noise"] > 0.1)
    assert rough[alone].mean() > 0.08
    assert torch.corrcoef(torch.stack([rough[alone], of["noise"][alone]]))[0, 1] > 0.2


def test_a_few_features_explain_factors_on_held_out_images() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 30, generator=generator).double()
    held, noise = 3 * features[:, 3] + 5, torch.randn(400, generator=generator).double()
    values = torch.stack([held, features[:, 7] - features[:, 9], noise, torch.ones(400).double()], 1)
    r2 = probing.sparse_r2(features, values, torch.arange(400) % 2 == 0)
    assert r2.shape == (len(probing.KS), 4)
    assert r2[0].tolist() == pytest.approx([1, 0.5, 0, 0], abs=0.15)
    assert r2[1, :2].tolist() == pytest.approx([1, 1])
    assert (r2[:, 2] < 0.1).all(), "what is chosen by chance does not hold"
    assert probing.ridge_r2(features, values, torch.arange(400) % 2 == 0)[:2].tolist() == pytest.approx(
        [1, 1], abs=1e-3
    )


def test_dictionaries_are_probed_for_the_known_factors_across_designs(data: Data) -> None:
    """For a network with random weights, on the images of the small preset: polarity is easy to read from few
    latents."""
    assert data.test.factors is not None
    torch.manual_seed(0)
    settings = Settings(step="evaluate", out=Path("unused"), preset="typefaces-small")
    model = GatedVit(create_vit(settings.vit, data.spec, 62), (1, 2), data.spec).eval()
    train, held_out = (residuals(model, split, "") for split in (data.train.take(torch.arange(0, 620, 2)), data.test))
    sae = Fitting(train, SWEEP).folded(held_out)
    found = probing.probed(probing.dictionaries(train, held_out, sae, 0, False), held_out, data.test)
    assert found["r2"].keys() == {"bundle", "sae", "frozen decoder", "random", "pca"}
    assert sum(found["images"]) == len(data.test)
    assert min(found["designs"]) >= 1
    assert found["factors"][-2:] == ["left neighbour", "right neighbour"]
    for of_dictionary in found["r2"].values():
        assert np.shape(of_dictionary) == (len(probing.KS), len(found["factors"]))
    polarity = found["factors"].index("dark on light")
    assert found["residual"][polarity] > 0.5
    assert probing.can_probe(data.test)
    assert not probing.can_probe(data.train)
    of_one_design = data.test.factors[:, 0] == data.test.factors[0, 0]
    assert not probing.can_probe(data.test.take(of_one_design))
    assert found["r2"]["pca"][0][polarity] > 0.1


def test_outlines_are_rendered_once(data: Data, settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typefaces, "faces", None)
    again = load(settings.model_copy(update={"dataset": "typefaces-small/merged"}), 1)
    assert len(again.labels) == 47
    assert torch.equal(pixels(again)[:5], pixels(data)[:5])
    with pytest.raises(TypeError):  # another share of the designs is another split
        load(settings.model_copy(update={"test_fraction": 0.4}), 0)


def test_missing_packages_are_named_with_their_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typefaces, "INSTALLED", tmp_path)
    with pytest.raises(DataError, match=r"^3 of the 3 Debian packages .* \(fonts-dustin, .*\): make typefaces$"):
        load(DataSettings(dataset="typefaces-small"), 0)
    with pytest.raises(DataError, match=r"channels 1, crop_fraction 1"):
        load(DataSettings(dataset="typefaces", channels=3), 0)
