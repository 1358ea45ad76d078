"""BLIP for visual question answering.

A vision transformer encodes the image, and the text encoder of the question attends to it. A text decoder attends to
the question's states, and generates an answer or ranks the candidates of a list.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextModel

from upop.models.blip import (
    LABEL_SMOOTHING,
    BlipConfig,
    build_text_decoder,
    build_vision_encoder,
    keep_position_ids,
    text_config,
)
from upop.models.sizes import some_images, some_words
from upop.pruning.precision import accumulator, precise

NUM_BEAMS = 3
MAX_TOKENS = 10
"""Maximum tokens of a generated answer, with [DEC]."""


class VqaConfig(BlipConfig):
    """Sizes of BLIP for VQA before pruning; question encoder and answer decoder have the same sizes."""

    image_size: int = 480


class _MaskedCrossAttention(BlipTextAttention):
    """Cross-attention that ignores padding; transformers' own drops the mask and attends to padding, too."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        context, shares = self.self(hidden_states, None, *args, encoder_attention_mask=attention_mask, **kwargs)
        return self.output(context, hidden_states), shares


class BlipVqa(nn.Module):
    """BLIP for VQA, with the parameter names of the published checkpoints."""

    def __init__(self, config: VqaConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_encoder(config)
        self.text_encoder = BlipTextModel(text_config(config), add_pooling_layer=False)
        keep_position_ids(self.text_encoder.embeddings)
        # The decoder attends to the question, not to the image.
        self.text_decoder = build_text_decoder(config.model_copy(update={"vision_width": config.text_width}))
        for layer in self.text_decoder.bert.encoder.layer:
            layer.crossattention.__class__ = _MaskedCrossAttention

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Small inputs, for `upop.find_prunable` to trace the model."""
        texts = some_words(self.config, "question") | some_words(self.config, "answer")
        return {"images": some_images(self.config), **texts, "answer_counts": torch.ones(2, dtype=torch.long)}

    def encode(self, images: Tensor, question_ids: Tensor, question_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return image states, [batch, patches, vision_width], and question states, [batch, tokens, text_width]."""
        image_states = self.visual_encoder(images)
        text = self.text_encoder(
            _with_first(question_ids, self.config.vocab_size - 1),  # [ENC], the last word of the vocabulary
            attention_mask=question_mask,
            encoder_hidden_states=image_states,
            is_decoder=False,
        )
        return image_states, text.last_hidden_state

    def decode(self, answer_ids: Tensor, answer_mask: Tensor, states: Tensor, question_mask: Tensor) -> Tensor:
        """Return next-token logits, [answers, tokens, vocab_size].

        Args:
            answer_ids: token ids, [answers, tokens]; the first is replaced by [DEC].
            answer_mask: 1 for tokens, 0 for padding, [answers, tokens].
            states: of each answer's question, [answers, question tokens, text_width].
            question_mask: of each answer's question, [answers, question tokens].
        """
        output = self.text_decoder(
            _with_first(answer_ids, self.config.vocab_size - 2),  # [DEC]
            attention_mask=answer_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=question_mask,
        )
        logits: Tensor = output.logits
        return logits

    def forward(
        self,
        images: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answer_counts: Tensor,
    ) -> Tensor:
        """Return next-token logits of answers, [answers, answer tokens, vocab_size].

        Args:
            images: [batch, 3, size, size].
            question_ids: token ids of the questions, [batch, tokens]; the first is replaced by [ENC].
            question_mask: 1 for tokens, 0 for padding, [batch, tokens].
            answer_ids: token ids of all answers, in the order of questions, [answers, answer tokens].
            answer_mask: 1 for tokens, 0 for padding, [answers, answer tokens].
            answer_counts: number of answers per question, [batch]; their sum is the number of answers.
        """
        _, states = self.encode(images, question_ids, question_mask)
        return self.decode(
            answer_ids,
            answer_mask,
            states.repeat_interleave(answer_counts, dim=0, output_size=len(answer_ids)),
            question_mask.repeat_interleave(answer_counts, dim=0, output_size=len(answer_ids)),
        )

    def rank(
        self, states: Tensor, question_mask: Tensor, candidate_ids: Tensor, candidate_mask: Tensor, k: int, chunk: int
    ) -> Tensor:
        """Return the index of the likeliest candidate for each question, [batch].

        The `k` candidates with the likeliest first token are compared by the loss of all their tokens.

        Args:
            states: of the questions, [batch, tokens, text_width], from `encode`.
            question_mask: [batch, tokens].
            candidate_ids: token ids, [candidates, answer tokens]; the first is replaced by [DEC].
            candidate_mask: [candidates, answer tokens].
            k: candidates per question to compare; all if the list is shorter.
            chunk: maximum question-candidate pairs per forward pass; bounds the memory.
        """
        begin = torch.zeros_like(question_mask[:, :1])
        first = self.decode(begin, torch.ones_like(begin), states, question_mask)[:, 0].softmax(-1)
        places = first[:, candidate_ids[:, 1]].topk(min(k, len(candidate_ids)), dim=1).indices
        pairs, lengths = places.flatten(), candidate_mask.sum(1)
        # Candidates of similar length are batched, to reduce padding: most have one word, and few have many.
        order = lengths[pairs].argsort(stable=True)
        losses = torch.empty(len(pairs), device=states.device, dtype=accumulator(states))
        for part in order.split(chunk):
            longest = int(lengths[pairs[part[-1]]])
            ids, mask = candidate_ids[pairs[part], :longest], candidate_mask[pairs[part], :longest]
            question = part // places.shape[1]
            logits = self.decode(ids, mask, states[question], question_mask[question])
            losses[part] = answer_losses(logits, ids, mask)
        best = losses.view_as(places).argmin(1, keepdim=True)
        return places.gather(1, best).squeeze(1)

    def generate(self, states: Tensor, question_mask: Tensor | None, end: int, pad: int = 0) -> Tensor:
        """Return answers by beam search, [batch, up to 10 tokens], each starting with [DEC].

        Args:
            states: of the questions, [batch, tokens, text_width], from `encode`.
            question_mask: [batch, tokens]; None attends to padding, too, as in the published code, so that answers
                depend on the length of the batch's other questions.
            end: id of the end token.
            pad: id of the padding token.
        """
        begin = torch.full((len(states), 1), self.config.vocab_size - 2, device=states.device)
        decoder: Any = self.text_decoder
        found: Tensor = decoder.generate(
            input_ids=begin,
            attention_mask=torch.ones_like(begin),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones_like(states[..., 0]) if question_mask is None else question_mask,
            max_length=MAX_TOKENS,
            min_length=1,
            num_beams=NUM_BEAMS,
            do_sample=False,
            use_cache=True,
            eos_token_id=end,
            pad_token_id=pad,
        )
        return found


def answer_losses(logits: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
    """Return the loss of each answer, [answers]: the sum over its tokens, with the published label smoothing.

    Args:
        logits: from the model, [answers, tokens, vocab_size].
        answer_ids: [answers, tokens]; the first token is not predicted.
        answer_mask: [answers, tokens].
    """
    targets = answer_ids.masked_fill(answer_mask == 0, -100)[:, 1:]
    losses = F.cross_entropy(
        precise(logits[:, :-1]).flatten(0, 1), targets.flatten(), label_smoothing=LABEL_SMOOTHING, reduction="none"
    )
    return losses.view_as(targets).sum(1)


def _with_first(ids: Tensor, token: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)
