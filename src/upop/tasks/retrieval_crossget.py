"""Retrieval (Flickr30K, COCO) with CLIP and CrossGET: the towers merge tokens, guided by cross tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from upop.models.clip import ClipSizes
from upop.models.crossget import CrossGetClip, CrossGetConfig, CrossLosses, published_macs
from upop.pruning import count_macs, count_parameters
from upop.runs.task import Batch
from upop.settings import RunSettings
from upop.tasks.retrieval_base import RetrievalSettings
from upop.tasks.retrieval_clip import ClipRetrievalSettings, ClipRetrievalTask

_CROSS_SHARE = 0.5
"""Weight of the cross loss in training, as published."""


class CrossGetSettings(ClipRetrievalSettings):
    """Settings of configs/retrieval_flickr_crossget.yaml; the defaults are the published ones."""

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {**values, "max_epoch": 12} for name, values in RetrievalSettings.published.items()
    }

    of_model: ClassVar[Mapping[str, str]] = {
        "image_size": "image_size",
        "model.max_positions": "max_positions",
        **{name: name for name in ("rv", "rl", "merge_padding")},  # published files lack them
    }

    dataset: Literal["coco", "flickr"] = Field("flickr", description="data set, for annotation files and defaults")
    image_size: int = Field(224, gt=0)
    batch_size_train: int = Field(64, ge=1, description="samples per process and forward pass")
    batch_size_test: int = Field(128, ge=1, description="images per process and forward pass")
    weight_decay: float = Field(0.05, ge=0)
    warmup_steps: int | None = Field(0, ge=0, description="linear warm-up")
    reduce: Literal["ours", "none"] = Field("ours", description="ours merges tokens; none is plain CLIP")
    rv: int = Field(16, ge=0, description="image tokens removed per layer")
    rl: int = Field(0, ge=0, description="text tokens removed per layer")
    merge_padding: bool = Field(
        False, description="merge padding like words, as published; a text's features then depend on its padding"
    )


class CrossGetTask(ClipRetrievalTask):
    """Image-text retrieval in both directions with CLIP and token merging."""

    name: ClassVar[str] = "retrieval-crossget"
    settings: ClassVar[type[RunSettings]] = CrossGetSettings
    config: ClassVar[type[ClipSizes]] = CrossGetConfig

    def sizes(self, settings: ClipRetrievalSettings) -> dict[str, Any]:
        """Return the model's sizes that the settings determine, with the tokens removed per layer."""
        assert isinstance(settings, CrossGetSettings)
        merges = settings.reduce == "ours"
        removed = {"rv": settings.rv, "rl": settings.rl} if merges else {"rv": 0, "rl": 0}
        return {
            "image_size": settings.image_size,
            "cross": merges,
            "merge_padding": settings.merge_padding,
            **removed,
            **settings.model,
        }

    def loss(self, model: nn.Module, batch: Batch, settings: ClipRetrievalSettings, epoch: float) -> Tensor:
        """Return half the contrastive plus half the cross loss; for plain CLIP, the contrastive loss."""
        losses: CrossLosses = model(images=batch["images"], input_ids=batch["input_ids"], ids=batch["ids"])
        if cast(CrossGetSettings, settings).reduce == "none":
            return losses.contrastive
        return (1 - _CROSS_SHARE) * losses.contrastive + _CROSS_SHARE * losses.cross

    def predict(self, model: nn.Module, batch: Batch, settings: ClipRetrievalSettings) -> dict[str, Tensor]:
        """Return normalised "features" of images, [batch, dim]."""
        return {"features": F.normalize(cast(CrossGetClip, model).encode_image(batch["images"]).features, dim=-1)}

    def text_features(self, model: nn.Module, words: Mapping[str, Tensor]) -> Tensor:
        """Return normalised features of texts, [batch, dim]."""
        return F.normalize(cast(CrossGetClip, model).encode_text(words["input_ids"]).features, dim=-1)

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Return the sizes of the model, and the published counts."""
        assert isinstance(model, CrossGetClip)
        parameters = count_parameters(model)
        return {
            "parameters": parameters,
            "gmacs": count_macs(model, self.example(model, 1)) / 1e9,
            "published_parameters": parameters,
            "published_gmacs": published_macs(model.config) / 1e9,
        }

    def _built(self, sizes: dict[str, Any]) -> nn.Module:
        return CrossGetClip(CrossGetConfig(**sizes))

    def _settle(self, model: nn.Module, settings: ClipRetrievalSettings) -> None:
        """Set the tokens removed per layer, which published checkpoints do not store."""
        sizes = self.sizes(settings)
        cast(CrossGetClip, model).set_removed(sizes["rv"], sizes["rl"])
