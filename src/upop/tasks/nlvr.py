"""Visual reasoning (NLVR2) with BLIP: is the sentence true of the two pictures?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.functional.classification import binary_accuracy

from upop.checkpoints import is_folder, load
from upop.checkpoints.official import load_official, start_from
from upop.data.nlvr import NlvrCollator, NlvrDataset
from upop.data.tokenizer import load_tokenizer
from upop.data.transforms import eval_transform, train_transform
from upop.errors import CheckpointError
from upop.models.blip import checkpoint_last_blocks
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.settings import TOKENIZER, RunSettings
from upop.training.task import Batch, Task

_EXAMPLE_TOKENS = 36  # the sentence length that the published multiply-adds were counted with


class NlvrSettings(RunSettings):
    """Settings of configs/nlvr.yaml; the defaults are the published ones."""

    image_root: Path = Field(Path("datasets/vision/NLVR2"), description="folder of the pictures")


class NlvrTask(Task[NlvrSettings]):
    """Visual reasoning over pairs of pictures."""

    name: ClassVar[str] = "nlvr"
    metric: ClassVar[str] = "accuracy"
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "dev", "test": "test"}
    settings: ClassVar[type[RunSettings]] = NlvrSettings

    def build(self, settings: NlvrSettings) -> nn.Module:
        """Return BLIP for NLVR with fresh weights; its vocabulary is the tokenizer's."""
        sizes = {"vocab_size": len(_tokenizer(settings.tokenizer)), **settings.model}
        return _prepared(BlipNlvr(NlvrConfig.vit(settings.vit, image_size=settings.image_size, **sizes)), settings)

    def load(self, path: Path, settings: NlvrSettings) -> nn.Module:
        """Return the model in one of our folders or in a published file."""
        if is_folder(path):
            model = load(path)
            if not isinstance(model, BlipNlvr):
                raise CheckpointError(f"{path} holds a {type(model).__name__}, and nlvr needs a BlipNlvr.")
        else:
            model = load_official("nlvr", path, image_size=settings.image_size, **settings.model)
        return _prepared(model, settings)

    def start(self, path: Path, settings: NlvrSettings) -> tuple[nn.Module, Sequence[str]]:
        """Return the dense model, started from a checkpoint that may lack the head and the twin layers."""
        if is_folder(path):
            return self.load(path, settings), ()
        model = self.build(settings)
        return model, start_from("nlvr", path, model)

    def dataset(self, settings: NlvrSettings, split: str) -> Dataset[Any]:
        """Return the pairs of a split; pictures are swapped at random in training only."""
        training = split == "train"
        size = settings.image_size
        return NlvrDataset(
            settings.ann_root / f"nlvr_{self.splits[split]}.json",
            settings.image_root,
            train_transform(size, settings.augment) if training else eval_transform(size),
            swap=training,
        )

    def collate(self, settings: NlvrSettings) -> Callable[[list[Any]], Batch]:
        """Return what stacks pictures and tokenizes sentences."""
        return NlvrCollator(_tokenizer(settings.tokenizer))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return pictures and tokens."""
        return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of the two classes."""
        return F.cross_entropy(model(**self.inputs(batch)).float(), batch["labels"])

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return answers (1 is true) and labels, [B]."""
        return {"answers": model(**self.inputs(batch)).argmax(1), "labels": batch["labels"]}

    def score(self, predictions: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the accuracy in percent."""
        return {"accuracy": 100 * float(binary_accuracy(predictions["answers"], predictions["labels"]))}

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` pairs of grey pictures with sentences of 36 tokens."""
        config: NlvrConfig = model.config  # type: ignore[assignment]
        device = next(model.parameters()).device
        tokens = min(_EXAMPLE_TOKENS, config.max_positions)
        words = torch.ones(batch_size, tokens, dtype=torch.long, device=device)
        images = torch.zeros(2 * batch_size, 3, config.image_size, config.image_size, device=device)
        return {"images": images, "input_ids": words, "attention_mask": torch.ones_like(words)}


def _prepared(model: nn.Module, settings: NlvrSettings) -> nn.Module:
    if settings.vit_grad_ckpt:
        checkpoint_last_blocks(model.visual_encoder, settings.vit_ckpt_layer)  # type: ignore[arg-type]
    return model


@cache
def _tokenizer(path: str) -> Any:
    on_hub = path == TOKENIZER and not Path(path).exists()
    return load_tokenizer(Path(path).name if on_hub else path)
