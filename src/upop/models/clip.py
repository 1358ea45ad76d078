"""CLIP for retrieval: transformers' two towers, with momentum encoders and queues as in the published model.

Parameter names are those of transformers' CLIPModel; `upop.checkpoints.names.clip` maps the published ones.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPConfig as _LibraryConfig
from transformers import CLIPModel

from upop.models.contrast import MomentumContrast
from upop.models.sizes import ModelConfig, check_heads, check_patches, some_images, some_words


class ClipSizes(ModelConfig):
    """Sizes of CLIP's towers before pruning. The defaults are those of ViT-L/14 at 336 pixels."""

    image_size: int = Field(336, gt=0, description="side of the square input images, in pixels")
    patch_size: int = Field(14, gt=0)
    vision_width: int = Field(1024, gt=0)
    vision_depth: int = Field(24, gt=0)
    vision_heads: int = Field(16, gt=0)
    vision_mlp: int = Field(4096, gt=0)
    text_width: int = Field(768, gt=0)
    text_depth: int = Field(12, gt=0)
    text_heads: int = Field(12, gt=0)
    text_mlp: int = Field(3072, gt=0)
    vocab_size: int = Field(49408, gt=0, description="the last two words are begin and end tokens")
    max_positions: int = Field(77, gt=0)
    embed_dim: int = Field(768, gt=0, description="size of the features")

    @model_validator(mode="after")
    def _heads(self) -> Self:
        check_heads(self, "vision", "text")
        check_patches(self)
        return self


class ClipConfig(ClipSizes):
    """Sizes of a CLIP model with momentum encoders and queues."""

    queue_size: int = Field(57600, gt=0, description="features of earlier batches in the contrastive loss")
    momentum: float = Field(0.995, ge=0, lt=1, description="momentum of the momentum encoders")


def library_config(config: ClipSizes) -> Any:
    """Return transformers' configuration of the two towers and their projections."""
    vision = {"image_size": config.image_size, "patch_size": config.patch_size}
    text = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": 0,
    }
    for tower, sizes in (("vision", vision), ("text", text)):
        sizes |= {
            "hidden_size": getattr(config, f"{tower}_width"),
            "num_hidden_layers": getattr(config, f"{tower}_depth"),
            "num_attention_heads": getattr(config, f"{tower}_heads"),
            "intermediate_size": getattr(config, f"{tower}_mlp"),
            "projection_dim": config.embed_dim,
        }
    return _LibraryConfig(vision_config=vision, text_config=text, projection_dim=config.embed_dim)


class ClipRetrieval(MomentumContrast):
    """CLIP with momentum encoders of its towers and projections, and queues of features."""

    momentum_encoders = {  # noqa: RUF012 - read-only
        name: f"{name}_m" for name in ("vision_model", "text_model", "visual_projection", "text_projection")
    }
    read_by_others = ("text_model.final_layer_norm", "text_model_m.final_layer_norm")

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        clip = CLIPModel(library_config(config))
        for name, momentum_encoder in self.momentum_encoders.items():
            setattr(self, name, getattr(clip, name))
            setattr(self, momentum_encoder, copy.deepcopy(getattr(clip, name)))
        self.logit_scale = clip.logit_scale
        self.copy_to_momentum()
        self.add_queues(config.embed_dim, config.queue_size)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Small inputs, for `upop.find_prunable` to trace the model."""
        words = some_words(self.config)["input_ids"]
        words[:, -1] = self.config.vocab_size - 1
        return {"images": some_images(self.config), "input_ids": words}

    def remake_queues(self, size: int) -> None:
        """Reinitialise the queues for `size` features."""
        super().remake_queues(size)
        self.config = self.config.model_copy(update={"queue_size": size})

    def encode_image(self, images: Tensor, *, momentum: bool = False) -> Tensor:
        """Return features of images, [batch, embed_dim], not normalised.

        Args:
            images: [batch, 3, size, size].
            momentum: whether to use the momentum encoders.
        """
        tower, projection = self._towers("vision_model", "visual_projection", momentum)
        features: Tensor = projection(tower(images).pooler_output)
        return features

    def encode_text(self, input_ids: Tensor, *, momentum: bool = False) -> Tensor:
        """Return features of texts, [batch, embed_dim], not normalised.

        Args:
            input_ids: token ids, [batch, tokens]; the last word of the vocabulary ends a text, and tokens after it have
                no effect.
            momentum: whether to use the momentum encoders. As published, they use the online tower's final norm; its
                copy is only stored in checkpoints.
        """
        tower, projection = self._towers("text_model", "text_projection", momentum)
        last: nn.LayerNorm = self.text_model.final_layer_norm  # type: ignore[assignment, union-attr]
        norm: dict[str, Tensor] = {"final_layer_norm.weight": last.weight, "final_layer_norm.bias": last.bias}
        states = functional_call(tower, norm, (input_ids,)) if momentum else tower(input_ids)
        features: Tensor = projection(states.pooler_output)
        return features

    def forward(
        self, images: Tensor, input_ids: Tensor, ids: Tensor | None = None, alpha: float = 0.0
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Return the features of images and texts; with `ids`, return the contrastive loss of a batch of pairs.

        In training mode the loss also updates the momentum encoders and adds the online features to the queues, as
        published.

        Args:
            images: [batch, 3, size, size].
            input_ids: token ids of the texts, [texts, tokens]; one text per image if `ids` are given.
            ids: image number of each pair, [batch]; pairs with equal numbers are positives.
            alpha: weight of the momentum encoders' similarities in the targets.

        Returns:
            Normalised features, [batch, embed_dim] and [texts, embed_dim]; or the loss, a scalar.
        """
        image = F.normalize(self.encode_image(images), dim=-1)
        text = F.normalize(self.encode_text(input_ids), dim=-1)
        if ids is None:
            return image, text
        with torch.no_grad():
            if self.training:
                self.update_momentum(self.config.momentum)
            image_m = F.normalize(self.encode_image(images, momentum=True), dim=-1)
            text_m = F.normalize(self.encode_text(input_ids, momentum=True), dim=-1)
        loss = self.contrastive_loss(image, text, image_m, text_m, ids, alpha, self.logit_scale.exp())
        if self.training:
            self.enqueue(image, text, ids)
        return loss

    def replay_arguments(self) -> dict[str, Any]:
        """Omit the loss: features do not depend on momentum encoders and queues."""
        return {"ids": None}

    def _towers(self, tower: str, projection: str, momentum: bool) -> tuple[nn.Module, nn.Module]:
        names = (self.momentum_encoders[tower], self.momentum_encoders[projection]) if momentum else (tower, projection)
        return getattr(self, names[0]), getattr(self, names[1])
