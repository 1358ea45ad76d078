"""What a format is: the four functions that its module has, and how a checkpoint is one of upop's own models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from upop.checkpoints.opening import Checkpoint

Kind = Literal["upop", "open_clip", "transformers", "timm", "state_dict"]

OPEN_CLIP = "open_clip_config.json"


@dataclass(frozen=True)
class Own:
    """A checkpoint as one of upop's own models.

    Attributes:
        read: gives the tensors under the names of that model; its argument is `strict`.
        task: whose model it is, where the format says so; attention then has its natural softmax scale.
        kind: what messages call it.
        sizes: fields of the model's configuration that the format says.
        images: how it says that images are prepared, by the names of our settings.
    """

    read: Callable[[bool], Mapping[str, Tensor]]
    task: str | None = None
    kind: str | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)


class Format(Protocol):
    """A way in which models are kept: a module of `upop.checkpoints.formats` each.

    A new format is such a module, a line in `_format`, and how it is recognised in `kind_of_path`.
    """

    def config(self, path: Path) -> Mapping[str, Any]:
        """Return how the model is built; see `Checkpoint.config`."""
        ...

    def weights(self, path: Path) -> Sequence[Path]:
        """Return the files of tensors; CheckpointError where there are none."""
        ...

    def load(self, checkpoint: Checkpoint, *, strict: bool) -> nn.Module:
        """Return the model; see `Checkpoint.load`."""
        ...

    def own(self, checkpoint: Checkpoint) -> Own:
        """Return it as one of upop's own models; see `Checkpoint.own`."""
        ...
