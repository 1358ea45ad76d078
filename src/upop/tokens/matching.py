"""Complete-graph matching: which tokens are removed, and which they merge into (CrossGET, arXiv 2305.17455, 3.2).

Every token may merge into any other. Ties are common (two mutually nearest tokens have the same distance), and are
broken by position, the lower one first, so that decisions do not depend on the device, the batch or a sorting routine.
Positions follow from comparisons, which every compiler and exporter supports.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from upop.pruning.precision import precise


@dataclass(frozen=True)
class Match:
    """A matching of the tokens of a batch that removes r' of T tokens per row.

    Attributes:
        source: positions of removed tokens, in the order of choice, [batch, r'].
        kept: positions of kept tokens, ascending, [batch, T - r'].
        target: index in `kept` of the token that each source merges into, [batch, r'].
        weight: weights of source and target in the merged token, [batch, r', 2]; they sum to 2.
    """

    source: Tensor
    kept: Tensor
    target: Tensor
    weight: Tensor


def removable(tokens: int, protected: int, asked: int) -> int:
    """Return how many tokens are removed: as asked, but at most half of the unprotected ones."""
    return max(0, min(asked, (tokens - protected) // 2))


def token_counts(tokens: int, protected: int, asked: Sequence[int]) -> list[int]:
    """Return the number of tokens before every layer, and after the last."""
    counts = [tokens]
    for each in asked:
        counts.append(counts[-1] - removable(counts[-1], protected, each))
    return counts


@torch.no_grad()
def match(
    keys: Tensor,
    importance: Tensor,
    remove: int,
    protected: Tensor,
    *,
    empty: Tensor | None = None,
    weighted: bool = True,
) -> Match:
    """Choose the tokens to remove: least important, and closest to a lower-ranked token.

    Args:
        keys: vectors whose cosine is the similarity, [batch, tokens, hidden]; computed at least in float32.
        importance: importance of each token, [batch, tokens].
        remove: number of tokens to remove per row; see `removable`.
        protected: tokens that are never merged, [batch, tokens] or [tokens], bool.
        empty: padding, [batch, tokens], bool; removed first, and never merged into other tokens.
        weighted: whether importance weighs merged tokens; otherwise all weights are 1.
    """
    with exactly(keys):
        keys = precise(keys)
        importance = importance.to(keys.dtype)
        batch, tokens, _ = keys.shape
        positions = torch.arange(tokens, device=keys.device)
        similarity = _cosines(keys).masked_fill(_barred(positions, protected, empty), -torch.inf)
        rank = _ranks(-similarity.amax(-1))
        reach = similarity.masked_fill(rank.unsqueeze(1) <= rank.unsqueeze(2), -torch.inf).amax(-1)
        cost = importance - reach
        if empty is not None:
            cost = cost.masked_fill(empty & ~protected, -torch.inf)
        order = _inverse(_ranks(cost))
        source, rest = order[:, :remove], order[:, remove:]
        among = similarity.gather(1, source.unsqueeze(2).expand(batch, remove, tokens))
        among = among.gather(2, rest.unsqueeze(1).expand(batch, remove, tokens - remove))
        target = rest.gather(1, among.argmax(2))
        weight = keys.new_ones(batch, remove, 2)
        if weighted:
            pair = torch.stack([importance.gather(1, source), importance.gather(1, target)], 2)
            weight = 2 * pair.softmax(2)
            if empty is not None:  # padding contributes nothing
                weight = torch.where(empty.gather(1, source).unsqueeze(2), torch.ones_like(weight), weight)
        return Match(source, _placed(rest, source), _place(target, source), weight)


def merge(tokens: Tensor, size: Tensor, found: Match) -> tuple[Tensor, Tensor]:
    """Return the merged tokens [batch, T - r', hidden] and their sizes [batch, T - r'], both differentiable.

    Args:
        tokens: [batch, tokens, hidden].
        size: number of original tokens in each token, [batch, tokens]; 0 for padding.
        found: the result of `match`.
    """
    with exactly(tokens):
        exact = size.dtype
        states = tokens.to(exact)
        given, own = found.weight.to(exact).unbind(2)
        # Row b, column a: whether source a merges into kept token b. A matrix product sums in a fixed order.
        places = torch.arange(found.kept.shape[1], device=tokens.device)
        joins = (places.unsqueeze(1) == found.target.unsqueeze(1)).to(exact)
        kept_size, source_size = size.gather(1, found.kept), size.gather(1, found.source)
        kept, sources = _rows(states, found.kept), _rows(states, found.source)
        share = kept_size * (1 + (joins @ (own - 1).unsqueeze(2)).squeeze(2))
        summed = share.unsqueeze(2) * kept + joins @ ((given * source_size).unsqueeze(2) * sources)
        merged_size = kept_size + (joins @ source_size.unsqueeze(2)).squeeze(2)
        # Padding keeps its state, which nothing reads.
        merged = torch.where(merged_size.unsqueeze(2) > 0, summed / merged_size.clamp_min(1).unsqueeze(2), kept)
        return merged.to(tokens.dtype), merged_size


def exactly(tokens: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast, so that training and evaluation decide alike."""
    return nullcontext() if tokens.is_meta else torch.autocast(tokens.device.type, enabled=False)


def unmerge(tokens: Tensor, found: Match) -> Tensor:
    """Restore the T tokens before merging, [batch, T, hidden], with merged tokens at each of their positions."""
    total = found.kept.shape[1] + found.source.shape[1]
    shape = (tokens.shape[0], total, tokens.shape[2])
    places = torch.cat([found.kept, found.source], 1).unsqueeze(2).expand(shape)
    return torch.zeros(shape, dtype=tokens.dtype, device=tokens.device).scatter(
        1, places, torch.cat([tokens, _rows(tokens, found.target)], 1)
    )


def cosine(keys: Tensor, guide: Tensor) -> Tensor:
    """Return the cosines of keys [batch, tokens, hidden] with a guide [batch, hidden], [batch, tokens]."""
    return (_group(keys) @ _group(guide).unsqueeze(2)).squeeze(2)


def _group(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.clamp_min(torch.finfo(vectors.dtype).tiny)


def _cosines(keys: Tensor) -> Tensor:
    """Return the cosines of all pairs, [batch, tokens, tokens], exactly symmetric in spite of rounding."""
    group = _group(keys)
    upper = (group @ group.transpose(1, 2)).triu(1)
    return upper + upper.transpose(1, 2)


def _barred(positions: Tensor, protected: Tensor, empty: Tensor | None) -> Tensor:
    """Return the pairs that must not merge, [batch, tokens, tokens] or [1, tokens, tokens]."""
    barred = protected.unsqueeze(-1) | protected.unsqueeze(-2) | (positions.unsqueeze(0) == positions.unsqueeze(1))
    if empty is not None:
        barred = barred | (empty.unsqueeze(2) != empty.unsqueeze(1))
    return barred


def _ranks(values: Tensor) -> Tensor:
    """Return each value's rank in ascending order, [batch, tokens]; ties by position."""
    positions = torch.arange(values.shape[1], device=values.device)
    mine, others = values.unsqueeze(2), values.unsqueeze(1)
    before = (others < mine) | ((others == mine) & (positions.unsqueeze(0) < positions.unsqueeze(1)))
    return before.sum(2)


def _inverse(permutation: Tensor) -> Tensor:
    positions = torch.arange(permutation.shape[1], device=permutation.device)
    return torch.zeros_like(permutation).scatter(1, permutation, positions.expand_as(permutation))


def _place(positions: Tensor, source: Tensor) -> Tensor:
    """Return the indices of kept positions after the sources are removed, [batch, n]."""
    return positions - (source.unsqueeze(1) < positions.unsqueeze(2)).sum(2)


def _placed(rest: Tensor, source: Tensor) -> Tensor:
    """Return kept positions in ascending order."""
    return torch.zeros_like(rest).scatter(1, _place(rest, source), rest)


def _rows(tokens: Tensor, positions: Tensor) -> Tensor:
    return tokens.gather(1, positions.unsqueeze(2).expand(*positions.shape, tokens.shape[2]))
