"""Converts between models of upop and classes of transformers: configurations and tensor names, one row per model.

Upop's BLIP takes its vision transformer from timm; the text models are those of transformers, with the same names.
Momentum encoders and queues serve training, and exist only in upop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from upop.checkpoints.names import vit
from upop.checkpoints.names.pairs import Pairs, in_block, turned
from upop.errors import CheckpointError
from upop.models.blip import LABEL_SMOOTHING
from upop.models.clip import library_config
from upop.models.retrieval import BlipRetrieval

State = Mapping[str, Tensor]

_SEP_ID = 102  # of bert-base-uncased: ends a text


@dataclass(frozen=True)
class Counterpart:
    """The correspondence of a model of upop and a class of transformers.

    Attributes:
        model: our model's name in `upop.models.MODELS`.
        task: the task of its published checkpoints.
        kind: the name of transformers' class.
        config: configuration of upop -> configuration of transformers.
        sizes: configuration of transformers -> fields of upop's.
        export: tensors of upop -> tensors of transformers.
        read: tensors of transformers -> tensors of upop.
        same: dotted field of transformers' configuration -> the value that upop's model assumes.
    """

    model: str
    task: str
    kind: str
    config: Callable[[Any], Any]
    sizes: Callable[[Any], dict[str, Any]]
    export: Callable[[State], dict[str, Tensor]]
    read: Callable[[State], dict[str, Tensor]]
    same: Mapping[str, Any]


def counterpart_of(model: str | None, name: str) -> Counterpart:
    """Return the row of a model of upop.

    Args:
        model: its name in `upop.models.MODELS`.
        name: its name in messages.

    Raises:
        CheckpointError: transformers has no class that computes the same.
    """
    for row in COUNTERPARTS:
        if row.model == model:
            return row
    raise CheckpointError(
        f"transformers has no class for a {name}: it has {', '.join(row.kind for row in COUNTERPARTS)}. "
        "Keep it as a folder of upop, or as a published checkpoint."
    )


def check_counterpart(row: Counterpart, config: Any) -> None:
    """Check that upop's model computes what a configuration of transformers asks for.

    Raises:
        CheckpointError: it does not; the message names the field.
    """
    for path, expected in row.same.items():
        found = config
        for part in path.split("."):
            found = getattr(found, part)
        if found != expected:
            raise CheckpointError(
                f"This {row.kind} has {path}={found!r}, and upop's {row.model} computes with {expected!r}. "
                "Compress the transformers model itself (upop.Compression)."
            )


def counterpart_named(kind: str) -> Counterpart:
    """Return the row of a class of transformers.

    Raises:
        CheckpointError: upop has no counterpart.
    """
    row = next((row for row in COUNTERPARTS if row.kind == kind), None)
    if row is None:
        raise CheckpointError(
            f"A {kind} of transformers has no counterpart among upop's own models; these have: "
            f"{', '.join(row.kind for row in COUNTERPARTS)}. It needs no conversion: compress the model itself "
            "(upop.Compression), and save it with upop.save or save_pretrained."
        )
    return row


_VIT_PARTS: Pairs = (
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.qkv", "self_attn.qkv"),
    ("attn.proj", "self_attn.projection"),
    ("mlp.", "mlp."),
)
_BLIP_BLOCKS: Pairs = (("visual_encoder.blocks.", "vision_model.encoder.layers."),)
_BLIP_TENSORS = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in (
            ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
            ("visual_encoder.norm", "vision_model.post_layernorm"),
        )
        for kind in ("weight", "bias")
    },
}
_POSITION_IDS = re.compile(r"text_(encoder|decoder\.bert)\.embeddings\.position_ids")
# For training only: momentum encoders, queues, and the temperature, which transformers' BLIP does not store.
_TRAINING = re.compile(r"(visual_encoder|vision_proj|text_encoder|text_proj|\w+_(model|projection))_m\..*|\w+_queue")


def _deployed(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not _TRAINING.fullmatch(name)}


def _blip_export(state: State) -> dict[str, Tensor]:
    return {
        _BLIP_TENSORS.get(name) or in_block(name, _BLIP_BLOCKS, _VIT_PARTS): value
        for name, value in _deployed(state).items()
        if not _POSITION_IDS.fullmatch(name) and name != "temp"
    }


def _blip_read(state: State) -> dict[str, Tensor]:
    back = {theirs: ours for ours, theirs in _BLIP_TENSORS.items()}
    blocks, parts = turned(_BLIP_BLOCKS), turned(_VIT_PARTS)
    result = {back.get(name) or in_block(name, blocks, parts): value for name, value in state.items()}
    for tower in ("text_encoder", "text_decoder.bert"):
        positions = result.get(f"{tower}.embeddings.position_embeddings.weight")
        if positions is not None:
            result[f"{tower}.embeddings.position_ids"] = torch.arange(len(positions)).unsqueeze(0)
    return result


def _blip_config(config: Any) -> Any:
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_depth,
        "num_attention_heads": config.text_heads,
        "intermediate_size": config.text_mlp,
        "max_position_embeddings": config.max_positions,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "pad_token_id": 0,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": 2,  # never generated: the library stops at sep_token_id
        "sep_token_id": min(_SEP_ID, config.vocab_size - 1),
        "is_decoder": True,
        "label_smoothing": LABEL_SMOOTHING,
    }
    vision = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.vision_width,
        "num_hidden_layers": config.vision_depth,
        "num_attention_heads": config.vision_heads,
        "intermediate_size": config.vision_mlp,
        "layer_norm_eps": config.vision_eps,
    }
    features = {"image_text_hidden_size": config.embed_dim} if hasattr(config, "embed_dim") else {}
    return transformers.BlipConfig(text_config=text, vision_config=vision, **features)


def _vqa_config(config: Any) -> Any:
    if config.text_width != config.vision_width:
        raise CheckpointError(
            "transformers has no class for this BlipVqa: its BlipForQuestionAnswering needs texts as wide as images, "
            f"and text_width is {config.text_width}, vision_width {config.vision_width}. Keep it as a folder of upop, "
            "or as a published checkpoint."
        )
    return _blip_config(config)


def _blip_sizes(config: Any) -> dict[str, Any]:
    text = config.text_config
    return {
        **_tower("vision", config.vision_config),
        **_tower("text", text),
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        "vision_eps": config.vision_config.layer_norm_eps,
        "vocab_size": text.vocab_size,
        "max_positions": text.max_position_embeddings,
        "dropout": text.hidden_dropout_prob,
    }


def _retrieval_sizes(config: Any) -> dict[str, Any]:
    return {**_blip_sizes(config), "embed_dim": config.image_text_hidden_size}


def _retrieval_read(state: State) -> dict[str, Tensor]:
    ours = _blip_read(state)
    # The temperature affects only the contrastive loss, and has the initial value of the published training.
    return {**with_copies(ours, BlipRetrieval.momentum_encoders), "temp": torch.tensor(0.07)}


def with_copies(state: State, momentum_encoders: Mapping[str, str]) -> dict[str, Tensor]:
    """Add the tensors of missing momentum encoders, equal to the originals."""
    copies = {
        momentum_encoder + key.removeprefix(name): value
        for name, momentum_encoder in momentum_encoders.items()
        for key, value in state.items()
        if key.startswith(f"{name}.")
    }
    return copies | dict(state)


def _tower(name: str, config: Any) -> dict[str, Any]:
    return {
        f"{name}_width": config.hidden_size,
        f"{name}_depth": config.num_hidden_layers,
        f"{name}_heads": config.num_attention_heads,
        f"{name}_mlp": config.intermediate_size,
    }


def _clip_sizes(config: Any) -> dict[str, Any]:
    return {
        **_tower("vision", config.vision_config),
        **_tower("text", config.text_config),
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        "vocab_size": config.text_config.vocab_size,
        "max_positions": config.text_config.max_position_embeddings,
        "embed_dim": config.projection_dim,
    }


_BLIP_SAME = {
    "vision_config.hidden_act": "gelu",
    "text_config.hidden_act": "gelu",
    "text_config.layer_norm_eps": 1e-12,
}
_CLIP_SAME = {
    f"{tower}_config.{name}": value
    for tower in ("vision", "text")
    for name, value in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5))
}

COUNTERPARTS = (
    Counterpart(
        "blip-caption",
        "caption",
        "BlipForConditionalGeneration",
        _blip_config,
        _blip_sizes,
        _blip_export,
        _blip_read,
        _BLIP_SAME,
    ),
    Counterpart(
        "blip-vqa",
        "vqa",
        "BlipForQuestionAnswering",
        _vqa_config,
        _blip_sizes,
        _blip_export,
        _blip_read,
        _BLIP_SAME,
    ),
    Counterpart(
        "blip-retrieval",
        "retrieval",
        "BlipForImageTextRetrieval",
        _blip_config,
        _retrieval_sizes,
        _blip_export,
        _retrieval_read,
        _BLIP_SAME,
    ),
    Counterpart(
        "clip-retrieval",
        "retrieval-clip",
        "CLIPModel",
        library_config,
        _clip_sizes,
        _deployed,
        dict,
        _CLIP_SAME,
    ),
    Counterpart(
        "classifier",
        "classification",
        "ViTForImageClassification",
        vit.config,
        vit.sizes,
        vit.export,
        vit.read,
        vit.SAME,
    ),
    Counterpart(
        "classifier",
        "classification",
        "DeiTForImageClassificationWithTeacher",
        vit.config,
        vit.sizes,
        vit.export,
        vit.read,
        vit.SAME,
    ),
)
