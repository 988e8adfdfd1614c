"""A served bundle: images and steering in, answers out. Counts everything."""

import asyncio
import math
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from service.access_log import current
from service.batcher import Batcher, BatchStats
from service.calls import Answer
from service.config import Settings
from service.counting import CUSTOM, NONE, OTHER, Key, NoProfile
from service.dial import FREE, Forced, budget_bias, floor_of
from service.errors import Overloaded
from service.explain import Explainer, Explanation
from service.lowering import Brownout
from service.metrics import Metrics, ModelMetrics
from service.profiles import Profiles
from service.shadow import LoweredShadow
from service.statistics import Statistics
from service.steering import Permission, Steering, joined, resolve, stack
from service.steering_tensors import from_tensors, with_biases
from service.tuning import Surroundings, start
from training.steering import NEUTRAL, SteeringArrays, Terms

MAX_RESOLVED = 4096
"""Limit of the steerings (profile x strength x budget) that a model caches; the least recently used go first."""
SLICE_SECONDS = 0.01
"""How long a request may use a thread of the pool before it is another request's turn."""
T = TypeVar("T")
Images = NDArray[np.uint8] | Sequence[Callable[[], NDArray[np.uint8]]]
"""uint8 (B, height, width, channels), or a decoder for each image."""


class Model:
    """Answers calls. They raise InvalidRequest from the decoders, and Overloaded, OverLimit, Expired or Stopping."""

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        metrics: Metrics,
        pool: ThreadPoolExecutor,
        surroundings: Surroundings,
        own_settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Loads the graph and checks it. own_settings: of the model, in place of the server's (serving_file.py). Raises
        BundleError or EngineError."""
        self.own_settings = own_settings
        settings = settings.model_copy(update=own_settings)
        self.settings = settings
        """The settings that hold for this model."""
        self.bundle = bundle
        """The bundle with the profiles of the last use()."""
        self.own = bundle
        """The bundle as it was loaded, without profiles of the profile folder."""
        self.default_budget: float | None = None
        """The budget of requests that name none."""
        if settings.default_budget is not None and bundle.dial is not None:
            self.default_budget = max(settings.default_budget, bundle.dial.lowest)
        instances = start(bundle, settings, surroundings)
        self.engine, self.plan = instances.engines[0], instances.plan
        self._explainer = Explainer(bundle)  # read now: its file has just been checked
        self.statistics = Statistics()
        self._in_flight = 0
        self._resolved = _resolver(bundle)
        self._gates = [bundle.manifest.gated_blocks.index(site.block) for site in bundle.manifest.sites]
        """For each site, the index of its block among the gated blocks."""
        self._target = settings.target_latency_ms / 1000
        self._pool = pool
        self._metrics: ModelMetrics = metrics.for_model(
            bundle, self.engine.graph_name, self.engine.provider, self.plan, self.engine.on_gpu
        )
        counted, statistics = self._metrics, self.statistics

        def count_batch(stats: BatchStats) -> None:  # not a method: a cycle would keep the session in memory
            counted.batch(stats)
            statistics.batch(stats.images, stats.seconds)

        self.batcher = Batcher(
            instances.engines,
            self.plan.max_batch,
            settings.max_delay_ms / 1000,
            settings.max_queue,
            count_batch,
            self._metrics.dropped,
            bundle.manifest.name,
            instances.lone,
            self.engine,
            self._brownout(len(instances.engines)) if self._target else None,
        )
        self._lowered_shadow = LoweredShadow(
            self.batcher,
            settings.shadow_fraction,
            settings.max_queue / 2,
            lambda steering, agreed: counted.shadowed_lowered(_label(steering), agreed),
        )
        batcher = weakref.ref(self.batcher)  # or the gauges would keep the session in memory

        def queue() -> tuple[int, float, float]:
            alive = batcher()
            return (alive.queued, alive.work, alive.level) if alive else (0, 0.0, 0.0)

        self._metrics.follow_queue(queue, settings.max_queue)

    @property
    def in_force(self) -> dict[str, Any]:
        """The settings that hold for this model, beside its plan and its graph; default_budget only if there is one."""
        names = (
            "max_queue", "max_delay_ms", "max_images", "default_profile", "min_budget", "target_latency_ms",
            "shadow_fraction",
        )  # fmt: skip
        of_budget = {} if self.default_budget is None else {"default_budget": self.default_budget}
        return {name: getattr(self.settings, name) for name in names} | of_budget

    async def predict(
        self, images: Images, steering: Steering, seconds_left: float | None, residual: bool = False
    ) -> Answer:
        """The answer. seconds_left: to the deadline, None without one; residual: whether to include residuals."""
        count = len(images)
        _record(count, steering, self._group(steering), count)
        shadowed = self._shadowed(count, steering)
        order = [*range(count), *shadowed]
        both = joined([(steering, count), (self._unsteered(steering), len(shadowed))]) if shadowed else steering
        answer, pixels = await self._run(images, order, both, seconds_left, residual)
        outputs = answer.outputs
        if shadowed:
            outputs = answer.outputs.rows(slice(0, count))
            unsteered = answer.outputs.rows(slice(count, len(order)))
            self._metrics.shadowed(_label(steering), outputs.rows(np.array(shadowed)), unsteered)
        self._metrics.answered(_label(steering), outputs, steering.budget)
        if answer.lowered:
            self._metrics.lowered(_label(steering), outputs, answer.lowered.own)
            if self.settings.shadow_fraction:
                self._lowered_shadow.lowered(pixels, steering, outputs)
        return replace(answer, outputs=outputs)

    async def compare(self, images: Images, steering: Steering, seconds_left: float | None) -> tuple[Answer, Answer]:
        """The images unsteered and steered, side by side in the same batch, at the same budget."""
        count, without = len(images), self._unsteered(steering)
        _record(count, steering, self._group(steering), 2 * count)
        order = [index for index in range(count) for _ in range(2)]
        rows = [steering.rows(slice(index, index + 1)) for index in range(count)]
        pairs = joined([(part, 1) for row in rows for part in (without, row)])
        answer, _ = await self._run(images, order, pairs, seconds_left, False)
        unsteered, steered = (answer.outputs.rows(slice(first, 2 * count, 2)) for first in (0, 1))
        self._metrics.answered(NONE, unsteered, steering.budget)
        self._metrics.answered(_label(steering), steered, steering.budget)
        return replace(answer, outputs=unsteered), replace(answer, outputs=steered)

    async def explain(
        self, images: Images, steering: Steering, seconds_left: float | None, latents: int
    ) -> tuple[Answer, list[list[Explanation]]]:
        """The answers, and by image and site the latents with the largest values, at most `latents` unsteered ones.
        Never lowered by brownout."""
        steering = replace(steering, permission=None)
        answer = await self.predict(images, steering, seconds_left, residual=True)
        residual = answer.outputs.residual
        assert residual is not None

        def explain(image: int) -> list[Explanation]:
            row = steering.rows(slice(image, image + 1)).arrays
            biases = [None if row.gate_bias is None else row.gate_bias[0, place] for place in self._gates]
            return [
                self._explainer.explain(site, x, row, bias, latents)
                for site, (x, bias) in enumerate(zip(residual[image], biases, strict=True))
            ]

        return answer, await self.in_turns([partial(explain, image) for image in range(len(images))])

    async def in_turns(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of the calls, run in the pool in time slices: requests take turns, and a cancelled one stops."""
        loop = asyncio.get_running_loop()
        done: list[T] = []
        while len(done) < len(calls):
            done += await loop.run_in_executor(self._pool, _some, calls[len(done) :])
        return done

    def steering(
        self,
        profile: str,
        terms: Terms,
        strength: float,
        made_for: str = "",
        budget: float | None = None,
        forced: Forced = FREE,
        min_budget: float | None = None,
    ) -> Steering:
        """The steering of a request, checked (service/steering.py). Profiles at a strength and a budget are cached.

        The default profile stands in for one that neither names a profile nor has terms, unless its strength is 0.
        """
        if not terms:
            profile = self._profile(profile, strength)
        resolved: Callable[[float | None], Steering] = (
            (lambda at: resolve(self.bundle, profile, terms, strength, made_for, at, forced))
            if terms or made_for or forced
            else (lambda at: self._resolved(profile, strength, at))
        )
        return self._permitted(resolved, strength, budget, min_budget)

    async def steering_of(
        self,
        terms: SteeringArrays | None,
        gate_bias: NDArray[np.float32] | None,
        profile: str,
        strength: float,
        budget: float | None,
        min_budget: float | None = None,
    ) -> Steering:
        """The steering of tensors, checked in the pool, as they may be large. terms: None for those of the profile;
        gate_bias: (B, G, U), added, or None."""
        bundle, loop = self.bundle, asyncio.get_running_loop()

        def read(at: float | None) -> Steering:
            steering = (
                self._resolved(self._profile(profile, strength), strength, at)
                if terms is None
                else from_tensors(bundle, terms, strength, at)
            )
            return steering if gate_bias is None else with_biases(bundle, steering, gate_bias, strength)

        self._in_flight += 1
        try:
            return await loop.run_in_executor(self._pool, self._permitted, read, strength, budget, min_budget)
        finally:
            self._in_flight -= 1

    def _profile(self, name: str, strength: float) -> str:
        """The profile of a request without terms: the default one where it names none, unless its strength is 0."""
        return name or (self.settings.default_profile if strength else "")

    def _permitted(
        self,
        resolved: Callable[[float | None], Steering],
        strength: float,
        budget: float | None,
        min_budget: float | None,
    ) -> Steering:
        """The steering at a budget, None for the default one, with the permission to lower it. resolved: the steering
        at any budget."""
        if budget is None:
            budget = self.default_budget
        steering = resolved(budget)
        if min_budget is None and (not self._target or self.settings.min_budget == 1):
            return steering
        floor = floor_of(self.bundle, budget, min_budget, self.settings.min_budget)
        if floor is None or not self._target:
            return steering
        without = steering if budget is None else resolved(None)
        bias = partial(budget_bias, self.bundle, profile=steering.profile if strength else "")
        return replace(steering, permission=Permission(floor, without.arrays, bias))

    def _brownout(self, engines: int) -> Brownout:
        """The brownout policy, with the cost of a small and of a larger batch, measured now."""
        dense, shape = self.bundle.manifest.macs.dense, self.bundle.manifest.image.shape
        runs = []
        for images in sorted({1, min(8, self.plan.max_batch)}):
            arrays = stack([self._resolved("", 1.0, None)], [images])
            outputs = self.engine.run(np.zeros((images, *shape), np.uint8), arrays)
            runs.append((outputs.macs.sum() / dense, outputs.seconds))
        return Brownout(self._target, dense, engines, self.plan.max_batch, runs)

    def use(self, profiles: Profiles) -> None:
        """Serve these profiles beside the bundle's own. Calls in progress are not affected."""
        curves = {name: curve for name, curve in self.own.curves.items() if name not in profiles}
        self.bundle = replace(self.bundle, profiles={**self.own.profiles, **profiles}, curves=curves)
        self._resolved = _resolver(self.bundle)
        self._metrics.use(self.bundle.profiles)

    async def retire(self) -> None:
        """Answer the calls in progress, and release everything. There must be no new calls."""
        while self._in_flight:
            await asyncio.sleep(0.01)
        self._lowered_shadow.close()
        await asyncio.get_running_loop().run_in_executor(None, self.batcher.close)
        self._metrics.retire()

    async def _run(
        self, images: Images, order: Sequence[int], steering: Steering, seconds_left: float | None, residual: bool
    ) -> tuple[Answer, NDArray[np.uint8]]:
        """Run the images in this order, possibly several times each. Also returns the pixels that ran."""
        self._in_flight += 1
        deadline = math.inf if seconds_left is None else time.monotonic() + seconds_left
        record, start, decoded, answer = current(), time.monotonic(), None, None
        try:
            pixels = images if isinstance(images, np.ndarray) else await self._decoded(images)
            decoded = time.monotonic() - start
            self._metrics.decoded(decoded)
            record.decode_seconds = None if isinstance(images, np.ndarray) else decoded
            if len(order) > len(pixels):
                pixels = pixels[list(order)]
            if course := record.course:
                course.decoding = None if isinstance(images, np.ndarray) else (start, decoded)
                course.queued = time.monotonic()
            answer = await self.batcher.submit(pixels, steering, deadline, residual, course.batches if course else None)
            record.queue_seconds, record.inference_seconds = answer.queue_seconds, answer.outputs.seconds
            record.budget_applied = answer.lowered.budget if answer.lowered else None
        except Overloaded:
            self._metrics.dropped("queue_full", len(order))
            raise
        finally:
            self._in_flight -= 1
            self.statistics.call(time.monotonic() - start, decoded, answer)
        return answer, pixels

    async def _decoded(self, decoders: Sequence[Callable[[], NDArray[np.uint8]]]) -> NDArray[np.uint8]:
        """The decoded images (B, height, width, channels)."""
        pixels = np.empty((len(decoders), *self.bundle.manifest.image.shape), np.uint8)

        def put(index: int) -> None:
            pixels[index] = decoders[index]()

        await self.in_turns([partial(put, index) for index in range(len(decoders))])
        return pixels

    def _group(self, steering: Steering) -> str:
        """Of the profile: its kind; OTHER when it was removed during the call."""
        key = _label(steering)
        if isinstance(key, NoProfile):
            return key.value
        return str(self.bundle.profiles[key].kind) if key in self.bundle.profiles else OTHER.value

    def _unsteered(self, steering: Steering) -> Steering:
        """No steering, at the same budget."""
        return self._resolved("", 1.0, steering.budget)

    def _shadowed(self, count: int, steering: Steering) -> list[int]:
        """The steered images of a call to run unsteered as well; none while the queue is more than half full, or
        budgets are lowered."""
        if not self.settings.shadow_fraction or _label(steering) is NONE:
            return []
        if 2 * (self.batcher.work + 2 * count) > self.settings.max_queue or self.batcher.level:
            return []
        return [index for index in range(count) if random.random() < self.settings.shadow_fraction]


def _record(images: int, steering: Steering, group: str, to_run: int) -> None:
    """Note what a call asks for. group: as of Record; to_run: images, which its client must be allowed to run now."""
    record = current()
    record.images, record.budget = images, steering.budget
    record.profile, record.group = steering.profile or ("custom" if steering.custom else ""), group
    if record.admission:
        record.admission.take(to_run)


def _resolver(bundle: Bundle) -> Callable[[str, float, float | None], Steering]:
    """A cached function from a profile, a strength and a budget to the steering."""

    @lru_cache(MAX_RESOLVED)
    def resolved(profile: str, strength: float, budget: float | None) -> Steering:
        return resolve(bundle, profile, NEUTRAL, strength, budget=budget)

    return resolved


def _some(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of the first calls: at least one, and as many as SLICE_SECONDS allow."""
    end, done = time.perf_counter() + SLICE_SECONDS, []
    for call in calls:
        done.append(call())
        if time.perf_counter() > end:
            break
    return done


def _label(steering: Steering) -> Key:
    """The key that the steering is counted under: NONE for a profile at strength 0."""
    return NONE if steering.off else steering.profile or (CUSTOM if steering.custom else NONE)
