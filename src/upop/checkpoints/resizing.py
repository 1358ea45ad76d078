"""Models of ours for images of another size than they were made for."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from upop.checkpoints.fit import expecting_shapes, fit
from upop.checkpoints.official import row_of, task_for
from upop.checkpoints.preparation import preparation_of, set_preparation
from upop.pruning.carried import plan_of, set_plan
from upop.tokens.encoders import merge_again, removed_tokens
from upop.values import described


def resized(model: nn.Module, image_size: int, source: str) -> nn.Module:
    """Return one of upop's own models for images of another size: its position embeddings are resized.

    Raises:
        CheckpointError: they cannot be.
        SettingError: no such model can be built.
    """
    row, found = row_of(task_for(model)), cast(Any, model.config)
    if found.image_size == image_size:
        return model
    plan, preparation, removed = plan_of(model), preparation_of(model), removed_tokens(model)
    with described(f"{source} cannot take images of {image_size} pixels"):
        config = row.config(**{**found.model_dump(), "image_size": image_size})
    with expecting_shapes(source):
        state = row.adapt(model.state_dict(), config)
    model = fit(row.model(config), state, source, lambda _group: False).eval()
    set_plan(model, plan)
    set_preparation(model, preparation)
    return model if removed is None else merge_again(model, removed)
