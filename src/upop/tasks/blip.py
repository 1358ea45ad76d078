"""What the tasks with a BLIP model share: how the model is built, loaded and started, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field
from torch import nn

from upop.checkpoints import is_folder, load
from upop.checkpoints.official import load_official, start_from
from upop.data.tokenizer import load_tokenizer
from upop.errors import CheckpointError
from upop.models.blip import BlipConfig, checkpoint_last_blocks
from upop.settings import TOKENIZER, RunSettings
from upop.training.task import Task


class BlipSettings(RunSettings):
    """Settings of every BLIP model, as in the published files."""

    vit: Literal["base", "large"] = "base"
    vit_grad_ckpt: bool = Field(False, description="recompute activations of the vision transformer: less memory")
    vit_ckpt_layer: int = Field(0, ge=0, description="how many of its last blocks do so; 0 is all")


BlipSettingsT = TypeVar("BlipSettingsT", bound=BlipSettings)


class BlipTask(Task[BlipSettingsT]):
    """A task whose model is a vision transformer with BlipText; `name` is also the name of its published format."""

    model: ClassVar[type[nn.Module]]
    config: ClassVar[type[BlipConfig]]

    def sizes(self, settings: BlipSettingsT) -> dict[str, Any]:
        """Return the sizes of the dense model that the settings, and not the ViT's name, decide."""
        return {"image_size": settings.image_size, **settings.model}

    def build(self, settings: BlipSettingsT) -> nn.Module:
        """Return the model with fresh weights; its vocabulary is the tokenizer's."""
        sizes = {"vocab_size": len(blip_tokenizer(settings.tokenizer)), **self.sizes(settings)}
        return self._prepared(self.model(self.config.vit(settings.vit, **sizes)), settings)

    def load(self, path: Path, settings: BlipSettingsT) -> nn.Module:
        """Return the model in one of our folders or in a published file."""
        if is_folder(path):
            model = load(path)
            if not isinstance(model, self.model):
                raise CheckpointError(
                    f"{path} holds a {type(model).__name__}, and {self.name} needs a {self.model.__name__}."
                )
        else:
            model = load_official(self.name, path, **self.sizes(settings))
        return self._prepared(model, settings)

    def start(self, path: Path, settings: BlipSettingsT) -> tuple[nn.Module, Sequence[str]]:
        """Return the dense model, started from a checkpoint that may lack what only this task has."""
        if is_folder(path):
            return self.load(path, settings), ()
        model = self.build(settings)
        return model, start_from(self.name, path, model)

    def _prepared(self, model: nn.Module, settings: BlipSettingsT) -> nn.Module:
        if settings.vit_grad_ckpt:
            checkpoint_last_blocks(model.visual_encoder, settings.vit_ckpt_layer)  # type: ignore[arg-type]
        return model


@cache
def blip_tokenizer(path: str) -> Any:
    """Return the tokenizer of the published models, from the folder where they look for it, or else from the hub."""
    on_hub = path == TOKENIZER and not Path(path).exists()
    return load_tokenizer(Path(path).name if on_hub else path)
