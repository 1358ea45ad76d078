"""Published vision transformers: DeiT and timm's as classifiers, Segmenter. Sizes from shapes, positions, heads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upop.checkpoints.fitting.fit import resize_positions
from upop.models.classifier import ClassifierConfig, architecture_sizes
from upop.models.segmenter import SegmenterConfig, resize_grid

State = Mapping[str, Tensor]

HEAD_DIM = 64
"""Of every published model."""

_POSITIONS = "pos_embed"
_DISTILLED = "deit_small_distilled_patch16_224"
_LAYER_SCALE = re.compile(r"(blocks\.\d+)\.gamma_([12])")


def count_layers(state: State, pattern: str) -> int:
    """Return how many layers a checkpoint has, from a pattern of keys whose first group is a layer's number."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def side(value: Any) -> Any:
    """Return the side of a square, if both sides are given and equal; anything else unchanged."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value


def vit_sizes(state: State, prefix: str) -> dict[str, Any]:
    """Return the sizes of the dense vision transformer whose tensors begin with `prefix`, named as timm names them.

    Numbers of heads and MLP widths, which shapes do not determine after compression, are those of the published models.

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


def classifier_positions(state: State, config: ClassifierConfig) -> dict[str, Tensor]:
    """Resize the position embeddings to the image size of the configuration.

    A head for another number of classes is left out, since it must be trained again.
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


def segmenter_sizes(state: State) -> dict[str, Any]:
    """Return the fields of SegmenterConfig that a checkpoint's shapes determine; KeyError names a missing tensor."""
    head = state.get("encoder.head.weight")
    config = {**vit_sizes(state, "encoder."), "encoder_classes": 0 if head is None else head.shape[0]}
    if "decoder.head.weight" in state:
        return {**config, "decoder": "linear", "classes": state["decoder.head.weight"].shape[0]}
    _, classes, width = state["decoder.cls_emb"].shape
    return {
        **config,
        "classes": classes,
        "decoder_width": width,
        "decoder_depth": count_layers(state, r"decoder\.blocks\.(\d+)\."),
        "decoder_heads": max(1, width // HEAD_DIM),
        "decoder_mlp": 4 * width,
    }


def segmenter_positions(state: State, config: SegmenterConfig) -> dict[str, Tensor]:
    """Return the tensors with position embeddings for the configuration's grid of patches."""
    side, positions = config.image_size // config.patch_size, f"encoder.{_POSITIONS}"
    return {key: resize_grid(value, (side, side)) if key == positions else value for key, value in state.items()}


def as_encoder(state: State) -> dict[str, Tensor]:
    """Make a plain vision transformer, as timm and DeiT name its tensors, the encoder, without its head.

    Tensors of a Segmenter stay as they are.
    """
    if _POSITIONS not in state:
        return dict(state)
    return {f"encoder.{key}": value for key, value in state.items() if not key.startswith("head.")}
