"""The servicer of steering.v1: protobuf in, protobuf out. The code that it calls knows no protobuf."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from export.bundle import Manifest
from service.calls import Answer
from service.config import Settings
from service.dial import Forced, Unit
from service.engine import Outputs
from service.errors import InvalidRequest
from service.explain import Explanation
from service.images import Limits, decode, from_raw
from service.model import Images, Model
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceServicer
from service.receipt import measures, origin
from service.repository import Repository
from service.steering import Steering, named
from training.dial import Point
from training.steering import SteeringError, SteeringProfile, SteeringTerm, digest

Context = grpc.aio.ServicerContext[Any, Any]
Request = pb.PredictRequest | pb.CompareRequest | pb.ExplainRequest
MAX_LATENTS = 100
MESSAGES = 2000
"""Number of an answer's messages that are made in one turn, which takes some milliseconds."""


class SteeringService(SteeringServiceServicer):
    """The RPCs of proto/steering.proto. They raise RequestError, which Guard turns into a status."""

    def __init__(self, repository: Repository, settings: Settings):
        self._repository, self._settings = repository, settings
        self._limits = Limits.of(settings)

    async def Predict(self, request: pb.PredictRequest, context: Context) -> bytes:
        model, images, steering, top_k = self._read(request)
        answer = await model.predict(images, steering, context.time_remaining())
        manifest, outputs = model.bundle.manifest, answer.outputs

        def part(rows: slice) -> pb.PredictResponse:
            return pb.PredictResponse(predictions=predictions(manifest, outputs.rows(rows), top_k))

        end = pb.PredictResponse(receipt=receipt(model, steering, answer))
        return await written(model, len(images), _messages(manifest, top_k), part, end)

    async def Compare(self, request: pb.CompareRequest, context: Context) -> bytes:
        model, images, steering, top_k = self._read(request)
        pair = await model.compare(images, steering, context.time_remaining())
        manifest = model.bundle.manifest

        def part(rows: slice) -> pb.CompareResponse:
            unsteered, steered = (answer.outputs.rows(rows) for answer in pair)
            return pb.CompareResponse(comparisons=comparisons(manifest, unsteered, steered, top_k))

        end = pb.CompareResponse(receipt=receipt(model, steering, pair[1]))
        return await written(model, len(images), 2 * _messages(manifest, top_k), part, end)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> bytes:
        model, images, steering, top_k = self._read(request)
        with model.statistics.failures():
            if not 0 <= request.latents <= MAX_LATENTS:
                raise InvalidRequest(f"latents is {request.latents}; allowed: 0 (10) to {MAX_LATENTS}")
        answer, explained = await model.explain(images, steering, context.time_remaining(), request.latents or 10)
        manifest, outputs = model.bundle.manifest, answer.outputs

        def part(rows: slice) -> pb.ExplainResponse:
            made = predictions(manifest, outputs.rows(rows), top_k)
            return pb.ExplainResponse(
                explanations=[
                    pb.ImageExplanation(prediction=prediction, sites=sites(manifest, of_image))
                    for prediction, of_image in zip(made, explained[rows], strict=True)
                ]
            )

        latents = sum(len(of_site.latent) for of_site in explained[0])
        end = pb.ExplainResponse(receipt=receipt(model, steering, answer))
        return await written(model, len(images), _messages(manifest, top_k) + latents, part, end)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        model = self._repository.get(request.model, request.version)
        bundle, manifest = model.bundle, model.bundle.manifest
        height, width, channels = manifest.image.shape
        return pb.GetModelResponse(
            model=manifest.name,
            version=str(manifest.version),
            bundle_digest=bundle.digest,
            gates_sae_digest=manifest.gates_sae_digest,
            graph=model.engine.graph_name,
            provider=model.engine.provider,
            height=height,
            width=width,
            channels=channels,
            labels=manifest.labels,
            gated_blocks=manifest.gated_blocks,
            heads=manifest.heads,
            sites=[pb.Site(block=site.block, latents=site.latents) for site in manifest.sites],
            profiles=len(bundle.profiles),
            macs_dense=manifest.macs.dense,
            instances=pb.Instances(**asdict(model.plan)),
            cuda_graph_batches=model.engine.captured,
            specialised_profiles=[
                entry.profile for entry in manifest.specialised if entry.digest in model.engine.specialised
            ],
            mlp_groups=manifest.mlp_groups,
            dial=dial_points(bundle.curves.get("", ())),
            lowest_budget=bundle.dial.lowest if bundle.dial else None,
            settings=pb.ModelSettings(**model.in_force, of_model=sorted(model.own_settings)),
        )

    async def GetProfile(self, request: pb.GetProfileRequest, context: Context) -> pb.GetProfileResponse:
        bundle = self._repository.get(request.model, request.version).bundle
        profile = named(bundle, request.name, "name")
        return pb.GetProfileResponse(
            profile=profile_message(profile),
            terms=[
                pb.SteeringTerm(site=site, latent=term.latent, scale=term.scale, shift=term.shift)
                for site, terms in sorted(profile.terms.items())
                for term in terms
            ],
            model=bundle.manifest.name,
            version=str(bundle.manifest.version),
            gates_sae_digest=bundle.manifest.gates_sae_digest,
            dial=dial_points(bundle.curves.get(profile.name, ())),
            gate_biases=[pb.GateBias(block=block, biases=of) for block, of in sorted(profile.gate_bias.items())],
        )

    async def ListProfiles(self, request: pb.ListProfilesRequest, context: Context) -> pb.ListProfilesResponse:
        bundle = self._repository.get(request.model, request.version).bundle
        if not 0 <= request.page_size <= 1000:
            raise InvalidRequest(f"page_size is {request.page_size}; allowed: 0 (100) to 1000")
        names = sorted(name for name in bundle.profiles if name > request.page_token)
        page = names[: request.page_size or 100]
        return pb.ListProfilesResponse(
            profiles=[profile_message(bundle.profiles[name]) for name in page],
            next_page_token=page[-1] if len(page) < len(names) else "",
            model=bundle.manifest.name,
            version=str(bundle.manifest.version),
            gates_sae_digest=bundle.manifest.gates_sae_digest,
        )

    def _read(self, request: Request) -> tuple[Model, Images, Steering, int]:
        """The parts of every request with images: model, images, steering and top_k."""
        model = self._repository.get(request.model, request.version)
        labels = model.bundle.manifest.labels
        with model.statistics.failures():
            if not 0 <= request.top_k <= len(labels):
                raise InvalidRequest(f"top_k is {request.top_k}; allowed: 0 to {len(labels)}")
            budget = round(request.budget, 6) if request.HasField("budget") else None  # 0.7, not 0.699999988079071
            min_budget = None
            if isinstance(request, pb.PredictRequest) and request.HasField("min_budget"):
                min_budget = round(request.min_budget, 6)
            steering = self._steering(model, request.steering, budget, min_budget)
            return model, self._images(model, request), steering, request.top_k or min(5, len(labels))

    def _images(self, model: Model, request: Request) -> Images:
        count = len(request.images)
        if not 1 <= count <= model.settings.max_images:
            raise InvalidRequest(f"images has {count} entries; allowed: 1 to {model.settings.max_images}")
        spec = model.bundle.manifest.image
        decoders: list[Callable[[], NDArray[np.uint8]]] = []
        encoded = False
        for index, image in enumerate(request.images):
            match image.WhichOneof("source"):
                case "encoded":
                    encoded = True
                    decoders.append(partial(decode, image.encoded, spec, self._limits, f"images[{index}].encoded"))
                case "pixels":
                    if image.shape and tuple(image.shape) != spec.shape:
                        raise InvalidRequest(
                            f"images[{index}].shape is {list(image.shape)}; allowed: {list(spec.shape)}, or none"
                        )
                    decoders.append(partial(from_raw, image.pixels, spec, f"images[{index}].pixels"))
                case _:
                    raise InvalidRequest(f"images[{index}] is empty; allowed: encoded or pixels")
        return decoders if encoded else np.stack([decode_() for decode_ in decoders])

    def _steering(
        self, model: Model, steering: pb.Steering, budget: float | None, min_budget: float | None
    ) -> Steering:
        for name in ("terms", "open", "closed"):
            if (count := len(getattr(steering, name))) > self._settings.max_terms:
                raise InvalidRequest(f"steering.{name} has {count} entries; allowed: {self._settings.max_terms}")
        terms: dict[int, tuple[SteeringTerm, ...]] = {}
        for index, term in enumerate(steering.terms):
            scale = term.scale if term.HasField("scale") else 1.0
            try:
                terms[term.site] = (*terms.get(term.site, ()), SteeringTerm(term.latent, scale, term.shift))
            except SteeringError as error:
                raise InvalidRequest(f"steering.terms[{index}]: {error}") from error
        strength = steering.strength if steering.HasField("strength") else 1.0
        forced = Forced(_units(steering.open, "open"), _units(steering.closed, "closed"))
        return model.steering(steering.profile, terms, strength, steering.gates_sae_digest, budget, forced, min_budget)


def _units(units: Sequence[pb.Unit], field: str) -> list[Unit]:
    read = []
    for index, unit in enumerate(units):
        kind = unit.WhichOneof("unit")
        if kind is None:
            raise InvalidRequest(f"steering.{field}[{index}] names no unit; allowed: head or mlp_group")
        read.append(Unit(unit.block, kind, getattr(unit, kind)))
    return read


async def written(model: Model, images: int, each: int, part: Callable[[slice], Message], end: Message) -> bytes:
    """The bytes of an answer, the concatenation of its parts. part: makes the part of some images; each: number of
    messages for an image. A large answer is made in the pool, in turns, so that it delays no other call."""
    step = max(1, MESSAGES // each)
    parts = [partial(_bytes_of, part, slice(first, first + step)) for first in range(0, images, step)]
    made = await model.in_turns(parts) if len(parts) > 1 else [parts[0]()]
    return b"".join((*made, end.SerializeToString()))


def _bytes_of(part: Callable[[slice], Message], rows: slice) -> bytes:
    return part(rows).SerializeToString()


def _messages(manifest: Manifest, top_k: int) -> int:
    """The number of messages in a prediction."""
    return 1 + top_k + len(manifest.gated_blocks) * (2 if manifest.mlp_groups else 1)


def predictions(manifest: Manifest, outputs: Outputs, top_k: int) -> list[pb.Prediction]:
    """One message per image, with its top_k most probable classes and the units that ran."""
    ranking, probability = outputs.ranked()
    rows = ranking[:, :top_k], probability[:, :top_k], outputs.head_gate, outputs.mlp_gate
    columns = (*rows, outputs.head_usage, outputs.mlp_usage, outputs.macs, outputs.near_threshold)
    blocks_with_groups = manifest.gated_blocks if manifest.mlp_groups else ()
    return [
        pb.Prediction(
            classes=[
                pb.ClassProbability(label=manifest.labels[c], index=c, probability=probability)
                for c, probability in zip(classes, likely, strict=True)
            ],
            head_mask=[
                pb.BlockHeads(block=block, kept=kept) for block, kept in zip(manifest.gated_blocks, mask, strict=True)
            ],
            head_usage=usage,
            compute_fraction=macs / manifest.macs.dense,
            gates_near_threshold=near,
            mlp_mask=[
                pb.BlockMlpGroups(block=block, kept=kept)
                for block, kept in zip(blocks_with_groups, of_mlps, strict=False)
            ],
            mlp_usage=mlp_usage,
        )
        for classes, likely, mask, of_mlps, usage, mlp_usage, macs, near in zip(
            *(values.tolist() for values in columns), strict=True
        )
    ]


def comparisons(manifest: Manifest, unsteered: Outputs, steered: Outputs, top_k: int) -> list[pb.Comparison]:
    """One message per image, from its row in both outputs. head_changes and mlp_changes are the gates that decided
    differently."""
    pairs = zip(predictions(manifest, unsteered, top_k), predictions(manifest, steered, top_k), strict=True)
    messages = []
    for row, (before, after) in enumerate(pairs):
        changed = np.argwhere(unsteered.head_gate[row] != steered.head_gate[row]).tolist()
        mlps_changed = np.argwhere(unsteered.mlp_gate[row] != steered.mlp_gate[row]).tolist()
        messages.append(
            pb.Comparison(
                unsteered=before,
                steered=after,
                unsteered_logits=unsteered.logits[row].tolist(),
                steered_logits=steered.logits[row].tolist(),
                same_label=before.classes[0].index == after.classes[0].index,
                head_changes=[
                    pb.HeadChange(block=manifest.gated_blocks[b], head=h, opened=bool(steered.head_gate[row, b, h]))
                    for b, h in changed
                ],
                compute_fraction_change=after.compute_fraction - before.compute_fraction,
                mlp_changes=[
                    pb.MlpGroupChange(
                        block=manifest.gated_blocks[b], mlp_group=m, opened=bool(steered.mlp_gate[row, b, m])
                    )
                    for b, m in mlps_changed
                ],
            )
        )
    return messages


def sites(manifest: Manifest, of_image: Sequence[Explanation]) -> list[pb.SiteExplanation]:
    """One message per site. of_image: the explanations of an image, by site."""
    return [
        pb.SiteExplanation(
            site=index,
            block=manifest.sites[index].block,
            active_latents=of.active,
            latents=[
                pb.Latent(latent=latent, value=value, steered_value=steered, gate_effects=effect)
                for latent, value, steered, effect in zip(
                    *(v.tolist() for v in (of.latent, of.value, of.steered_value, of.effect)), strict=True
                )
            ],
            gate_logits=of.gate_logit.tolist(),
            unsteered_gate_logits=of.unsteered_gate_logit.tolist(),
        )
        for index, of in enumerate(of_image)
    ]


def receipt(model: Model, steering: Steering, answer: Answer) -> pb.Receipt:
    """The receipt of an answer (service/receipt.py) as a message."""
    return pb.Receipt(**origin(model, steering)._asdict(), **measures(model, steering, answer)._asdict())


def dial_points(curve: Sequence[Point]) -> list[pb.DialPoint]:
    """One message per point."""
    return [
        pb.DialPoint(
            position=point.budget,
            compute_fraction=point.compute_fraction,
            accuracy=point.accuracy,
            measured_accuracy=point.measured_accuracy,
        )
        for point in curve
    ]


def profile_message(profile: SteeringProfile) -> pb.Profile:
    """A profile without its terms. Its evaluation is reduced to the fields of the message."""
    message = pb.Profile(
        name=profile.name,
        classes=profile.classes,
        strategy=profile.strategy,
        terms=sum(map(len, profile.terms.values())),
        steering_digest=digest(profile.terms, profile.gate_bias),
        images=profile.evaluation.get("images", 0),
        kind=profile.kind or "",
    )
    for name, field in (("before", message.before), ("after", message.after)):
        if name in profile.evaluation:
            known = profile.evaluation[name].keys() & pb.Effect.DESCRIPTOR.fields_by_name.keys()
            field.CopyFrom(pb.Effect(**{key: profile.evaluation[name][key] for key in known}))
    return message
