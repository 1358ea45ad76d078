"""What the tasks with a BLIP model share: how the model is built, and its tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field
from torch import nn

from upop.data.tokenizer import load_tokenizer
from upop.models.blip import BlipConfig, checkpoint_last_blocks, enlarge_weights
from upop.settings import TOKENIZER, LanguageSettings
from upop.tasks.published import SIZES, PublishedTask
from upop.values import told


class BlipSettings(LanguageSettings):
    """Settings of every BLIP model, as in the published files."""

    vit: Literal["base", "large"] = "base"
    vit_grad_ckpt: bool = Field(False, description="recompute activations of the vision transformer: less memory")
    vit_ckpt_layer: int = Field(0, ge=0, description="how many of its last blocks do so")
    init_scale: float = Field(1.0, gt=0, description="makes fresh weights so much larger: small models need 5 or so")


BlipSettingsT = TypeVar("BlipSettingsT", bound=BlipSettings)


class BlipTask(PublishedTask[BlipSettingsT]):
    """A task whose model is a vision transformer with BlipText; `name` is also the name of its published format."""

    model: ClassVar[type[nn.Module]]
    config: ClassVar[type[BlipConfig]]

    def build(self, settings: BlipSettingsT) -> nn.Module:
        """Return the model with fresh weights; its vocabulary is the tokenizer's."""
        sizes = {"vocab_size": len(blip_tokenizer(settings.tokenizer)), **self.sizes(settings)}
        with told(SIZES):
            config = self.config.vit(settings.vit, **sizes)
        model = self.model(config)
        enlarge_weights(model, settings.init_scale)
        return self._prepared(model, settings)

    def _prepared(self, model: nn.Module, settings: BlipSettingsT) -> nn.Module:
        if settings.vit_grad_ckpt:
            checkpoint_last_blocks(model.visual_encoder, settings.vit_ckpt_layer)  # type: ignore[arg-type]
        return super()._prepared(model, settings)


@cache
def blip_tokenizer(path: str) -> Any:
    """Return the tokenizer of the published models, from the folder where they look for it, or else from the hub."""
    on_hub = path == TOKENIZER and not Path(path).exists()
    return load_tokenizer(Path(path).name if on_hub else path)
