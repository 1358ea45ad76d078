"""Files of tensors: published checkpoints, whose tensors tell the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from upop.checkpoints.official import load_official, task_of
from upop.checkpoints.opening import Checkpoint, Own


def config(path: Path) -> Mapping[str, Any]:
    """Return nothing: shapes say all that there is."""
    del path
    return {}


def weights(path: Path) -> Sequence[Path]:
    """Return the file itself."""
    return [path]


def load(checkpoint: Checkpoint, *, strict: bool) -> nn.Module:
    """Return the model of the task whose tensors these are; see `load_official`."""
    return load_official(task_of(checkpoint.state, str(checkpoint.path)), checkpoint, strict=strict)


def own(checkpoint: Checkpoint) -> Own:
    """Return the tensors: published checkpoints have the names of upop's own models."""
    return Own(lambda _strict: checkpoint.state)
