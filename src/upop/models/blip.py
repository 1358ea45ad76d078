"""Common parts of all BLIP models: timm's vision transformer and transformers' BLIP text model.

Parameter names are those of the published checkpoints, which both libraries use.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BlipTextConfig

from upop.models.checkpointed_block import CheckpointedBlock
from upop.models.decoder import TextDecoder
from upop.models.sizes import ModelConfig, check_heads, check_patches

VIT_SIZES: dict[str, dict[str, int]] = {
    "base": {"vision_width": 768, "vision_depth": 12, "vision_heads": 12, "vision_mlp": 3072},
    "large": {"vision_width": 1024, "vision_depth": 24, "vision_heads": 16, "vision_mlp": 4096},
}

LABEL_SMOOTHING = 0.1
"""Label smoothing of the text decoder's loss."""


class BlipConfig(ModelConfig):
    """Sizes of a BLIP model before pruning. The defaults are those of the published ViT-B models."""

    image_size: int = Field(384, gt=0, description="side of the square input images, in pixels")
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
    vision_eps: float = Field(1e-6, gt=0, description="of the vision transformer's norms; transformers writes 1e-5")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the text encoder's hidden states and attention")
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth rate of the vision transformer's last block"
    )

    @model_validator(mode="after")
    def _heads(self) -> Self:
        check_heads(self, "vision", "text")
        check_patches(self)
        return self

    @classmethod
    def vit(cls, size: Literal["base", "large"], **overrides: Any) -> Self:
        """Return the published configuration with ViT-B or ViT-L."""
        return cls(**{**VIT_SIZES[size], **overrides})


def build_vision_encoder(config: BlipConfig) -> VisionTransformer:
    """Return the vision transformer: images, [batch, 3, size, size] -> states, [batch, 1 + patches, vision_width]."""
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        mlp_ratio=(config.vision_mlp + 0.5) / config.vision_width,  # timm rounds the product down
        drop_path_rate=config.drop_path,
        norm_layer=partial(LayerNorm, eps=config.vision_eps),
        num_classes=0,
        global_pool="",
    )


def checkpoint_last_blocks(encoder: VisionTransformer, count: int | None = None) -> None:
    """Turn on gradient checkpointing for the last `count` blocks; None for all."""
    for block in list(encoder.blocks)[0 if count is None else max(0, len(encoder.blocks) - count) :]:
        block.__class__ = CheckpointedBlock


@torch.no_grad()
def enlarge_weights(model: nn.Module, factor: float) -> None:
    """Multiply the initial matrices and embeddings of a model by `factor`.

    The libraries initialise them with a standard deviation of 0.02, which suits a width of 768; in small models,
    activations nearly vanish. Position embeddings of patches get ten times that factor, because few training steps do
    not learn positions if the content of patches dominates.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("patch_embed.proj.weight"):  # its initialisation suits any width
            parameter.mul_(factor * 10 if factor != 1 and name.endswith("pos_embed") else factor)


def text_config(config: BlipConfig) -> BlipTextConfig:
    """Return transformers' configuration of the text model; it only has cross-attention if `is_decoder` is set."""
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


def build_text_decoder(config: BlipConfig) -> TextDecoder:
    """Return the text decoder, which attends to an image or a question.

    Its output layer is tied to its word embedding. With `labels` it returns the mean loss, with the published label
    smoothing.
    """
    text = text_config(config)
    text.label_smoothing = LABEL_SMOOTHING
    decoder = TextDecoder(text)
    keep_position_ids(decoder.bert.embeddings)
    return decoder


def keep_position_ids(embeddings: nn.Module) -> None:
    """Make position ids persistent, as in the published checkpoints."""
    ids: Tensor = embeddings.position_ids  # type: ignore[assignment]
    embeddings.register_buffer("position_ids", torch.arange(ids.shape[-1]).unsqueeze(0), persistent=True)
