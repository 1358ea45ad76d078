"""BLIP for visual question answering: a question about an image, answered in words.

The vision transformer encodes the image, a text encoder reads the question with the image in view, and a text
decoder with the question's states in view writes an answer, or says how likely each candidate of a list is.
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
"""Of a generated answer, with its first token."""


class VqaConfig(BlipConfig):
    """Sizes of BLIP for VQA before pruning; question encoder and answer decoder have the same."""

    image_size: int = 480


class _MaskedCrossAttention(BlipTextAttention):
    """Cross-attention that leaves padding out; transformers' own loses the mask on the way, and attends to all."""

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
        # The decoder looks at the question's states, not at the image's.
        self.text_decoder = build_text_decoder(config.model_copy(update={"vision_width": config.text_width}))
        for layer in self.text_decoder.bert.encoder.layer:
            layer.crossattention.__class__ = _MaskedCrossAttention

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """A small call, off which `upop.find_prunable` reads the model."""
        texts = some_words(self.config, "question") | some_words(self.config, "answer")
        return {"images": some_images(self.config), **texts, "answer_counts": torch.ones(2, dtype=torch.long)}

    def encode(self, images: Tensor, question_ids: Tensor, question_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return image states [B, N, vision_width] and question states [batch, tokens, text_width]; see `forward`."""
        image_states = self.visual_encoder(images)
        text = self.text_encoder(
            _with_first(question_ids, self.config.vocab_size - 1),  # [ENC], the last word of the vocabulary
            attention_mask=question_mask,
            encoder_hidden_states=image_states,
            is_decoder=False,
        )
        return image_states, text.last_hidden_state

    def decode(self, answer_ids: Tensor, answer_mask: Tensor, states: Tensor, question_mask: Tensor) -> Tensor:
        """Return logits [A, L, vocab_size] of the tokens after each of an answer's.

        Args:
            answer_ids: token ids of A answers, [A, L]; the first one becomes [DEC].
            answer_mask: 1 where there is a token, [A, L].
            states: of each answer's question, [A, T, text_width].
            question_mask: of each answer's question, [A, T].
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
        """Return logits [A, L, vocab_size] of the tokens after each of an answer's.

        Args:
            images: [batch, 3, size, size].
            question_ids: token ids of the questions, [batch, tokens]; the first one becomes [ENC].
            question_mask: 1 where there is a token, 0 where there is padding, [batch, tokens].
            answer_ids: token ids of all answers, those of the first question first, [A, L].
            answer_mask: as `question_mask`, [A, L].
            answer_counts: how many answers each question has, [batch]; their sum is A.
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
        """Return the place in the list of the likeliest candidate for each question, [batch].

        The `k` candidates whose first token is the likeliest are compared by the loss of all their tokens.

        Args:
            states: of the questions, [batch, tokens, text_width], from `encode`.
            question_mask: [batch, tokens].
            candidate_ids: token ids of the list, [C, L], each starting with any token that stands for [DEC].
            candidate_mask: [C, L].
            k: how many; all of them where the list is shorter.
            chunk: most pairs of question and candidate that go through the decoder at once; what bounds the memory.
        """
        begin = torch.zeros_like(question_mask[:, :1])
        first = self.decode(begin, torch.ones_like(begin), states, question_mask)[:, 0].softmax(-1)
        places = first[:, candidate_ids[:, 1]].topk(min(k, len(candidate_ids)), dim=1).indices
        pairs, lengths = places.flatten(), candidate_mask.sum(1)
        # Candidates of like length go together, so that little is spent on padding: most have one word, few have many.
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
        """Return answers found by beam search, [batch, at most 10 tokens], each starting with [DEC].

        Args:
            states: of the questions, [batch, tokens, text_width], from `encode`.
            question_mask: [batch, T]; None has the states of padding in view too, as in the published code, so that an
                answer depends on how long the other questions of its batch are.
            end: the token that ends an answer.
            pad: the token that fills shorter answers up.
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
    """Return the loss of each answer, [A]: the sum over its tokens, with the published label smoothing.

    Args:
        logits: [A, L, vocab_size], from the model.
        answer_ids: [A, L]; the first token is not predicted.
        answer_mask: [A, L].
    """
    targets = answer_ids.masked_fill(answer_mask == 0, -100)[:, 1:]
    losses = F.cross_entropy(
        precise(logits[:, :-1]).flatten(0, 1), targets.flatten(), label_smoothing=LABEL_SMOOTHING, reduction="none"
    )
    return losses.view_as(targets).sum(1)


def _with_first(ids: Tensor, token: int) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)
