"""From images to steered answers: train, export, serve, ask, watch. Real parts throughout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from processes import ROOT, ServerProcess, run_main, serving

from export.__main__ import main as export_main
from export.bundle import Bundle, load_bundle
from service.cli import main as cli_main
from service.client import Client
from service.engine import Engine
from training.__main__ import main as training_main
from training.config import DataSettings
from training.data.splits import load
from training.steering import to_arrays

pytestmark = pytest.mark.slow


def test_smoke_run_is_trained_exported_served_and_counted(
    smoke_run: Path, smoke_models: Path, tmp_path: Path, samples: dict[str, list[bytes]]
) -> None:
    results = json.loads((smoke_run / "results.json").read_text())
    assert results["neutral"]["accuracy"] > 0.5, "ten classes: a model that learned nothing has 0.1"
    assert results["neutral"]["head_usage"] < 0.9
    assert results["mean_change"]["head_usage"] < -0.05
    assert (smoke_run / "report.html").read_text().count("<img") >= 6

    shutil.copytree(smoke_models / "smoke", tmp_path / "smoke")
    bundle = load_bundle(tmp_path / "smoke" / "1")
    assert sorted(bundle.profiles) == sorted(samples)

    with serving(tmp_path) as server:
        sent = ask_everything(server, bundle, samples)
        for label, (images, kept) in sent.items():
            assert server.count("steervit_images_total", model="smoke", version="1", profile=label) == images
            for index, block in enumerate(bundle.manifest.gated_blocks):
                for head in range(bundle.manifest.heads):
                    labels = {"profile": label, "block": str(block), "head": str(head)}
                    assert server.count("steervit_heads_kept_total", **labels) == kept[index, head]


def ask_everything(
    server: ServerProcess, bundle: Bundle, files: dict[str, list[bytes]]
) -> dict[str, tuple[int, NDArray[np.int64]]]:
    """Every image under its class's profile, and some of each class without ("none"): images sent and heads kept, by
    profile."""
    sent = {}
    unsteered = [file for of_class in files.values() for file in of_class[:10]]
    with Client(server.address) as client:
        for label, of_class in {**files, "none": unsteered}.items():
            answer = client.predict(of_class, profile=label if label in files else "")
            assert answer.receipt.bundle_digest == bundle.digest
            masks = [[list(block.kept) for block in p.head_mask] for p in answer.predictions]
            sent[label] = len(of_class), np.asarray(masks).sum(0)
    assert sent["none"][1].any()
    return sent


def test_a_finished_run_is_kept_and_other_settings_are_refused(smoke_run: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in smoke_run.glob("*.safetensors")}
    done = run_main(training_main, "profiles", "--preset", "smoke", "--out", str(smoke_run))
    assert done.returncode == 0, done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in smoke_run.glob("*.safetensors")} == before
    done = run_main(training_main, "sae", "--preset", "smoke", "--sae.k", "5", "--out", str(smoke_run))
    assert done.returncode == 1
    assert "was made with other settings (sae.k: 12 stored, 5 requested)" in done.stderr


def test_an_export_without_an_evaluation_is_refused(smoke_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    (run / "results.json").unlink()
    done = run_main(export_main, str(run), str(tmp_path / "models"), "--name", "smoke")
    assert done.returncode == 1
    assert "results.json is missing: run the step 'evaluate' first" in done.stderr
    assert not (tmp_path / "models").exists()


def coloured_shapes(root: Path) -> None:
    """A folder of odd-sized colour JPEGs: reddish boxes, greenish crosses and bluish discs on grounds of any colour."""
    generator = np.random.default_rng(0)
    for channel, label in enumerate(("box", "cross", "disc")):
        (root / label).mkdir(parents=True)
        for index in range(80):
            width, height = generator.integers(30, 60, 2).tolist()
            back, front = generator.integers(0, 200, 3), generator.integers(0, 120, 3)
            front[channel] = 230
            image = Image.new("RGB", (width, height), tuple(back.tolist()))
            draw = ImageDraw.Draw(image)
            x, y, r = width // 2, height // 2, int(generator.integers(8, 14))
            if label == "disc":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(front.tolist()))
            elif label == "box":
                draw.rectangle((x - r, y - r, x + r, y + r), fill=tuple(front.tolist()))
            else:
                draw.rectangle((x - r, y - 3, x + r, y + 3), fill=tuple(front.tolist()))
                draw.rectangle((x - 3, y - r, x + 3, y + r), fill=tuple(front.tolist()))
            image.save(root / label / f"{index:03d}.jpg", quality=92)


def test_a_folder_of_colour_images_is_trained_exported_and_served_by_flags_alone(tmp_path: Path) -> None:
    coloured_shapes(tmp_path / "shapes")
    data = ["--data.dataset", "folder", "--data.root", str(tmp_path / "shapes"), "--data.image-size", "32"]
    shape = ["--vit.unpadded", "0", "--vit.mlp-ratio", "4", "--profiles.steps", "10"]
    longer = ["--vit.batch-size", "16", "--vit.backbone-epochs", "12", "--vit.joint-epochs", "6"]
    done = run_main(
        training_main, "all", "--preset", "smoke", "--out", str(tmp_path / "run"),
        "--data.channels", "3", "--data.crop-fraction", "0.9", *data, *shape, *longer,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["neutral"]["accuracy"] > 0.5
    done = run_main(export_main, str(tmp_path / "run"), str(tmp_path / "models"), "--name", "shapes")
    assert done.returncode == 0, done.stderr[-2000:]
    bundle = load_bundle(tmp_path / "models" / "shapes" / "1")
    assert bundle.manifest.image.shape == (32, 32, 3)
    assert bundle.manifest.image.resize == 35
    files = {
        label: [path.read_bytes() for path in sorted((tmp_path / "shapes" / label).glob("*.jpg"))]
        for label in ("box", "cross", "disc")
    }
    with serving(tmp_path / "models") as server:
        for label, (images, kept) in ask_everything(server, bundle, files).items():
            assert server.count("steervit_images_total", profile=label) == images == (80 if label in files else 30)
            assert server.count("steervit_heads_kept_total", profile=label) == kept.sum()


def test_the_committed_bundle_has_the_accuracy_that_its_manifest_states(bundle: Bundle) -> None:
    """10,000 test images through onnxruntime alone; rounding may change the answer for one image."""
    test = load(DataSettings(), 0).test
    engine = Engine(bundle, "auto", 0)
    profile = bundle.profiles["Shirt"]
    correct, kept, shirts = 0, 0.0, []
    for start in range(0, len(test), 200):
        images = test.images[start : start + 200].numpy()
        classes = test.classes[start : start + 200].numpy()
        outputs = engine.run(images, to_arrays([{}] * len(images), len(bundle.manifest.sites)))
        correct += int((outputs.logits.argmax(1) == classes).sum())
        kept += float(outputs.head_gate.mean((1, 2)).sum())
        own = images[classes == bundle.manifest.labels.index("Shirt")]
        steered = engine.run(own, to_arrays([profile.terms] * len(own), len(bundle.manifest.sites)))
        shirts += (steered.logits.argmax(1) == bundle.manifest.labels.index("Shirt")).tolist()
    stated = bundle.manifest.evaluation
    assert stated["images"] == len(test) == 10_000
    assert correct / len(test) == pytest.approx(stated["accuracy"], abs=1.01e-4)
    assert kept / len(test) == pytest.approx(stated["head_usage"], abs=1e-4)
    assert np.mean(shirts) == pytest.approx(profile.evaluation["after"]["recall"], abs=1.01e-3)


def test_the_bundle_of_typefaces_answers_by_its_budgets_and_profiles() -> None:
    """What the samples cost, and what the profile of a form field saves."""
    folder = ROOT / "deploy" / "typefaces"
    files = sorted((folder / "samples").glob("*.png"))
    labels = [file.stem.partition("-")[2] for file in files]
    assert len(set(labels)) == 62
    with serving(folder / "models") as server, Client(server.address) as client:
        model = client.model()
        assert (model.model, model.graph, len(model.labels)) == ("typefaces", "dispatch.fp32", 62)
        for budget in (1.0, 0.7, model.lowest_budget):
            found = client.predict([file.read_bytes() for file in files], budget=budget).predictions
            right = sum(p.classes[0].label == label for p, label in zip(found, labels, strict=True))
            assert right > 0.6 * len(files), budget
            assert np.mean([p.compute_fraction for p in found]) == pytest.approx(budget, abs=0.04)
        lower = [file for file in files if file.stem.startswith("lower-")]
        sent = [file.read_bytes() for file in lower]
        plain, steered = (client.predict(sent, profile=profile).predictions for profile in ("", "lower case"))
        spent = [np.mean([p.compute_fraction for p in found]) for found in (plain, steered)]
        assert spent[1] < spent[0] - 0.1
        for command, given in (("predict", ("--budget", "0.6")), ("compare", ("--profile", "lower case"))):
            done = run_main(cli_main, command, "--address", server.address, *given, *map(str, lower))
            assert done.returncode == 0, done.stderr
            assert "lower-a.png" in done.stdout
