"""Image classification with classifiers of transformers (ViT, Swin, DINOv2, BEiT, ConvNeXt, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from upop.checkpoints.opening import Checkpoint, open_checkpoint
from upop.data.row_images import CropAtRandom, ImageSampleCollator, LabelledImages, unchanged
from upop.errors import CheckpointError
from upop.examples import Album, Example
from upop.pruning.errors import some_of
from upop.runs.task import Batch
from upop.tasks.labelled import accuracies, labelled_examples, likeliest
from upop.tasks.library import LibrarySettings, LibraryTask
from upop.tasks.row_settings import rows_for

_UNNAMED = "LABEL_"
"""Prefix of transformers' default class names."""


class ImageClassificationSettings(LibrarySettings):
    """Settings of `upop compress image-classification`."""

    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    batch_size_train: int = Field(32, ge=1)
    batch_size_test: int = Field(64, ge=1)


class ImageClassificationTask(LibraryTask[ImageClassificationSettings]):
    """Image classification with a classifier of transformers."""

    name: ClassVar[str] = "image-classification"
    pipeline: ClassVar[str | None] = "image-classification"
    metric: ClassVar[str] = "acc@1"
    shown: ClassVar[tuple[str, ...]] = ("acc@1", "acc@5")
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val", "test": "test"}
    settings: ClassVar[type[ImageClassificationSettings]] = ImageClassificationSettings
    autos: ClassVar[tuple[str, ...]] = ("AutoModelForImageClassification",)

    def changes(self, path: Path, settings: ImageClassificationSettings) -> dict[str, Any]:
        """Return the classes of the data if the model has others: it then gets a new head."""
        names = rows_for(settings, "train", kinds=("label",)).names
        if _has_classes(_classes_in(open_checkpoint(path)), names):
            return {}
        return {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "num_labels": len(names),
        }

    def adapt(
        self, model: nn.Module, settings: ImageClassificationSettings, *, training: bool
    ) -> tuple[nn.Module, Sequence[str]]:
        """Return the model unchanged, after checking that it has the classes of the data.

        Raises:
            CheckpointError: it has others.
        """
        split = next(iter((*(("train",) if settings.data else ()), *settings.held_out)))
        names = rows_for(settings, split, kinds=("label",)).names
        config: Any = model.config
        mine = _named(config.id2label)
        if not _has_classes(mine, names):
            raise CheckpointError(
                f"{settings.pretrained} has the classes {some_of(mine)}, and the data have {some_of(names)}. Train it "
                "on the data first (upop train image-classification), which gives it a new head, or rename the classes "
                "of the data."
            )
        return model, ()

    def evaluated(self, settings: ImageClassificationSettings) -> tuple[str, ...]:
        """Return the held-out splits that the settings name data for."""
        return settings.held_out

    def dataset(self, settings: ImageClassificationSettings, split: str) -> Dataset[Any]:
        """Return images with labels, in the model's numbering of classes."""
        rows = rows_for(settings, split, kinds=("label",))
        mine = _classes_in(open_checkpoint(str(settings.pretrained))) if settings.pretrained else None
        training = rows.names if split == "train" or not settings.data else _train_names(settings)
        names = mine if mine is not None and _has_names(mine) and _has_classes(mine, training) else training
        crops = split == "train" and settings.augment
        return LabelledImages(rows, CropAtRandom("strong") if crops else unchanged, names)

    def collate(self, settings: ImageClassificationSettings) -> ImageSampleCollator:
        """Return the collator, which calls the model's processor."""
        return ImageSampleCollator(self.processor(settings))

    def loss(self, model: nn.Module, batch: Batch, settings: ImageClassificationSettings, epoch: float) -> Tensor:
        """Return the cross-entropy with smoothed labels."""
        logits = model(**self.takes(model, self.inputs(batch))).logits.float()
        return F.cross_entropy(logits, batch["labels"], label_smoothing=settings.smoothing)

    def predict(self, model: nn.Module, batch: Batch, settings: ImageClassificationSettings) -> dict[str, Tensor]:
        """Return "answers", the likeliest classes, [batch, up to 5]; "labels" and "nll", the loss, [batch]."""
        logits = model(**self.takes(model, self.inputs(batch))).logits.float()
        nll = F.cross_entropy(logits, batch["labels"], reduction="none")
        return {"answers": likeliest(logits), "labels": batch["labels"], "nll": nll}

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: ImageClassificationSettings
    ) -> dict[str, float]:
        """Return acc@1, acc@5 if there are at least five classes, in percent, and the mean loss."""
        return {**accuracies(predictions), "loss": float(predictions["nll"].double().mean())}

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: ImageClassificationSettings,
        album: Album,
    ) -> list[Example]:
        """Return images and the likeliest classes, with the true class."""
        assert isinstance(samples, LabelledImages)
        return labelled_examples(found, samples, numbers, album)


def _classes_in(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    """Return the class names in a folder's config.json, by index; None if it has none."""
    if checkpoint.library != "transformers":
        return None
    config = checkpoint.config
    named = config.get("id2label")
    if isinstance(named, dict):
        return _named(named)
    count = config.get("num_labels")
    return tuple(f"{_UNNAMED}{number}" for number in range(count)) if isinstance(count, int) else None


def _named(labels: Mapping[Any, Any]) -> tuple[str, ...]:
    return tuple(str(name) for _, name in sorted(labels.items(), key=lambda each: int(each[0])))


def _has_names(classes: Sequence[str]) -> bool:
    return not all(name == f"{_UNNAMED}{number}" for number, name in enumerate(classes))


def _has_classes(mine: Sequence[str] | None, names: Sequence[str]) -> bool:
    """Whether a model has the classes of the data: by name, or by number if its classes have no names."""
    if mine is None:
        return False
    return set(names) <= set(mine) if _has_names(mine) else len(mine) == len(names)


def _train_names(settings: ImageClassificationSettings) -> tuple[str, ...]:
    return rows_for(settings, "train", kinds=("label",)).names
