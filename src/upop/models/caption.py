"""BLIP for captioning (COCO): a vision transformer, and a text decoder that attends to the image.

The decoder continues a prompt; generation is that of transformers, with its key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from upop.models.blip import LABEL_SMOOTHING, BlipConfig, build_text_decoder, build_vision_encoder
from upop.models.sizes import some_images, some_words
from upop.pruning.precision import precise

PAD = 0


class CaptionConfig(BlipConfig):
    """Sizes of BLIP for captioning before pruning; it is trained without stochastic depth."""

    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth rate of the vision transformer's last block"
    )


class BlipCaption(nn.Module):
    """BLIP for captioning, with the parameter names of the published checkpoints."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_encoder(config)
        self.text_decoder = build_text_decoder(config)

    @property
    def begin(self) -> int:
        """The id of [DEC], the first token of every text and the second-to-last token of the vocabulary."""
        return self.config.vocab_size - 2

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Small inputs, for `upop.find_prunable` to trace the model."""
        return {"images": some_images(self.config), **some_words(self.config)}

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of the next word at each position, [batch, tokens, vocab_size].

        Args:
            images: [batch, 3, size, size].
            input_ids: token ids of the prompted captions, [batch, tokens]; the first is replaced by [DEC].
            attention_mask: 1 where there is a token, 0 where there is padding, [batch, tokens].
        """
        first = torch.full_like(input_ids[:, :1], self.begin)
        output = self.text_decoder(
            torch.cat([first, input_ids[:, 1:]], dim=1),
            attention_mask=attention_mask,
            encoder_hidden_states=self.visual_encoder(images),
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        prompt: Sequence[int],
        end: int,
        *,
        max_length: int = 20,
        min_length: int = 5,
        num_beams: int = 3,
        sample: bool = False,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
    ) -> Tensor:
        """Return captions as token ids, [batch, tokens]: [DEC], prompt, new tokens, `end`, padding (0).

        Args:
            images: [batch, 3, size, size].
            prompt: token ids of the prompt.
            end: id of the end token ([SEP]).
            max_length: maximum tokens, prompt included.
            min_length: minimum tokens, prompt included.
            num_beams: width of the beam search; 1 is greedy. Not used with `sample`.
            sample: use nucleus sampling, with torch's generator, instead of beam search.
            top_p: probability of the nucleus.
            repetition_penalty: penalty for repeated tokens; 1 has no effect.
        """
        states = self.visual_encoder(images)
        start = torch.tensor([[self.begin, *prompt]], device=images.device).repeat(len(images), 1)
        how: dict[str, Any] = {"do_sample": False, "num_beams": num_beams}
        if sample:
            how = {"do_sample": True, "num_beams": 1, "top_p": top_p, "top_k": 0}
        found: Tensor = self.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=states,
            max_length=max_length,
            min_length=min_length,
            repetition_penalty=repetition_penalty,
            eos_token_id=end,
            pad_token_id=PAD,
            use_cache=True,
            **how,
        )
        return found


def caption_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of the labelled tokens, a scalar, at least in float32.

    Args:
        logits: of `BlipCaption`, [batch, tokens, vocab_size].
        labels: token ids, [batch, tokens], -100 for ignored positions; not shifted.
    """
    predictions = precise(logits[:, :-1]).flatten(0, 1)
    return F.cross_entropy(predictions, labels[:, 1:].flatten(), label_smoothing=LABEL_SMOOTHING)
