"""How a model's inputs are prepared, noted on the model itself until it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_PREPARATION = "upop_preparation"


def preparation_of(model: nn.Module) -> Mapping[str, Any] | None:
    """Return how a model's inputs are prepared, by the names of a task's settings, if that was noted on it."""
    found = getattr(model, _PREPARATION, None)
    return found if isinstance(found, Mapping) else None


def set_preparation(model: nn.Module, preparation: Mapping[str, Any] | None) -> None:
    """Note on a model how its inputs are prepared, so that `save` writes it."""
    if preparation is not None:
        setattr(model, _PREPARATION, dict(preparation))
