"""Image classification (ImageNet) with timm's vision transformers; DeiT-S is the published one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from upop.checkpoints.fitting.fit import fit
from upop.checkpoints.published.vit import classifier_positions
from upop.data.classification import ImageCollator, ImageFolderDataset, RepeatedSampler, class_names
from upop.data.classification_transforms import (
    POLICY,
    Augmentation,
    CropInterpolation,
    Erasing,
    Mixing,
    MixMode,
    eval_transform,
    train_transform,
)
from upop.errors import CheckpointError, SettingError
from upop.examples import Album, Example
from upop.models.blip import enlarge_weights
from upop.models.classifier import DEIT_SMALL, ClassifierConfig, build_classifier, replace_head
from upop.preparation import IMAGENET_MEAN, IMAGENET_STD, Deviation, Mean, Resize
from upop.runs.task import Batch
from upop.settings import ImageSettings, RunSettings
from upop.tasks.labelled import accuracies, labelled_examples, likeliest
from upop.tasks.published import SIZES, PublishedTask
from upop.values import described


class ClassificationSettings(ImageSettings):
    """Settings of configs/classification.yaml; the defaults are the published ones."""

    data_path: Path = Field(Path("datasets/vision/imagenet"), description="folder of train/CLASS/* and val/CLASS/*")
    architecture: str = Field(DEIT_SMALL, description="timm's name of a vision transformer")
    classes: int | None = Field(None, ge=1, description="number of classes; by default the number of class folders")
    image_size: int = Field(224, gt=0)
    mean: Mean = IMAGENET_MEAN
    std: Deviation = IMAGENET_STD
    resize: Resize = "crop"
    crop_ratio: float = Field(
        0.875, gt=0, le=1, description="share of an image's short side in the centre crop of evaluation"
    )

    # DeiT's augmentations; `augment: false` turns off all of them except mixup and cutmix.
    auto_augment: str | None = Field(POLICY, description="augmentation policy, by timm's name")
    color_jitter: float = Field(0.4, ge=0, description="strength of colour jitter without a policy")
    train_interpolation: CropInterpolation = "bicubic"
    reprob: float = Field(0.25, ge=0, le=1, description="probability of random erasing")
    remode: Erasing = "pixel"
    recount: int = Field(1, ge=1)
    repeats: int = Field(3, ge=1, description="repeated augmentation: copies of a sample per epoch; 1 turns it off")
    mixup: float = Field(0.8, ge=0, description="mixup alpha; 0 turns it off")
    cutmix: float = Field(1.0, ge=0, description="cutmix alpha; 0 turns it off")
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = Field(1.0, ge=0, le=1)
    mixup_switch_prob: float = Field(0.5, ge=0, le=1, description="probability of cutmix, if both are on")
    mixup_mode: MixMode = "batch"
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    dropout: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth rate of the last block")

    init_scale: float = Field(1.0, gt=0, description="factor for initial weights: small models need about 5")
    init_lr: float = Field(1e-4, gt=0)
    min_lr: float = Field(1e-5, ge=0)
    schedule: Literal["epoch", "step", "polynomial"] = "step"
    ema_decay: float | None = Field(0.99996, gt=0, lt=1)
    max_epoch: int = Field(300, ge=1)
    search_epochs: int | None = Field(60, ge=1)
    interval: int = Field(800, ge=1)
    batch_size_train: int = Field(512, ge=1)
    batch_size_test: int = Field(768, ge=1)
    num_workers: int = Field(10, ge=0)
    seed: int = Field(0, ge=0)

    @property
    def listed_folders(self) -> tuple[Path, ...]:
        """The folders of the splits, whose subfolders are classes."""
        return tuple(self.data_path / split for split in ClassificationTask.splits.values())

    def mixing(self, classes: int) -> Mixing | None:
        """Return mixup and cutmix of training batches; None if both are off."""
        mixing = Mixing(
            classes,
            self.mixup,
            self.cutmix,
            self.cutmix_minmax,
            self.mixup_prob,
            self.mixup_switch_prob,
            self.mixup_mode,
            self.smoothing,
        )
        return mixing if mixing.active else None


class ClassificationTask(PublishedTask[ClassificationSettings]):
    """Image classification: one class per image."""

    name: ClassVar[str] = "classification"
    pipeline: ClassVar[str | None] = "image-classification"
    metric: ClassVar[str] = "acc@1"
    shown: ClassVar[tuple[str, ...]] = ("acc@1", "acc@5")
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val", "test": "test"}
    settings: ClassVar[type[RunSettings]] = ClassificationSettings
    config: ClassVar[type[Any]] = ClassifierConfig
    update_first_step: ClassVar[bool] = False

    def sizes(self, settings: ClassificationSettings) -> dict[str, Any]:
        """Return the sizes in the settings: the architecture if one is named, and what differs from it.

        A checkpoint determines the others.
        """
        named = {"architecture": settings.architecture} if "architecture" in settings.model_fields_set else {}
        return {
            **named,
            "dropout": settings.dropout,
            "drop_path": settings.drop_path,
            **settings.model,
        }

    def build(self, settings: ClassificationSettings) -> nn.Module:
        """Return the model with random weights, for the classes of the data."""
        sizes = {"image_size": settings.image_size, "classes": _classes(settings), **self.sizes(settings)}
        with described(SIZES):
            config = ClassifierConfig(**sizes)
        model = build_classifier(config)
        enlarge_weights(model, settings.init_scale)
        return model

    def _at_size(self, model: nn.Module, settings: ClassificationSettings, source: str) -> nn.Module:
        return model  # `adapt` resizes it

    def adapt(
        self, model: nn.Module, settings: ClassificationSettings, *, training: bool
    ) -> tuple[nn.Module, Sequence[str]]:
        """Return the model with a head for the data's classes, positions for its images, and the run's dropout."""
        config: ClassifierConfig = model.config  # type: ignore[assignment]
        changes = []
        wanted = {name: getattr(settings, name) for name in ("image_size", "dropout", "drop_path")}
        if wanted != {name: getattr(config, name) for name in wanted}:
            if config.image_size != settings.image_size:
                changes.append(
                    f"position embeddings are resized from {config.image_size} to {settings.image_size} pixels"
                )
            changed = config.model_copy(update=wanted)
            state = classifier_positions(model.state_dict(), changed)
            model = fit(build_classifier(changed), state, str(settings.pretrained), lambda _group: False).eval()
        classes = _classes(settings)
        if config.classes != classes:
            if not training:
                raise CheckpointError(
                    f"{settings.pretrained} has {config.classes} classes, and {settings.data_path} has {classes}. "
                    "Evaluate it on data with its own classes."
                )
            fresh = ", ".join(replace_head(model, classes))
            changes.append(f"the head for {config.classes} classes is replaced by a new one for {classes}: {fresh}")
        return model, changes

    def evaluated(self, settings: ClassificationSettings) -> tuple[str, ...]:
        """Return "val", and "test" if the data have a folder for it."""
        return ("val", "test") if (settings.data_path / "test").is_dir() else ("val",)

    def dataset(self, settings: ClassificationSettings, split: str) -> Dataset[Any]:
        """Return the images of a split."""
        training = split == "train"
        if training and settings.augment:
            augmentation = Augmentation(
                settings.auto_augment,
                settings.color_jitter,
                settings.train_interpolation,
                settings.reprob,
                settings.remode,
                settings.recount,
            )
            transform = train_transform(settings.image_size, augmentation, settings.images)
        else:
            transform = eval_transform(settings.image_size, settings.images)
        samples = ImageFolderDataset(
            settings.data_path,
            split,
            transform,
            training=training,
            classes=settings.classes,
            outside=settings.allow_outside,
        )
        batch = min(settings.batch_size_train, len(samples))
        if training and batch % 2 and self.takes_pairs(settings):
            few = f"all {len(samples)} training images are one batch" if batch == len(samples) else "it is odd"
            raise SettingError(
                f"batch_size_train is {settings.batch_size_train}, and {few}: mixup and cutmix need pairs of images. "
                f"Set batch_size_train to an even number{f', such as {batch - 1}' if batch > 1 else ''}, or mixup and "
                "cutmix to 0."
            )
        return samples

    def takes_pairs(self, settings: ClassificationSettings) -> bool:
        """Whether mixup or cutmix is on: they need pairs of images."""
        return settings.mixing(1) is not None

    def sampler(self, samples: Dataset[Any], settings: ClassificationSettings) -> Sampler[int] | None:
        """Return the sampler of repeated augmentation, or None."""
        return RepeatedSampler(samples, settings.repeats, settings.seed) if settings.repeats > 1 else None

    def collate(self, settings: ClassificationSettings) -> Callable[[list[Any]], Batch]:
        """Return the collator, which stacks images, and mixes them in training."""
        return ImageCollator(settings.mixing(_classes(settings)))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the images."""
        return {"x": batch["images"]}

    def optimizer(self, model: nn.Module, settings: ClassificationSettings) -> torch.optim.Optimizer:
        """Return AdamW, without weight decay for biases, norms, position embeddings and class tokens."""
        listed: set[str] = getattr(model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=listed)
        return torch.optim.AdamW(groups, lr=settings.init_lr)

    def loss(self, model: nn.Module, batch: Batch, settings: ClassificationSettings, epoch: float) -> Tensor:
        """Return the cross-entropy with smoothed labels, or with the soft targets of mixed images."""
        logits = model(batch["images"]).float()
        if "targets" in batch:
            return F.cross_entropy(logits, batch["targets"])
        return F.cross_entropy(logits, batch["labels"], label_smoothing=settings.smoothing)

    def predict(self, model: nn.Module, batch: Batch, settings: ClassificationSettings) -> dict[str, Tensor]:
        """Return "answers", the likeliest classes, [batch, up to 5], and "labels", [batch]."""
        logits = model(batch["images"])
        return {"answers": likeliest(logits), "labels": batch["labels"]}

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: ClassificationSettings
    ) -> dict[str, float]:
        """Return acc@1, and acc@5 if there are at least five classes, in percent."""
        return accuracies(predictions)

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: ClassificationSettings,
        album: Album,
    ) -> list[Example]:
        """Return images and the likeliest classes, with the true class."""
        assert isinstance(samples, ImageFolderDataset)
        return labelled_examples(found, samples, numbers, album)

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` grey images."""
        config: ClassifierConfig = model.config  # type: ignore[assignment]
        size, device = config.image_size, next(model.parameters()).device
        return {"x": torch.zeros(batch_size, 3, size, size, device=device)}


def _classes(settings: ClassificationSettings) -> int:
    return settings.classes or len(class_names(settings.data_path))
