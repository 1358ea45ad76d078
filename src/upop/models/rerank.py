"""Re-ranking: the matching head scores the candidates of feature similarity, many queries at a time.

A pair has the same matching logit in both directions, so it is computed once. Pairs are sorted by image, so that the
texts of a pass share the image's keys and values, most of the work of a pair. Texts of similar length are batched, to
reduce padding.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_TEXTS_PER_ROW = 64
_BLOCK = 1024


class Matcher(Protocol):
    """A matching head, such as `upop.models.retrieval.BlipRetrieval.match`."""

    def __call__(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, [texts, 2], for images with equally many texts each."""
        ...


@torch.no_grad()
def candidates(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` keys that are most similar to each query, best first, and their similarities.

    Args:
        queries: features, [queries, dim].
        keys: features, [keys, dim].
        count: candidates per query; all keys if there are fewer.

    Returns:
        Indices of the keys, and similarities, [queries, candidates] each.
    """
    count = min(count, len(keys))
    best = [(block @ keys.t()).topk(count) for block in queries.split(_BLOCK)]
    return torch.cat([found.indices for found in best]), torch.cat([found.values for found in best])


@torch.no_grad()
def match_pairs(
    match: Matcher,
    image_states: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    images: Tensor,
    texts: Tensor,
    *,
    batch: int,
    device: torch.device | None = None,
) -> Tensor:
    """Return the "match" logit of image-text pairs, [pairs], on the CPU.

    Args:
        match: the model's matching head.
        image_states: of all images, [images, patches, hidden]; on the CPU they are moved to the device as needed.
        input_ids: of all texts, [texts, tokens].
        attention_mask: 1 for tokens, 0 for padding at the end, [texts, tokens].
        images: image of each pair, [pairs], on the CPU.
        texts: text of each pair, [pairs], on the CPU.
        batch: maximum pairs per pass; bounds the memory.
        device: of the computation; by default that of the states.
    """
    device = image_states.device if device is None else device
    if not len(images):
        return torch.empty(0)
    lengths = attention_mask.sum(1).cpu()
    rows = _rows(images, lengths[texts], batch)
    width = rows.shape[1]
    # Rows of similar length share a pass.
    rows = rows[lengths[texts[rows]].amax(1).argsort(stable=True)]
    logits = torch.empty(len(images))
    for part in rows.split(max(1, batch // width)):
        wanted = texts[part.flatten()]
        longest = int(lengths[wanted].max())
        words = [tensor[wanted.to(tensor.device), :longest].to(device) for tensor in (input_ids, attention_mask)]
        states = image_states[images[part[:, 0]].to(image_states.device)].to(device)
        logits[part.flatten()] = match(states, words[0], words[1])[:, 1].float().cpu()
    return logits


def _rows(images: Tensor, lengths: Tensor, batch: int) -> Tensor:
    """Return rows of pairs with the same image, [rows, width], short texts first.

    The last pair of an image is repeated to fill its last row.
    """
    order = torch.argsort(lengths, stable=True)
    order = order[torch.argsort(images[order], stable=True)]
    _, counts = torch.unique_consecutive(images[order], return_counts=True)
    width = max(1, min(batch, _TEXTS_PER_ROW, -(-len(images) // len(counts))))
    rows = []
    for pairs in order.split(counts.tolist()):
        filled = torch.cat([pairs, pairs[-1:].expand(-len(pairs) % width)])
        rows.append(filled.view(-1, width))
    return torch.cat(rows)
