"""How a model uses the CPUs: as measured at the start, as saved beside the bundle, or by flags."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle, load_bundle
from service.config import Settings
from service.engine import Engine, Outputs, usable_cpus
from service.steering import resolve, stack
from service.tuning import COMPARE_EVERY, Plan, Quickest, Surroundings, start
from training.steering import NEUTRAL

STARTING = Surroundings(serving=False, spinning=True)


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(bundle.folder, tmp_path / "3")
    return load_bundle(tmp_path / "3")


def settings(bundle: Bundle, **flags: Any) -> Settings:
    return Settings(repository=bundle.folder, **{"provider": "cpu", "tune": "0.2", **flags})


def plan(bundle: Bundle, surroundings: Surroundings = STARTING, **flags: Any) -> Plan:
    return start(bundle, settings(bundle, **flags), surroundings).plan


def test_measurements_are_saved_beside_the_bundle_and_used_at_the_next_start(copied: Bundle) -> None:
    measured = plan(copied)
    assert measured.source == "measured"
    assert measured.instances * measured.threads <= usable_cpus()
    kept = json.loads((copied.folder.parent / "3.tuning.json").read_text())
    assert kept["milliseconds_per_image"]["one image"] > 0
    kept["plan"] |= {"max_batch": 7, "wide_threads": 0}
    (copied.folder.parent / "3.tuning.json").write_text(json.dumps(kept))
    cached = plan(copied)
    assert (cached.source, cached.max_batch, cached.wide_threads) == ("cached", 7, 0)
    assert plan(copied, max_batch=5).max_batch == 5, "measured for other flags"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"measured_for": {}, "plan": {}, "milliseconds_per_image": {}}', "instances 0", "other bundle"],
)
def test_a_file_that_does_not_fit_is_measured_anew(copied: Bundle, content: str) -> None:
    path = copied.folder.parent / "3.tuning.json"
    if content in ("instances 0", "other bundle"):
        plan(copied)
        kept = json.loads(path.read_text())
        kept["plan"]["max_batch"] = 7
        kept["plan" if content == "instances 0" else "measured_for"] |= (
            {"instances": 0} if content == "instances 0" else {"bundle_digest": "0"}
        )
        content = json.dumps(kept)
    path.write_text(content)
    found = plan(copied)
    assert found.source == "measured"
    assert found.max_batch != 7
    assert json.loads(path.read_text())["plan"]["max_batch"] == found.max_batch


def test_an_unwritable_folder_only_makes_the_next_start_measure_again(copied: Bundle) -> None:
    (copied.folder.parent / "3.tuning.json").mkdir()
    assert plan(copied).source == "measured"
    assert sorted(path.name for path in copied.folder.parent.iterdir()) == ["3", "3.tuning.json"]


def test_flags_win_and_leave_nothing_to_measure(copied: Bundle) -> None:
    assert plan(copied, instances=3, threads=2, max_batch=5) == Plan(3, 2, 0, plan(copied).spinning, 5, "flags")
    assert plan(copied, threads=1, tune="off").instances == usable_cpus()


def test_nothing_is_measured_while_calls_are_answered(copied: Bundle) -> None:
    found = plan(copied, Surroundings(serving=True, spinning=False))
    assert (found.source, found.spinning) == ("default", False)
    assert not (copied.folder.parent / "3.tuning.json").exists()


def test_all_sessions_of_a_model_give_the_same_answers(bundle: Bundle, sample_pixels: NDArray[np.uint8]) -> None:
    engine, wide = Engine(bundle, "cpu", 1), Engine(bundle, "cpu", 2, spinning=True)
    steering = stack([resolve(bundle, "Shirt", NEUTRAL, 1.0)], [len(sample_pixels)])
    narrow, broad = (each.run(sample_pixels, steering) for each in (engine, wide))
    np.testing.assert_allclose(narrow.logits, broad.logits, atol=1e-5)


class Counted:
    """An engine of known speed, so that the choice is predictable."""

    def __init__(self, engine: Engine, seconds: float):
        self.engine, self.seconds, self.runs = engine, seconds, 0

    def run(self, *inputs: Any) -> Outputs:
        self.runs += 1
        return replace(self.engine.run(*inputs), seconds=self.seconds)


def test_single_calls_run_on_the_session_that_was_faster_recently(
    bundle: Bundle, sample_pixels: NDArray[np.uint8]
) -> None:
    engine = Engine(bundle, "cpu", 1)
    first, second = Counted(engine, 0.2), Counted(engine, 0.1)
    quickest = Quickest(first, second)
    steering = resolve(bundle, "", NEUTRAL, 1.0).arrays
    for _ in range(2 * COMPARE_EVERY):
        quickest.run(sample_pixels[:1], steering)
    assert (first.runs, second.runs) == (3, 2 * COMPARE_EVERY - 3), "each is tried, and the slower one now and then"
    second.seconds = 1.0
    for _ in range(COMPARE_EVERY):
        quickest.run(sample_pixels[:1], steering)
    assert first.runs > COMPARE_EVERY - 3
