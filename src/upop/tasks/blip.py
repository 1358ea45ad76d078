"""Base of the tasks with a BLIP model: its construction and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from upop.data.tokenizer import load_tokenizer
from upop.errors import SettingError
from upop.models.blip import BlipConfig, checkpoint_last_blocks, enlarge_weights
from upop.models.blip_cross import add_cross_tokens, crossing, has_cross_tokens
from upop.pruning.masks import unwrapped
from upop.settings import TOKENIZER, LanguageSettings
from upop.tasks.published import SIZES, PublishedTask
from upop.values import described


class BlipSettings(LanguageSettings):
    """Settings of every BLIP task, as in the published configs."""

    vit: Literal["base", "large"] = "base"
    vit_grad_ckpt: bool = Field(False, description="recompute activations of the vision transformer: less memory")
    vit_ckpt_layer: int = Field(0, ge=0, description="number of last blocks to recompute with vit_grad_ckpt")
    init_scale: float = Field(1.0, gt=0, description="factor for initial weights: small models need about 5")
    cross: float | None = Field(
        None,
        ge=0,
        description="adds a cross token to each layer, which guides the merging of image tokens (requires tokens); the "
        "value is the weight of the loss that aligns the cross tokens of image and text",
    )

    @model_validator(mode="after")
    def _crosses(self) -> Self:
        if self.cross is not None and (self.tokens is None or self.width):
            why = "cross tokens are as wide as the residual stream" if self.width else "nothing is merged"
            raise ValueError(f"cross={self.cross:g} leads the merging of tokens, and {why}; give tokens, without width")
        return self


BlipSettingsT = TypeVar("BlipSettingsT", bound=BlipSettings)


class BlipTask(PublishedTask[BlipSettingsT]):
    """A task whose model is a ViT with BlipText; `name` is also the name of its published format."""

    model: ClassVar[type[nn.Module]]
    config: ClassVar[type[BlipConfig]]

    def build(self, settings: BlipSettingsT) -> nn.Module:
        """Return the model with random weights, and the tokenizer's vocabulary."""
        sizes = {"vocab_size": len(blip_tokenizer(settings.tokenizer)), **self.sizes(settings)}
        with described(SIZES):
            config = self.config.vit(settings.vit, **sizes)
        model = self.model(config)
        enlarge_weights(model, settings.init_scale)
        return self._prepared(model, settings)

    def load(self, path: Path, settings: BlipSettingsT) -> nn.Module:
        """Return the model in a checkpoint; its own tokenizer may have fewer words than the vocabulary.

        Raises:
            SettingError: the tokenizer does not match the model.
        """
        model = super().load(path, settings)
        known: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        words = len(self.tokenizer(settings))
        if words > known or (words < known and Path(settings.tokenizer) != path):
            # The ids of [DEC] and [ENC], the last two words, would differ from those in training.
            raise SettingError(
                f"The model's vocabulary has {known} words, and the tokenizer {settings.tokenizer!r} has {words}. Set "
                "tokenizer to the one that the model was trained with."
            )
        return model

    def adapt(self, model: nn.Module, settings: BlipSettingsT, *, training: bool) -> tuple[nn.Module, Sequence[str]]:
        """Return the model with cross tokens, where the settings ask for them.

        Raises:
            SettingError: it has some, and its residual streams are to lose channels.
        """
        if settings.width and training and has_cross_tokens(model):
            raise SettingError(
                f"{settings.pretrained} has cross tokens, which are as wide as the residual stream, and width=True "
                "would prune its channels. Leave width out."
            )
        if settings.cross is None or has_cross_tokens(model):
            return model, ()
        add_cross_tokens(model)
        return model, ("every layer of the image encoder and the text model was given a cross token of zeros",)

    def tokenizer(self, settings: BlipSettingsT) -> Any:
        """Return BERT's tokenizer."""
        return blip_tokenizer(settings.tokenizer)

    def _prepared(self, model: nn.Module, settings: BlipSettingsT) -> nn.Module:
        if settings.vit_grad_ckpt:
            checkpoint_last_blocks(model.visual_encoder, settings.vit_ckpt_layer)  # type: ignore[arg-type]
        return super()._prepared(model, settings)


Losses = Callable[[Any, nn.Module, Any, Any, float], Tensor]


def with_cross_loss(loss: Losses) -> Losses:
    """Wrap a task's loss so that training also aligns the cross tokens of image and text, if the model has any."""

    @wraps(loss)
    def total_loss(task: Any, model: nn.Module, batch: Any, settings: Any, epoch: float) -> Tensor:
        inner = unwrapped(model)
        if not model.training or not has_cross_tokens(inner):
            return loss(task, model, batch, settings, epoch)
        with crossing(inner) as found:
            total = loss(task, model, batch, settings, epoch)
        cross_loss = found.loss()
        # Even with weight 0, the text's cross tokens stay in the graph: several processes wait for all gradients.
        return total if cross_loss is None else total + (settings.cross or 0.0) * cross_loss

    return total_loss


def blank_images(model: nn.Module, count: int) -> Tensor:
    """Return grey images of the model's size, [count, 3, size, size], on its device."""
    config: BlipConfig = model.config  # type: ignore[assignment]
    return torch.zeros(count, 3, config.image_size, config.image_size, device=next(model.parameters()).device)


def dummy_tokens(model: nn.Module, count: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask of ones, [count, tokens] each, with at most as many tokens as the model takes."""
    config: BlipConfig = model.config  # type: ignore[assignment]
    shape = count, min(tokens, config.max_positions)
    ones = torch.ones(shape, dtype=torch.long, device=next(model.parameters()).device)
    return ones, torch.ones_like(ones)


@cache
def blip_tokenizer(path: str) -> Any:
    """Return BERT's tokenizer with BLIP's special tokens, from a local folder if it exists, else from the hub."""
    on_hub = path == TOKENIZER and not Path(path).exists()
    return load_tokenizer(Path(path).name if on_hub else path)
