"""The batcher over the real engine and the committed bundle."""

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from service import batcher
from service import patience as module_patience
from service.batcher import Batcher, BatchStats
from service.calls import Answer, Call, CallQueue
from service.engine import Engine, Outputs, joined
from service.errors import Expired, InvalidRequest, Overloaded, Stopping
from service.steering import Steering, resolve, stack
from training.steering import NEUTRAL, SteeringArrays, SteeringTerm

LOGIT_TOLERANCE = 2e-4
"""|difference| of a logit between batches of different composition."""


class HeldEngine:
    """The real engine behind a door, so that a test can fill the queue while a batch is in flight."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.fails_from = math.inf
        """Number of images in a batch from which the engine fails."""

    def run(
        self, images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False, digest: str = ""
    ) -> Outputs:
        self.entered.set()
        assert self.open.wait(30)
        if len(images) >= self.fails_from:
            raise RuntimeError("out of memory")
        return self.engine.run(images, steering, residual)


class Parts:
    def __init__(
        self, engine: Engine, steerings: list[Steering], pixels: NDArray[np.uint8], engines: int = 1, delay: float = 0.0
    ):
        self.steerings, self.pixels = steerings, pixels
        self.engines = [HeldEngine(engine) for _ in range(engines)]
        self.engine, self.lone = self.engines[0], HeldEngine(engine)
        self.batches: list[BatchStats] = []
        self.drops: list[tuple[str, int]] = []
        self.batcher = Batcher(
            self.engines, 8, delay, 20, self.batches.append,
            lambda reason, count: self.drops.append((reason, count)), "t", self.lone if engines > 1 else None,
        )  # fmt: skip

    def submit(self, images: int, steering: int = 0, deadline: float = math.inf) -> "asyncio.Task[Answer]":
        """Submit a call with this many images."""
        return asyncio.create_task(self.batcher.submit(self.pixels[:images], self.steerings[steering], deadline))

    async def held(self, images: int) -> "asyncio.Task[Answer]":
        """Submit a call that occupies the engine until its door opens."""
        self.engine.open.clear()
        call = self.submit(images)
        await asyncio.to_thread(self.engine.entered.wait, 30)
        return call


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Engine:
    return Engine(bundle, "cpu", 1)


@pytest.fixture
def parts(engine: Engine, steerings: list[Steering], sample_pixels: NDArray[np.uint8]) -> Iterator[Parts]:
    parts = Parts(engine, steerings, sample_pixels, delay=0.01)
    yield parts
    parts.engine.open.set()
    parts.batcher.close()


@pytest.fixture
def pair(engine: Engine, steerings: list[Steering], sample_pixels: NDArray[np.uint8]) -> Iterator[Parts]:
    """Two engines, and a lone one."""
    pair = Parts(engine, steerings, sample_pixels, engines=2)
    yield pair
    for each in pair.engines:
        each.open.set()
    pair.batcher.close()


@pytest.fixture(scope="module")
def steerings(bundle: Bundle) -> list[Steering]:
    """No steering, every profile, a strong one, inline terms."""
    profiles = [resolve(bundle, name, NEUTRAL, 1.0) for name in bundle.profiles]
    inline = resolve(bundle, "", {0: (SteeringTerm(5, 0.0, 30.0), SteeringTerm(9, -2.0, 1.0))}, 1.0)
    return [resolve(bundle, "", NEUTRAL, 1.0), *profiles, resolve(bundle, "Shirt", NEUTRAL, 2.5), inline]


def same(found: Answer, expected: Outputs, row: int = 0) -> None:
    """Equal within the tolerance, unless a gate within rounding of its threshold decided differently."""
    alike = (found.outputs.gate_logit[row] > 0) == (expected.gate_logit[0] > 0)
    assert (alike | (np.abs(expected.gate_logit[0]) < 1e-3)).all()
    if alike.all():
        np.testing.assert_allclose(found.outputs.logits[row], expected.logits[0], atol=LOGIT_TOLERANCE)


async def test_a_batch_of_mixed_profiles_equals_the_single_requests(parts: Parts, engine: Engine) -> None:
    chosen = [(parts.pixels[i : i + 1], parts.steerings[i % len(parts.steerings)]) for i in range(20)]
    answers = await asyncio.gather(*(parts.batcher.submit(image, s, math.inf) for image, s in chosen))
    assert max(stats.images for stats in parts.batches) > 1, "nothing was batched"
    for (image, steering), answer in zip(chosen, answers, strict=True):
        same(answer, engine.run(image, steering.arrays))


async def test_a_batch_that_does_not_end_is_told_of(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.engine.open.clear()
    call = parts.submit(1)
    await asyncio.to_thread(parts.engine.entered.wait)
    assert parts.batcher.alive
    monkeypatch.setattr(batcher, "HANGS_AFTER", 0.0)
    assert not parts.batcher.alive
    parts.engine.open.set()
    await call
    while min(parts.batcher._started) < math.inf:
        await asyncio.sleep(0.01)
    assert parts.batcher.alive


async def test_a_call_larger_than_a_batch_is_split_and_put_together(parts: Parts, engine: Engine) -> None:
    answer = await parts.submit(19, 3)
    assert sorted(stats.images for stats in parts.batches) == [3, 8, 8]
    for row in range(19):
        same(answer, engine.run(parts.pixels[row : row + 1], parts.steerings[3].arrays), row)


def test_residuals_of_some_batches_are_no_residuals_of_a_call(
    engine: Engine, sample_pixels: NDArray[np.uint8], steerings: list[Steering]
) -> None:
    """A call without residuals shares one of its two batches with a call that requests them."""
    with_, without = (engine.run(sample_pixels[:2], stack([steerings[3]], [2]), residual) for residual in (True, False))
    assert joined([with_, without]).residual is None
    assert joined([with_, without]).rows(np.array([3])).logits.shape[0] == 1
    residual = joined([with_, with_]).residual
    assert residual is not None
    assert len(residual) == 4


async def test_calls_beyond_the_queues_limit_are_refused_and_the_rest_answered(parts: Parts) -> None:
    first = await parts.held(8)
    waiting = parts.submit(20)
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="queue full: 20 queued \\+ 1 new > limit 20"):
        await parts.submit(1)
    with pytest.raises(InvalidRequest, match=r"21 images .* exceed the queue limit of 20"):
        await parts.submit(21)
    parts.engine.open.set()
    assert len((await first).outputs.logits) == 8
    assert len((await waiting).outputs.logits) == 20
    assert parts.batcher.queued == 0


async def test_the_first_batch_tells_how_long_a_full_queue_will_take(parts: Parts) -> None:
    await parts.submit(8)
    parts.engine.entered.clear()
    calls = [await parts.held(8), parts.submit(20)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await parts.submit(1)
    parts.engine.open.set()
    await asyncio.gather(*calls)
    assert caught.value.retry_after_seconds >= 0.05 + 1.5 * 20 * parts.batches[0].seconds / 8


async def test_cancelled_and_expired_calls_are_dropped_before_inference(parts: Parts) -> None:
    first = await parts.held(8)
    gone = parts.submit(3, 1)
    late = parts.submit(2, 1, time.monotonic() + 0.01)
    kept = parts.submit(1, 1)
    await asyncio.sleep(0.05)
    gone.cancel()
    await asyncio.sleep(0)
    parts.engine.open.set()
    with pytest.raises(Expired, match="deadline passed"):
        await late
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert len((await kept).outputs.logits) == 1
    assert len((await first).outputs.logits) == 8
    assert sorted(parts.drops) == [("cancelled", 3), ("deadline", 2)]
    assert [stats.images for stats in parts.batches] == [8, 1]


async def test_an_expired_call_is_dropped_even_if_no_other_call_ends(parts: Parts) -> None:
    first = await parts.held(8)
    late = parts.submit(2, 1, time.monotonic() + 0.01)
    await asyncio.sleep(0.05)
    parts.engine.open.set()
    with pytest.raises(Expired, match="deadline passed"):
        await late
    await first
    assert parts.drops == [("deadline", 2)]


async def test_the_images_of_a_call_that_have_run_are_not_dropped(
    steerings: list[Steering], sample_pixels: NDArray[np.uint8]
) -> None:
    drops: list[tuple[str, int]] = []
    queue = CallQueue(None, lambda reason, images: drops.append((reason, images)))
    future = asyncio.get_running_loop().create_future()
    queue.append(Call(sample_pixels[:19], steerings[0], False, time.monotonic(), time.monotonic(), future))
    queue.take(8)
    queue.drop_finished()
    assert (drops, queue.images, queue.oldest) == ([("deadline", 11)], 0, None)
    with pytest.raises(Expired):
        await future


async def test_a_call_waits_until_its_last_batch_starts(
    engine: Engine, steerings: list[Steering], sample_pixels: NDArray[np.uint8]
) -> None:
    call = Call(sample_pixels[:3], steerings[0], False, math.inf, 10.0, asyncio.get_running_loop().create_future())
    parts = [engine.run(sample_pixels[rows], steerings[0].arrays) for rows in (slice(2), slice(2, 3))]
    assert call.add(0, 11.0, parts[0]) is None
    answer = call.add(2, 15.0, parts[1])
    assert answer is not None
    assert answer.queue_seconds == 5.0
    assert answer.outputs.seconds == pytest.approx(parts[0].seconds + parts[1].seconds)


def test_gates_near_their_threshold_are_counted_on_both_sides(
    engine: Engine, sample_pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.NEAR_THRESHOLD", 1.0)
    outputs = engine.run(sample_pixels, resolve(engine.bundle, "", NEUTRAL, 1.0).arrays)
    near = np.abs(outputs.gate_logit) < 1
    assert (near & (outputs.gate_logit > 0)).any()
    assert (near & (outputs.gate_logit < 0)).any()
    np.testing.assert_array_equal(outputs.near_threshold, near.sum((1, 2)))


async def test_a_cancelled_call_leaves_its_room_in_the_queue_at_once(parts: Parts) -> None:
    first = await parts.held(8)
    gone = parts.submit(20)
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    kept = parts.submit(20)
    await asyncio.sleep(0)
    assert not kept.done(), "the previous batch is still running"
    parts.engine.open.set()
    assert len((await kept).outputs.logits) == 20
    assert len((await first).outputs.logits) == 8
    assert parts.drops == [("cancelled", 20)]


async def test_calls_take_turns_so_a_small_one_waits_for_a_batch_of_each_large_one(parts: Parts) -> None:
    """Batches of 8: one is in flight, and calls of 17 images and of 1 come. In the order of arrival 1 would be last."""
    done: list[int] = []

    async def call(count: int) -> None:
        answer = await parts.batcher.submit(parts.pixels[:count], parts.steerings[0], math.inf)
        assert len(answer.outputs.logits) == count
        done.append(count)

    parts.engine.open.clear()
    calls = [asyncio.create_task(call(8))]
    await asyncio.to_thread(parts.engine.entered.wait, 30)
    for count in (17, 1):
        calls.append(asyncio.create_task(call(count)))
        await asyncio.sleep(0)
    assert parts.batcher.queued == 18
    parts.engine.open.set()
    await asyncio.gather(*calls)
    assert [stats.images for stats in parts.batches] == [8, 8, 1, 8, 1]
    assert done == [8, 1, 17]
    assert parts.batcher.queued == 0


async def test_a_failed_batch_is_run_call_by_call_and_only_the_cause_fails(
    parts: Parts, engine: Engine, steerings: list[Steering], sample_pixels: NDArray[np.uint8]
) -> None:
    parts.engine.fails_from = 4
    calls = [
        parts.batcher.submit(sample_pixels[first : first + count], steerings[0], math.inf)
        for first, count in ((0, 1), (10, 4), (20, 2))
    ]
    first, too_much, last = await asyncio.gather(*calls, return_exceptions=True)
    assert str(too_much) == "out of memory"
    assert isinstance(first, Answer)
    assert isinstance(last, Answer)
    same(first, engine.run(sample_pixels[:1], steerings[0].arrays))
    same(last, engine.run(sample_pixels[20:21], steerings[0].arrays))
    assert [stats.images for stats in parts.batches] == [1, 2]
    parts.engine.fails_from = math.inf
    assert len((await parts.submit(4)).outputs.logits) == 4
    assert parts.batcher.alive


async def test_close_answers_waiting_calls_and_refuses_new_ones(
    engine: Engine, steerings: list[Steering], sample_pixels: NDArray[np.uint8]
) -> None:
    parts = Parts(engine, steerings, sample_pixels, delay=0.01)
    waiting = parts.submit(20)
    await asyncio.sleep(0)
    await asyncio.to_thread(parts.batcher.close)
    assert len((await waiting).outputs.logits) == 20
    with pytest.raises(Stopping):
        await parts.submit(1)


async def test_free_engines_share_what_waits(pair: Parts, engine: Engine) -> None:
    answer = await pair.submit(7, 2)
    assert sorted(stats.images for stats in pair.batches) == [3, 4]
    for row in range(7):
        same(answer, engine.run(pair.pixels[row : row + 1], pair.steerings[2].arrays), row)


async def test_one_engine_is_busy_and_another_one_answers(pair: Parts) -> None:
    for each in pair.engines:
        each.open.clear()
    slow = pair.submit(1)
    while not any(each.entered.is_set() for each in pair.engines):
        await asyncio.sleep(0.001)
    next(each for each in pair.engines if not each.entered.is_set()).open.set()
    await pair.submit(1)
    assert not slow.done()
    for each in pair.engines:
        each.open.set()
    await slow


@pytest.mark.parametrize(
    ("patience", "contended", "batches"), [(30.0, 0.0, [4, 4]), (0.01, 0.0, [4, 1, 3]), (30.0, 1e9, [4, 1, 3])]
)
async def test_an_engine_waits_for_callers_who_were_just_answered(
    engine: Engine, steerings: list[Steering], sample_pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch,
    patience: float, contended: float, batches: list[int],
) -> None:  # fmt: skip
    monkeypatch.setattr(batcher, "PATIENCE", patience)
    for name, value in {"PATIENCE": patience, "SHARE": 1e9, "CONTENDED": contended}.items():
        monkeypatch.setattr(module_patience, name, value)
    parts = Parts(engine, steerings, sample_pixels)
    await asyncio.gather(*(parts.submit(1) for _ in range(4)))
    parts.engine.entered.clear()
    early = parts.submit(1)
    started = await asyncio.to_thread(parts.engine.entered.wait, 0.3)
    assert started == (len(batches) > 2)
    await asyncio.gather(early, *(parts.submit(1) for _ in range(3)))
    parts.batcher.close()
    assert [stats.images for stats in parts.batches] == batches


async def test_calls_that_meet_no_others_run_on_the_lone_engine(pair: Parts) -> None:
    async def alone(calls: int) -> bool:
        """Whether the last of this many successive calls ran on the lone engine."""
        for _ in range(calls):
            pair.lone.entered.clear()
            await pair.submit(1)
        return pair.lone.entered.is_set()

    assert not await alone(batcher.LONE_AFTER)
    assert await alone(1)
    await asyncio.gather(*(pair.submit(1) for _ in range(2)))
    assert not await alone(batcher.LONE_AFTER - 1)


@dataclass
class Costs:
    """Graphs for some steerings, in which a batch costs a start and a time per image."""

    specialised: set[str]
    image: float
    """Cost of an image in these graphs; 1 in the general graph."""
    start: float = 0.0

    def seconds(self, rows: int, digest: str = "") -> float:
        return self.start + rows * (self.image if digest in self.specialised else 1.0)


@pytest.mark.parametrize(
    ("image", "start", "expected"),
    [
        # 0: the held one. Then A B A B A A: of one steering, as each image costs half
        (0.5, 0.0, [["A"], ["A", "A", "A", "A"], ["B", "B"]]),
        # more of them together are worth more than the graph of their own
        (0.9, 4.0, [["A"], ["A", "B", "A", "B", "A", "A"]]),
        (2.0, 0.0, [["A"], ["A", "B", "A", "B", "A", "A"]]),
    ],
)
async def test_batches_are_of_one_steering_when_that_is_faster(
    engine: Engine, bundle: Bundle, sample_pixels: NDArray[np.uint8], image: float, start: float,
    expected: list[list[str]],
) -> None:  # fmt: skip
    held = HeldEngine(engine)
    names = {"A": resolve(bundle, "Shirt", NEUTRAL, 1.0), "B": resolve(bundle, "Bag", NEUTRAL, 1.0)}
    seen: list[tuple[str, int]] = []

    def run(images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False, digest: str = "") -> Outputs:
        seen.append((digest, len(images)))
        return HeldEngine.run(held, images, steering, residual)

    held.run = run  # type: ignore[method-assign]
    costs = Costs({steering.digest for steering in names.values()}, image, start)
    batcher_ = Batcher([held], 8, 0.0, 20, lambda _: None, lambda *_: None, "t", specialists=costs)

    held.open.clear()
    first = asyncio.create_task(batcher_.submit(sample_pixels[:1], names["A"], math.inf))
    await asyncio.to_thread(held.entered.wait)
    asked = [
        asyncio.create_task(batcher_.submit(sample_pixels[i : i + 1], names[name], math.inf))
        for i, name in enumerate("ABABAA")
    ]
    await asyncio.sleep(0.05)
    held.open.set()
    await first
    answers = await asyncio.gather(*asked)
    batcher_.close()
    assert [count for _, count in seen] == [len(batch) for batch in expected]
    assert [digest for digest, _ in seen] == [
        names[batch[0]].digest if len(set(batch)) == 1 else "" for batch in expected
    ]
    for index, name in enumerate("ABABAA"):
        same(answers[index], engine.run(sample_pixels[index : index + 1], names[name].arrays))
