"""Base of the tasks with published checkpoints: loading one, and initialising a dense model from one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from upop.checkpoints import open_checkpoint
from upop.checkpoints.inputs import stated_inputs
from upop.checkpoints.official import load_official, resized, start_from
from upop.errors import CheckpointError
from upop.models import MODELS, kind_of
from upop.runs.task import Task
from upop.settings import RunSettings

SIZES = "The sizes of the model are not valid; they are the published ones, except for those under `model`"
"""Beginning of an error message about sizes."""

PublishedSettingsT = TypeVar("PublishedSettingsT", bound=RunSettings)


class PublishedTask(Task[PublishedSettingsT]):
    """A task with a model that upop builds; `name` is also the name of its published format."""

    config: ClassVar[type[Any]]
    """Class of the model's configuration; it identifies the models of this task."""

    def sizes(self, settings: PublishedSettingsT) -> dict[str, Any]:
        """Return the dense model's sizes that the settings determine."""
        return {"image_size": settings.image_size, **settings.model}

    def load(self, path: Path, settings: PublishedSettingsT) -> nn.Module:
        """Return the model in an output of upop, a published file, or a folder of transformers."""
        checkpoint = open_checkpoint(path)
        if checkpoint.library == "upop":
            model = checkpoint.load()
            if not self._is_mine(kind_of(model)):
                raise CheckpointError(
                    f"{path} holds a {type(model).__name__}, which is not a model of task {self.name}. Give a "
                    "checkpoint of this task."
                )
            model = self._at_size(model, settings, str(path))
        else:
            model = load_official(self.name, checkpoint, **self.sizes(settings))
        return self._prepared(model, settings)

    def start(self, path: Path, settings: PublishedSettingsT) -> tuple[nn.Module, Sequence[str]]:
        """Return the dense model initialised from a checkpoint, which may lack parts that only this task has.

        From the checkpoint of another task, it takes the towers that both have.
        """
        checkpoint = open_checkpoint(path)
        is_folder = checkpoint.kind != "state_dict"
        if is_folder and stated_inputs(checkpoint).task == self.name:
            return self.load(path, settings), ()
        model = self.build(settings)
        return model, start_from(self.name, checkpoint, model, any_towers=is_folder)

    def _at_size(self, model: nn.Module, settings: PublishedSettingsT, source: str) -> nn.Module:
        """Return a model resized to the images of the settings."""
        return resized(model, settings.image_size, source)

    def _is_mine(self, kind: str | None) -> bool:
        return kind is not None and kind in MODELS and MODELS[kind][1] is self.config

    def _prepared(self, model: nn.Module, settings: PublishedSettingsT) -> nn.Module:
        """Return the model adapted to the settings; it may be changed in place."""
        return model
