"""Finds the logits in a model's output, and measures their distance from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upop.pruning.precision import precise


def divergence(own: Tensor, aim: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """Return the mean KL divergence of `own` from `aim` over all positions, or those of `mask`, times temperature^2."""
    axis = 1 if own.dim() == 4 else -1
    logs, target = (F.log_softmax(precise(value) / temperature, dim=axis) for value in (own, aim))
    each = F.kl_div(logs, target, reduction="none", log_target=True).sum(axis)
    if mask is None:
        return each.mean() * temperature**2
    weight = mask.to(each)
    return (each * weight).sum() / weight.sum().clamp_min(1) * temperature**2


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in a model's output; for a dual encoder, the similarities of the batch."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 1:
        return found
    return similarities(output)


def similarities(output: Any) -> Tensor | None:
    """Return the image-text similarities of a batch, by image and by text, [2, batch, batch].

    Models of transformers return them; for open_clip, they are computed from features and scale.
    """
    by_image = getattr(output, "logits_per_image", None)
    if isinstance(by_image, Tensor) and by_image.dim() == 2 and by_image.shape[0] == by_image.shape[1]:
        return torch.stack([by_image, by_image.t()])
    if isinstance(output, Mapping):
        output = tuple(output.get(name) for name in ("image_features", "text_features", "logit_scale"))
    if not isinstance(output, tuple) or len(output) < 3 or not all(isinstance(each, Tensor) for each in output[:3]):
        return None
    image, text, scale = output[:3]
    if image.dim() != 2 or image.shape != text.shape or scale.numel() != 1:
        return None
    by_image = scale * image @ text.t()
    return torch.stack([by_image, by_image.t()])
