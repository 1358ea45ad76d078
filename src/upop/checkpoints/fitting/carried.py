"""Facts that a model object carries until it is saved: input preparation, kept vocabulary, token merging."""

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
    """Return the input preparation that was set on a model, by the names of a task's settings; None without any."""
    found = getattr(model, _PREPARATION, None)
    return found if isinstance(found, Mapping) else None


def set_preparation(model: nn.Module, preparation: Mapping[str, Any] | None) -> None:
    """Set the input preparation of a model, which `save` writes."""
    if preparation is not None:
        setattr(model, _PREPARATION, dict(preparation))


def merge_as_saved(model: nn.Module, description: Description | None, folder: Path) -> nn.Module:
    """Restore the token merging that `upop.json` records; the model is traced again for its layers.

    Args:
        model: the model loaded from the folder.
        description: its `upop.json`; None for other formats, which record no merging.
        folder: the folder, for messages.

    Raises:
        CheckpointError: this model cannot merge tokens.
    """
    if description is None or not description.tokens:
        return model
    try:
        return merge_again(model, description.tokens)
    except (LayoutError, SettingError) as error:
        raise CheckpointError(f"{folder} holds a model that merges tokens, and this model cannot: {error}") from error


def refuse_cross_tokens(model: nn.Module, form: str) -> None:
    """Refuse a model with cross tokens, for a format that cannot hold them.

    Raises:
        CheckpointError: it has some.
    """
    if has_cross_tokens(model):
        raise CheckpointError(
            f"{form} cannot hold the cross tokens of this {type(model).__name__}, which guide the merging of its "
            "image tokens. Save it with upop.save, or export it to ONNX."
        )
