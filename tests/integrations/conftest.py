"""Tests of this folder run on one thread, from one seed, and train a tiny classifier of transformers on noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset


@pytest.fixture(autouse=True)
def _alone_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Images(Dataset[dict[str, Tensor]]):
    """24 images of noise, of three classes."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(index % 3)}


@pytest.fixture
def image_set() -> Images:
    return Images()


def tiny_classifier() -> Any:
    """A ViT of transformers, with random biases and norms."""
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=16,
        patch_size=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViTForImageClassification(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def classifier() -> Any:
    """A ViT of transformers, with random biases and norms."""
    return tiny_classifier()


def sizes(model: nn.Module) -> list[int]:
    """The channels of all groups."""
    import upop

    return [group.size for group in upop.find_groups(model)]
