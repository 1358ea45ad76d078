"""Base of the tasks with models of transformers and open_clip: loading, and inputs by the model's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from upop.checkpoints.files.hub import local_path
from upop.checkpoints.pretrained import open_model
from upop.checkpoints.processors import InputProcessor, Padding, processor_in
from upop.errors import SettingError
from upop.models.dual import taken
from upop.pruning.masks import unwrapped
from upop.runs.task import Batch, Task
from upop.tasks.row_settings import RowSettings

_EXAMPLE = "upop_example"
_GREY = (127, 127, 127)
_SIDE = 64  # pixels of the example image, which the processor resizes


class LibrarySettings(RowSettings):
    """Settings of the tasks with models of transformers and open_clip."""

    recorded: ClassVar[tuple[str, ...]] = ()  # the checkpoint's processor prepares inputs
    of_model: ClassVar[Mapping[str, str]] = {}

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of weights; bfloat16 halves their memory and the optimizer's"
    )
    augment: bool = Field(False, description="randomly crop training images before the processor resizes them")
    padding: Padding = Field(
        "auto", description="padding of texts: to the longest of a batch, or to the model's max_length"
    )
    max_length: int | None = Field(None, ge=1, description="maximum tokens of a text; by default the model's")
    init_lr: float = Field(1e-5, gt=0, description="highest learning rate")
    schedule: Literal["epoch", "step", "polynomial"] = "step"
    clip_grad: float | None = Field(1.0, gt=0, description="maximum norm of the gradients")
    max_epoch: int = Field(3, ge=1, description="epochs of `train`, and of retraining")
    search_epochs: int | None = Field(1, ge=1)


LibrarySettingsT = TypeVar("LibrarySettingsT", bound=LibrarySettings)


class LibraryTask(Task[LibrarySettingsT]):
    """A task with a model of transformers or open_clip, given by `--model`."""

    model_prepares: ClassVar[bool] = True
    autos: ClassVar[tuple[str, ...]]
    """Names of transformers' Auto classes whose models the task takes, in order of preference."""

    def check(self, model: nn.Module, source: str) -> None:
        """Check that a model suits the task; by default any does.

        Raises:
            CheckpointError: it does not.
        """

    def build(self, settings: LibrarySettingsT) -> nn.Module:
        """Refuse: the model comes from a folder.

        Raises:
            SettingError: always.
        """
        raise SettingError(
            f"{self.name} needs a model, and none was given. Set --model to a folder or a name on the hub. A folder "
            "with a config.json and a processor, but no weights, is trained from scratch."
        )

    def load(self, path: Path, settings: LibrarySettingsT) -> nn.Module:
        """Return the model in a folder, dense or compressed, written by the library or by upop."""
        return self._prepared(open_model(path, self.autos).model, path, settings)

    def start(self, path: Path, settings: LibrarySettingsT) -> tuple[nn.Module, Sequence[str]]:
        """Return a model to train, and its newly initialised tensors."""
        opened = open_model(path, self.autos, fresh=True, changes=self.changes(path, settings))
        return self._prepared(opened.model, path, settings), opened.fresh

    def changes(self, path: Path, settings: LibrarySettingsT) -> dict[str, Any]:
        """Return the entries of config.json to change for the training data, such as its classes."""
        return {}

    def tokenizer(self, settings: LibrarySettingsT) -> InputProcessor | None:
        """Return the processor; checkpoints store it like a tokenizer."""
        return self.processor(settings) if settings.pretrained else None

    def processor(self, settings: LibrarySettingsT) -> InputProcessor:
        """Return the processor that makes the model's inputs."""
        if not settings.pretrained:
            self.build(settings)
        return _processor(str(local_path(str(settings.pretrained))), settings.padding, settings.max_length)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the part of a batch that the processor made."""
        return {name: value for name, value in batch.items() if name not in ("ids", "labels")}

    def cast(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return the part of a batch that the processor made, in the model's precision."""
        return {name: _cast(value, model) for name, value in self.inputs(batch).items()}

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return the inputs of a grey image, and of a text if the model takes one, `batch_size` times."""
        device = next(model.parameters()).device
        held: Mapping[str, Tensor] = getattr(model, _EXAMPLE)
        return {name: _cast(value, model).to(device).repeat_interleave(batch_size, 0) for name, value in held.items()}

    def sample_inputs(self, processor: InputProcessor) -> dict[str, Tensor]:
        """Return the inputs of one sample, for `example`."""
        return processor.images([Image.new("RGB", (_SIDE, _SIDE), _GREY)])

    def _prepared(self, model: nn.Module, path: Path, settings: LibrarySettingsT) -> nn.Module:
        """Return a model in the run's precision, with the inputs of one sample as an attribute."""
        self.check(model, str(path))
        model = model.to(getattr(torch, settings.precision))
        setattr(model, _EXAMPLE, self.takes(model, self.sample_inputs(self.processor(settings))))
        return model

    def takes(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs that the model's forward pass accepts, in its precision."""
        return {name: _cast(value, model) for name, value in taken(unwrapped(model).forward, inputs).items()}


def _cast(value: Any, model: nn.Module) -> Any:
    """Return floating-point inputs in the precision of a model's weights."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(next(each.dtype for each in model.parameters() if each.is_floating_point()))


@cache
def _processor(path: str, padding: Padding, length: int | None) -> InputProcessor:
    return processor_in(Path(path), padding, length)
