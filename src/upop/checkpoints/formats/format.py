"""The interface of a format: four functions of its module, and `Own`, a checkpoint as one of upop's own models."""

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
        read: `strict` -> the tensors under the names of that model.
        task: the task of the model, if the format states it; the softmax scale then follows head_dim.
        kind: its name in messages.
        sizes: fields of the model's configuration that the format states.
        images: the image preparation that the format states, by the names of upop's settings.
    """

    read: Callable[[bool], Mapping[str, Tensor]]
    task: str | None = None
    kind: str | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)


class Format(Protocol):
    """The functions of a format, each of which is a module of `upop.checkpoints.formats`.

    A new format is such a module, a line in `opening._format`, and a condition in `opening.kind_of_path`.
    """

    def config(self, path: Path) -> Mapping[str, Any]:
        """Return how the model is built; see `Checkpoint.config`."""
        ...

    def weights(self, path: Path) -> Sequence[Path]:
        """Return the files of weights; CheckpointError if there are none."""
        ...

    def load(self, checkpoint: Checkpoint, *, strict: bool) -> nn.Module:
        """Return the model; see `Checkpoint.load`."""
        ...

    def own(self, checkpoint: Checkpoint) -> Own:
        """Return it as one of upop's own models; see `Checkpoint.own`."""
        ...
