"""The servicer of the Open Inference Protocol: tensors in, tensors out. What its calls mean here:

- Inputs of ModelInfer: `image` UINT8 [images, height, width, channels], or `encoded_image` BYTES [images] or
  [images, 1] with JPEG, PNG, WebP, BMP or GIF files; and `steering_latent` INT64, `steering_scale` FP32 and
  `steering_shift` FP32, all three [images, sites, terms]; and `gate_bias` FP32 [images, gated blocks, units], added to
  the gate logits at the strength. The metadata does not list the tensors that steer: clients that make up data for
  every listed input would steer at random. Raw or typed contents, not both; typed ones of at most 2^18 elements a
  tensor.
- Parameters: `profile` (string), `strength`, `budget` and `min_budget` (double, int, or a string with a number).
- Outputs: `logits` FP32, `head_gate` BOOL, `gate_logit` FP32, of a model with MLP groups `mlp_gate` BOOL and, if
  requested, `residual` FP32; raw contents. With the parameter `classification` N, `logits` are BYTES [images, N]
  `logit:index:label`, the largest first.
- Parameters of the answer: the fields of receipt.py, without empty strings, counts of 0 and what does not apply.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version as package_version
from typing import Any

import grpc

from export.bundle import GATE_BIAS, Manifest
from service.config import Settings
from service.errors import InvalidRequest, NotAllowed, RequestError
from service.images import Limits, decode
from service.infer_messages import OUTPUT_TYPES, Asked, by_default, read_request, response
from service.limits import permit
from service.model import Images, Model
from service.pb import open_inference_pb2 as pb
from service.pb.open_inference_pb2_grpc import GRPCInferenceServiceServicer
from service.repository import Repository
from service.statistics import Duration
from service.steering import Steering
from service.tensors import STEERING, Tensor, read_tensors
from training.steering import NEUTRAL, SteeringArrays

Context = grpc.aio.ServicerContext[Any, Any]
EXTENSIONS = ("classification", "model_configuration", "statistics", "model_repository", "binary_tensor_data")


class OpenInferenceService(GRPCInferenceServiceServicer):
    """The RPCs of the Open Inference Protocol. They raise RequestError, which Guard turns into a status."""

    def __init__(self, repository: Repository, settings: Settings, ready: Callable[[], bool]):
        """ready: whether the server takes requests."""
        self._repository, self._settings, self._ready = repository, settings, ready
        self._limits = Limits.of(settings)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self._repository.alive)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        try:
            self._repository.get(request.name, request.version)
        except RequestError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ready())

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="steervit", version=package_version("steervit"), extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        manifest = self._repository.get(request.name, request.version).bundle.manifest
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=manifest.name,
            versions=[
                str(entry.version) for entry in self._repository.index() if entry.ready and entry.name == manifest.name
            ],
            platform="onnxruntime_onnx",
            inputs=[tensor(name="image", datatype="UINT8", shape=[-1, *manifest.image.shape])],
            outputs=[
                tensor(name=name, datatype=OUTPUT_TYPES[name], shape=[-1, *shape])
                for name, shape in _output_shapes(manifest).items()
            ],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        model = self._repository.get(request.name, request.version)
        manifest = model.bundle.manifest
        kinds = {"UINT8": pb.TYPE_UINT8, "FP32": pb.TYPE_FP32, "BOOL": pb.TYPE_BOOL}
        config = pb.ModelConfig(
            name=manifest.name,
            platform="onnxruntime_onnx",
            backend="onnxruntime",
            max_batch_size=model.settings.max_images,
            input=[pb.ModelInput(name="image", data_type=pb.TYPE_UINT8, dims=manifest.image.shape)],
            output=[
                pb.ModelOutput(name=name, data_type=kinds[OUTPUT_TYPES[name]], dims=shape)
                for name, shape in _output_shapes(manifest).items()
            ],
            instance_group=[pb.ModelInstanceGroup(count=model.plan.instances)],
            dynamic_batching=pb.ModelDynamicBatching(
                preferred_batch_size=[model.plan.max_batch],
                max_queue_delay_microseconds=round(1000 * model.settings.max_delay_ms),
            ),
            parameters={name: pb.ModelParameter(string_value=f"{value}") for name, value in model.in_force.items()},
        )
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        models = self._repository.models
        if request.name:
            named = self._repository.get(request.name, request.version)
            versions = [model for model in models if model.bundle.manifest.name == request.name]
            models = [named] if request.version else versions
        return pb.ModelStatisticsResponse(model_stats=[_statistics(model) for model in models])

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                index(
                    name=entry.name,
                    version=str(entry.version),
                    state="READY" if entry.ready else "UNAVAILABLE",
                    reason=entry.reason,
                )
                for entry in self._repository.index()
                if entry.ready or not request.ready
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        self._check_control(request.parameters)
        permit(request.model_name)
        await self._repository.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        self._check_control(request.parameters, "unload_dependents")
        permit(request.model_name)
        await self._repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _check_control(self, parameters: Iterable[str], *allowed: str) -> None:
        control = self._settings.model_control
        if control != "explicit":
            raise NotAllowed(
                f"models cannot be loaded or unloaded by clients: --model-control is {control!r}; allowed: 'explicit'"
            )
        for name in parameters:
            if name not in allowed:
                raise InvalidRequest(f"parameter {name!r} is not served; allowed: {', '.join(allowed) or 'none'}")

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> bytes:
        model = self._repository.get(request.model_name, request.model_version)
        with model.statistics.failures():
            request_id, raw = request.id, request.raw_input_contents[:]
            asked, contents = read_request(request, bool(raw))
            inputs = read_tensors(asked.tensors, raw, contents, self._most(model))
            images = self._images(model, inputs)
            steering = await self._steering(model, asked, inputs, len(images))
        answer = await model.predict(images, steering, context.time_remaining(), "residual" in asked.outputs)
        return response(request_id, model, steering, answer, asked.outputs)

    def _most(self, model: Model) -> dict[str, int]:
        """The most elements of each input: no more than these become Python objects."""
        images, terms = model.settings.max_images, self._settings.max_terms
        manifest = model.bundle.manifest
        steering = dict.fromkeys(STEERING, images * terms)
        steering[GATE_BIAS] = images * len(manifest.gated_blocks) * manifest.units
        return {**steering, "image": images * math.prod(manifest.image.shape), "encoded_image": images}

    def _images(self, model: Model, inputs: Mapping[str, Tensor]) -> Images:
        names = [name for name in ("image", "encoded_image") if name in inputs]
        if len(names) != 1:
            raise InvalidRequest(f"inputs are {sorted(inputs)}; allowed: one of image and encoded_image")
        name, images, spec = names[0], inputs[names[0]], model.bundle.manifest.image
        sizes = [spec.shape] if name == "image" else [(), (1,)]
        if images.shape[1:] not in sizes:
            allowed = " or ".join(f"[{', '.join(['images', *map(str, size)])}]" for size in sizes)
            raise InvalidRequest(f"input {name!r} has the shape {list(images.shape)}; allowed: {allowed}")
        if not 1 <= len(images) <= model.settings.max_images:
            raise InvalidRequest(f"input {name!r} has {len(images)} images; allowed: 1 to {model.settings.max_images}")
        if name == "image":
            return images
        return [
            partial(decode, bytes(image), spec, self._limits, f"encoded_image[{index}]")
            for index, image in enumerate(images.ravel().tolist())
        ]

    async def _steering(self, model: Model, asked: Asked, inputs: Mapping[str, Tensor], images: int) -> Steering:
        profile, strength, budget, min_budget = asked.profile, asked.strength, asked.budget, asked.min_budget
        tensors = [inputs[name] for name in STEERING if name in inputs]
        manifest, bias = model.bundle.manifest, inputs.get(GATE_BIAS)
        units = images, len(manifest.gated_blocks), manifest.units
        if bias is not None and bias.shape != units:
            raise InvalidRequest(f"input 'gate_bias' has the shape {list(bias.shape)}; allowed: {list(units)}")
        if not tensors and bias is None:
            return model.steering(profile, NEUTRAL, strength, budget=budget, min_budget=min_budget)
        if not tensors:
            return await model.steering_of(None, bias, profile, strength, budget, min_budget)
        if profile:
            raise InvalidRequest(
                f"parameter profile is {profile!r} and steering tensors are given too; allowed: one of them"
            )
        shapes = {tensor.shape for tensor in tensors}
        if len(tensors) != 3 or len(shapes) != 1 or tensors[0].ndim != 3 or len(tensors[0]) != images:
            by_name = {name: list(inputs[name].shape) for name in STEERING if name in inputs}
            raise InvalidRequest(
                f"steering tensors have the shapes {by_name}; allowed: {', '.join(STEERING)}, "
                f"all [{images}, {len(manifest.sites)}, terms]"
            )
        if tensors[0][0].size > self._settings.max_terms:
            raise InvalidRequest(
                f"steering tensors have {tensors[0][0].size} terms an image; allowed: {self._settings.max_terms}"
            )
        return await model.steering_of(SteeringArrays(*tensors), bias, profile, strength, budget, min_budget)


def _output_shapes(manifest: Manifest) -> dict[str, list[int]]:
    """The shapes of the default outputs, without the batch."""
    of_block = manifest.heads, manifest.units, manifest.mlp_groups
    shapes = [[len(manifest.labels)], *([len(manifest.gated_blocks), number] for number in of_block)]
    return dict(zip(by_default(manifest), shapes, strict=False))


def _statistics(model: Model) -> pb.ModelStatistics:
    seen, manifest = model.statistics, model.bundle.manifest
    batches = sorted(seen.batches.copy().items())  # a copy: the batcher's threads add to it

    def duration(value: Duration) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=value.count, ns=round(1e9 * value.seconds))

    return pb.ModelStatistics(
        name=manifest.name,
        version=str(manifest.version),
        last_inference=round(1000 * seen.last),
        inference_count=sum(size * value.count for size, value in batches),
        execution_count=sum(value.count for _, value in batches),
        inference_stats=pb.InferStatistics(
            success=duration(seen.success),
            fail=duration(seen.fail),
            queue=duration(seen.queue),
            compute_input=duration(seen.decode),
            compute_infer=duration(seen.inference),
            compute_output=duration(seen.output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=pb.StatisticDuration(count=value.count),
                compute_infer=duration(value),
                compute_output=pb.StatisticDuration(count=value.count),
            )
            for size, value in batches
        ],
    )
