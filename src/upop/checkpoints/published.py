"""Reading what others published: a file of tensors, or a model in the layout of another library, here or on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from upop.checkpoints.config_json import is_transformers_folder
from upop.checkpoints.description import check_digests, is_folder, read_description
from upop.checkpoints.foreign import recognised
from upop.checkpoints.hub import local_path
from upop.checkpoints.hugging_face import counterpart_for
from upop.checkpoints.read import read_weights
from upop.checkpoints.transformers_models import load_transformers


@dataclass(frozen=True)
class Published:
    """What a published checkpoint holds.

    Attributes:
        state: its tensors, under the names of the task's model.
        sizes: fields of the model's configuration that the checkpoint tells beside the shapes.
        task: whose model it is, where the checkpoint says so; attention then has its natural softmax scale.
        kind: the class that it names.
    """

    state: Mapping[str, Tensor]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    kind: str | None = None


def read_published(path: str | Path, *, strict: bool = True) -> Published:
    """Return what is in a `.pth` or `.safetensors` file, a model of the hub, or a folder of another library.

    These are transformers', timm's and open_clip's.

    Raises:
        CheckpointError: there is no such thing, it is damaged, carries more than tensors, or is no model of ours.
    """
    path = local_path(path)
    other = recognised(path) if path.is_dir() and not is_transformers_folder(path) else None
    if other is not None:
        if is_folder(path):
            check_digests(path, read_description(path), strict=strict)
        return Published(read_weights(other.weights), other.sizes, other.task, other.kind)
    if not is_transformers_folder(path):
        return Published(read_weights(path))
    theirs = load_transformers(path, strict=strict).float()
    row = counterpart_for(theirs)
    return Published(row.read(theirs.state_dict()), row.sizes(theirs.config), row.task, row.kind)
