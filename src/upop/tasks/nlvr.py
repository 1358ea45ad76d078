"""Visual reasoning (NLVR2) with BLIP: whether a sentence is true of two images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.functional.classification import binary_accuracy

from upop.data.nlvr import LABELS, NlvrCollator, NlvrDataset
from upop.data.transforms import eval_transform, train_transform
from upop.examples import Album, Answer, Example
from upop.models.blip import BlipConfig
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.runs.examples import untransformed
from upop.runs.task import Batch
from upop.settings import RunSettings
from upop.tasks.blip import BlipSettings, BlipTask, blank_images, blip_tokenizer, dummy_tokens, with_cross_loss

_EXAMPLE_TOKENS = 36  # the sentence length that the published multiply-adds were counted with


class NlvrSettings(BlipSettings):
    """Settings of configs/nlvr.yaml; the defaults are the published ones."""

    image_root: Path = Field(Path("datasets/vision/NLVR2"), description="folder of the images")


class NlvrTask(BlipTask[NlvrSettings]):
    """Visual reasoning: whether a sentence is true of a pair of images."""

    name: ClassVar[str] = "nlvr"
    metric: ClassVar[str] = "accuracy"
    shown: ClassVar[tuple[str, ...]] = ("accuracy",)
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "dev", "test": "test"}
    settings: ClassVar[type[RunSettings]] = NlvrSettings
    model: ClassVar[type[nn.Module]] = BlipNlvr
    config: ClassVar[type[BlipConfig]] = NlvrConfig

    def dataset(self, settings: NlvrSettings, split: str) -> Dataset[Any]:
        """Return the pairs of a split; training swaps their images at random."""
        training = split == "train"
        size, how = settings.image_size, settings.images
        return NlvrDataset(
            settings.ann_root / f"nlvr_{self.splits[split]}.json",
            settings.image_root,
            train_transform(size, settings.augment, how) if training else eval_transform(size, how),
            swap=training,
            outside=settings.allow_outside,
        )

    def collate(self, settings: NlvrSettings) -> Callable[[list[Any]], Batch]:
        """Return the collator that stacks images and tokenizes sentences."""
        return NlvrCollator(blip_tokenizer(settings.tokenizer))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return images and tokens."""
        return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}

    @with_cross_loss
    def loss(self, model: nn.Module, batch: Batch, settings: NlvrSettings, epoch: float) -> Tensor:
        """Return the cross-entropy of the two classes."""
        return F.cross_entropy(model(**self.inputs(batch)).float(), batch["labels"])

    def predict(self, model: nn.Module, batch: Batch, settings: NlvrSettings) -> dict[str, Tensor]:
        """Return "answers" (1 is true) and "labels", [batch] each."""
        return {"answers": model(**self.inputs(batch)).argmax(1), "labels": batch["labels"]}

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: NlvrSettings
    ) -> dict[str, float]:
        """Return the accuracy in percent."""
        return {"accuracy": 100 * float(binary_accuracy(predictions["answers"], predictions["labels"]))}

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: NlvrSettings,
        album: Album,
    ) -> list[Example]:
        """Return pairs of images with their sentences, and the answers."""
        shown, plain = [], untransformed(samples)
        for place, number in enumerate(numbers):
            item = plain[number]
            texts = {name: LABELS[int(rows["answers"][place])] for name, rows in found.items()}
            truth = LABELS[item["label"]]
            shown.append(
                Example(
                    images=tuple(album.add(item[f"image{side}"], f"{number}-{side}") for side in (0, 1)),
                    prompt=item["sentence"],
                    truth=Answer(text=truth),
                    answers={name: Answer(text=text, right=text == truth) for name, text in texts.items()},
                )
            )
        return shown

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` pairs of grey images with sentences of 36 tokens."""
        ids, mask = dummy_tokens(model, batch_size, _EXAMPLE_TOKENS)
        return {"images": blank_images(model, 2 * batch_size), "input_ids": ids, "attention_mask": mask}
