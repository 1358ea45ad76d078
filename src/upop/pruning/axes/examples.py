"""Examples for models that come without one: the shapes that their layers ask for, tried until one runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.axes.copies import Shapes
from upop.pruning.errors import LayoutError

_BATCH, _TOKENS = 2, 5
_LARGEST = 300_000_000
"""Parameters of a model that is read without being asked to: a proof takes a copy of it in float64."""
_MOST = 12
"""How many shapes are tried."""


def example_for(model: nn.Module) -> Any:
    """Return something that a call of the model can be given, [2, ...]; None where nothing runs, or the model is large.

    What runs is a good example: units are proved on numbers, whatever the numbers.
    """
    if sum(each.numel() for each in model.parameters()) > _LARGEST:
        return None
    for number, example in enumerate(_shapes(model)):
        if number == _MOST:
            return None
        try:
            Shapes(model, example, numbers=False)
        except LayoutError:
            continue
        return example
    return None


def _shapes(model: nn.Module) -> Iterator[Tensor]:
    """Yield inputs by the layers: images for a convolution, indices for an embedding, tokens for a linear layer."""
    layers = list(model.modules())
    first = next((each for each in layers if isinstance(each, nn.Conv2d | nn.Embedding | nn.Linear)), None)
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    if isinstance(first, nn.Conv2d):
        for size in _image_sizes(model):
            yield torch.randn(_BATCH, first.in_channels, size, size, dtype=dtype)
    if any(isinstance(each, nn.Embedding) for each in layers):
        for length in (_TOKENS, 2 * _TOKENS, *_positions(model)):
            yield torch.zeros(_BATCH, length, dtype=torch.long)
    widths = dict.fromkeys(each.in_features for each in layers if isinstance(each, nn.Linear))
    widths |= dict.fromkeys(each.embed_dim for each in layers if isinstance(each, nn.MultiheadAttention))
    for width in widths:
        yield torch.randn(_BATCH, _TOKENS, width, dtype=dtype)
        yield torch.randn(_BATCH, width, dtype=dtype)


def _image_sizes(model: nn.Module) -> Iterator[int]:
    """Yield sizes of square images: what a model says of itself, and common ones."""
    held = (getattr(model, "default_cfg", None) or {}).get("input_size", (0, 0, 0))[-1]
    yield from dict.fromkeys(size for size in (held, 32, 64, 224) if size)


def _positions(model: nn.Module) -> Iterator[int]:
    """Yield lengths of tables of positions: some models take sequences of that length alone."""
    tables = [each for each in model.parameters() if each.dim() >= 2]
    yield from dict.fromkeys(each.shape[-2] for each in tables if 1 < each.shape[-2] <= 1024)
