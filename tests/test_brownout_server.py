"""Brownout in the batcher and the server: who is lowered, by how much, what their receipts say, and that it ends."""

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from masks import unit_mask
from numpy.typing import NDArray
from PIL import Image
from processes import SMALL, ServerProcess, serving
from prometheus_client import CollectorRegistry
from refusals import refusal
from small_models import STEERED, dial_of, images, of_kind, source_of

from export.bundle import Bundle, load_bundle
from export.write import ExportSettings, write_source
from service.batcher import Batcher
from service.calls import Answer
from service.client import Asked, AsyncClient, Client
from service.client.__main__ import main
from service.config import Settings
from service.dial import budget_bias, floor_of
from service.engine import Engine, Outputs
from service.errors import InvalidRequest, Overloaded
from service.lowering import Brownout
from service.metrics import Metrics
from service.model import Model
from service.pb import open_inference_pb2 as oi
from service.pb import steering_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.steering import Permission, Steering, resolve
from service.tuning import Surroundings
from training.steering import NEUTRAL, SteeringArrays, SteeringProfile

pytestmark = pytest.mark.slow

SETTINGS = ExportSettings("dial", attentions=("masked",), verify_images=8, accuracy_images=8)
PIXELS = images(16, 5)
SECONDS = 0.02
"""Time of an image at budget 1 on a slow engine."""
TARGET = 1.0
COUNTS = [8] * 30 + [1] * 6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    steered = of_kind("plain", 4)
    profile = SteeringProfile("b", ("b",), "by hand", STEERED, {"after": {"head_usage": 0.5}})
    source = source_of(steered, (profile,), dial_of(steered))
    return write_source(source, tmp_path_factory.mktemp("models"), SETTINGS)


class SlowEngine:
    """The real engine, slowed down in proportion to the compute that it spends."""

    def __init__(self, engine: Engine):
        self.engine, self.dense = engine, engine.bundle.manifest.macs.dense

    def run(
        self, images: NDArray[np.uint8], steering: SteeringArrays, residual: bool = False, digest: str = ""
    ) -> Outputs:
        outputs = self.engine.run(images, steering, residual)
        time.sleep(SECONDS * float(outputs.macs.sum()) / self.dense)
        return outputs


def steering_of(bundle: Bundle, budget: float | None, floor: float | None) -> Steering:
    steering = resolve(bundle, "", NEUTRAL, 1.0, budget=budget)
    if floor is None:
        return steering
    without = resolve(bundle, "", NEUTRAL, 1.0).arrays
    permission = Permission(floor, without, lambda at: budget_bias(bundle, at, ""))
    return Steering(steering.arrays, "", False, steering.digest, budget=budget, permission=permission)


def test_a_flood_is_lowered_and_not_refused(bundle: Bundle) -> None:
    """60 images at once are 1.2 s of work; with permission for most of them they are answered within the target.
    Some calls without permission are refused. A call of 64 images lowers nobody; others wait for one batch of it."""
    engine = SlowEngine(Engine(bundle, "cpu", 1))
    runs = [(work, SECONDS * work) for work in (1.0, 8.0)]
    brownout = Brownout(TARGET, engine.dense, 1, 8, runs)
    batcher = Batcher([engine], 8, 0.0, 1000, lambda _: None, lambda *_: None, "t", brownout=brownout)
    may, kept = steering_of(bundle, 1.0, 0.4), steering_of(bundle, 1.0, None)

    async def flood() -> list[tuple[float, Answer]]:
        start = time.monotonic()

        async def call(index: int) -> tuple[float, Answer]:
            answer = await batcher.submit(PIXELS[index % 16][None], kept if index % 5 == 0 else may, math.inf)
            return time.monotonic() - start, answer

        answers = await asyncio.gather(*map(call, range(60)))
        assert batcher.level > 0
        await asyncio.sleep(2 * TARGET)
        assert batcher.level == 0
        refused = await asyncio.gather(
            *(batcher.submit(PIXELS[:1], kept, math.inf) for _ in range(80)), return_exceptions=True
        )
        assert 20 < sum(isinstance(error, Overloaded) for error in refused) < 60
        late = next(error for error in refused if isinstance(error, Overloaded))
        assert "new images would be late at their lowest budgets" in str(late)
        assert 0.5 < late.retry_after_seconds < 2
        assert not any(answer.lowered for answer in refused if isinstance(answer, Answer))
        large = asyncio.create_task(batcher.submit(np.repeat(PIXELS, 4, 0), may, math.inf))
        await asyncio.sleep(SECONDS)
        begun = time.monotonic()
        await batcher.submit(PIXELS[:1], kept, math.inf)
        assert time.monotonic() - begun < 0.6 * TARGET
        assert (await large).lowered is None
        return answers

    try:
        answers = asyncio.run(flood())
    finally:
        batcher.close()
    assert max(seconds for seconds, _ in answers) < TARGET
    lowered = [answer.lowered for _, answer in answers if answer.lowered]
    assert len(lowered) > 30
    assert all(0.4 <= of.budget < of.own == 1 for of in lowered)
    assert not any(answer.lowered for _, answer in answers[::5])
    for index, (_, answer) in enumerate(answers):
        budget = answer.lowered.budget if answer.lowered else 1.0
        single = engine.engine.run(PIXELS[index % 16][None], resolve(bundle, "", NEUTRAL, 1.0, budget=budget).arrays)
        near = np.abs(single.gate_logit) < 1e-3
        assert ((answer.outputs.gate_logit > 0) == (single.gate_logit > 0))[~near].all()


def test_a_flood_of_large_calls_is_lowered_and_refused_and_small_ones_are_not(bundle: Bundle) -> None:
    """30 calls of 8 images at once are 4.8 s of work, 1.9 s at their floors. 6 calls of one image come after them."""
    engine = SlowEngine(Engine(bundle, "cpu", 1))
    brownout = Brownout(TARGET, engine.dense, 1, 8, [(work, SECONDS * work) for work in (1.0, 8.0)])
    batcher = Batcher([engine], 8, 0.0, 1000, lambda _: None, lambda *_: None, "t", brownout=brownout)
    may = steering_of(bundle, 1.0, 0.4)

    async def flood() -> list[Answer | BaseException]:
        calls = (batcher.submit(PIXELS[:count], may, math.inf) for count in COUNTS)
        return await asyncio.gather(*calls, return_exceptions=True)

    try:
        answers = asyncio.run(flood())
    finally:
        batcher.close()
    large, small = answers[:30], answers[30:]
    assert sum(isinstance(answer, Overloaded) for answer in large) > 10
    served = [answer for answer in large if isinstance(answer, Answer)]
    assert sum(answer.lowered is not None for answer in served) > 5
    for answer in small:
        assert isinstance(answer, Answer)
        assert answer.lowered is None
        assert answer.queue_seconds < 1.2 * TARGET


def test_floors_by_hand(bundle: Bundle) -> None:
    """The dial begins at 0.3; what is lowered below it has no gate biases."""
    for budget, asked, default, floor in (
        (None, None, 0.1, 0.3), (None, None, 0.6, 0.6), (0.5, None, 0.6, None), (None, None, 1.0, None),
        (0.8, 0.3 - 1e-7, 1.0, 0.3), (0.8, 0.6, 0.1, 0.6), (0.6, 0.6, 0.1, None),
    ):  # fmt: skip
        assert floor_of(bundle, budget, asked, default) == floor, (budget, asked, default)
    assert floor_of(load_bundle(SMALL / "small" / "1"), None, None, 0.1) is None


def test_the_queue_is_bounded_by_work(bundle: Bundle) -> None:
    """An image with budget 0.5 takes half of an image's room; if brownout may lower it, only that of its floor."""
    engine, opened, entered = SlowEngine(Engine(bundle, "cpu", 1)), threading.Event(), threading.Event()

    class Held(SlowEngine):
        def run(self, *arguments: Any) -> Outputs:
            entered.set()
            assert opened.wait(30)
            return super().run(*arguments)

    async def scenario(batcher: Batcher, steering: Steering, room: int) -> None:
        opened.clear()
        entered.clear()
        many = np.repeat(PIXELS, 4, 0)
        full = steering_of(bundle, 1.0, None)
        first = asyncio.create_task(batcher.submit(many[:1], full, math.inf))
        await asyncio.to_thread(entered.wait, 30)
        waiting = asyncio.create_task(batcher.submit(many[:room], steering, math.inf))
        await asyncio.sleep(0)
        assert (batcher.queued, batcher.work) == (room, pytest.approx(20))
        with pytest.raises(Overloaded, match=r"queue full: 20 queued \+ 1 new > limit 20\. Try again later"):
            await batcher.submit(many[:1], full, math.inf)
        with pytest.raises(InvalidRequest, match=r"20\.\d images at full budget .* exceed the queue limit of 20"):
            await batcher.submit(many[: room + 1], steering, math.inf)
        opened.set()
        await first
        assert len((await waiting).outputs.logits) == room

    for steering, room, brownout in (
        (steering_of(bundle, 0.5, None), 40, None),
        (steering_of(bundle, 1.0, 0.4), 50, Brownout(60.0, engine.dense, 1, 8, [(1.0, SECONDS), (8.0, 8 * SECONDS)])),
    ):
        batcher = Batcher(
            [Held(engine.engine)], 8, 0.0, 20, lambda _: None, lambda *_: None, "t", brownout=brownout
        )  # fmt: skip
        try:
            asyncio.run(scenario(batcher, steering, room))
        finally:
            opened.set()
            batcher.close()


def test_lowered_images_run_at_their_own_budget_afterwards(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.shadow.KEPT", 1000)
    registry = CollectorRegistry()
    settings = Settings(
        repository=bundle.folder, provider="cpu", tune="off", shadow_fraction=1.0, target_latency_ms=15, instances=1,
        threads=1, max_batch=8,
    )  # fmt: skip

    def count(what: str) -> float:
        found = registry.get_sample_value(
            f"steervit_brownout_{what}_total", {"model": "dial", "version": "1", "profile": "none"}
        )
        assert found is not None
        return found

    async def flood(model: Model) -> int:
        """The number of lowered answers with the label of the image's own budget."""
        steering = model.steering("", NEUTRAL, 1.0, min_budget=0.3)
        own = int((await model.predict(PIXELS[:1], steering, None)).outputs.logits.argmax())
        calls = (model.predict(PIXELS[:1], steering, None) for _ in range(300))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        lowered = [answer for answer in answers if isinstance(answer, Answer) and answer.lowered]
        assert lowered
        for _ in range(100):
            if count("shadow_images") == len(lowered) == count("images"):
                break
            await asyncio.sleep(0.1)
        await model.retire()
        return sum(int(answer.outputs.logits.argmax()) == own for answer in lowered)

    with ThreadPoolExecutor(1) as pool:
        model = Model(bundle, settings, Metrics(registry, 200), pool, Surroundings(serving=False, spinning=False))
        agreed = asyncio.run(flood(model))
    assert count("shadow_images") == count("images") > 0
    assert count("shadow_agreed") == agreed


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[ServerProcess]:
    flags = ("--instances", "1", "--threads", "1", "--max-batch", "8", "--target-latency-ms", "15")
    with serving(bundle.folder.parents[1], *flags) as running:
        yield running


ASKED: tuple[Asked, ...] = (
    {"min_budget": 0.3},
    {"budget": 0.9, "min_budget": 0.5, "profile": "b"},
    {"budget": 0.8},
    {"terms": STEERED, "min_budget": 0.4},
)


def test_answers_are_those_of_the_budget_in_the_receipt(server: ServerProcess) -> None:
    async def flood() -> list[tuple[Asked, pb.PredictResponse]]:
        async with AsyncClient(server.address, attempts=1) as client:

            async def call(index: int) -> tuple[Asked, pb.PredictResponse] | None:
                asked = ASKED[index % len(ASKED)]
                try:
                    return asked, await client.predict(list(PIXELS[:4]), **asked)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    return None

            return [answer for answer in await asyncio.gather(*map(call, range(400))) if answer]

    answers = asyncio.run(flood())
    lowered = [(asked, answer) for asked, answer in answers if answer.receipt.brownout]
    assert {tuple(asked) for asked, _ in lowered} == {tuple(asked) for asked in ASKED if "min_budget" in asked}
    saved = sum(server.count("steervit_brownout_images_total", profile=profile) for profile in ("none", "b", "custom"))
    assert saved == 4 * len(lowered)
    assert server.count("steervit_brownout_macs_saved_total") > 0
    with Client(server.address) as client:
        seen = set()
        for asked, answer in answers:
            applied = round(answer.receipt.budget_applied, 6) if answer.receipt.HasField("budget_applied") else None
            if not answer.receipt.brownout:
                assert applied == asked.get("budget")
                continue
            assert applied is not None
            assert asked["min_budget"] <= applied < asked.get("budget", 1)
            if (asked.get("profile"), applied) in seen:
                continue
            seen.add((asked.get("profile"), applied))
            plain: Asked = {key: value for key, value in asked.items() if key != "min_budget"}  # type: ignore[assignment]
            plain["budget"] = applied
            single = client.predict(list(PIXELS[:4]), **plain)
            assert not single.receipt.brownout
            np.testing.assert_array_equal(unit_mask(single.predictions), unit_mask(answer.predictions))
    time.sleep(0.1)
    assert server.count("steervit_brownout_level", model="dial") == 0


def test_what_is_told_and_what_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(picture := tmp_path / "picture.png")
    flags = ("--address", server.address, "--budget", "0.9", "--min-budget", "0.5", str(picture))
    assert main(["predict", *flags]) == 0
    assert main(["load", "--seconds", "0.2", *flags]) == 0
    with Client(server.address) as client:
        for asked, sentence in (
            ({"min_budget": 0.2}, "min_budget is 0.2; allowed: 0.3 to 1, the budget"),
            ({"budget": 0.6, "min_budget": 0.7}, "min_budget is 0.7; allowed: 0.3 to 0.6, the budget"),
            ({"min_budget": math.nan}, "min_budget is nan; allowed: 0.3 to 1, the budget"),
        ):
            assert refusal(client.predict, [PIXELS[0]], **asked) == ("INVALID_ARGUMENT", sentence)
        receipt = client.predict([PIXELS[0]], budget=0.6, min_budget=0.6).receipt
        assert (round(receipt.budget_applied, 6), receipt.brownout) == (0.6, False)
        with pytest.raises(ValueError, match=r"min_budget is 0\.5; allowed: only for predict"):
            client.compare([PIXELS[0]], min_budget=0.5)
    request = oi.ModelInferRequest(model_name="dial")
    request.inputs.add(name="image", datatype="UINT8", shape=PIXELS[:2].shape)
    request.raw_input_contents.append(PIXELS[:2].tobytes())
    stub = GRPCInferenceServiceStub(grpc.insecure_channel(server.address))  # type: ignore[no-untyped-call]
    request.parameters["budget"].double_param = 0.7
    request.parameters["min_budget"].string_param = "0.5"
    answer = stub.ModelInfer(request, timeout=20)
    assert answer.parameters["budget_applied"].double_param == 0.7
    assert "brownout" not in answer.parameters
    request.parameters["min_budget"].double_param = 0.8
    assert refusal(stub.ModelInfer, request, timeout=20)[1] == "min_budget is 0.8; allowed: 0.3 to 0.7, the budget"


def test_a_load_reports_what_was_spent_and_how_often_budgets_were_lowered(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(PIXELS[0]).save(picture := tmp_path / "picture.png")
    names = ("steervit_brownout_images_total", "steervit_macs_spent_total", "steervit_macs_dense_total")
    before = [server.count(name, profile="none") for name in names]
    many = (
        "--concurrency", "100", "--images-per-call", "4", "--seconds", "1", "--budget", "0.9", "--min-budget", "0.3",
    )  # fmt: skip
    assert main(["load", "--json", "--address", server.address, *many, str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    counted = (server.count(name, profile="none") - count for name, count in zip(names, before, strict=True))
    lowered, spent, dense = counted
    assert report["lowered"] == lowered / report["images"] > 0
    assert report["compute_fraction"] == pytest.approx(spent / dense, rel=0.05)  # the first call is not in the report
