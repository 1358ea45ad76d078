"""Files of tensors: published checkpoints, whose tensor names determine the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.formats.format import Own
from upop.checkpoints.published.tasks import build_model, task_of

if TYPE_CHECKING:
    from upop.checkpoints.opening import Checkpoint


def config(path: Path) -> Mapping[str, Any]:
    """Return an empty configuration: sizes are inferred from shapes."""
    del path
    return {}


def weights(path: Path) -> Sequence[Path]:
    """Return the file itself."""
    return [path]


def load(checkpoint: Checkpoint, *, strict: bool) -> nn.Module:
    """Return the model of the task whose tensors these are; see `load_official`."""
    state, source = checkpoint.state, str(checkpoint.path)
    return build_model(task_of(state, source), state, source, strict=strict)


def own(checkpoint: Checkpoint) -> Own:
    """Return the tensors as they are: published checkpoints have the names of upop's own models."""
    return Own(lambda _strict: checkpoint.state)
