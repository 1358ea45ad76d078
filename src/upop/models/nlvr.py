"""BLIP for visual reasoning (NLVR2): whether a sentence is true of a pair of images.

A vision transformer encodes both images. Each layer of the text encoder attends to them in two cross-attention
branches; lower layers average the branches, upper ones merge them by a linear layer. A head classifies the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention

from upop.models.blip import BlipConfig, build_vision_encoder, keep_position_ids, text_config
from upop.models.sizes import some_images, some_words


class NlvrConfig(BlipConfig):
    """Sizes of BLIP for NLVR before pruning."""

    merge_from: int = Field(6, ge=0, description="first text layer that merges its branches by a linear layer")


class _BranchesOutput(nn.Module):
    """Projects and joins the outputs of both branches, and adds the residual (`output` in the published names)."""

    def __init__(self, config: Any, merge: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None

    def forward(self, context0: Tensor, context1: Tensor, residual: Tensor) -> Tensor:
        first, second = self.dense0(context0), self.dense1(context1)
        if self.merge_layer is None:
            joined = (first + second) / 2
        else:
            joined = self.merge_layer(torch.cat([first, second], dim=-1))
        states: Tensor = self.LayerNorm(self.dropout(joined) + residual)
        return states


class TwinCrossAttention(nn.Module):
    """Two cross-attention branches, one per image; replaces the single cross-attention of a BlipTextLayer."""

    def __init__(self, config: Any, layer: int, merge: bool) -> None:
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True, layer_idx=layer)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True, layer_idx=layer)
        self.output = _BranchesOutput(config, merge)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Sequence[Tensor], **_unused: Any
    ) -> tuple[Tensor, None]:
        """Return new text states, [batch, tokens, text_width].

        Args:
            hidden_states: text states, [batch, tokens, text_width].
            encoder_hidden_states: states of the two images, [batch, patches, vision_width] each.
        """
        context0, _ = self.self0(hidden_states, encoder_hidden_states=encoder_hidden_states[0])
        context1, _ = self.self1(hidden_states, encoder_hidden_states=encoder_hidden_states[1])
        return self.output(context0, context1, hidden_states), None


class BlipNlvr(nn.Module):
    """BLIP for NLVR, with the parameter names of the published checkpoints."""

    def __init__(self, config: NlvrConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_encoder(config)
        text = text_config(config)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        keep_position_ids(self.text_encoder.embeddings)
        for number, layer in enumerate(self.text_encoder.encoder.layer):
            layer.crossattention = TwinCrossAttention(text, number, merge=number >= config.merge_from)
            layer.crossattention.apply(self.text_encoder._init_weights)
        width = config.text_width
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Small inputs, for `upop.find_prunable` to trace the model."""
        return {"images": some_images(self.config, 4), **some_words(self.config)}

    def encode(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return image states, [2 * batch, patches, vision_width], and text states, [batch, tokens, text_width]."""
        image_states = self.visual_encoder(images)
        # The first token becomes [ENC], the last word of the vocabulary, as in all published checkpoints.
        first = torch.full_like(input_ids[:, :1], self.config.vocab_size - 1)
        pairs = image_states.unflatten(0, (2, -1))
        text = self.text_encoder(
            torch.cat([first, input_ids[:, 1:]], dim=1),
            attention_mask=attention_mask,
            encoder_hidden_states=[pairs[0], pairs[1]],  # a list: transformers before 5.24 does not support tuples
            is_decoder=False,
        )
        return image_states, text.last_hidden_state

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [batch, 2] (false, true).

        Args:
            images: [2 * batch, 3, size, size], all first images before all second ones.
            input_ids: token ids of the sentences, [batch, tokens].
            attention_mask: 1 where there is a token, 0 where there is padding, [batch, tokens].
        """
        logits: Tensor = self.cls_head(self.encode(images, input_ids, attention_mask)[1][:, 0])
        return logits
