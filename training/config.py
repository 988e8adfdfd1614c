"""Typed settings of a training run. The settings are the command line.

`python -m training all --preset fashion-mnist --out runs/fm --vit.joint-epochs 6`

A preset gives defaults; flags win over it. Each stage (vit, sae, profiles) has a group of its own, and a
finished stage remembers the groups that it depends on: see checkpoint.py.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import BaseSettings, CliPositionalArg, PydanticBaseSettingsSource, SettingsConfigDict

AsInteger = BeforeValidator(lambda value: int(value) if str(value).isdigit() else value)
"""The command line gives text."""
STEPS = ("vit", "sae", "profiles", "evaluate", "report")


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataSettings(Group):
    """The images, and how they are split."""

    dataset: str = Field("fashion-mnist", pattern=r"^(fashion-mnist|folder|(torch|hfds)/.+)$")
    """`fashion-mnist`; a data set of timm, such as `torch/cifar100` or `hfds/<name>`; or `folder`: root/<label>/*.png,
    or root/train/<label>/ and root/test/<label>/."""
    root: Path | None = None
    """Where the data are. Fashion-MNIST is found by itself: Debian's package, else a download."""
    download: bool = False
    """Whether a data set of timm may be downloaded to root."""
    image_size: int = Field(28, ge=8, le=1024)
    """Height and width of the model's input, pixels."""
    channels: Annotated[Literal[1, 3], AsInteger] = 1
    """1 grey, 3 RGB."""
    crop_fraction: float = Field(1.0, gt=0.1, le=1.0)
    """The shorter side is resized to image_size / crop_fraction before the centre crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Of the resize."""
    selection_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of each class's training images held out to choose profiles."""
    test_fraction: float = Field(0.2, gt=0, lt=0.9)
    """Share of each class held out for the test, when a folder has no test/ of its own."""
    max_train: int | None = Field(None, ge=10)
    """Use a random, class-balanced subset of this many training images."""
    max_test: int | None = Field(None, ge=10)
    """Use a random, class-balanced subset of this many test images."""
    flip: bool = True
    """Augmentation: mirror half of the images."""
    shift: int = Field(2, ge=0)
    """Augmentation: shift by up to this many pixels each way."""


class VitSettings(Group):
    """The Vision Transformer and its gates."""

    model: str = "conv_stem"
    """The name of a timm VisionTransformer, or `conv_stem`: convolutional stem and fixed sin-cos positions."""
    dim: int = Field(192, ge=8)
    """Width of the residual stream (conv_stem)."""
    depth: int = Field(6, ge=2)
    """Transformer blocks (conv_stem)."""
    heads: int = Field(6, ge=1)
    """Attention heads a block (conv_stem)."""
    patch: Annotated[Literal[2, 4, 8, 16], AsInteger] = 4
    """Stride of the stem: pixels a token, each way (conv_stem)."""
    pretrained: bool = False
    """Start from timm's weights (timm models)."""
    gated_blocks: str = "all"
    """`all` (every block but the first), `last`, or a list such as `2,4-5`."""
    gate: Literal["gumbel", "straight-through", "static"] = "gumbel"
    """Gumbel noise in training; none; or gates that do not look at the image (a fixed set of heads)."""
    budget: Literal["global", "per-block"] = "global"
    """Whether all gated blocks together, or each of them, is drawn to the usage target."""
    usage_target: float = Field(0.5, gt=0, le=1)
    """Mean head usage that the joint phase is drawn to."""
    usage_weight: float = Field(4.0, ge=0)
    """Weight of (usage - target)^2 in the loss."""
    distillation_weight: float = Field(1.0, ge=0)
    """Weight of the KL divergence to the ungated teacher."""
    gumbel_temperature: float = Field(5.0, gt=0)
    """Temperature of the straight-through Gumbel gates in training."""
    backbone_epochs: float = Field(6, ge=0)
    """Ungated training."""
    gate_epochs: float = Field(0.5, ge=0)
    """Gates alone, backbone frozen."""
    joint_epochs: float = Field(4.5, ge=0)
    """Gates and backbone together, usage annealed from 1 to the target."""
    batch_size: int = Field(128, ge=1)
    """Images a step."""
    learning_rate: float = Field(1.5e-3, gt=0)
    """AdamW, ungated phase: 10% warm-up, then cosine."""
    joint_learning_rate: float = Field(8e-4, gt=0)
    """AdamW, joint phase."""
    gate_learning_rate: float = Field(5e-3, gt=0)
    """AdamW, gate phase."""
    weight_decay: float = Field(0.05, ge=0)
    """Not applied to norms, positions and biases."""
    label_smoothing: float = Field(0.05, ge=0, lt=1)
    """Of the cross-entropy."""
    ema_decay: float = Field(0.998, ge=0, lt=1)
    """Of the averaged weights that each phase ends with."""


class SaeSettings(Group):
    """The sparse autoencoders, one a site (every gated block)."""

    kind: Literal["batch-topk", "topk"] = "batch-topk"
    """k active latents an image on average over a batch, or exactly. Both are saved as JumpReLU."""
    latents: int = Field(512, ge=4)
    """Latents a site."""
    k: int = Field(32, ge=1)
    """Active latents an image on average (BatchTopK)."""
    epochs: float = Field(60, gt=0)
    """Over the residuals of the training images."""
    batch_size: int = Field(1024, ge=8)
    """Residuals a step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam, with warm-up and a linear decay over the last fifth."""
    aux_weight: float = Field(1 / 32, ge=0)
    """Weight of the AuxK loss that revives dead latents."""
    dead_epochs: float = Field(2, gt=0)
    """A latent is dead that was silent for this long."""


class ProfileSettings(Group):
    """The search for class steering profiles."""

    terms: int = Field(32, ge=1)
    """Steering terms a site at most."""
    usage_target: float = Field(0.27, gt=0, le=1)
    """Head usage on the class that the learned profiles are drawn to."""
    steps: int = Field(600, ge=0)
    """Steps of the joint search for all classes."""
    rows: int = Field(12, ge=2)
    """Images a class and step: half of the class, half of any."""
    own_weight: float = Field(0.2, gt=0)
    """Weight of the own images in the cross-entropy, beside 1 for any image: more buys recall with precision."""
    learning_rate: float = Field(0.05, gt=0)
    """Adam."""
    contexts: dict[str, tuple[str, ...]] = {}
    """Further targets, each a set of labels, as JSON: {"footwear": ["Sandal", "Sneaker", "Ankle boot"]}."""
    sparsity: float = Field(2e-3, ge=0)
    """Weight of the L1 norm of the changes (in units of each latent's own scale)."""
    min_effect: float = Field(0.02, ge=0)
    """Terms that move no gate logit of their class by more than this are dropped."""


PRESETS: dict[str, dict[str, Any]] = {
    # python -m training all --preset fashion-mnist --out runs/fm
    # Fashion-MNIST, ViT 192 x 6 blocks x 6 heads, 49 tokens. Result and run time: README.md, "What was measured".
    "fashion-mnist": {
        "profiles": {
            "contexts": {
                "tops": ("T-shirt", "Pullover", "Coat", "Shirt", "Dress"),
                "footwear": ("Sandal", "Sneaker", "Ankle boot"),
                "rest": ("Trouser", "Bag"),
            }
        },
    },
    # python -m training all --preset smoke --out runs/smoke
    # Every stage on a real subset, in minutes on 2 cores. For tests: the accuracy is beside the point.
    "smoke": {
        "data": {"max_train": 4000, "max_test": 1000},
        "vit": {"dim": 48, "depth": 3, "heads": 3, "backbone_epochs": 5, "gate_epochs": 0.5, "joint_epochs": 4},
        "sae": {"latents": 96, "k": 12, "epochs": 30, "batch_size": 256},
        "profiles": {"terms": 8, "steps": 80, "usage_target": 0.35},
    },
}


class Settings(BaseSettings):
    """Train a gated Vision Transformer, its sparse autoencoders and its class steering profiles."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_parse_args=False,
        cli_prog_name="python -m training",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        use_attribute_docstrings=True,
    )

    step: CliPositionalArg[Literal["vit", "sae", "profiles", "evaluate", "report", "all"]]
    """One step of the run, or all of them in this order: vit, sae, profiles, evaluate, report."""
    out: Path
    """The run folder. A finished stage is kept, an interrupted one is taken up where it stood."""
    preset: Literal["fashion-mnist", "smoke"] = "fashion-mnist"
    """Where the defaults come from."""
    seed: int = 0
    """Of everything that is drawn at random."""
    bf16: bool = True
    """bfloat16 autocast in training where the machine computes it natively. Evaluation is always float32."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0: all cores."""
    data: DataSettings = DataSettings()
    vit: VitSettings = VitSettings()
    sae: SaeSettings = SaeSettings()
    profiles: ProfileSettings = ProfileSettings()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, PresetSource(settings_cls)

    def fingerprint(self, stage: str) -> dict[str, Any]:
        """The settings that the results of `stage` depend on, as JSON: its own group and those before it."""
        groups = {"vit": ("data", "vit"), "sae": ("data", "vit", "sae"), "profiles": ("data", "vit", "sae", "profiles")}
        return {"seed": self.seed, **self.model_dump(mode="json", include=set(groups[stage]))}


class PresetSource(PydanticBaseSettingsSource):
    """The values of the preset that the sources before this one (the command line) name."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise AssertionError("values are given as a whole by __call__")

    def __call__(self) -> dict[str, Any]:
        return PRESETS.get(self.current_state.get("preset", "fashion-mnist"), {})
