"""Checks shared by the configurations of all models, and small example inputs."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from upop.values import Checked

_MOST = 2**24
_MOST_LAYERS = 2**12
_WORDS = 5


class ModelConfig(Checked):
    """Base of the models' configurations: sizes before pruning."""

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_built(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject sizes that no memory holds, before a model is built."""
        most = _MOST_LAYERS if str(info.field_name).endswith("_depth") else _MOST
        if isinstance(value, int) and value > most:
            raise ValueError(f"Input should be at most {most}")
        return value


def check_heads(config: ModelConfig, *parts: str) -> None:
    """Raise ValueError if the width of a part ("vision", "text", ...) is not a multiple of its number of heads."""
    for part in parts:
        width, heads = getattr(config, f"{part}_width"), getattr(config, f"{part}_heads")
        if width % heads:
            raise ValueError(f"{part}_width ({width}) is not a multiple of {part}_heads ({heads})")


def check_patches(config: ModelConfig) -> None:
    """Raise ValueError if an image is smaller than a patch."""
    size, patch = getattr(config, "image_size"), getattr(config, "patch_size")  # noqa: B009 - of any configuration
    if patch and size < patch:
        raise ValueError(f"image_size ({size}) is below patch_size ({patch})")


def some_images(config: Any, count: int = 2) -> Tensor:
    """Return random images, [count, 3, size, size], of a configuration's size."""
    return torch.randn(count, 3, config.image_size, config.image_size)


def some_words(config: Any, kind: str = "input") -> dict[str, Tensor]:
    """Return token ids and attention mask of two short texts, [2, tokens] each."""
    ids = torch.randint(config.vocab_size, (2, min(_WORDS, config.max_positions)))
    return {f"{kind}_ids": ids, "attention_mask" if kind == "input" else f"{kind}_mask": torch.ones_like(ids)}
