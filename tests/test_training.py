"""Training: interrupted runs end like uninterrupted ones, runs share what they can, wrong settings are named."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, run_main
from test_sae import Breaking, Interrupted

from training import reproduce
from training.__main__ import main, parse
from training.checkpoint import Run, RunError
from training.config import DENSE, DataSettings, Settings, VitSettings
from training.data.splits import Data, Split, load
from training.evaluation.controls import narrower, width_of
from training.image_spec import ImageSpec
from training.model.gated_vit import GatedVit
from training.model.inference import Outcome, effect
from training.model.macs import Macs, count
from training.vit import fit, phases

TINY = VitSettings(
    dim=16, depth=2, heads=2, backbone_epochs=2, gate_epochs=1, joint_epochs=2, batch_size=50, learning_rate=5e-3
)


WITH_DIAL = TINY.model_copy(update={"dial": True, "mlp_groups": 2, "gate_learning_rate": 0.1})


def tiny(out: Path, vit: VitSettings = TINY) -> Settings:
    data = DataSettings(max_train=400, max_test=50)
    return Settings(step="vit", out=out, save_every=0, data=data, vit=vit)  # type: ignore[call-arg]


def whole_run(folder: Path, vit: VitSettings = TINY) -> Path:
    """The folder of an uninterrupted run."""
    settings = tiny(folder, vit)
    fit.fit_vit(settings, load(settings.data, settings.seed), Run(folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def whole_with_dial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("runs") / "whole", WITH_DIAL)


def assert_same(model: GatedVit, run: Path) -> None:
    for name, value in fit.load_vit(Run(run)).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "states"), [*(("whole", states) for states in (6, 15, 18, 23, 28, 38)), ("whole_with_dial", 28)]
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    name: str, states: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Interrupted within and after each of the three phases of 14, 7 and 14 steps, right after a state was saved."""
    whole: Path = request.getfixturevalue(name)
    settings = tiny(tmp_path, TINY if name == "whole" else WITH_DIAL)
    data = load(settings.data, settings.seed)

    with pytest.raises(Interrupted):
        fit.fit_vit(settings, data, Breaking(tmp_path / "broken", states))
    with pytest.raises(RunError, match="run the step 'vit' first"):
        fit.load_vit(Run(tmp_path / "broken"))
    state = Run(tmp_path / "broken").read_state("vit", settings.fingerprint("vit"))
    assert state is not None
    assert (state.meta["step"] == 0) == (states in (15, 23, 38))
    assert_same(fit.fit_vit(settings, data, Run(tmp_path / "broken")), whole)
    assert not (tmp_path / "broken" / "vit.state.safetensors").exists()


def test_a_training_that_diverges_stops_there(tmp_path: Path) -> None:
    settings = tiny(tmp_path, TINY.model_copy(update={"learning_rate": 1e30}))
    data = load(settings.data, settings.seed)
    message = r"the loss is (nan|inf) at step \d+ of phase 'backbone'; allowed: a finite number\. Lower"
    with pytest.raises(RunError, match=message):
        fit.fit_vit(settings, data, Run(tmp_path))


@pytest.mark.slow
def test_a_shared_backbone_is_the_one_that_the_run_would_have_trained(whole: Path, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    data = load(settings.data, settings.seed)

    def sharing(**changes: Any) -> Settings:
        vit = TINY.model_copy(update={"backbone": whole, **changes})
        return settings.model_copy(update={"vit": vit})

    assert_same(fit.fit_vit(sharing(), data, Run(tmp_path / "again")), whole)
    with pytest.raises(RunError, match=r"vit\.backbone is .*whole, trained with another backbone_epochs"):
        fit.fit_vit(sharing(backbone_epochs=3), data, Run(tmp_path / "other"))
    with pytest.raises(RunError, match=r"which has no backbone\.safetensors: run the step 'vit' there first"):
        fit.fit_vit(sharing(backbone=tmp_path), data, Run(tmp_path / "none"))


def test_a_run_folder_of_another_version_is_left_alone(tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    data = load(settings.data, settings.seed)
    old = tmp_path / "vit.json"
    old.write_text('{"settings": {}, "result": {}}')
    with pytest.raises(
        RunError, match=r"vit\.json has the format None of another version; this version reads and writes 2"
    ):
        fit.fit_vit(settings, data, Run(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["vit.json"]
    assert old.read_text() == '{"settings": {}, "result": {}}'


@pytest.mark.slow
def test_a_run_continues_only_with_the_images_and_labels_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An added image shifts the split, so that training images would be in the test."""
    settings = tiny(tmp_path)
    data = load(settings.data, settings.seed)
    more = replace(data, digests={**data.digests, "training images": "60001 with the digest 0"})
    images = r"training images: 60000 with the digest \w{16} before, 60001 with the digest 0 now"
    part = Run(tmp_path / "part")
    model = fit.build(TINY, data.spec, len(data.labels))
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    meta = {"phase": 3, "step": 0, "curves": [], "data": data.digests}
    part.write_tensors("backbone", model.state_dict())
    part.write_state("vit", settings.fingerprint("vit"), tensors, meta)
    with pytest.raises(RunError, match=rf"part/vit\.state\.safetensors was made with other images \({images}\)"):
        fit.fit_vit(settings, more, part)
    fit.fit_vit(settings, data, part)
    fit.check_images(part, data)
    with pytest.raises(RunError, match=rf"part/vit\.json was made with other images \({images}\)\. Give the same"):
        fit.fit_vit(settings, more, part)
    with pytest.raises(RunError, match=r"labels: 10 before, 11 now; different: 'Hat'"):
        fit.check_images(part, replace(data, labels=(*data.labels, "Hat")))
    old = part.info("vit")
    old["result"]["data"] = more.digests
    part.write_json("vit.json", old)
    for step in ("sae", "profiles", "controls", "evaluate"):
        assert main([step, "--preset=smoke", "--out", str(part.folder)]) == 1
        assert "vit.json was made with other images (training images: 60001" in capsys.readouterr().err
    del old["result"]["data"]
    part.write_json("vit.json", old)
    fit.check_images(part, more)


def test_an_interrupted_training_continues_only_in_its_precision_and_with_its_teacher(tmp_path: Path) -> None:
    settings = tiny(tmp_path / "run", TINY.model_copy(update={"teacher": tmp_path / "teacher"}))
    none = Split(torch.zeros(0, 28, 28, 1), torch.zeros(0))
    data = Data(("a", "b"), ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,)), none, none, none)
    run, teacher = Run(settings.out), Run(tmp_path / "teacher")
    teacher.write_tensors("vit", {"weight": torch.zeros(1)})
    model = fit.build(settings.vit, data.spec, 2)
    phases.save(settings, data, run, model, 0, 0, [], {})
    with pytest.raises(
        RunError, match=r"vit\.state\.safetensors was made with other settings \(bf16: True stored, False requested\)"
    ):
        fit.fit_vit(settings.model_copy(update={"bf16": False}), data, run)
    teacher.write_tensors("vit", {"weight": torch.ones(1)})
    with pytest.raises(RunError, match=r"other settings \(teacher: \w{64} stored, \w{64} requested\)"):
        fit.fit_vit(settings, data, run)
    meta = {"phase": 0, "step": 0, "curves": []}  # of an older run
    run.write_state("vit", settings.fingerprint("vit"), model.state_dict(prefix="model."), meta)
    with pytest.raises(RunError, match="teacher, which has no finished model"):
        fit.fit_vit(settings, data, run)


def test_a_run_continues_wherever_its_images_are_cached(tmp_path: Path) -> None:
    settings, run = tiny(tmp_path), Run(tmp_path)
    run.finish("vit", settings.fingerprint("vit"), {})

    def with_data(**changes: Any) -> dict[str, Any]:
        data = settings.data.model_copy(update=changes)
        return settings.model_copy(update={"data": data}).fingerprint("vit")

    assert run.finished("vit", with_data(cache=tmp_path, download=True))
    with pytest.raises(RunError, match=r"other settings \(data\.shift: 2 stored, 1 requested\)"):
        run.finished("vit", with_data(cache=tmp_path, shift=1))


def test_a_missing_file_of_a_finished_stage_is_named(tmp_path: Path) -> None:
    spec = ImageSpec(28, 28, 1, 28, "bicubic", (0.3,), (0.4,))
    result = {"image": spec.to_json(), "labels": ["a", "b"]}
    Run(tmp_path).finish("vit", tiny(tmp_path).fingerprint("vit"), result)
    with pytest.raises(RunError, match=r"vit\.safetensors is missing\. Restore it, or remove the JSON file"):
        fit.load_vit(Run(tmp_path))


def test_offsets_spare_the_first_image_and_most_others() -> None:
    torch.manual_seed(0)
    offsets = phases.offsets(10_000, 3.0, 0.4, torch.device("cpu"))[:, 0]
    assert offsets[0] == 0
    assert (offsets > 0).float().mean().item() == pytest.approx(0.4, abs=0.02)
    assert offsets[offsets > 0].mean().item() == pytest.approx(1.5, abs=0.05)
    assert offsets.max() <= 3


def test_the_smaller_control_computes_as_much_as_the_gated_model() -> None:
    data = load(DataSettings(max_train=100, max_test=20), 0)
    wide = fit.build(VitSettings(), data.spec, 10).eval()
    macs = count(wide)
    dim = narrower(VitSettings(), data, usage=0.25)
    small = count(fit.build(VitSettings(dim=dim), data.spec, 10).eval()).dense
    wanted = (
        macs.fraction(torch.cat([torch.zeros(3, 5, 6), torch.ones(1, 5, 6)])).mean().item()
    )  # a quarter of the heads
    assert dim % 12 == 0
    assert small / macs.dense == pytest.approx(wanted, abs=0.06)
    assert narrower(VitSettings(), data, usage=1.0) == 192
    shape = VitSettings(depth=3, dial=True, mlp_groups=4)
    plain = VitSettings(depth=3, dim=width_of(shape, data, 0.55))
    whole, part = (count(fit.build(settings, data.spec, 10).eval()).dense for settings in (shape, plain))
    assert part / whole == pytest.approx(0.55, abs=0.06)


def test_effect_by_hand() -> None:
    classes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2])
    gates = torch.tensor([[[True, False]]] * 4 + [[[True, True]]] * 4)
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    found = effect(Outcome(logits, gates, gates.float(), 2), classes, (0,), Macs(dense=100, per_head=(20,)))
    assert found.recall == 3 / 4
    assert found.precision == 3 / 4
    assert found.false_positive_rate == 1 / 4
    assert found.overall_accuracy == 6 / 8
    assert found.others_accuracy == 3 / 4
    assert found.f1 == pytest.approx(3 / 4)
    assert found.head_usage == 0.5
    assert found.compute_fraction == pytest.approx(0.8)


def test_an_effect_has_the_usage_of_mlp_groups_too() -> None:
    """Two heads of 20 MACs and two groups of 30, open on the target's two images: 1 + 2, and 1 + 1."""
    gates = torch.tensor([[[True, False, True, True]], [[False, True, False, True]], [[True] * 4]])
    macs = Macs(200, (20,), (30,), mlp_groups=2)
    outcome = Outcome(torch.eye(3)[[0, 0, 1]], gates, gates.float(), heads=2)
    found = effect(outcome, torch.tensor([0, 0, 1]), (0,), macs)
    assert (found.head_usage, found.mlp_usage) == (0.5, 0.75)
    assert found.usage == found.unit_usage == pytest.approx((80 + 50) / 200)
    assert found.compute_fraction == pytest.approx(1 - 70 / 400)
    assert outcome.usage(macs) == pytest.approx((80 + 50 + 100) / 300)
    heads = Outcome(outcome.logits, gates[:, :, :2], gates[:, :, :2].float(), heads=2)
    alone = effect(heads, torch.tensor([0, 0, 1]), (0,), Macs(200, (20,)))
    assert (alone.usage, alone.compute_fraction) == (0.5, pytest.approx(1 - 40 / 400))
    assert found.to_json().keys() - alone.to_json().keys() == {"mlp_usage", "unit_usage"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data.root /typo", "data.root is /typo; allowed: the folder of Fashion-MNIST's four files, or none"),
        ("--vit.weights file", "vit.weights is file with vit.model 'conv_stem'; allowed: a timm model"),
        ("--vit.pretrained", "vit.pretrained is True with vit.model 'conv_stem'; allowed: a timm model"),
        (
            "--vit.model deit_tiny_patch16_224 --vit.depth 4",
            "vit.depth is 4 with vit.model 'deit_tiny_patch16_224', wh",
        ),
        ("--vit.dim 50", "vit.dim is 50 with 3 heads; allowed: a multiple of 12"),
        ("--vit.dim 18", "vit.dim is 18 with 3 heads; allowed: a multiple of 12"),
        ("--vit.patch 16 --vit.unpadded 1", "vit.patch is 16 and vit.unpadded 1, which leave no token of 28 pixels"),
    ],
)
def test_no_setting_is_passed_over(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vit", "--preset=smoke", "--out", str(tmp_path), *flags.split()]) == 1
    assert message in capsys.readouterr().err


def test_seed_is_not_taken_for_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main(["--out", "run", "--seed", "5"])
    assert "--seed is not a flag here; allowed: --seeds, the number of seeds from 0 on" in capsys.readouterr().err


def test_the_teacher_of_a_preset_can_be_left_out() -> None:
    assert parse(["all", "--out", "run"]).vit.teacher == DENSE
    assert parse(["all", "--out", "run", "--vit.teacher", "none"]).vit.teacher is None


def test_contexts_that_are_given_replace_those_of_the_preset() -> None:
    def contexts(*flags: str) -> list[str]:
        return list(parse(["all", "--out", "run", *flags]).profiles.contexts)

    assert contexts("--profiles.steps", "3") == ["tops", "footwear", "rest"]
    assert contexts("--profiles.contexts", '{"tops": ["Coat"]}') == ["tops"]
    page = (ROOT / "docs" / "training.md").read_text()
    command = re.search(r"`(--preset fashion-mnist --data.dataset folder [^`]+)`", page)
    assert command
    assert contexts(*shlex.split(command[1])) == [], "a folder has not the labels of Fashion-MNIST"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vit", "--vit.dim", "-3"], "--vit.dim is '-3': Input should be greater than or equal to 8"),
        (["vit", "--seed", "-1"], "--seed is '-1': Input should be greater than or equal to 0"),
        (["vit", "--seed", f"{2**32}"], f"--seed is '{2**32}': Input should be less than {2**32}"),
        (["vit", "--vit.nonsense", "1"], "python -m training: error: unrecognized arguments: --vit.nonsense 1"),
        (["vit", "--vit.gated-blocks", "0"], "vit.gated_blocks is '0'; allowed: 'all', 'last', or numbers"),
        (["vit", "--vit.model", "no_such_model"], "vit.model is 'no_such_model'"),
        (["vit", "--data.dataset", "folder", "--data.root", "nowhere"], "data.root is nowhere; allowed: a folder of"),
        (["vit", "--data.image-size", "32"], "fashion-mnist is 28 x 28 and grey; allowed: image_size 28"),
        (["vit", "--profiles.contexts", '{"pets": ["Cat"]}'], "profiles.contexts['pets'] names ['Cat']; allowed: one"),
        (["sae"], "vit.json is missing: run the step 'vit' first"),
        (["report"], "results.json is missing: run the step 'evaluate' first"),
    ],
)
def test_bad_settings_are_named(flags: list[str], message: str, tmp_path: Path) -> None:
    done = run_main(main, *flags, "--preset", "smoke", "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
