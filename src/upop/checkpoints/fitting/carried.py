"""What is noted on a model itself until it is saved: how its inputs are prepared, and which tokens are left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from upop.checkpoints.files.description import Description
from upop.errors import CheckpointError, LayoutError, SettingError
from upop.tokens.cross import has_cross_tokens
from upop.tokens.encoders import merge_again

VOCABULARY = "upop_vocabulary"
"""The attribute that holds the original ids of the tokens that `reduce_vocabulary` kept."""
_PREPARATION = "upop_preparation"


def preparation_of(model: nn.Module) -> Mapping[str, Any] | None:
    """Return how a model's inputs are prepared, by the names of a task's settings, if that was noted on it."""
    found = getattr(model, _PREPARATION, None)
    return found if isinstance(found, Mapping) else None


def set_preparation(model: nn.Module, preparation: Mapping[str, Any] | None) -> None:
    """Note on a model how its inputs are prepared, so that `save` writes it."""
    if preparation is not None:
        setattr(model, _PREPARATION, dict(preparation))


def merge_as_saved(model: nn.Module, description: Description | None, folder: Path) -> nn.Module:
    """Restore token merging as a folder of ours records it; layers are traced anew.

    Args:
        model: loaded from the folder.
        description: its `upop.json`; None for other formats, which record none.
        folder: for messages.

    Raises:
        CheckpointError: this model cannot merge.
    """
    if description is None or not description.tokens:
        return model
    try:
        return merge_again(model, description.tokens)
    except (LayoutError, SettingError) as error:
        raise CheckpointError(f"{folder} holds a model that merged tokens, and this one cannot: {error}") from error


def refuse_cross_tokens(model: nn.Module, form: str) -> None:
    """Refuse a model led by cross tokens, for a form that has no place for them.

    Raises:
        CheckpointError: it has some.
    """
    if has_cross_tokens(model):
        raise CheckpointError(
            f"{form} has no place for the cross tokens of this {type(model).__name__}, which lead the merging of its "
            "image tokens. Save it with upop.save, or export it to ONNX."
        )
