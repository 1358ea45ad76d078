"""CrossGET's training loss, which aligns the cross tokens of both modalities (arXiv 2305.17455, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn


def cross_loss(image: Tensor, text: Tensor) -> Tensor:
    """Return ( KL(M || p_image) + KL(M || p_text) ) / 2, a mean over rows, where M is the mean of both distributions.

    This is what the published code computes; the paper calls it a Jensen-Shannon divergence, which is of KL(p || M).

    Args:
        image: projected cross tokens of the images, [N, D]; their softmax over D is p_image.
        text: those of the texts, [N, D], row by row with the images'.
    """
    of_image, of_text = image.log_softmax(1), text.log_softmax(1)
    mean = (of_image.exp() + of_text.exp()) / 2
    return (F.kl_div(of_image, mean, reduction="batchmean") + F.kl_div(of_text, mean, reduction="batchmean")) / 2


Image = TypeVar("Image")
Text = TypeVar("Text")


def layer_by_layer(image: Sequence[Image], text: Sequence[Text]) -> tuple[list[Image], list[Text]]:
    """Pair what the layers of two encoders have; that of the one with fewer layers is repeated evenly.

    As published for LLaVA; CLIP's code only takes encoders of equal depth.
    """
    depth = max(len(image), len(text))
    return _spread(image, depth), _spread(text, depth)


def _spread(tokens: Sequence[Image], depth: int) -> list[Image]:
    count = len(tokens)
    times = [(layer + 1) * depth // count - layer * depth // count for layer in range(count)]
    return [each for each, repeated in zip(tokens, times, strict=True) for _ in range(repeated)]


def matching_loss(image: Tensor, text: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric contrastive loss of a batch; targets are shared equally among rows of the same image.

    Args:
        image: normalised features, [batch, dim].
        text: normalised features, [batch, dim].
        ids: image index of each pair, [batch].
        scale: factor of the similarities.
    """
    same = (ids.unsqueeze(0) == ids.unsqueeze(1)).to(image.dtype)
    targets = same / same.sum(1, keepdim=True)
    logits = scale * image @ text.t()
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2


def through(layer: nn.Linear, states: Tensor) -> Tensor:
    """Return what a linear layer makes of states, without its weights learning from what becomes of it."""
    return F.linear(states, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
