"""Published checkpoints of Segmenter: the sizes that their shapes tell, and positions for other sizes of images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from upop.checkpoints.vit_sizes import HEAD_DIM, State, count_layers, vit_sizes
from upop.models.segmenter import SegmenterConfig, resize_grid

_POSITIONS = "encoder.pos_embed"


def segmenter_sizes(state: State) -> dict[str, Any]:
    """Return the fields of SegmenterConfig that a checkpoint's shapes tell; KeyError names a missing tensor."""
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


def with_positions(state: State, config: SegmenterConfig) -> dict[str, Tensor]:
    """Return the tensors with position embeddings for the configuration's grid of patches."""
    side = config.image_size // config.patch_size
    return {key: resize_grid(value, (side, side)) if key == _POSITIONS else value for key, value in state.items()}


def as_encoder(state: State) -> dict[str, Tensor]:
    """Make a plain vision transformer, as timm and DeiT name its tensors, the encoder, without its head.

    Tensors of a Segmenter stay as they are.
    """
    if _POSITIONS.removeprefix("encoder.") not in state:
        return dict(state)
    return {f"encoder.{key}": value for key, value in state.items() if not key.startswith("head.")}
