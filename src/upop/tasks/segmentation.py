"""Semantic segmentation (ADE20K) with Segmenter."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tvf

from upop.data.segmentation import FOLDER, SegmentationDataset, class_names, collate_segments
from upop.data.segmentation_transforms import (
    IGNORED,
    STATISTICS,
    Normalise,
    Normalization,
    Statistics,
    TrainCrop,
)
from upop.errors import SettingError
from upop.examples import Album, Answer, Example
from upop.metrics.segmentation import confusion, named_ious, segmentation_scores
from upop.models.blip import enlarge_weights
from upop.models.segmenter import BACKBONES, Segmenter, SegmenterConfig
from upop.preparation import Deviation, Mean
from upop.report.blends import blended, write_blends
from upop.runs.bad_images import LEFT_OUT, readable
from upop.runs.devices import autocast, to_device
from upop.runs.examples import untransformed
from upop.runs.task import Batch
from upop.settings import RunSettings
from upop.tasks.published import SIZES, PublishedTask
from upop.tasks.windows import SCALES, Window, segment
from upop.values import described

_MOMENTUM = 0.9


def _dataset_root() -> Path:
    return Path(os.environ.get("DATASET") or "datasets/vision")


class SegmentationSettings(RunSettings):
    """Settings of configs/segmentation.yaml; the defaults are the published ones."""

    recorded: ClassVar[tuple[str, ...]] = (
        *("image_size", "crop_size", "window_size", "window_stride", "mean", "std", "classes"),
    )
    of_model: ClassVar[Mapping[str, str]] = {"image_size": "image_size", "classes": "classes"}

    dataset_root: Path = Field(default_factory=_dataset_root, description=f"folder with {FOLDER}; by default $DATASET")
    backbone: Literal[
        "vit_tiny_patch16_384",
        "vit_small_patch16_384",
        "vit_small_patch32_384",
        "vit_base_patch8_384",
        "vit_base_patch16_384",
        "vit_base_patch32_384",
        "vit_large_patch16_384",
    ] = "vit_small_patch16_384"
    decoder: Literal["mask_transformer", "linear"] = "mask_transformer"
    classes: int = Field(150, ge=1, le=254)
    normalization: Normalization = Field(
        "vit", description="mean and standard deviation of colours: vit (0.5) or deit (ImageNet)"
    )
    mean: Mean | None = Field(
        None, description="mean of red, green and blue, from 0 to 1; by default that of normalization"
    )
    std: Deviation | None = Field(
        None, description="standard deviation of red, green and blue; by default that of normalization"
    )

    image_size: int = Field(512, gt=0, description="size to which short sides of images are resized")
    crop_size: int | None = Field(None, gt=0, description="side of training crops; by default image_size")
    window_size: int | None = Field(None, gt=0, description="side of the sliding window; by default crop_size")
    window_stride: int | None = Field(None, gt=0, description="stride of the sliding window; by default window_size")
    window_batch: int = Field(8, ge=1, description="windows per forward pass of evaluation; bounds the memory")
    multiscale: bool = Field(False, description="evaluate at six scales from 0.5 to 1.75, with and without flips")
    blend: int | Literal["all"] = Field(
        0, description="images of an evaluation to write to blended/, with overlays of prediction and ground truth"
    )

    dropout: float | None = Field(None, ge=0, lt=1, description="dropout of the encoder; by default the model's")
    drop_path: float | None = Field(None, ge=0, lt=1, description="stochastic depth rate of the encoder's last block")
    init_scale: float = Field(1.0, gt=0, description="factor for initial weights: small models need about 5")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd has Nesterov momentum of 0.9")
    schedule: Literal["epoch", "step", "polynomial"] = "polynomial"
    init_lr: float = Field(4e-3, gt=0)
    min_lr: float = Field(1e-5, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_epoch: int = Field(64, ge=1)
    batch_size_train: int = Field(16, ge=1)
    batch_size_test: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _windows(self) -> Self:
        if self.window.stride > self.window.size:
            raise ValueError(f"window_stride ({self.window.stride}) is above window_size ({self.window.size})")
        if isinstance(self.blend, int) and self.blend < 0:
            raise ValueError(f"blend ({self.blend}) must be a number of images, or all")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _named_statistics(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Take mean and deviation from `normalization`; if it is set, it overrides a checkpoint's."""
        if not isinstance(values, dict) or values.get("normalization", "vit") not in list(STATISTICS):
            return handler(values)
        named = dict(zip(("mean", "std"), STATISTICS[values.get("normalization", "vit")], strict=True))
        filled = {name: value for name, value in named.items() if values.get(name) is None}
        made = handler({**values, **filled})
        if "normalization" not in values:
            made.model_fields_set.difference_update(filled)
        return made

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation for normalising colours."""
        mean, std = STATISTICS[self.normalization]
        return self.mean or mean, self.std or std

    @property
    def crop(self) -> int:
        """Side of the training crops, in pixels."""
        return self.crop_size or self.image_size

    @property
    def window(self) -> Window:
        """The sliding window of evaluation."""
        size = self.window_size or self.crop
        return Window(size, self.window_stride or size, self.window_batch)

    @property
    def root(self) -> Path:
        """Folder of ADE20K's images and annotations."""
        return self.dataset_root / FOLDER

    @property
    def listed_folders(self) -> tuple[Path, ...]:
        """The folders of images and of label maps."""
        return (self.root / "images", self.root / "annotations")


class SegmentationTask(PublishedTask[SegmentationSettings]):
    """Semantic segmentation of scenes."""

    name: ClassVar[str] = "segmentation"
    pipeline: ClassVar[str | None] = "image-segmentation"
    metric: ClassVar[str] = "mIoU"
    shown: ClassVar[tuple[str, ...]] = ("mIoU", "pixel accuracy")
    splits: ClassVar[Mapping[str, str]] = {"train": "training", "val": "validation"}
    settings: ClassVar[type[RunSettings]] = SegmentationSettings
    config: ClassVar[type[Any]] = SegmenterConfig
    update_first_step: ClassVar[bool] = False

    def sizes(self, settings: SegmentationSettings) -> dict[str, Any]:
        """Return the model's sizes that the settings determine; its image size is that of the crops."""
        rates = {"dropout": settings.dropout, "drop_path": settings.drop_path}
        given = {name: rate for name, rate in rates.items() if rate is not None}
        return {"image_size": settings.crop, "classes": settings.classes, **given, **settings.model}

    def build(self, settings: SegmentationSettings) -> nn.Module:
        """Return the model with random weights."""
        sizes = {**BACKBONES[settings.backbone], "decoder": settings.decoder, **self.sizes(settings)}
        with described(SIZES):
            config = SegmenterConfig(**sizes)
        model = Segmenter(config)
        enlarge_weights(model, settings.init_scale)
        return self._prepared(model, settings)

    def evaluated(self, settings: SegmentationSettings) -> tuple[str, ...]:
        """Return "val" alone: ADE20K's test split has no public labels."""
        return ("val",)

    def dataset(self, settings: SegmentationSettings, split: str) -> Dataset[Any]:
        """Return the images of a split: crops in training, whole images in evaluation."""
        transform = (
            TrainCrop(settings.image_size, settings.crop, settings.augment, settings.statistics)
            if split == "train"
            else Normalise(settings.statistics)
        )
        class_names(settings.root, settings.classes)  # raises an error now if the classes do not match
        return SegmentationDataset(
            settings.root, self.splits[split], transform, settings.classes, outside=settings.allow_outside
        )

    def collate(self, settings: SegmentationSettings) -> Callable[[list[Any]], Batch]:
        """Return the collator, which stacks crops, and makes lists of whole images."""
        return cast(Callable[[list[Any]], Batch], collate_segments)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the crops."""
        return {"images": batch["images"]}

    def loss(self, model: nn.Module, batch: Batch, settings: SegmentationSettings, epoch: float) -> Tensor:
        """Return the mean cross-entropy of all pixels with a class; 0 if the batch has none."""
        logits: Tensor = model(**self.inputs(batch)).float()
        labels: Tensor = batch["labels"]
        summed: Tensor = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return summed / (labels != IGNORED).sum().clamp_min(1)

    def optimizer(self, model: nn.Module, settings: SegmentationSettings) -> torch.optim.Optimizer:
        """Return SGD with Nesterov momentum, as published, or AdamW."""
        if settings.optimizer == "adamw":
            return super().optimizer(model, settings)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(
            parameters, settings.init_lr, momentum=_MOMENTUM, weight_decay=settings.weight_decay, nesterov=True
        )

    def predict(self, model: nn.Module, batch: Batch, settings: SegmentationSettings) -> dict[str, Tensor]:
        """Return the confusion matrix of every image, [batch, classes, classes]."""
        return self._confusion(batch, self._maps(model, batch, settings), settings)

    def collect(
        self, accelerator: Accelerator, model: nn.Module, loader: Any, settings: SegmentationSettings
    ) -> dict[str, Tensor]:
        """Return the confusion matrix of the whole split, int64 [classes, classes], on the CPU.

        Prediction maps are kept for one batch only; `blend` of them are written as images.
        """
        total = torch.zeros(settings.classes, settings.classes, dtype=torch.long)
        for batch in readable(accelerator, loader):
            with autocast(accelerator, settings):
                maps = self._maps(model, batch, settings)
            self._write_blends(batch, maps, settings)
            counts = self._confusion(batch, maps, settings)["confusion"]
            if LEFT_OUT in batch:
                counts[batch[LEFT_OUT]] = 0
            # Gathered per image, which drops the repeated images that fill up the last batch.
            total += accelerator.gather_for_metrics(counts).sum(0).cpu()
        return {"confusion": total}

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: SegmentationSettings
    ) -> dict[str, float]:
        """Return mIoU, pixel accuracy and mean class accuracy in percent."""
        return segmentation_scores(predictions["confusion"])

    def files(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: SegmentationSettings, split: str
    ) -> dict[str, Any]:
        """Return the intersection over union of every class, in percent."""
        names = class_names(settings.root, settings.classes)
        return {f"iou_per_class_{self.splits[split]}.json": named_ious(predictions["confusion"], names)}

    def answers(
        self, model: nn.Module, samples: Dataset[Any], numbers: Sequence[int], settings: SegmentationSettings
    ) -> Mapping[str, Any]:
        """Return "maps": the predicted classes of some images, [H, W] each, on the CPU."""
        device = next(model.parameters()).device
        # One by one, because sizes of images differ.
        batches = (to_device(self.collate(settings)([samples[number]]), device) for number in numbers)
        return {"maps": [self._maps(model, batch, settings)[0].cpu() for batch in batches]}

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: SegmentationSettings,
        album: Album,
    ) -> list[Example]:
        """Return images with overlays of the predicted and true classes."""
        shown, plain = [], untransformed(samples)
        for place, number in enumerate(numbers):
            item = plain[number]
            image, labels = item["image"], item["labels"]
            maps = [rows["maps"][place] for rows in found.values()]
            mixed = [tvf.to_pil_image(blended(image, each, settings.classes)) for each in (labels, *maps)]
            truth, *overlays = [album.add(each, f"{number}-{column}") for column, each in enumerate(mixed)]
            answers = {}
            for model, file, predicted in zip(found, overlays, maps, strict=True):
                right = (predicted == labels).sum() / (labels != IGNORED).sum().clamp_min(1)
                answers[model] = Answer(images=(file,), note=f"{100 * right:.1f} % of pixels correct")
            shown.append(
                Example(
                    images=(album.add(tvf.to_pil_image(image), str(number)),),
                    truth=Answer(images=(truth,)),
                    answers=answers,
                )
            )
        return shown

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` grey crops of the model's image size."""
        side = cast(Segmenter, model).config.image_size
        return {"images": torch.zeros(batch_size, 3, side, side, device=next(model.parameters()).device)}

    def _maps(self, model: nn.Module, batch: Batch, settings: SegmentationSettings) -> list[Tensor]:
        """Return the predicted classes of every image, [H, W] each."""
        scales = SCALES if settings.multiscale else (1.0,)
        probabilities = segment(
            model, list(batch["images"]), settings.window, settings.image_size, scales, flips=settings.multiscale
        )
        return [each.argmax(0) for each in probabilities]

    def _confusion(self, batch: Batch, maps: list[Tensor], settings: SegmentationSettings) -> dict[str, Tensor]:
        pairs = zip(maps, batch["labels"], strict=True)
        return {"confusion": torch.stack([confusion(found, labels, settings.classes) for found, labels in pairs])}

    def _write_blends(self, batch: Batch, maps: list[Tensor], settings: SegmentationSettings) -> None:
        normalise = Normalise(settings.statistics)
        numbers = batch["numbers"].tolist()
        for number, name, image, found, labels in zip(
            numbers, batch["names"], batch["images"], maps, batch["labels"], strict=True
        ):
            if settings.blend == "all" or number < settings.blend:
                path = settings.output_dir / "blended" / f"{name}.png"
                write_blends(path, normalise.undo(image), found, labels, settings.classes)

    def _at_size(self, model: nn.Module, settings: SegmentationSettings, source: str) -> nn.Module:
        return model  # it takes windows of any size

    def _prepared(self, model: nn.Module, settings: SegmentationSettings) -> nn.Module:
        found = cast(Segmenter, model).config.classes
        if found != settings.classes:
            raise SettingError(
                f"The model has {found} classes, and classes is {settings.classes}. Set classes={found}, or train a "
                "model for this data set."
            )
        return super()._prepared(model, settings)
