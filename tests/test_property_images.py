"""Hostile images and random changes of them: each gets a sentence, within the limits, and the server stays alive.

tests/corpus/make.py writes the files of tests/corpus; their names begin with the expected result.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import PREDICT, Live
from processes import MODELS, ROOT, SAMPLES, serving

from service.pb import steering_pb2 as pb

CORPUS = sorted(path for path in (ROOT / "tests" / "corpus").iterdir() if path.suffix != ".py" and path.is_file())
REAL = next((SAMPLES / "Coat").glob("*.png"))
MEMORY = 400 * 2**10
"""Limit of the server's memory in kB. It has 130,000 before the first image."""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(MODELS) as running:  # of its own, for its memory
        yield Live(running.address, REAL)
        status = Path(f"/proc/{running.process.pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0])
    assert peak < MEMORY, f"the server has taken {peak} kB"


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_each_nasty_image_is_answered_or_refused_with_a_sentence(live: Live, path: Path) -> None:
    said = live.send(PREDICT, pb.PredictRequest(images=[pb.Image(encoded=path.read_bytes())]))
    if path.name.startswith("ok_"):
        assert said.status == "OK", said
    else:
        assert said.status == "INVALID_ARGUMENT"
        assert said.sentence.startswith("images[0].encoded ")
        assert "allowed: " in said.sentence


def test_the_corpus_is_there_and_small() -> None:
    assert len(CORPUS) > 25
    assert sum(path.stat().st_size for path in CORPUS) < 100_000


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_image_is_answered_or_refused_with_a_sentence(live: Live, data: st.DataObject) -> None:
    """Bytes of a file, of the corpus or a real one, are changed, cut out or joined with another file's."""
    content = bytearray(data.draw(st.sampled_from([REAL, *CORPUS])).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 200)) | st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    if data.draw(st.booleans()):
        content += data.draw(st.sampled_from(CORPUS)).read_bytes()
    said = live.send(PREDICT, pb.PredictRequest(images=[pb.Image(encoded=bytes(content))]))
    assert said.status in ("OK", "INVALID_ARGUMENT")
