from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PredictRequest(_message.Message):
    __slots__ = ("model", "version", "images", "steering", "top_k", "budget", "min_budget")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    MIN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    steering: Steering
    top_k: int
    budget: float
    min_budget: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., steering: _Optional[_Union[Steering, _Mapping]] = ..., top_k: _Optional[int] = ..., budget: _Optional[float] = ..., min_budget: _Optional[float] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("encoded", "pixels", "shape")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    pixels: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, encoded: _Optional[bytes] = ..., pixels: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Steering(_message.Message):
    __slots__ = ("profile", "terms", "strength", "gates_sae_digest", "open", "closed")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    GATES_SAE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    profile: str
    terms: _containers.RepeatedCompositeFieldContainer[SteeringTerm]
    strength: float
    gates_sae_digest: str
    open: _containers.RepeatedCompositeFieldContainer[Unit]
    closed: _containers.RepeatedCompositeFieldContainer[Unit]
    def __init__(self, profile: _Optional[str] = ..., terms: _Optional[_Iterable[_Union[SteeringTerm, _Mapping]]] = ..., strength: _Optional[float] = ..., gates_sae_digest: _Optional[str] = ..., open: _Optional[_Iterable[_Union[Unit, _Mapping]]] = ..., closed: _Optional[_Iterable[_Union[Unit, _Mapping]]] = ...) -> None: ...

class Unit(_message.Message):
    __slots__ = ("block", "head", "mlp_group")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    MLP_GROUP_FIELD_NUMBER: _ClassVar[int]
    block: int
    head: int
    mlp_group: int
    def __init__(self, block: _Optional[int] = ..., head: _Optional[int] = ..., mlp_group: _Optional[int] = ...) -> None: ...

class SteeringTerm(_message.Message):
    __slots__ = ("site", "latent", "scale", "shift")
    SITE_FIELD_NUMBER: _ClassVar[int]
    LATENT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    site: int
    latent: int
    scale: float
    shift: float
    def __init__(self, site: _Optional[int] = ..., latent: _Optional[int] = ..., scale: _Optional[float] = ..., shift: _Optional[float] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("predictions", "receipt")
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    predictions: _containers.RepeatedCompositeFieldContainer[Prediction]
    receipt: Receipt
    def __init__(self, predictions: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("classes", "head_mask", "head_usage", "compute_fraction", "gates_near_threshold", "mlp_mask", "mlp_usage")
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    HEAD_MASK_FIELD_NUMBER: _ClassVar[int]
    HEAD_USAGE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    GATES_NEAR_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MLP_MASK_FIELD_NUMBER: _ClassVar[int]
    MLP_USAGE_FIELD_NUMBER: _ClassVar[int]
    classes: _containers.RepeatedCompositeFieldContainer[ClassProbability]
    head_mask: _containers.RepeatedCompositeFieldContainer[BlockHeads]
    head_usage: float
    compute_fraction: float
    gates_near_threshold: int
    mlp_mask: _containers.RepeatedCompositeFieldContainer[BlockMlpGroups]
    mlp_usage: float
    def __init__(self, classes: _Optional[_Iterable[_Union[ClassProbability, _Mapping]]] = ..., head_mask: _Optional[_Iterable[_Union[BlockHeads, _Mapping]]] = ..., head_usage: _Optional[float] = ..., compute_fraction: _Optional[float] = ..., gates_near_threshold: _Optional[int] = ..., mlp_mask: _Optional[_Iterable[_Union[BlockMlpGroups, _Mapping]]] = ..., mlp_usage: _Optional[float] = ...) -> None: ...

class ClassProbability(_message.Message):
    __slots__ = ("label", "index", "probability")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    label: str
    index: int
    probability: float
    def __init__(self, label: _Optional[str] = ..., index: _Optional[int] = ..., probability: _Optional[float] = ...) -> None: ...

class BlockHeads(_message.Message):
    __slots__ = ("block", "kept")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    block: int
    kept: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, block: _Optional[int] = ..., kept: _Optional[_Iterable[bool]] = ...) -> None: ...

class BlockMlpGroups(_message.Message):
    __slots__ = ("block", "kept")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    block: int
    kept: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, block: _Optional[int] = ..., kept: _Optional[_Iterable[bool]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("model", "version", "bundle_digest", "gates_sae_digest", "graph", "profile", "steering_digest", "queue_seconds", "inference_seconds", "head_usage", "compute_fraction", "gates_near_threshold", "mlp_usage", "budget", "budget_applied", "brownout")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GATES_SAE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    STEERING_DIGEST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEAD_USAGE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    GATES_NEAR_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MLP_USAGE_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    BUDGET_APPLIED_FIELD_NUMBER: _ClassVar[int]
    BROWNOUT_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    bundle_digest: str
    gates_sae_digest: str
    graph: str
    profile: str
    steering_digest: str
    queue_seconds: float
    inference_seconds: float
    head_usage: float
    compute_fraction: float
    gates_near_threshold: int
    mlp_usage: float
    budget: float
    budget_applied: float
    brownout: bool
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., gates_sae_digest: _Optional[str] = ..., graph: _Optional[str] = ..., profile: _Optional[str] = ..., steering_digest: _Optional[str] = ..., queue_seconds: _Optional[float] = ..., inference_seconds: _Optional[float] = ..., head_usage: _Optional[float] = ..., compute_fraction: _Optional[float] = ..., gates_near_threshold: _Optional[int] = ..., mlp_usage: _Optional[float] = ..., budget: _Optional[float] = ..., budget_applied: _Optional[float] = ..., brownout: _Optional[bool] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("model", "version", "images", "steering", "top_k", "budget")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    steering: Steering
    top_k: int
    budget: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., steering: _Optional[_Union[Steering, _Mapping]] = ..., top_k: _Optional[int] = ..., budget: _Optional[float] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("comparisons", "receipt")
    COMPARISONS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    comparisons: _containers.RepeatedCompositeFieldContainer[Comparison]
    receipt: Receipt
    def __init__(self, comparisons: _Optional[_Iterable[_Union[Comparison, _Mapping]]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Comparison(_message.Message):
    __slots__ = ("unsteered", "steered", "unsteered_logits", "steered_logits", "same_label", "head_changes", "compute_fraction_change", "mlp_changes")
    UNSTEERED_FIELD_NUMBER: _ClassVar[int]
    STEERED_FIELD_NUMBER: _ClassVar[int]
    UNSTEERED_LOGITS_FIELD_NUMBER: _ClassVar[int]
    STEERED_LOGITS_FIELD_NUMBER: _ClassVar[int]
    SAME_LABEL_FIELD_NUMBER: _ClassVar[int]
    HEAD_CHANGES_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FRACTION_CHANGE_FIELD_NUMBER: _ClassVar[int]
    MLP_CHANGES_FIELD_NUMBER: _ClassVar[int]
    unsteered: Prediction
    steered: Prediction
    unsteered_logits: _containers.RepeatedScalarFieldContainer[float]
    steered_logits: _containers.RepeatedScalarFieldContainer[float]
    same_label: bool
    head_changes: _containers.RepeatedCompositeFieldContainer[HeadChange]
    compute_fraction_change: float
    mlp_changes: _containers.RepeatedCompositeFieldContainer[MlpGroupChange]
    def __init__(self, unsteered: _Optional[_Union[Prediction, _Mapping]] = ..., steered: _Optional[_Union[Prediction, _Mapping]] = ..., unsteered_logits: _Optional[_Iterable[float]] = ..., steered_logits: _Optional[_Iterable[float]] = ..., same_label: _Optional[bool] = ..., head_changes: _Optional[_Iterable[_Union[HeadChange, _Mapping]]] = ..., compute_fraction_change: _Optional[float] = ..., mlp_changes: _Optional[_Iterable[_Union[MlpGroupChange, _Mapping]]] = ...) -> None: ...

class HeadChange(_message.Message):
    __slots__ = ("block", "head", "opened")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    block: int
    head: int
    opened: bool
    def __init__(self, block: _Optional[int] = ..., head: _Optional[int] = ..., opened: _Optional[bool] = ...) -> None: ...

class MlpGroupChange(_message.Message):
    __slots__ = ("block", "mlp_group", "opened")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    MLP_GROUP_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    block: int
    mlp_group: int
    opened: bool
    def __init__(self, block: _Optional[int] = ..., mlp_group: _Optional[int] = ..., opened: _Optional[bool] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("model", "version", "images", "steering", "top_k", "latents", "budget")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    steering: Steering
    top_k: int
    latents: int
    budget: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., steering: _Optional[_Union[Steering, _Mapping]] = ..., top_k: _Optional[int] = ..., latents: _Optional[int] = ..., budget: _Optional[float] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("explanations", "receipt")
    EXPLANATIONS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    explanations: _containers.RepeatedCompositeFieldContainer[ImageExplanation]
    receipt: Receipt
    def __init__(self, explanations: _Optional[_Iterable[_Union[ImageExplanation, _Mapping]]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class ImageExplanation(_message.Message):
    __slots__ = ("prediction", "sites")
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    prediction: Prediction
    sites: _containers.RepeatedCompositeFieldContainer[SiteExplanation]
    def __init__(self, prediction: _Optional[_Union[Prediction, _Mapping]] = ..., sites: _Optional[_Iterable[_Union[SiteExplanation, _Mapping]]] = ...) -> None: ...

class SiteExplanation(_message.Message):
    __slots__ = ("site", "block", "active_latents", "latents", "gate_logits", "unsteered_gate_logits")
    SITE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_LATENTS_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    GATE_LOGITS_FIELD_NUMBER: _ClassVar[int]
    UNSTEERED_GATE_LOGITS_FIELD_NUMBER: _ClassVar[int]
    site: int
    block: int
    active_latents: int
    latents: _containers.RepeatedCompositeFieldContainer[Latent]
    gate_logits: _containers.RepeatedScalarFieldContainer[float]
    unsteered_gate_logits: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, site: _Optional[int] = ..., block: _Optional[int] = ..., active_latents: _Optional[int] = ..., latents: _Optional[_Iterable[_Union[Latent, _Mapping]]] = ..., gate_logits: _Optional[_Iterable[float]] = ..., unsteered_gate_logits: _Optional[_Iterable[float]] = ...) -> None: ...

class Latent(_message.Message):
    __slots__ = ("latent", "value", "steered_value", "gate_effects")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    STEERED_VALUE_FIELD_NUMBER: _ClassVar[int]
    GATE_EFFECTS_FIELD_NUMBER: _ClassVar[int]
    latent: int
    value: float
    steered_value: float
    gate_effects: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, latent: _Optional[int] = ..., value: _Optional[float] = ..., steered_value: _Optional[float] = ..., gate_effects: _Optional[_Iterable[float]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "version", "bundle_digest", "gates_sae_digest", "graph", "provider", "height", "width", "channels", "labels", "gated_blocks", "heads", "sites", "profiles", "macs_dense", "instances", "cuda_graph_batches", "specialised_profiles", "mlp_groups", "dial", "lowest_budget", "settings")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GATES_SAE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    GATED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    MACS_DENSE_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    CUDA_GRAPH_BATCHES_FIELD_NUMBER: _ClassVar[int]
    SPECIALISED_PROFILES_FIELD_NUMBER: _ClassVar[int]
    MLP_GROUPS_FIELD_NUMBER: _ClassVar[int]
    DIAL_FIELD_NUMBER: _ClassVar[int]
    LOWEST_BUDGET_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    bundle_digest: str
    gates_sae_digest: str
    graph: str
    provider: str
    height: int
    width: int
    channels: int
    labels: _containers.RepeatedScalarFieldContainer[str]
    gated_blocks: _containers.RepeatedScalarFieldContainer[int]
    heads: int
    sites: _containers.RepeatedCompositeFieldContainer[Site]
    profiles: int
    macs_dense: int
    instances: Instances
    cuda_graph_batches: _containers.RepeatedScalarFieldContainer[int]
    specialised_profiles: _containers.RepeatedScalarFieldContainer[str]
    mlp_groups: int
    dial: _containers.RepeatedCompositeFieldContainer[DialPoint]
    lowest_budget: float
    settings: ModelSettings
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., gates_sae_digest: _Optional[str] = ..., graph: _Optional[str] = ..., provider: _Optional[str] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., channels: _Optional[int] = ..., labels: _Optional[_Iterable[str]] = ..., gated_blocks: _Optional[_Iterable[int]] = ..., heads: _Optional[int] = ..., sites: _Optional[_Iterable[_Union[Site, _Mapping]]] = ..., profiles: _Optional[int] = ..., macs_dense: _Optional[int] = ..., instances: _Optional[_Union[Instances, _Mapping]] = ..., cuda_graph_batches: _Optional[_Iterable[int]] = ..., specialised_profiles: _Optional[_Iterable[str]] = ..., mlp_groups: _Optional[int] = ..., dial: _Optional[_Iterable[_Union[DialPoint, _Mapping]]] = ..., lowest_budget: _Optional[float] = ..., settings: _Optional[_Union[ModelSettings, _Mapping]] = ...) -> None: ...

class ModelSettings(_message.Message):
    __slots__ = ("max_queue", "max_delay_ms", "max_images", "default_budget", "min_budget", "target_latency_ms", "shadow_fraction", "of_model", "default_profile")
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    MAX_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_BUDGET_FIELD_NUMBER: _ClassVar[int]
    MIN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    TARGET_LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FRACTION_FIELD_NUMBER: _ClassVar[int]
    OF_MODEL_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PROFILE_FIELD_NUMBER: _ClassVar[int]
    max_queue: int
    max_delay_ms: float
    max_images: int
    default_budget: float
    min_budget: float
    target_latency_ms: float
    shadow_fraction: float
    of_model: _containers.RepeatedScalarFieldContainer[str]
    default_profile: str
    def __init__(self, max_queue: _Optional[int] = ..., max_delay_ms: _Optional[float] = ..., max_images: _Optional[int] = ..., default_budget: _Optional[float] = ..., min_budget: _Optional[float] = ..., target_latency_ms: _Optional[float] = ..., shadow_fraction: _Optional[float] = ..., of_model: _Optional[_Iterable[str]] = ..., default_profile: _Optional[str] = ...) -> None: ...

class DialPoint(_message.Message):
    __slots__ = ("position", "compute_fraction", "accuracy", "measured_accuracy")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MEASURED_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    position: float
    compute_fraction: float
    accuracy: float
    measured_accuracy: float
    def __init__(self, position: _Optional[float] = ..., compute_fraction: _Optional[float] = ..., accuracy: _Optional[float] = ..., measured_accuracy: _Optional[float] = ...) -> None: ...

class Instances(_message.Message):
    __slots__ = ("instances", "threads", "wide_threads", "spinning", "max_batch", "source")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    WIDE_THREADS_FIELD_NUMBER: _ClassVar[int]
    SPINNING_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    instances: int
    threads: int
    wide_threads: int
    spinning: bool
    max_batch: int
    source: str
    def __init__(self, instances: _Optional[int] = ..., threads: _Optional[int] = ..., wide_threads: _Optional[int] = ..., spinning: _Optional[bool] = ..., max_batch: _Optional[int] = ..., source: _Optional[str] = ...) -> None: ...

class Site(_message.Message):
    __slots__ = ("block", "latents")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    block: int
    latents: int
    def __init__(self, block: _Optional[int] = ..., latents: _Optional[int] = ...) -> None: ...

class GetProfileRequest(_message.Message):
    __slots__ = ("model", "version", "name")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    name: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class GetProfileResponse(_message.Message):
    __slots__ = ("profile", "terms", "model", "version", "gates_sae_digest", "dial", "gate_biases")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GATES_SAE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIAL_FIELD_NUMBER: _ClassVar[int]
    GATE_BIASES_FIELD_NUMBER: _ClassVar[int]
    profile: Profile
    terms: _containers.RepeatedCompositeFieldContainer[SteeringTerm]
    model: str
    version: str
    gates_sae_digest: str
    dial: _containers.RepeatedCompositeFieldContainer[DialPoint]
    gate_biases: _containers.RepeatedCompositeFieldContainer[GateBias]
    def __init__(self, profile: _Optional[_Union[Profile, _Mapping]] = ..., terms: _Optional[_Iterable[_Union[SteeringTerm, _Mapping]]] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., gates_sae_digest: _Optional[str] = ..., dial: _Optional[_Iterable[_Union[DialPoint, _Mapping]]] = ..., gate_biases: _Optional[_Iterable[_Union[GateBias, _Mapping]]] = ...) -> None: ...

class GateBias(_message.Message):
    __slots__ = ("block", "biases")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    block: int
    biases: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, block: _Optional[int] = ..., biases: _Optional[_Iterable[float]] = ...) -> None: ...

class ListProfilesRequest(_message.Message):
    __slots__ = ("model", "version", "page_size", "page_token")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    page_size: int
    page_token: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListProfilesResponse(_message.Message):
    __slots__ = ("profiles", "next_page_token", "model", "version", "gates_sae_digest")
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GATES_SAE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    profiles: _containers.RepeatedCompositeFieldContainer[Profile]
    next_page_token: str
    model: str
    version: str
    gates_sae_digest: str
    def __init__(self, profiles: _Optional[_Iterable[_Union[Profile, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., gates_sae_digest: _Optional[str] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("name", "classes", "strategy", "terms", "steering_digest", "before", "after", "images", "kind")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    STEERING_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    name: str
    classes: _containers.RepeatedScalarFieldContainer[str]
    strategy: str
    terms: int
    steering_digest: str
    before: Effect
    after: Effect
    images: int
    kind: str
    def __init__(self, name: _Optional[str] = ..., classes: _Optional[_Iterable[str]] = ..., strategy: _Optional[str] = ..., terms: _Optional[int] = ..., steering_digest: _Optional[str] = ..., before: _Optional[_Union[Effect, _Mapping]] = ..., after: _Optional[_Union[Effect, _Mapping]] = ..., images: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class Effect(_message.Message):
    __slots__ = ("recall", "precision", "false_positive_rate", "overall_accuracy", "head_usage", "compute_fraction", "f1", "auroc", "others_accuracy", "mlp_usage", "unit_usage")
    RECALL_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    FALSE_POSITIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    OVERALL_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    HEAD_USAGE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    F1_FIELD_NUMBER: _ClassVar[int]
    AUROC_FIELD_NUMBER: _ClassVar[int]
    OTHERS_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MLP_USAGE_FIELD_NUMBER: _ClassVar[int]
    UNIT_USAGE_FIELD_NUMBER: _ClassVar[int]
    recall: float
    precision: float
    false_positive_rate: float
    overall_accuracy: float
    head_usage: float
    compute_fraction: float
    f1: float
    auroc: float
    others_accuracy: float
    mlp_usage: float
    unit_usage: float
    def __init__(self, recall: _Optional[float] = ..., precision: _Optional[float] = ..., false_positive_rate: _Optional[float] = ..., overall_accuracy: _Optional[float] = ..., head_usage: _Optional[float] = ..., compute_fraction: _Optional[float] = ..., f1: _Optional[float] = ..., auroc: _Optional[float] = ..., others_accuracy: _Optional[float] = ..., mlp_usage: _Optional[float] = ..., unit_usage: _Optional[float] = ...) -> None: ...
