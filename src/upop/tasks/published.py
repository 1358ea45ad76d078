"""What the tasks share whose models have published checkpoints: how one is loaded, and how a dense one is started."""

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

SIZES = "The sizes of the model cannot be used; they are the published ones but for those under `model`"
"""How a complaint about them begins."""

PublishedSettingsT = TypeVar("PublishedSettingsT", bound=RunSettings)


class PublishedTask(Task[PublishedSettingsT]):
    """A task with a model of ours; `name` is also the name of its published format."""

    config: ClassVar[type[Any]]
    """Of the model's configuration, which tells this task's models from others."""

    def sizes(self, settings: PublishedSettingsT) -> dict[str, Any]:
        """Return the sizes of the dense model that the settings decide."""
        return {"image_size": settings.image_size, **settings.model}

    def load(self, path: Path, settings: PublishedSettingsT) -> nn.Module:
        """Return the model in one of our folders, in a published file, or in a folder of transformers."""
        checkpoint = open_checkpoint(path)
        if checkpoint.library == "upop":
            model = checkpoint.load()
            if not self._is_mine(kind_of(model)):
                raise CheckpointError(f"{path} holds a {type(model).__name__}, which is no model for {self.name}.")
            model = self._at_size(model, settings, str(path))
        else:
            model = load_official(self.name, checkpoint, **self.sizes(settings))
        return self._prepared(model, settings)

    def start(self, path: Path, settings: PublishedSettingsT) -> tuple[nn.Module, Sequence[str]]:
        """Return the dense model, started from a checkpoint that may lack what only this task has.

        From a folder of another task's model, the towers that both have are taken.
        """
        checkpoint = open_checkpoint(path)
        is_folder = checkpoint.kind != "state_dict"
        if is_folder and stated_inputs(checkpoint).task == self.name:
            return self.load(path, settings), ()
        model = self.build(settings)
        return model, start_from(self.name, checkpoint, model, any_towers=is_folder)

    def _at_size(self, model: nn.Module, settings: PublishedSettingsT, source: str) -> nn.Module:
        """Return a model of ours for images of the settings' size."""
        return resized(model, settings.image_size, source)

    def _is_mine(self, kind: str | None) -> bool:
        return kind is not None and kind in MODELS and MODELS[kind][1] is self.config

    def _prepared(self, model: nn.Module, settings: PublishedSettingsT) -> nn.Module:
        """Return the model as this run needs it; it may be changed."""
        return model
