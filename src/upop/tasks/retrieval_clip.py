"""Retrieval (COCO, Flickr30K) with CLIP, by feature similarity alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from upop.data.clip_tokenizer import ClipCollator, ClipTokenizer, load_clip_tokenizer
from upop.errors import SettingError
from upop.models.clip import ClipConfig, ClipRetrieval, ClipSizes
from upop.runs.task import Batch
from upop.settings import RunSettings
from upop.tasks.published import SIZES, PublishedTask
from upop.tasks.retrieval_base import RetrievalSettings, RetrievalTask
from upop.values import described

TOKENIZER = "pretrained/clip-vit-large-patch14-336"
"""Default folder of CLIP's vocabulary; if it does not exist, openai's on the hub is used."""


class ClipRetrievalSettings(RetrievalSettings):
    """Settings of configs/retrieval_{coco,flickr}_clip.yaml; the defaults are the published ones."""

    of_model: ClassVar[Mapping[str, str]] = {**RetrievalSettings.of_model, "model.max_positions": "max_positions"}

    image_size: int = Field(336, gt=0)
    tokenizer: str = Field(
        TOKENIZER,
        description="folder with CLIP's vocab.json and merges.txt or tokenizer.json, OpenAI's own file, or hub name",
    )
    weight_decay: float = Field(0.2, ge=0)
    w_sp_attn: float = Field(
        22 / 15 * 8e-3, ge=0, description="weight of the sparsity term; affects only the logged loss"
    )


class ClipRetrievalTask(RetrievalTask[ClipRetrievalSettings], PublishedTask[ClipRetrievalSettings]):
    """Image-text retrieval in both directions with CLIP."""

    name: ClassVar[str] = "retrieval-clip"
    settings: ClassVar[type[RunSettings]] = ClipRetrievalSettings
    config: ClassVar[type[ClipSizes]] = ClipConfig

    def sizes(self, settings: ClipRetrievalSettings) -> dict[str, Any]:
        """Return the dense model's sizes that the settings determine, and the queue's."""
        return {"queue_size": settings.queue_size, **super().sizes(settings)}

    def build(self, settings: ClipRetrievalSettings) -> nn.Module:
        """Return the model with random weights, and the tokenizer's vocabulary."""
        sizes = {"vocab_size": len(clip_tokenizer(settings.tokenizer)), **self.sizes(settings)}
        with described(SIZES):
            model = self._built(sizes)
        return self._prepared(model, settings)

    def collate(self, settings: ClipRetrievalSettings) -> ClipCollator:
        """Return the collator that stacks images and tokenizes captions."""
        length = settings.model.get("max_positions", ClipConfig.model_fields["max_positions"].default)
        return ClipCollator(clip_tokenizer(settings.tokenizer), length)

    def tokenizer(self, settings: ClipRetrievalSettings) -> Any:
        """Return CLIP's tokenizer."""
        return clip_tokenizer(settings.tokenizer).library

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return images and tokens."""
        return {name: batch[name] for name in ("images", "input_ids")}

    def loss(self, model: nn.Module, batch: Batch, settings: ClipRetrievalSettings, epoch: float) -> Tensor:
        """Return the contrastive loss."""
        loss: Tensor = model(**self.inputs(batch), ids=batch["ids"], alpha=settings.alpha_at(epoch))
        return loss

    def predict(self, model: nn.Module, batch: Batch, settings: ClipRetrievalSettings) -> dict[str, Tensor]:
        """Return normalised "features" of images, [batch, dim]."""
        return {"features": nn.functional.normalize(cast(ClipRetrieval, model).encode_image(batch["images"]), dim=-1)}

    def text_features(self, model: nn.Module, words: Mapping[str, Tensor]) -> Tensor:
        """Return normalised features of texts, [batch, dim]."""
        return nn.functional.normalize(cast(ClipRetrieval, model).encode_text(words["input_ids"]), dim=-1)

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` grey images, each with a text of full length (77 tokens)."""
        config = cast(ClipRetrieval, model).config
        device = next(model.parameters()).device
        words = torch.full((batch_size, config.max_positions), config.vocab_size - 1, device=device)
        images = torch.zeros(batch_size, 3, config.image_size, config.image_size, device=device)
        return {"images": images, "input_ids": words}

    def _prepared(self, model: nn.Module, settings: ClipRetrievalSettings) -> nn.Module:
        config = cast(ClipRetrieval, model).config
        words = len(clip_tokenizer(settings.tokenizer))
        if words != config.vocab_size:
            # The model would not find the end token, whose features it uses.
            raise SettingError(
                f"The model's vocabulary has {config.vocab_size} words, and the tokenizer {settings.tokenizer!r} has "
                f"{words}. Set tokenizer to the one that the model was trained with."
            )
        self._settle(model, settings)
        return super()._prepared(model, settings)

    def _built(self, sizes: dict[str, Any]) -> nn.Module:
        """Return a model of these sizes with random weights."""
        return ClipRetrieval(ClipConfig(**sizes))

    def _settle(self, model: nn.Module, settings: ClipRetrievalSettings) -> None:
        """Apply the settings to a model, in place: here the size of its queue."""
        assert isinstance(model, ClipRetrieval)
        if model.config.queue_size != settings.queue_size:
            model.remake_queues(settings.queue_size)


@cache
def clip_tokenizer(path: str) -> ClipTokenizer:
    """Return CLIP's tokenizer, from a local folder if it exists, else from the hub."""
    on_hub = path == TOKENIZER and not Path(path).exists()
    return load_clip_tokenizer(f"openai/{Path(path).name}" if on_hub else path)
