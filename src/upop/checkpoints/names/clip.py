"""Converts tensor names of CLIP between OpenAI (published checkpoints) and transformers (models of upop).

OpenAI packs the query, key and value projections into one tensor, and stores the two output projections transposed.
Momentum copies have the suffix "_m" on their first name in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from upop.checkpoints.names.pairs import in_block, replaced, turned

_TENSORS = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.proj", "visual_projection.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("text_projection", "text_projection.weight"),
    ("visual.transformer.cross_image", "vision_model.encoder.cross_image"),  # CrossGET's
    ("transformer.cross_text", "text_model.encoder.cross_text"),
    *(
        (f"{theirs}.{kind}", f"{ours}.{kind}")
        for theirs, ours in (
            ("visual.ln_pre", "vision_model.pre_layrnorm"),  # misspelt in transformers
            ("visual.ln_post", "vision_model.post_layernorm"),
            ("ln_final", "text_model.final_layer_norm"),
        )
        for kind in ("weight", "bias")
    ),
)
_TO_OURS = dict(_TENSORS)
_TO_OPENAI = {ours: theirs for theirs, ours in _TENSORS}
_TRANSPOSED = ("visual_projection.weight", "text_projection.weight")

_BLOCKS = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
)
_PARTS = (
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_PACKED = re.compile(r"(.*\.)attn\.in_proj_(weight|bias)")
_SPLIT = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)")
_GROUP = re.compile(r"(.*resblocks\.\d+)(\.attn)?")

# Entries that are no weights: sizes in OpenAI's files, position ids in older ones of transformers.
_NO_WEIGHTS = re.compile(r"input_resolution|context_length|vocab_size|(text|vision)_model\.embeddings\.position_ids")


def is_openai(names: Iterable[str]) -> bool:
    """Whether tensors are named as by OpenAI."""
    return "visual.conv1.weight" in names


def from_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of a checkpoint from OpenAI's names to those of upop's models.

    Works for dense and compressed checkpoints; unknown names stay.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        name, copy = _without_copy(key)
        packed = _PACKED.fullmatch(name)
        if packed:
            layer = replaced(packed[1], _BLOCKS)
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                result[_with_copy(f"{layer}self_attn.{projection}_proj.{packed[2]}", copy)] = part.contiguous()
            continue
        ours = _TO_OURS.get(name) or in_block(name, _BLOCKS, _PARTS)
        result[_with_copy(ours, copy)] = value.t().contiguous() if ours in _TRANSPOSED else value
    return result


def to_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of a model of upop to OpenAI's names; the exact inverse of `from_openai`."""
    blocks, parts = turned(_BLOCKS), turned(_PARTS)
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        name, copy = _without_copy(key)
        split = _SPLIT.fullmatch(name)
        if split:
            if split[2] == "q":
                packed = [state[_with_copy(f"{split[1]}{each}_proj.{split[3]}", copy)] for each in "qkv"]
                layer = replaced(split[1].removesuffix("self_attn."), blocks)
                result[_with_copy(f"{layer}attn.in_proj_{split[3]}", copy)] = torch.cat(packed)
            continue
        theirs = _TO_OPENAI.get(name) or in_block(name, blocks, parts)
        result[_with_copy(theirs, copy)] = value.t().contiguous() if name in _TRANSPOSED else value
    return result


def weights_only(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the plain numbers that some CLIP files store beside the weights."""
    return {key: value for key, value in state.items() if not _NO_WEIGHTS.fullmatch(key)}


def group_from_openai(name: str) -> str:
    """Convert a group name of the published code: a block (its MLP), or a block's "attn"."""
    found = _GROUP.fullmatch(name)
    if found is None:
        return name
    return replaced(found[1], _BLOCKS) + (".self_attn" if found[2] else ".mlp")


def _without_copy(key: str) -> tuple[str, bool]:
    root, dot, rest = key.partition(".")
    return root.removesuffix("_m") + dot + rest, root.endswith("_m")


def _with_copy(name: str, copy: bool) -> str:
    root, dot, rest = name.partition(".")
    return f"{root}_m{dot}{rest}" if copy else name
