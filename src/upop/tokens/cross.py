"""Cross tokens that layers keep themselves, one each: they guide the matching, and learn from the other modality.

A layer with such a parameter, [C], has what merges its tokens put one more token behind them (`Merger.enter`). Models
that keep the cross tokens of a tower in one parameter (CLIP and LLaVA as published) hand them over themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CROSS_TOKEN = "cross_token"


def cross_token_of(layer: nn.Module) -> nn.Parameter | None:
    """Return the cross token of a layer, [C]; None if it has none."""
    found = getattr(layer, CROSS_TOKEN, None)
    return found if isinstance(found, nn.Parameter) else None


def give_cross_token(layer: nn.Module, width: int) -> None:
    """Give a layer a cross token of zeros, [width], where it has none."""
    if cross_token_of(layer) is None:
        like = next(layer.parameters())
        layer.register_parameter(CROSS_TOKEN, nn.Parameter(torch.zeros(width, dtype=like.dtype, device=like.device)))


def give_held(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give the layers of a model the cross tokens that a state has, as zeros; return the model."""
    modules = dict(model.named_modules())
    for name, value in state.items():
        path, _, last = name.rpartition(".")
        if last == CROSS_TOKEN and path in modules and value.dim() == 1:
            give_cross_token(modules[path], len(value))
    return model


def has_cross_tokens(model: nn.Module) -> bool:
    """Whether any layer keeps a cross token."""
    return any(cross_token_of(layer) is not None for layer in model.modules())
