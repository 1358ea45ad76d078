"""Published checkpoints of CLIP: sizes from shapes, momentum copies, queues and cross tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from upop.checkpoints.fitting.fit import resize_positions
from upop.checkpoints.names.clip import from_openai, is_openai, weights_only
from upop.checkpoints.names.counterparts import with_copies
from upop.checkpoints.published.vit import HEAD_DIM, State, count_layers
from upop.errors import CheckpointError
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.contrast import fresh_queues
from upop.models.crossget import CrossGetConfig
from upop.models.retrieval import RetrievalConfig

_CROSS = {"vision": "vision_model.encoder.cross_image", "text": "text_model.encoder.cross_text"}
_CLIP_PATCHES = "vision_model.embeddings.patch_embedding.weight"
_CLIP_POSITIONS = "{}_model{}.embeddings.position_embedding.weight"


def _clip_named(state: State) -> dict[str, Tensor]:
    state = weights_only(state)
    return from_openai(state) if is_openai(state) else state


def clip_sizes(state: State) -> dict[str, Any]:
    """Infer fields of a CLIP configuration from the shapes of a checkpoint; KeyError names a missing tensor."""
    state = _clip_named(state)
    patches, projection = state[_CLIP_PATCHES], state["visual_projection.weight"]
    positions = state[_CLIP_POSITIONS.format("text", "")]
    words = state.get("text_model.embeddings.token_embedding.weight")  # CoOp's files have none
    width, patch = patches.shape[0], patches.shape[-1]
    queue = {"queue_size": state["image_queue"].shape[1]} if "image_queue" in state else {}
    return {
        "patch_size": patch,
        "image_size": math.isqrt(state[_CLIP_POSITIONS.format("vision", "")].shape[0] - 1) * patch,
        "vision_width": width,
        "vision_depth": count_layers(state, r"vision_model\.encoder\.layers\.(\d+)\."),
        "vision_heads": max(1, width // HEAD_DIM),
        "vision_mlp": 4 * width,
        "text_width": positions.shape[1],
        "text_depth": count_layers(state, r"text_model\.encoder\.layers\.(\d+)\."),
        "text_heads": max(1, positions.shape[1] // HEAD_DIM),
        "text_mlp": 4 * positions.shape[1],
        "max_positions": positions.shape[0],
        "embed_dim": projection.shape[0],
        **({} if words is None else {"vocab_size": words.shape[0]}),
        **queue,
    }


def clip_complete(state: State, config: ClipConfig) -> dict[str, Tensor]:
    """Add momentum encoders, equal to the originals, and new queues, which plain CLIP lacks."""
    state = _clip_named(state)
    state = with_copies(state, ClipRetrieval.momentum_encoders)
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    for key in (_CLIP_POSITIONS.format("vision", momentum_encoder) for momentum_encoder in ("", "_m")):
        if key in state:
            state[key] = resize_positions(state[key].unsqueeze(0), tokens).squeeze(0)
    return with_queues(state, config)


def with_queues(state: State, config: RetrievalConfig | ClipConfig) -> dict[str, Tensor]:
    """Add new queues to the tensors of a checkpoint, if its own are missing or of another size."""
    fresh = fresh_queues(config.embed_dim, config.queue_size)
    fits = all(key in state and state[key].shape == value.shape for key, value in fresh.items())
    return {**state, **({} if fits else fresh)}


def crossget_state(state: State, config: CrossGetConfig) -> dict[str, Tensor]:
    """Check cross tokens against the configuration; return the tensors.

    Raises:
        CheckpointError: only one of checkpoint and configuration has cross tokens.
    """
    state = _plain(state)
    has = any(name in state for name in _CROSS.values())
    if config.cross and not has:
        raise CheckpointError(
            "The checkpoint has no cross tokens (visual.transformer.cross_image, transformer.cross_text), which "
            "merging of image and text tokens needs. Evaluate it with --reduce none, or train it first with "
            "--reduce ours, where they start at zero."
        )
    if has and not config.cross:
        raise CheckpointError(
            "The checkpoint has cross tokens, without which its features change. Use --reduce ours with the --rv and "
            "--rl that it was trained with."
        )
    key, side = _CLIP_POSITIONS.format("vision", ""), config.image_size // config.patch_size
    return {**state, key: resize_positions(state[key].unsqueeze(0), 1 + side**2).squeeze(0)}


def crossget_start(state: State) -> dict[str, Tensor]:
    """Add trainable cross tokens to the tensors of any CLIP; missing ones are zero."""
    state = _plain(state)
    sizes = clip_sizes(state)
    fresh = {name: torch.zeros(1, sizes[f"{tower}_depth"], sizes[f"{tower}_width"]) for tower, name in _CROSS.items()}
    return {**fresh, **state}


def _plain(state: State) -> dict[str, Tensor]:
    """Drop tensors that only momentum training needs."""
    return {
        name: value
        for name, value in _clip_named(state).items()
        if not name.partition(".")[0].endswith(("_m", "_queue"))
    }
