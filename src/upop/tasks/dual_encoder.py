"""Dual encoders (CLIP, SigLIP, SigLIP 2, VisionTextDualEncoder, open_clip): embeddings of images and of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from upop.checkpoints.processors import InputProcessor
from upop.data.row_images import (
    CaptionedImages,
    CropAtRandom,
    ImageGallery,
    ImageSampleCollator,
    LabelledImages,
    unchanged,
)
from upop.examples import Album, Example
from upop.models.dual import LossName, check_dual, contrast, encoded
from upop.runs.devices import alone, autocast
from upop.runs.evaluation import samples_of
from upop.runs.task import Batch, Task
from upop.tasks.labelled import accuracies, labelled_examples, likeliest
from upop.tasks.library import LibrarySettings, LibraryTask
from upop.tasks.retrieval_base import Retrieval
from upop.tasks.row_settings import rows_for

_SHORT = "an image"


class DualEncoderSettings(LibrarySettings):
    """Settings of `upop compress dual-encoder`."""

    loss: LossName = Field(
        "auto", description="softmax, or sigmoid as in SigLIP; auto is sigmoid if the model has a logit bias"
    )
    templates: tuple[str, ...] = Field(
        ("a photo of a {}.",), description="prompt templates for class names, for images with labels"
    )
    distill_similarity: float | None = Field(
        None, ge=0, description="weight of the divergence of a batch's similarities from the dense model's"
    )
    batch_size_train: int = Field(64, ge=1)
    batch_size_test: int = Field(64, ge=1)

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        wrong = next((each for each in templates if each.count("{}") != 1), None)
        if wrong is not None or not templates:
            raise ValueError(f"each template must contain {{}} once, for the class name; found {wrong!r}")
        return templates


class DualEncoderTask(LibraryTask[DualEncoderSettings], Retrieval[DualEncoderSettings]):
    """Retrieval in both directions; for images with labels, zero-shot classification."""

    name: ClassVar[str] = "dual-encoder"
    pipeline: ClassVar[str | None] = "zero-shot-image-classification"
    shown: ClassVar[tuple[str, ...]] = ("TR@1", "IR@1", "acc@1")
    settings: ClassVar[type[DualEncoderSettings]] = DualEncoderSettings
    autos: ClassVar[tuple[str, ...]] = ("AutoModelForZeroShotImageClassification", "AutoModel")

    def check(self, model: nn.Module, source: str) -> None:
        """Raise a `CheckpointError` unless the model encodes images and texts separately."""
        check_dual(model, source)

    def sample_inputs(self, processor: InputProcessor) -> dict[str, Tensor]:
        """Return the inputs of a grey image and a short text."""
        return {**super().sample_inputs(processor), **processor.texts([_SHORT])}

    def evaluated(self, settings: DualEncoderSettings) -> tuple[str, ...]:
        """Return the held-out splits that the settings name data for."""
        return settings.held_out

    def dataset(self, settings: DualEncoderSettings, split: str) -> Dataset[Any]:
        """Return images with one caption each in training; with all captions, or with labels, in evaluation."""
        if split == "train":
            change = CropAtRandom("mild") if settings.augment else unchanged
            return CaptionedImages(rows_for(settings, split, kinds=("caption",)), change)
        rows = rows_for(settings, split, kinds=("caption", "label"))
        return LabelledImages(rows) if rows.kind == "label" else ImageGallery(rows)

    def collate(self, settings: DualEncoderSettings) -> ImageSampleCollator:
        """Return the collator, which calls the model's processor."""
        return ImageSampleCollator(self.processor(settings))

    def loss(self, model: nn.Module, batch: Batch, settings: DualEncoderSettings, epoch: float) -> Tensor:
        """Return the contrastive loss over the batches of all processes."""
        return contrast(model, model(**self.inputs_of(model, batch)), settings.loss)

    def inputs_of(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the model's forward pass in a batch, in its precision."""
        return self.takes(model, self.inputs(batch))

    def distill_options(self, settings: DualEncoderSettings) -> dict[str, float]:
        """Return the weights of the feature loss and of the divergence of similarities."""
        similar = settings.distill_similarity
        return {"features": settings.distill_weight} | ({"logits": similar} if similar else {})

    def predict(self, model: nn.Module, batch: Batch, settings: DualEncoderSettings) -> dict[str, Tensor]:
        """Return "features" of images, [batch, dim], and "labels", [batch], if there are any."""
        features = encoded(model, "image", self.cast(model, batch))
        return {"features": features} | ({"labels": batch["labels"]} if "labels" in batch else {})

    def text_features(self, model: nn.Module, words: Mapping[str, Tensor]) -> Tensor:
        """Return embeddings of texts, [batch, dim]."""
        return encoded(model, "text", words)

    def some_of(self, words: Mapping[str, Tensor], part: slice) -> dict[str, Tensor]:
        """Return the inputs of some texts, with their padding, which some models require."""
        return {name: value[part] for name, value in words.items()}

    def collect(
        self, accelerator: Accelerator, model: nn.Module, loader: Any, settings: DualEncoderSettings
    ) -> dict[str, Tensor]:
        """Return the candidates of all images and texts, or, for images with labels, the likeliest classes."""
        samples = samples_of(loader)
        if not isinstance(samples, LabelledImages):
            return super().collect(accelerator, model, loader, settings)
        rows = Task.collect(self, accelerator, model, loader, settings)
        classes = self._classes(accelerator, model, samples.names, settings).cpu()
        return {"answers": likeliest(rows["features"] @ classes.t()), "labels": rows["labels"]}

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: DualEncoderSettings
    ) -> dict[str, float]:
        """Return TR@k, IR@k and r_mean, or acc@k, in percent."""
        if "answers" in predictions:
            return accuracies(predictions)
        return super().score(predictions, samples, settings)

    def deciding(self, scores: Mapping[str, float]) -> str:
        """Return "acc@1" for images with labels, else "r_mean"."""
        return "acc@1" if "acc@1" in scores else self.metric

    def answers(
        self, model: nn.Module, samples: Dataset[Any], numbers: Sequence[int], settings: DualEncoderSettings
    ) -> Mapping[str, Any]:
        """Return the best texts and images, or the likeliest classes."""
        if not isinstance(samples, LabelledImages):
            return super().answers(model, samples, numbers, settings)
        features = Task.answers(self, model, samples, numbers, settings)["features"]
        classes = self._classes(alone(features.device), model, samples.names, settings)
        return {"answers": likeliest(features @ classes.t())}

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: DualEncoderSettings,
        album: Album,
    ) -> list[Example]:
        """Return texts with the best images and images with the best text, or images with the likeliest classes."""
        if isinstance(samples, LabelledImages):
            return labelled_examples(found, samples, numbers, album)
        return super().examples(found, samples, numbers, settings, album)

    def about_examples(self, samples: Dataset[Any], numbers: Sequence[int], split: str) -> str:
        """Return a sentence about the samples that `examples` shows."""
        if isinstance(samples, LabelledImages):
            return Task.about_examples(self, samples, numbers, split)
        return super().about_examples(samples, numbers, split)

    def _classes(
        self, accelerator: Accelerator, model: nn.Module, names: Sequence[str], settings: DualEncoderSettings
    ) -> Tensor:
        """Return normalised class embeddings, [classes, dim]: the mean over all templates."""
        collate = self.collate(settings)
        device = accelerator.device
        means = []
        for name in names:
            words = collate.tokenize([template.replace("{}", name) for template in settings.templates])
            with torch.no_grad(), autocast(accelerator, settings):
                rows = self.text_features(model, {key: value.to(device) for key, value in words.items()})
            means.append(nn.functional.normalize(rows.float().mean(0), dim=-1))
        return torch.stack(means)
