"""Published checkpoints of DeiT and of vision transformers with its tensor names: sizes, positions, heads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upop.checkpoints.fit import resize_positions
from upop.checkpoints.vit_sizes import State, vit_sizes
from upop.models.classifier import ClassifierConfig, architecture_sizes

_POSITIONS = "pos_embed"
_DISTILLED = "deit_small_distilled_patch16_224"
_LAYER_SCALE = re.compile(r"(blocks\.\d+)\.gamma_([12])")


def classifier_sizes(state: State) -> dict[str, Any]:
    """Infer fields of ClassifierConfig from the shapes of a checkpoint; KeyError names a missing tensor."""
    sizes = vit_sizes(state, "")
    side = math.isqrt(state[_POSITIONS].shape[1])  # whether or not tokens stand before the square of patches
    distilled = {"architecture": _DISTILLED} if "dist_token" in state else {}
    return {
        **sizes,
        **distilled,
        "image_size": side * sizes["patch_size"],
        "classes": state["head.weight"].shape[0],
    }


def named_sizes(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes implied by an architecture's name, mainly numbers of heads, which shapes do not show."""
    return dict(architecture_sizes(overrides["architecture"])) if "architecture" in overrides else {}


def with_positions(state: State, config: ClassifierConfig) -> dict[str, Tensor]:
    """Resize the position embeddings to the image size of the configuration.

    A head for another number of classes is left out, since it must be trained anew.
    """
    state = {_LAYER_SCALE.sub(r"\1.ls\2.gamma", key): value for key, value in state.items()}
    if _POSITIONS in state and "patch_embed.proj.weight" in state:
        count = state[_POSITIONS].shape[1]
        before = count - math.isqrt(count) ** 2  # class and distillation token
        side = config.image_size // state["patch_embed.proj.weight"].shape[-1]
        state[_POSITIONS] = resize_positions(state[_POSITIONS], before + side**2)
    heads = [name for name in ("head", "head_dist") if f"{name}.weight" in state]
    other = [name for name in heads if state[f"{name}.weight"].shape[0] != config.classes]
    return {key: value for key, value in state.items() if key.rpartition(".")[0] not in other}
