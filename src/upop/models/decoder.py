"""The text decoder: transformers' BLIP decoder, with the beam search of the published models.

The published code uses an old version of transformers, which divides a text's log-probability by its length including
the prompt. Current versions leave the prompt out, which favours shorter texts, and stop beams by another rule.
`TextDecoder` applies the old rules to the current search.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

_Beams = tuple[Tensor, Tensor, Tensor, Tensor]


class TextDecoder(BlipTextLMHeadModel):
    """The text decoder; `generate` returns token ids, [batch, tokens], padded with the padding token."""

    _ends: Tensor
    _open: Tensor

    # The library calls these three methods with keyword arguments.

    def _beam_search(self, input_ids: Any, *_args: Any, **settings: Any) -> Any:
        generation_config = settings["generation_config"]
        self._ends = generation_config._eos_token_tensor
        library: Any = super()
        found = library._beam_search(input_ids, **settings)
        if isinstance(found, Tensor):
            # The library pads with the end token if the id of the padding token is 0.
            start = input_ids.shape[1]
            ended = torch.isin(found[:, start:], self._ends).long()
            found[:, start:].masked_fill_(ended.cumsum(1) > ended, generation_config.pad_token_id)
        return found

    def _update_finished_beams(self, *_args: Any, **step: Any) -> _Beams:
        """Add the texts that end at this step; arguments and results are those of transformers."""
        length, sums = step["cur_len"], step["topk_log_probs"]  # tokens before this one, prompt included
        ended = torch.isin(step["topk_running_sequences"][:, :, length], self._ends)
        found: _Beams = super()._update_finished_beams(
            **{**step, "next_token_hits_stopping_criteria": ended, "decoder_prompt_len": 1}
        )
        _, scores, _, finished = found
        full = finished.all(1, keepdim=True)
        worst = scores.min(1, keepdim=True).values
        best_to_come = sums[:, :1] / length ** step["length_penalty"]
        self._open = step["is_early_stop_heuristic_unsatisfied"] & ~(full & (worst >= best_to_come))
        if length + 1 < step["sequences"].shape[-1]:
            return found
        # At the maximum length, unfinished texts count as they are.
        left = ~ended & ((~ended).cumsum(1) <= step["num_beams"])
        names = ("sequences", "beam_scores", "beam_indices", "is_sent_finished")
        last = {
            **step,
            **dict(zip(names, found, strict=True)),
            "next_token_hits_stopping_criteria": left,
            "top_num_beam_mask": torch.ones_like(step["top_num_beam_mask"]),
            "is_early_stop_heuristic_unsatisfied": self._open,
            "decoder_prompt_len": 0,
        }
        texts: _Beams = super()._update_finished_beams(**last)
        return texts

    def _check_early_stop_heuristic(self, **_step: Any) -> Tensor:  # type: ignore[override]  # static in the library
        """Return which texts of the batch may still improve, [batch, 1]."""
        return self._open
