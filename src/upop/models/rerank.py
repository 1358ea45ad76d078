"""Re-ranking: the candidates that features propose, compared again by the matching head, many queries at a time.

The matching logit of an image and a text is the same whichever of them asks, so every pair is computed once for both
directions. Pairs are sorted by image: its states are kept once, and all texts of a pass that look at it share its
keys and values, most of the work of a pair. Texts of like length go together, so that little is spent on padding.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_TEXTS_PER_ROW = 64
_BLOCK = 1024


class Matcher(Protocol):
    """What `match_pairs` asks of a model; `upop.models.retrieval.BlipRetrieval.match` is one."""

    def __call__(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [G * n, 2] of G images with n texts each."""
        ...


@torch.no_grad()
def candidates(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` keys that are most similar to each query, best first, and their similarities.

    Args:
        queries: features, [Q, D].
        keys: features, [K, D].
        count: how many; all keys if there are fewer.

    Returns:
        Numbers of the keys and similarities, both [Q, min(count, K)].
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
    """Return the logit of "match" for pairs of an image and a text, [P], on the CPU.

    Args:
        match: the model's matching head.
        image_states: of all images, [N, tokens, width]; they may lie on the CPU, and go to the device as needed.
        input_ids: of all texts, [M, T].
        attention_mask: 1 where there is a token, 0 where there is padding (at the end), [M, T].
        images: the image of each pair, [P], on the CPU.
        texts: the text of each pair, [P], on the CPU.
        batch: most pairs in a pass; what bounds the memory.
        device: where to compute; where the states are if not given.
    """
    device = image_states.device if device is None else device
    if not len(images):
        return torch.empty(0)
    lengths = attention_mask.sum(1).cpu()
    rows = _rows(images, lengths[texts], batch)
    width = rows.shape[1]
    # Rows of like length share a pass.
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
    """Return rows of pairs that have their image in common, [rows, width], short texts first.

    An image's last row is filled up with its last pair.
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
