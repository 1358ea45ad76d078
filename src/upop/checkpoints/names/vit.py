"""Converts vision transformers between timm and transformers (ViT, or DeiT with a distillation token)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from upop.checkpoints.names.pairs import Pairs, in_block, turned

State = Mapping[str, Tensor]

SAME = {"hidden_act": "gelu"}
"""Settings of transformers that timm's classifiers assume."""

_DISTILLED = "dist_token"
_PARTS: Pairs = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.o_proj"),
    ("mlp.", "mlp."),
)


def _tensors(base: str) -> dict[str, str]:
    """Return timm's names -> transformers' names, outside the blocks."""
    distilled = base == "deit"
    head = "cls_classifier" if distilled else "classifier"
    names = {
        "cls_token": f"{base}.embeddings.cls_token",
        _DISTILLED: f"{base}.embeddings.distillation_token",
        "pos_embed": f"{base}.embeddings.position_embeddings",
    }
    layers = {
        "patch_embed.proj": f"{base}.embeddings.patch_embeddings.projection",
        "norm": f"{base}.layernorm",
        "head": head,
        "head_dist": "distillation_classifier",
    }
    return names | {
        f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in layers.items() for kind in ("weight", "bias")
    }


def export(state: State) -> dict[str, Tensor]:
    """Rename the tensors of a classifier from timm to transformers, and split packed q, k and v."""
    base = "deit" if _DISTILLED in state else "vit"
    names, blocks = _tensors(base), (("blocks.", f"{base}.layers."),)
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            layer, kind = in_block(key.partition("attn.qkv.")[0], blocks, ()), key.rpartition(".")[2]
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{layer}attention.{projection}_proj.{kind}"] = part.contiguous()
        else:
            result[names.get(key) or in_block(key, blocks, _PARTS)] = value
    return result


def read(state: State) -> dict[str, Tensor]:
    """Rename the tensors of a classifier from transformers to timm: the exact inverse of `export`."""
    base = "deit" if any(key.startswith("deit.") for key in state) else "vit"
    names = {theirs: ours for ours, theirs in _tensors(base).items()}
    blocks, parts = ((f"{base}.layers.", "blocks."),), turned(_PARTS)
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        head, packed, kind = key.partition("attention.q_proj.")
        if packed:
            projections = [state[f"{head}attention.{each}_proj.{kind}"] for each in "qkv"]
            result[f"{in_block(head, blocks, ())}attn.qkv.{kind}"] = torch.cat(projections)
        elif not any(f"attention.{each}_proj." in key for each in "kv"):
            result[names.get(key) or in_block(key, blocks, parts)] = value
    return result


def config(ours: Any) -> Any:
    """Return transformers' configuration of a classifier."""
    from upop.models.classifier import architecture_sizes  # of timm, which models of transformers do without

    sizes = architecture_sizes(ours.architecture)
    whole = {name: getattr(ours, name) or sizes[name] for name in sizes}
    kind: Any = transformers.DeiTConfig if "distilled" in ours.architecture else transformers.ViTConfig
    return kind(
        image_size=ours.image_size,
        patch_size=whole["patch_size"],
        hidden_size=whole["vision_width"],
        num_hidden_layers=whole["vision_depth"],
        num_attention_heads=whole["vision_heads"],
        intermediate_size=whole["vision_mlp"],
        hidden_dropout_prob=ours.dropout,
        layer_norm_eps=ours.norm_eps or 1e-6,
        num_labels=ours.classes,
    )


def sizes(theirs: Any) -> dict[str, Any]:
    """Return the fields of ClassifierConfig that a transformers configuration determines."""
    distilled = theirs.model_type == "deit"
    return {
        "architecture": "deit_small_distilled_patch16_224" if distilled else "deit_small_patch16_224",
        "image_size": theirs.image_size,
        "patch_size": theirs.patch_size,
        "vision_width": theirs.hidden_size,
        "vision_depth": theirs.num_hidden_layers,
        "vision_heads": theirs.num_attention_heads,
        "vision_mlp": theirs.intermediate_size,
        "classes": theirs.num_labels,
        "dropout": theirs.hidden_dropout_prob,
        "norm_eps": theirs.layer_norm_eps,
    }
