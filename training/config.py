"""Typed settings of a training run. The settings are the command line.

`python -m training all --preset fashion-mnist --out runs/fm --vit.joint-epochs 6`

A preset sets defaults; flags override it. Each stage (vit, sae, profiles) has its own group of settings, and a finished
stage records the groups that it depends on: see checkpoint.py.
"""

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from training.presets import PRESETS
from training.terminal import HelpFormatter, make_readable

AsInteger = BeforeValidator(lambda value: int(value) if str(value).isdigit() else value)
"""Converts the text of the command line."""
Teacher = Annotated[Path | None, PlainSerializer(lambda path: path and path.name, when_used="json")]
"""Only the folder's name is recorded, so that a run folder can be moved."""
DENSE = Path("dense")
"""The value of vit.teacher for the control `dense` of the same run."""
STEPS = ("vit", "sae", "profiles", "evaluate", "report")
"""The steps that `all` runs."""
PRESET = "A preset changes the defaults below: see training/presets.py."
ALONE = {
    "evaluate": f"Measure a trained run on the test images, with the settings that it was trained with. {PRESET}",
    "report": f"Write the report of an evaluated run, with the settings that it was trained with. {PRESET}",
}
"""What the steps that are also commands of `steervit` do."""


class Group(BaseModel):
    """Settings that go together. They are immutable, and unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataSettings(Group):
    """The images, and how they are split."""

    dataset: str = Field(
        "fashion-mnist", pattern=r"^(fashion-mnist|typefaces(-small)?(/merged)?|folder|(torch|hfds|hfids|wds)/.+)$"
    )
    """`fashion-mnist`; `typefaces`: 0-9A-Za-z in the typefaces of Debian's font packages (`make typefaces`), or
    `typefaces-small`: three of the packages; either with `/merged`: 47 classes, where upper and lower case letters of
    the same shape are one class; `folder`: root/<label>/*.png, or root/train/<label>/ and root/test/<label>/ (also
    training/; testing/, val/, valid/, validation/; upper or lower case); or a data set of timm: `torch/cifar100`,
    `wds/<any name>` (shards in root), `hfds/<name or folder>`, `hfids/<name>`."""
    root: Path | None = None
    """Folder of the data. Default for Fashion-MNIST: Debian's package if it is installed, otherwise a download."""
    download: bool = False
    """Whether a data set of timm may be downloaded to root."""
    train_split: str = "train"
    """Name of the training split (hfds, hfids), or of the shards, such as `train-{000..099}.tar|100000` (wds)."""
    test_split: str = "validation"
    """Name of the test split, in the same form as train_split."""
    image_key: str | None = None
    """The field of a sample that holds its image (default: image for hfds; jpg;png;webp for wds)."""
    label_key: str | None = None
    """The field of a sample that holds its class number (default: label for hfds; for wds the .cls file, otherwise a
    field of the .json)."""
    labels: Path | None = None
    """A UTF-8 file of labels in the order of the class numbers, one per line (for timm data sets that do not name their
    classes)."""
    copies: Literal["refuse", "drop", "keep"] = Field("refuse", exclude_if=lambda value: value == "refuse")
    """Dataset `folder`: what to do with exact copies of an image, which could end up in both training and test. `drop`
    removes copies of test images from training; without a folder of test images, it keeps the first copy."""
    memory: Literal["auto", "memory", "lazy", "map"] = Field("auto", exclude=True)
    """Where pixels are kept. `memory`: in memory; `lazy`: decoded at each use; `map`: decoded once, into a
    memory-mapped file; `auto`: in memory up to the limit, above it mapped for streaming data sets and lazy for
    others."""
    memory_limit: int = Field(4 * 2**30, ge=0, exclude=True)
    """Size of a split's pixels, in bytes, above which `auto` does not keep them in memory."""
    cache: Path | None = None
    """Folder of the mapped files (default: steervit in the user's cache folder)."""
    skip_unreadable: bool = Field(False, exclude=True)
    """Skip and list images that cannot be read; by default they are an error. Unless images are mapped, each is read
    once more before training."""
    workers: int = Field(0, ge=0, le=256, exclude=True)
    """Processes that prepare training batches, for each training process; 0: the training process itself."""
    image_size: int = Field(28, ge=8, le=1024)
    """Height and width of the model's input, in pixels."""
    channels: Annotated[Literal[1, 3], AsInteger] = 1
    """1: grey; 3: RGB."""
    crop_fraction: float = Field(1.0, gt=0.1, le=1.0)
    """The shorter side is resized to image_size / crop_fraction before the centre crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation of the resize."""
    mean: tuple[float, ...] | None = None
    """Mean per channel, of pixels scaled to 0..1 (default: measured on training images). A pretrained model should get
    the one that it was trained with."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel, with the same default."""
    selection_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of each class's training images held out to choose profiles (typefaces: share of the designs)."""
    test_fraction: float = Field(0.2, gt=0, lt=0.9)
    """Share of each class held out for the test, when a folder has no test/ of its own (typefaces: share of the
    designs)."""
    degradation: float = Field(1.0, ge=0, le=2, exclude_if=lambda value: value == 1.0)
    """Dataset `typefaces`: how strongly characters are rotated, blurred and so on. 0: clean; 1: as in a poor scan."""
    max_train: int | None = Field(None, ge=10)
    """Use a random, class-balanced subset of this many training images."""
    max_test: int | None = Field(None, ge=10)
    """Use a random, class-balanced subset of this many test images."""
    flip: bool = True
    """Augmentation: mirror half of the images."""
    shift: int = Field(2, ge=0)
    """Augmentation `shift`: largest shift in each direction, in pixels."""
    augmentation: Literal["shift", "timm"] = "shift"
    """`shift`: flip and shift. `timm`: random resized crop, flip, and the settings below."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Augmentation `timm`: smallest and largest share of the image's area that a crop keeps."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Augmentation `timm`: smallest and largest width / height of the crop."""
    train_interpolation: Literal["random", "bilinear", "bicubic"] = "bicubic"
    """Augmentation `timm`: interpolation of the crop's resize."""
    auto_augment: str | None = None
    """Augmentation `timm`: a policy of timm, such as rand-m9-mstd0.5-inc1, 3a or augmix-m5-w4-d2."""
    color_jitter: float = Field(0.4, ge=0)
    """Augmentation `timm`: strength of random brightness, contrast and saturation; most auto_augment policies replace
    it."""
    re_prob: float = Field(0.0, ge=0, le=1)
    """Augmentation `timm`: share of images in which a rectangle is replaced by noise."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup (https://arxiv.org/abs/1710.09412); 0: off."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of cutmix (https://arxiv.org/abs/1905.04899); 0: off."""
    mixup_prob: float = Field(1.0, ge=0, le=1)
    """Share of batches that are mixed."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Share of mixed batches that use cutmix, when both are on."""


class VitSettings(Group):
    """The Vision Transformer and its gates."""

    model: str = "conv_stem"
    """The name of a timm VisionTransformer, or `conv_stem`: convolutional stem and fixed sin-cos positions."""
    weights: Path | None = None
    """Start from the weights in this file (timm models): safetensors, or a PyTorch checkpoint of tensors. The
    classifier is kept if it has as many classes as there are labels."""
    backbone: Path | None = Field(None, exclude=True)
    """Start from the ungated model of this run folder, which must have been trained with the same settings."""
    teacher: Teacher = Field(None, exclude_if=lambda value: value is None)
    """Distil the model from the plain ViT of this run folder; `dense`: from that of the control `dense`, which is then
    trained first; `none`: with a dial, from its own average. Without a dial: in the ungated phase alone."""
    dim: int = Field(192, ge=8)
    """Width of the residual stream (conv_stem)."""
    depth: int = Field(6, ge=2)
    """Transformer blocks (conv_stem)."""
    heads: int = Field(6, ge=1)
    """Attention heads per block (conv_stem)."""
    patch: Annotated[Literal[2, 4, 8, 16], AsInteger] = 4
    """Stride of the stem: pixels per token in each direction (conv_stem)."""
    unpadded: int = Field(0, ge=0, le=4)
    """Number of 3x3 convolutions without padding at the end of the stem: each shrinks the grid of tokens by two rows
    and two columns (conv_stem)."""
    mlp_ratio: float = Field(4.0, gt=0, le=16)
    """Width of the MLP / width of the residual stream (conv_stem)."""
    pretrained: bool = False
    """Start from timm's weights (timm models)."""
    gated_blocks: str = "all"
    """`all` (every block but the first), `last`, or a list such as `2,4-5`."""
    mlp_groups: int = Field(0, ge=0, le=64, exclude_if=lambda value: value == 0)
    """Also gate the MLPs, each in this many equal groups of hidden neurons (needs a dial); 0: gate heads only."""
    dial: bool = Field(False, exclude_if=lambda value: not value)
    """Train one model for every usage: each image's budget sets gate biases."""
    gate: Literal["gumbel", "straight-through", "static"] = "gumbel"
    """`gumbel`: Gumbel noise in training; `straight-through`: no noise; `static`: gates that do not depend on the image
    (a fixed set of heads)."""
    budget: Literal["global", "per-block"] = "global"
    """Whether the usage target applies to all gated blocks together or to each of them."""
    usage_target: float = Field(0.5, gt=0, le=1)
    """Target of the mean head usage in the joint phase; with a dial, the unit usage (by MACs) of requests without a
    budget."""
    usage_weight: float = Field(4.0, ge=0)
    """Weight of (usage - target)^2 in the loss; with a dial, averaged over the budgets."""
    distillation_weight: float = Field(1.0, ge=0)
    """Weight of the KL divergence from the ungated teacher; with a dial, from vit.teacher or the averaged model with
    all units open."""
    offset: float = Field(3.0, ge=0)
    """Joint phase: the largest random offset by which all gate logits of an image are lowered; not used with a dial."""
    offset_share: float = Field(0.4, ge=0, lt=1)
    """Joint phase: share of the images that get such an offset. They do not count towards the usage target."""
    gumbel_temperature: float = Field(5.0, gt=0)
    """Temperature of the straight-through Gumbel gates in training."""
    backbone_epochs: float = Field(6, ge=0)
    """Epochs of ungated training."""
    gate_epochs: float = Field(0.5, ge=0)
    """Epochs with only the gates trained, backbone frozen."""
    joint_epochs: float = Field(4.5, ge=0)
    """Epochs of gates and backbone together; without a dial, usage is annealed from 1 to the target."""
    batch_size: int = Field(128, ge=1)
    """Images per step."""
    learning_rate: float = Field(1.5e-3, gt=0)
    """AdamW, peak rate of the ungated phase. The first tenth of each phase is warm-up."""
    schedule: Literal["cosine", "tanh", "poly", "step", "constant"] = "cosine"
    """timm's schedule of that name, in each phase."""
    joint_learning_rate: float = Field(8e-4, gt=0)
    """AdamW, peak rate of the joint phase."""
    gate_learning_rate: float = Field(5e-3, gt=0)
    """AdamW, peak rate of the gate phase."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay; not applied to norms, positions and biases."""
    label_smoothing: float = Field(0.05, ge=0, lt=1)
    """Label smoothing of the cross-entropy."""
    ema_decay: float = Field(0.998, ge=0, lt=1)
    """Decay of the moving average of the weights; each phase ends with the averaged weights."""


class SaeSettings(Group):
    """The sparse autoencoders, one per site (every gated block)."""

    kind: Literal["batch-topk", "topk"] = "batch-topk"
    """`batch-topk`: k active latents per image on average over a batch; `topk`: exactly k. Both are saved as
    JumpReLU."""
    latents: int = Field(512, ge=4)
    """Latents per site."""
    k: int = Field(48, ge=1)
    """Active latents per image: on average (batch-topk), or exactly (topk)."""
    epochs: float = Field(30, gt=0)
    """Epochs over the residuals of the training images."""
    batch_size: int = Field(1024, ge=8)
    """Residuals per step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam, with warm-up and linear decay over the last fifth."""
    aux_weight: float = Field(1 / 32, ge=0)
    """Weight of the AuxK loss that revives dead latents."""
    dead_epochs: float = Field(0.3, gt=0)
    """Epochs without activation after which a latent counts as dead."""
    memory_limit: int = Field(4 * 2**30, ge=0)
    """Bytes. Residuals that take more (4 bytes per entry) are kept in a file in the run folder, in half precision."""
    stability_seeds: int = Field(0, ge=0)
    """Number of additional fits from other seeds, to report how many latents reappear; each takes as long as the
    first."""


class ProfileSettings(Group):
    """The search for class steering profiles."""

    terms: int = Field(32, ge=1)
    """Largest number of steering terms per site."""
    usage_target: float = Field(0.27, gt=0, le=1)
    """Target of the unit usage (head usage when only heads are gated) of learned profiles, on their class."""
    steps: int = Field(500, ge=0)
    """Steps of the joint search for all classes."""
    rows: int = Field(12, ge=2)
    """Images per class and step: half from the class, half from any class."""
    own_weight: float = Field(0.5, gt=0)
    """Weight of the class's own images in the cross-entropy; other images have weight 1. More trades precision for
    recall."""
    keep_weight: float = Field(2.0, ge=0)
    """Weight of the KL divergence from the unsteered answers, on the other half of the images."""
    pool: int = Field(20_000, ge=10)
    """Largest number of training images that the search draws from."""
    learning_rate: float = Field(0.05, gt=0)
    """Learning rate of Adam."""
    contexts: dict[str, tuple[str, ...]] = {}
    """Additional targets, each a set of labels, as JSON: {"footwear": ["Sandal", "Sneaker", "Ankle boot"]}. They
    replace those of the preset; {}: none."""
    sparsity: float = Field(2e-3, ge=0)
    """Weight of the L1 norm of the changes, in units of each latent's own scale."""
    min_effect: float = Field(0.02, ge=0)
    """Terms that change no gate logit of their class by more than this are dropped."""


class Settings(BaseSettings):
    """Train a gated Vision Transformer, its sparse autoencoders and its class steering profiles."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_parse_args=False,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_parse_none_str="none",
        cli_avoid_json=True,
        use_attribute_docstrings=True,
    )

    step: CliPositionalArg[Literal["vit", "sae", "profiles", "controls", "evaluate", "report", "all"]] = "all"
    """One step of the run, or `all` of them: vit, sae, profiles, evaluate, report. `controls` is not part of `all`: it
    trains the models that the report compares with, which takes longer than all other steps together."""
    out: Path
    """The run folder. Finished stages are kept, an interrupted one resumes."""
    preset: Literal[
        "fashion-mnist",
        "typefaces",
        "typefaces-small",
        "smoke",
        "cifar100-deit-s",
        "cifar100-deit-s-dial",
        "imagenet-deit-s",
        "folder",
    ] = "fashion-mnist"
    """The preset that sets the defaults."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of all random numbers."""
    bf16: bool = True
    """bfloat16 autocast in training; slow on hardware that only emulates it. Evaluation is always in float32."""
    save_every: float = Field(60, ge=0)
    """Seconds between two saved states of a stage: the most work that an interruption loses."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0: all cores."""
    only: tuple[
        Literal[
            "dense",
            "direct",
            "last-block",
            "small",
            "plain-100",
            "plain-75",
            "plain-55",
            "plain-40",
            "static",
            "heads",
        ],
        ...,
    ] = ()
    """Step `controls`: train only these."""
    others: tuple[Path, ...] = ()
    """Step `report`: evaluated runs of other seeds, to compare with this one."""
    data: DataSettings = DataSettings()
    vit: VitSettings = VitSettings()
    sae: SaeSettings = SaeSettings()
    profiles: ProfileSettings = ProfileSettings()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the command line, then the preset. The environment is not read."""
        return init_settings, PresetSource(settings_cls)

    def fingerprint(self, stage: str) -> dict[str, Any]:
        """The settings that the results of `stage` depend on, as JSON: its own group and those of earlier stages."""
        groups = {"vit": ("data", "vit"), "sae": ("data", "vit", "sae"), "profiles": ("data", "vit", "sae", "profiles")}
        return {"seed": self.seed, **self.model_dump(mode="json", include=set(groups[stage]))}


class PresetSource(PydanticBaseSettingsSource):
    """The values of the preset that the command line, the source before this one, names.

    Contexts given there replace the preset's; other values are merged setting by setting.
    """

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Never called: __call__ returns all values at once. Raises AssertionError."""
        raise AssertionError("values are given as a whole by __call__")

    def __call__(self) -> dict[str, Any]:
        """Settings by name, as nested dictionaries; empty for a preset that does not exist."""
        preset = PRESETS.get(self.current_state.get("preset", "fashion-mnist"), {})
        if "contexts" not in self.current_state.get("profiles", {}):
            return preset
        return {**preset, "profiles": {k: v for k, v in preset.get("profiles", {}).items() if k != "contexts"}}


def source(prog: str = "python -m training") -> CliSettingsSource[argparse.ArgumentParser]:
    """The command line as a source of Settings. prog: the command that a user types; it may end with the step."""
    *_, step = prog.split()
    step_given = step in ALONE
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog}{'' if step_given else ' [STEP]'} --out FOLDER [--preset NAME] [--SETTING VALUE ...]",
        description=ALONE[step] if step_given else f"{Settings.__doc__} {PRESET}",
        formatter_class=HelpFormatter,
    )
    filled: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(Settings, root_parser=parser)
    make_readable(parser)
    if step_given:
        next(action for action in parser._actions if action.dest == "step").help = argparse.SUPPRESS
    return filled


def parser(prog: str = "python -m training") -> argparse.ArgumentParser:
    """The parser of the settings. prog: as for `source`."""
    return source(prog).root_parser
