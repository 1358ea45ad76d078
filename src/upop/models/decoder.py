"""The text decoder: transformers' BLIP decoder, searching with beams as the published models do.

The published code runs with an old transformers, which scores a finished text by its log-probability per token of the
whole text, prompt included; the present one leaves the prompt out of the count, and so prefers shorter texts. It also
takes leave of beams at other moments. `TextDecoder` gives the present search the old rules; all else is the library's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

_Beams = tuple[Tensor, Tensor, Tensor, Tensor]


class TextDecoder(BlipTextLMHeadModel):
    """The text decoder; `generate` gives token ids [batch, at most max_length], padded with the padding token."""

    _ends: Tensor
    _open: Tensor

    # The library calls the three methods below with named arguments.

    def _beam_search(self, input_ids: Any, *_args: Any, **settings: Any) -> Any:
        generation_config = settings["generation_config"]
        self._ends = generation_config._eos_token_tensor
        library: Any = super()
        found = library._beam_search(input_ids, **settings)
        if isinstance(found, Tensor):
            # The library fills up with the end token where the number of the padding token is 0.
            start = input_ids.shape[1]
            ended = torch.isin(found[:, start:], self._ends).long()
            found[:, start:].masked_fill_(ended.cumsum(1) > ended, generation_config.pad_token_id)
        return found

    def _update_finished_beams(self, *_args: Any, **step: Any) -> _Beams:
        """Take in the texts that end at this step; the same arguments and results as in transformers."""
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
        # No room is left: the texts that have no end yet count as they stand.
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
        """Which texts of the batch may still get better, [batch, 1]."""
        return self._open
