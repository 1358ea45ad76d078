"""The settings of a run: one frozen class that YAML files, command flags and Python all fill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from upop.errors import SettingError, nearest
from upop.packaged import located
from upop.preparation import CLIP_MEAN, CLIP_STD, Deviation, Images, Interpolation, Mean, Resize
from upop.pruning.choice import is_ratio, meant
from upop.pruning.deprecated import warn_renamed
from upop.pruning.round_to import RoundTo, check_round_to, read_round_to
from upop.pruning.targets import format_target, read_target
from upop.values import Checked, problems
from upop.yaml_files import key_lines, read_yaml

TOKENIZER = "pretrained/bert-base-uncased"
"""Where the published code looks for BERT's vocabulary."""

AUTO = "auto"
"""The value of `batch_size_train` that has the largest batch found that fits, and of `tokens`."""

_DISTILL_WEIGHT = 5.0
OLDER: Mapping[str, tuple[str, ...]] = {
    "p": ("ratio",),
    "epoch": ("max_epoch", "search_epochs"),
    "epochs_search": ("search_epochs",),
    "align": ("round_to",),
    "score": ("importance",),
}
"""Names that settings had, as in the published commands, and what they are called now."""

S = TypeVar("S", bound="RunSettings")


class RunSettings(Checked):
    """Settings of every task's run. Published YAML files use these names; flags override the file."""

    # numpy takes no larger seed.
    largest: ClassVar[Mapping[str, int]] = {"seed": 2**32 - 1, "image_size": 2**14, "num_workers": 2**10}

    recorded: ClassVar[tuple[str, ...]] = ("image_size",)
    """Settings that a checkpoint keeps, to be evaluated with elsewhere; it decides them where they are not given."""
    of_model: ClassVar[Mapping[str, str]] = {"image_size": "image_size"}
    """Settings (of `model`, with a dot) that a model's configuration decides in the same way, and its fields."""

    # Data and weights, as in the published files.
    pretrained: str | None = Field(
        None,
        description="checkpoint to start from: a published .pth or .safetensors (a file, or an http(s) URL), a folder, "
        "or a name on the hub",
    )
    image_size: int = Field(384, gt=0, description="side in pixels of the model's input images")
    augment: bool = Field(True, description="random crops, flips and RandAugment in training")

    model: dict[str, Any] = Field(default_factory=dict, description="sizes that differ from the published model's")

    # Optimisation.
    weight_decay: float = Field(0.05, ge=0)
    init_lr: float = Field(3e-6, gt=0, description="highest learning rate")
    search_lr: float | None = Field(
        None, gt=0, description="learning rate of the search with method reference; by default init_lr"
    )
    min_lr: float = Field(0.0, ge=0)
    lr_batch: int | None = Field(
        None, ge=1, description="samples per step that init_lr is meant for; the rate is scaled to the actual number"
    )
    epochs: int | None = Field(
        None,
        ge=1,
        description="all epochs of the run, search included; by default max_epoch and search_epochs determine them",
    )
    max_epoch: int = Field(15, ge=1, description="epochs of retraining (and of `train`), as published files name them")
    search_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs of the published search; other methods train for as many in total. By default max_epoch",
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="linear warm-up; by default 5 % of all steps with methods upop and magnitude, else none",
    )
    warmup_epochs: int = Field(0, ge=0, description="epochs of warm-up in addition to warmup_steps")
    schedule: Literal["epoch", "step", "polynomial"] = Field(
        "epoch", description="how the rate falls to min_lr: a cosine that moves per epoch or step, or (1 - t)^0.9"
    )
    batch_size_train: int = Field(
        32, ge=1, description="samples per process and forward pass; auto finds the largest number that fits"
    )
    batch_size_auto: bool = Field(
        False,
        description="find the largest batch that fits; if batch_size_train is set too, a step keeps its samples",
    )
    batch_size_test: int = Field(128, ge=1)
    accumulate: int = Field(1, ge=1, description="forward passes per optimizer step")
    clip_grad: float | None = Field(None, gt=0, description="maximum norm of the gradients")
    amp: bool = Field(False, description="bfloat16 autocast")
    grad_checkpointing: bool = Field(
        False, description="recompute the activations of all blocks in the backward pass: less memory, more time"
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of the weights, which is evaluated too"
    )
    max_bad_steps: int = Field(20, ge=1, description="stop after this many non-finite steps in a row")

    # The method.
    ratio: float = Field(0.5, description="share of the prunable cost to remove; 0.5 is 2x, 0.75 is 4x")
    target: str | None = Field(
        None,
        description="instead of ratio: limits for the whole model: params=0.5 (or 12M, 40MB@float16), macs=2x, or both",
    )
    profile: Path | None = Field(
        None, description="file of `upop profile`, for a target such as latency=0.5 or latency=12ms"
    )
    vocabulary: Path | None = Field(
        None,
        description="before compression, remove all words that this file does not use: texts, one per line, or a JSON "
        "list of token ids; a target of parameters counts them as removed",
    )
    method: Literal["upop", "reference", "magnitude", "one-shot"] = Field(
        "upop",
        description="reference: as published; magnitude and one-shot: one cut, by weight norm or by first-order terms",
    )
    search_share: float = Field(
        0.1, gt=0, lt=1, description="share of all steps that the search of method upop takes, at least 16 steps"
    )
    importance: Literal["absolute", "squared", "signed"] | None = Field(
        None, description="how method upop ranks first-order changes of the loss; by default absolute"
    )
    correct: bool = Field(
        True, description="method upop corrects the consumers of pruned channels, by least squares on their inputs"
    )
    rotate: bool = Field(
        True,
        description="method upop rotates attention heads to their principal axes first, where that changes no output",
    )
    distill: float | None = Field(
        None,
        ge=0,
        description="weight of feature distillation from the dense model, in search and retraining; by default 5 for "
        "method upop, else 0. Above 0, every step takes a forward pass of the dense model",
    )
    cost: Literal["params", "macs", "reference"] = "params"
    round_to: RoundTo | None = Field(
        None,
        description="numbers of kept channels are multiples of this, or by kind: attention=8,mlp=128; by default 8 on "
        "CUDA, else 1",
    )
    uniform: Literal["tower"] | None = Field(
        None,
        description="tower: all layers of a tower keep equally many heads and neurons, where the model's configuration "
        "can express it, so that libraries load the result without upop",
    )
    depth: bool = Field(
        False,
        description="prune whole branches too, by the importance of all their channels; with uniform, whole layers",
    )
    tokens: int | float | tuple[int, ...] | Literal["auto"] | None = Field(
        None,
        description="image tokens that merging removes in every layer: one number, one for each layer, or the share of "
        "the encoder's multiply-adds to save; auto: as many as calibration finds best for a target of macs",
    )
    width: bool = Field(
        False,
        description="prune channels of each tower's residual stream too, in all layers that use it; needs a target",
    )
    interval: int = Field(50, ge=1, description="search steps between updates of the masks, with method reference")
    w_sp_attn: float = Field(4.8e-3, ge=0, description="weight of the sparsity term; affects only the logged loss")
    w_sp_mlp: float = Field(2e-4, ge=0)

    # The run.
    output_dir: Path = Path("output")
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp: shard weights, gradients and optimizer state over the processes"
    )
    seed: int = Field(42, ge=0)
    num_workers: int = Field(4, ge=0, description="processes that decode images, per training process")
    skip_bad_images: int = Field(
        0, ge=0, description="number of unreadable image files to skip; one more stops the run"
    )
    allow_outside: bool = Field(
        False,
        description="images may lie outside of their folder: by absolute paths, .. or links",
    )
    latency_batch: int = Field(1, ge=1, description="batch size for measuring latency")
    examples: int = Field(8, ge=0, description="held-out samples whose images and answers are kept for the report")
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.jsonl")
    trackers: tuple[str, ...] = Field(
        (),
        description="further trackers of the rows of metrics.jsonl: tensorboard, or any tracker that Accelerate knows",
    )
    resume: Literal["no", "auto", "must"] = Field(
        "no",
        description="continue from the newest checkpoint in output_dir: if there is one (auto), or fail (must)",
    )
    allow_changes: bool = Field(
        False,
        description="continue a resumed run although weights, data or libraries have changed, and record the changes",
    )
    checkpoint_minutes: float = Field(
        15, ge=0, description="between checkpoints within an epoch; 0 writes one after every step"
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints to keep; older ones are removed")

    passing: ClassVar[frozenset[str]] = frozenset(
        {
            *("output_dir", "device", "num_workers", "skip_bad_images", "allow_outside", "latency_batch", "examples"),
            *("log_every", "resume", "checkpoint_minutes", "keep_checkpoints", "batch_size_train", "accumulate"),
            *("batch_size_auto", "grad_checkpointing", "trackers", "allow_changes"),
        }
    )
    """Settings that a resumed run may change: they decide nothing about its result (samples per step are compared)."""

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, values: Any) -> Any:
        return current_names(values) if isinstance(values, Mapping) else values

    @field_validator("ratio", mode="before")
    @classmethod
    def _is_a_ratio(cls, value: Any) -> Any:
        number = _number(value)
        if not is_ratio(number):
            raise ValueError(f"Input should be a number strictly between 0 and 1{meant(value)}")
        return number

    @field_validator("target", mode="before")
    @classmethod
    def _is_a_target(cls, value: Any) -> Any:
        try:
            return None if value is None else format_target(read_target(value))
        except SettingError as error:
            raise ValueError(str(error).removeprefix("target ")) from None

    @field_validator("round_to", mode="before")
    @classmethod
    def _is_a_round_to(cls, value: Any) -> Any:
        try:
            return None if value is None else read_round_to(value) if isinstance(value, str) else check_round_to(value)
        except SettingError as error:
            raise ValueError(str(error).removeprefix("round_to ").partition("; found")[0]) from None

    @model_validator(mode="before")
    @classmethod
    def _automatic_batch(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("batch_size_train") == AUTO:
            given = {name: value for name, value in values.items() if name != "batch_size_train"}
            return {**given, "batch_size_auto": True}
        return values

    @model_validator(mode="after")
    def _learning_rates(self) -> Self:
        if self.min_lr > self.init_lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above init_lr ({self.init_lr})")
        return self

    @model_validator(mode="after")
    def _shares_a_budget(self) -> Self:
        limits = () if self.target is None else read_target(self.target)
        if self.tokens == AUTO and not any(limit.kind == "macs" for limit in limits):
            raise ValueError(
                f"tokens: auto divides a target of multiply-adds, and target is {self.target}; give one: "
                "target: macs=0.5"
            )
        return self

    @model_validator(mode="after")
    def _method(self) -> Self:
        if self.target is not None and not self.is_default("ratio"):
            raise ValueError(f"ratio ({self.ratio:g}) and target ({self.target}) are both given; leave one of them out")
        if self.target is not None and self.cost == "reference":
            raise ValueError("cost: reference is the budget of the published search, which takes a ratio and no target")
        if self.width and self.target is None:
            raise ValueError("width needs a target, which counts the weights of the whole model: target: params=0.5")
        if self.method == "upop" and self.cost == "reference":
            raise ValueError("cost: reference is the budget of the published search; set method: reference")
        if self.method in ("reference", "magnitude"):
            changed = [
                name
                for name in ("search_share", "importance", "correct", "rotate", "depth", "width")
                if getattr(self, name) != type(self).model_fields[name].default
            ]
            if changed:
                raise ValueError(
                    f"method: {self.method} does not use {' and '.join(changed)}; leave "
                    f"{'them' if len(changed) > 1 else 'it'} out, or set method: upop"
                )
        return self

    @property
    def listed_folders(self) -> tuple[Path, ...]:
        """Folders in which every image is data: a run in one of them would train on what it wrote."""
        return ()

    @property
    def budget(self) -> dict[str, Any]:
        """What a compression is asked for, as arguments of `upop.Compression` and the like."""
        if self.target is None:
            return {"ratio": self.ratio}
        if self.profile is None:
            return {"target": self.target}
        from upop.profiling import read_profile

        return {"target": self.target, "profile": read_profile(self.profile)}

    @property
    def distill_weight(self) -> float:
        """The weight of what the dense model teaches, in a compression."""
        return (_DISTILL_WEIGHT if self.method == "upop" else 0.0) if self.distill is None else self.distill

    @property
    def teaching(self) -> float:
        """The older name of `distill_weight`."""
        warn_renamed(f"{type(self).__name__}.teaching", "distill_weight")
        return self.distill_weight

    @property
    def all_epochs(self) -> int:
        """Epochs of a compression, those of its search included."""
        return self.epochs or self.max_epoch + (self.search_epochs or self.max_epoch)

    @property
    def training_epochs(self) -> int:
        """Epochs of `train`."""
        return self.epochs or self.max_epoch

    @property
    def searching_epochs(self) -> int:
        """Epochs of the published search: of all epochs the share that it has of max_epoch and search_epochs."""
        searched = self.search_epochs or self.max_epoch
        if self.epochs is None:
            return searched
        return max(1, self.epochs * searched // (searched + self.max_epoch))

    @property
    def retraining_epochs(self) -> int:
        """Epochs after the published search."""
        return self.all_epochs - self.searching_epochs

    @property
    def data_folders(self) -> dict[str, Path]:
        """Setting -> folder, of the settings that say where data lie."""
        names = [name for name in type(self).model_fields if name.endswith("_root") or name == "data_path"]
        return {name: Path(getattr(self, name)) for name in names if getattr(self, name) is not None}

    def is_default(self, name: str) -> bool:
        """Whether a setting was not given, or as it would be anyway."""
        usual = type(self).model_fields[name].get_default(call_default_factory=True)
        return name not in self.model_fields_set or getattr(self, name) == usual

    def to_yaml(self) -> str:
        """Return the settings as resolved, in the form that `read_settings` takes."""
        unused = {"ratio"} if self.target is not None else {"target"}
        return yaml.safe_dump(self.model_dump(mode="json", exclude=unused), sort_keys=False)


class ImageSettings(RunSettings):
    """Settings of the tasks that see whole images, all of one size."""

    recorded: ClassVar[tuple[str, ...]] = ("image_size", "mean", "std", "interpolation", "resize", "crop_ratio")

    mean: Mean = Field(CLIP_MEAN, description="mean of red, green and blue, from 0 to 1")
    std: Deviation = Field(CLIP_STD, description="standard deviation of red, green and blue")
    interpolation: Interpolation = Field("bicubic", description="how images are resized")
    resize: Resize = Field(
        "squash",
        description="squash: both sides to the model's; crop: the short side, then a centre crop; pad: the long side",
    )
    crop_ratio: float = Field(
        1.0, gt=0, le=1, description="share of a resized image's side in the centre crop of evaluation"
    )

    @property
    def images(self) -> Images:
        """How images are brought to the model's size and range."""
        return Images(self.mean, self.std, self.interpolation, self.resize, self.crop_ratio)


class LanguageSettings(ImageSettings):
    """Settings of the tasks with texts, whose annotation files are published."""

    ann_root: Path = Field(Path("annotation"), description="folder of the annotation files")
    tokenizer: str = Field(TOKENIZER, description="folder of the tokenizer, or its name on the hub")


def read_settings(
    kind: type[S],
    path: Path | None,
    overrides: Mapping[str, Any],
    sources: Mapping[str, str] | None = None,
    *,
    published: bool = False,
) -> S:
    """Return settings of a kind from a YAML file and overrides, which beat it; older names of settings are read too.

    Args:
        kind: class of the settings.
        path: of the file.
        overrides: setting -> value.
        sources: setting -> where its value in `overrides` is from, for messages: "from --ratio".
        published: whether the published method, and the published budget with it, is what is done by default.

    A file such as configs/nlvr.yaml that is not in the working directory is the package's own.

    Raises:
        SettingError: the file is missing or is no mapping; all unknown keys (with the nearest known one) and all
            values out of range are listed, and where each is from.
    """
    path = located(path) if path is not None else None
    written = _read_yaml(path) if path is not None else {}
    in_file, given = current_names(written), current_names(overrides)
    if {"max_epoch", "search_epochs"} & given.keys():  # more particular than what the file says of all epochs
        in_file.pop("epochs", None)
    if {"ratio", "target"} <= given.keys():
        raise SettingError(
            f"ratio ({given['ratio']}) and target ({given['target']}) are both given. Leave one of them out: ratio is "
            "the share of the prunable cost to remove, target a limit for the whole model."
        )
    for one, other in (("ratio", "target"), ("target", "ratio")):
        if one in given:
            in_file.pop(other, None)
    values = in_file | given
    if published and values.setdefault("method", "reference") == "reference":
        # The published budget is a share of the cost, over single channels.
        values.setdefault("cost", "reference" if not values.get("target") and not values.get("uniform") else "params")
    named = in_file.get("batch_size_train", AUTO)
    if values.get("batch_size_train") == AUTO and named != AUTO:  # the file's number is what a step keeps to
        values |= {"batch_size_train": named, "batch_size_auto": True}

    known = list(kind.model_fields)

    def source(name: str) -> str | None:
        if name in given:
            return sources.get(name, "the default") if sources is not None else None
        if name not in in_file or path is None:
            return "the default" if name in known else None
        key = next(key for key in written if name in (key, *OLDER.get(key, ())))
        return f"from {'' if key == name else f'{key} in '}{path}, line {key_lines(path).get(str(key), 1)}"

    unknown = [
        f"unknown key {key!r}{nearest(str(key), known)}" + (f", {place}" if (place := source(key)) else "")
        for key in values
        if key not in known
    ]
    wrong: list[str] = []
    try:
        settings = kind(**{str(key): value for key, value in values.items() if key in known})
    except ValidationError as error:
        wrong = problems(error, source)
    if unknown or wrong:
        raise SettingError("These settings cannot be used:\n  " + "\n  ".join(unknown + wrong))
    return settings


def current_names(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return settings under the names that they have today; `p` is `ratio`, and the cost `flops` is `macs`.

    Raises:
        SettingError: one is there under both names.
    """
    current = dict(values)
    for old, names in OLDER.items():
        if old in current:
            twice = [name for name in names if name in values]
            if twice:
                raise SettingError(f"{old} is an older name of {twice[0]}, and both are given. Leave {old} out.")
            value = current.pop(old)
            current |= dict.fromkeys(names, value)
    if current.get("cost") == "flops":
        current["cost"] = "macs"
    return current


def _number(value: Any) -> Any:
    """Return a text that is a number as one: YAML and command lines have texts such as 1e-1."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "Config file")
    if not isinstance(content, dict):
        raise SettingError(f"Config file {path} must hold 'key: value' lines; found {type(content).__name__}.")
    return content
