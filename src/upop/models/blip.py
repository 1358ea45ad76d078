"""What all BLIP models here share: timm's vision transformer and transformers' BLIP text encoder, sized by one config.

Parameter names are those of the published checkpoints, which both libraries already use.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BlipTextConfig

VIT_SIZES: dict[str, dict[str, int]] = {
    "base": {"vision_width": 768, "vision_depth": 12, "vision_heads": 12, "vision_mlp": 3072},
    "large": {"vision_width": 1024, "vision_depth": 24, "vision_heads": 16, "vision_mlp": 4096},
}


class BlipConfig(BaseModel):
    """Sizes of a BLIP model before pruning. The defaults are those of the published ViT-B models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(384, gt=0, description="side of the square input pictures, in pixels")
    patch_size: int = Field(16, gt=0)
    vision_width: int = Field(768, gt=0)
    vision_depth: int = Field(12, gt=0)
    vision_heads: int = Field(12, gt=0)
    vision_mlp: int = Field(3072, gt=0)
    text_width: int = Field(768, gt=0)
    text_depth: int = Field(12, gt=0)
    text_heads: int = Field(12, gt=0)
    text_mlp: int = Field(3072, gt=0)
    vocab_size: int = Field(30524, gt=0, description="BERT's words plus [DEC] and [ENC]")
    max_positions: int = Field(512, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1, description="of the text encoder's hidden states and attention")
    drop_path: float = Field(0.1, ge=0, lt=1, description="of the vision transformer, at its last block")

    @model_validator(mode="after")
    def _heads(self) -> Self:
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width ({width}) is no multiple of {tower}_heads ({heads})")
        return self

    @classmethod
    def vit(cls, size: Literal["base", "large"], **overrides: Any) -> Self:
        """Return the published configuration with ViT-B or ViT-L."""
        return cls(**{**VIT_SIZES[size], **overrides})


class _CheckpointedBlock(Block):
    """A block that computes its activations again in the backward pass instead of keeping them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


def build_vision_encoder(config: BlipConfig) -> VisionTransformer:
    """Return the vision transformer: pictures [B, 3, S, S] -> token states [B, 1 + (S / patch)^2, vision_width]."""
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        mlp_ratio=(config.vision_mlp + 0.5) / config.vision_width,  # timm rounds the product down
        drop_path_rate=config.drop_path,
        num_classes=0,
        global_pool="",
    )


def checkpoint_last_blocks(encoder: VisionTransformer, count: int | None = None) -> None:
    """Trade time for memory in the last `count` blocks (all of them when None)."""
    for block in list(encoder.blocks)[0 if count is None else max(0, len(encoder.blocks) - count) :]:
        block.__class__ = _CheckpointedBlock


def text_config(config: BlipConfig) -> BlipTextConfig:
    """Return transformers' configuration of the text model; cross-attention exists only where `is_decoder` is set."""
    return BlipTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.text_width,
        encoder_hidden_size=config.vision_width,
        intermediate_size=config.text_mlp,
        num_hidden_layers=config.text_depth,
        num_attention_heads=config.text_heads,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        pad_token_id=0,
        bos_token_id=config.vocab_size - 2,  # [DEC]
        sep_token_id=None,
        eos_token_id=None,
        is_decoder=True,
        use_cache=False,
    )


def keep_position_ids(embeddings: nn.Module) -> None:
    """Have the position numbers saved, as the published checkpoints do."""
    ids: Tensor = embeddings.position_ids  # type: ignore[assignment]
    embeddings.register_buffer("position_ids", torch.arange(ids.shape[-1]).unsqueeze(0), persistent=True)
