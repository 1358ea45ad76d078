"""Retrieval (COCO, Flickr30K) with BLIP: candidates by feature similarity, re-ranked by the matching head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from upop.data.retrieval import TEXT_TOKENS, RetrievalCollator
from upop.models.blip import BlipConfig
from upop.models.rerank import match_pairs
from upop.models.retrieval import BlipRetrieval, RetrievalConfig, RetrievalLosses
from upop.runs.devices import autocast
from upop.runs.task import Batch
from upop.settings import RunSettings
from upop.tasks.blip import BlipSettings, BlipTask, blank_images, blip_tokenizer, dummy_tokens, with_cross_loss
from upop.tasks.retrieval_base import Found, Kept, RetrievalSettings, RetrievalTask, summed


class BlipRetrievalSettings(RetrievalSettings, BlipSettings):
    """Settings of configs/retrieval_coco.yaml and retrieval_flickr.yaml; the defaults are the published ones."""

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "coco": {**RetrievalSettings.published["coco"], "k_test": 256},
        "flickr": {**RetrievalSettings.published["flickr"], "k_test": 128},
    }

    recorded: ClassVar[tuple[str, ...]] = (*RetrievalSettings.recorded, "k_test")

    w_sp_attn: float = Field(6.4e-3, ge=0, description="weight of the sparsity term; affects only the logged loss")
    k_test: int = Field(256, ge=1, description="candidates per query to re-rank; all if there are fewer")
    rerank_batch: int = Field(256, ge=1, description="pairs per forward pass of re-ranking; bounds its memory")
    negative_all_rank: bool = Field(True, description="draw hard negatives from the batches of all processes")


class BlipRetrievalTask(RetrievalTask[BlipRetrievalSettings], BlipTask[BlipRetrievalSettings]):
    """Image-text retrieval in both directions with BLIP."""

    name: ClassVar[str] = "retrieval"
    settings: ClassVar[type[RunSettings]] = BlipRetrievalSettings
    model: ClassVar[type[nn.Module]] = BlipRetrieval
    config: ClassVar[type[BlipConfig]] = RetrievalConfig

    def sizes(self, settings: BlipRetrievalSettings) -> dict[str, Any]:
        """Return the dense model's sizes that the settings determine, and the queue's."""
        return {"queue_size": settings.queue_size, **super().sizes(settings)}

    def start(self, path: Path, settings: BlipRetrievalSettings) -> tuple[nn.Module, Sequence[str]]:
        """Return the dense model; momentum encoders that the checkpoint lacks are copied from their originals."""
        model, lacking = super().start(path, settings)
        copies = {name for name in lacking if name.split(".")[0] in BlipRetrieval.momentum_encoders.values()}
        if copies:
            cast(BlipRetrieval, model).copy_to_momentum()
        return model, lacking

    def collate(self, settings: BlipRetrievalSettings) -> RetrievalCollator:
        """Return the collator that stacks images and tokenizes captions."""
        return RetrievalCollator(blip_tokenizer(settings.tokenizer))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return images and tokens."""
        return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}

    @with_cross_loss
    def loss(self, model: nn.Module, batch: Batch, settings: BlipRetrievalSettings, epoch: float) -> Tensor:
        """Return the sum of the contrastive and the matching loss."""
        losses: RetrievalLosses = model(
            **self.inputs(batch),
            ids=batch["ids"],
            alpha=settings.alpha_at(epoch),
            all_ranks=settings.negative_all_rank,
        )
        return losses.contrastive + losses.matching

    def predict(self, model: nn.Module, batch: Batch, settings: BlipRetrievalSettings) -> dict[str, Tensor]:
        """Return "states", [batch, tokens, hidden], and "features", [batch, dim], of images."""
        states, features = cast(BlipRetrieval, model).encode_image(batch["images"])
        return {"states": states, "features": features}

    def text_features(self, model: nn.Module, words: Mapping[str, Tensor]) -> Tensor:
        """Return normalised features of texts, [batch, dim]."""
        return cast(BlipRetrieval, model).encode_text(words["input_ids"], words["attention_mask"])[1]

    def candidate_counts(self, settings: BlipRetrievalSettings) -> int:
        """Return the number of candidates per query."""
        return settings.k_test

    def rescore(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        settings: BlipRetrievalSettings,
        kept: Kept,
        words: Mapping[str, Tensor],
        found: Found,
    ) -> Found:
        """Add the "match" logit to each candidate's similarity, as published.

        Each process scores the pairs of its own images, once for both directions.
        """
        assert kept.states is not None
        texts, images = found.texts.cpu(), found.images.cpu()
        row_of = torch.full((len(texts),), -1)
        row_of[kept.numbers] = torch.arange(len(kept.numbers))
        # A pair is encoded as one number: local row of the image * texts + text.
        count = len(images)
        by_image = torch.arange(len(kept.numbers)).unsqueeze(1) * count + texts[kept.numbers]
        here = row_of[images] >= 0
        by_text = (row_of[images] * count + torch.arange(count).unsqueeze(1))[here]
        pairs, places = torch.unique(torch.cat([by_image.flatten(), by_text]), return_inverse=True)
        with autocast(accelerator, settings):
            logits = match_pairs(
                cast(BlipRetrieval, model).match,
                kept.states,
                words["input_ids"],
                words["attention_mask"],
                pairs // count,
                pairs % count,
                batch=settings.rerank_batch,
                device=accelerator.device,
            )[places]
        text_logits, image_logits = torch.zeros(texts.shape), torch.zeros(images.shape)
        text_logits[kept.numbers] = logits[: by_image.numel()].view(by_image.shape)
        image_logits[here] = logits[by_image.numel() :]
        return Found(
            found.texts,
            found.text_scores + summed(accelerator, text_logits.to(accelerator.device)),
            found.images,
            found.image_scores + summed(accelerator, image_logits.to(accelerator.device)),
        )

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` grey images, each with a text of 35 tokens."""
        ids, mask = dummy_tokens(model, batch_size, TEXT_TOKENS)
        return {"images": blank_images(model, batch_size), "input_ids": ids, "attention_mask": mask}

    def published_example(self, model: nn.Module) -> dict[str, Any]:
        """Return the additional inputs of the loss for one pair, which is its own hard negative."""
        extra = super().published_example(model)
        return {**extra, "draws": extra["ids"].repeat(2), "all_ranks": False}

    def _prepared(self, model: nn.Module, settings: BlipRetrievalSettings) -> nn.Module:
        assert isinstance(model, BlipRetrieval)
        if model.config.queue_size != settings.queue_size:
            model.remake_queues(settings.queue_size)
        return super()._prepared(model, settings)
