"""Parameters that a model lost before its search, such as rows of words: targets for the whole model count them."""

from __future__ import annotations

from torch import Tensor, nn

_LOST = "upop_lost_parameters"


def note_lost(model: nn.Module, count: int, example: Tensor) -> None:
    """Add to the number of parameters that a model has lost.

    Args:
        model: the model, without them.
        count: how many.
        example: a tensor of their dtype.
    """
    before = lost_parameters(model)
    setattr(model, _LOST, (before + count, lost_bytes(model, None) + count * example.element_size()))


def lost_parameters(model: nn.Module) -> int:
    """Return how many parameters a model has lost."""
    return int(getattr(model, _LOST, (0, 0))[0])


def lost_bytes(model: nn.Module, each: int | None) -> int:
    """Return how many bytes they had, or would have with `each` bytes per parameter."""
    return int(getattr(model, _LOST, (0, 0))[1]) if each is None else lost_parameters(model) * each
