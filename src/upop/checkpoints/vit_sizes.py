"""Sizes of vision transformers, read off the shapes of a published checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]

HEAD_DIM = 64
"""Of every published model."""


def count_layers(state: State, pattern: str) -> int:
    """Return how many layers a checkpoint has, from a pattern of keys whose first group is a layer's number."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def side(value: Any) -> Any:
    """Return the side of a square, of which a file may say both sides; all else as it is."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value


def vit_sizes(state: State, prefix: str) -> dict[str, Any]:
    """Return the sizes of the dense vision transformer whose tensors begin with `prefix`, named as timm names them.

    Numbers of heads and MLP widths, which shapes do not tell after compression, are those of the published models.

    Raises:
        KeyError: names a tensor that is missing.
    """
    patches = state[f"{prefix}patch_embed.proj.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    return {
        "patch_size": patch,
        "image_size": math.isqrt(state[f"{prefix}pos_embed"].shape[1] - 1) * patch,
        "vision_width": width,
        "vision_depth": count_layers(state, rf"{re.escape(prefix)}blocks\.(\d+)\."),
        "vision_heads": max(1, width // HEAD_DIM),
        "vision_mlp": 4 * width,
    }
