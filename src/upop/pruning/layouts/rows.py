"""The table: what attention modules call their projections, and the numbers that they keep about their heads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from upop.pruning.layouts.reading import NotPrunableError, is_projection

Order = Literal["by kind", "by head", "read"]


@dataclass(frozen=True)
class Layout:
    """How an attention names its projections.

    Attributes:
        makers: query, key and value; or one layer that makes all three; or the query, and key and value in one.
        outputs: what the layer that consumes the heads may be called; "^" goes one module up.
        order: how one layer's outputs are ordered: first all queries, then all keys, then all values ("by kind"), or
            all three of the first head, then of the second ("by head"); "read" reads it off the forward.
    """

    makers: tuple[str, ...]
    outputs: tuple[str, ...]
    order: Order = "read"


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj", "out_proj", "proj", "dense", "projection_layer", "output_proj", "Wo", "proj_out"),
    ),
    Layout(("query", "key", "value"), ("out_proj", "dense", "output", "proj", "^output.dense")),
    Layout(("q", "k", "v"), ("o", "proj", "out", "proj_out")),
    Layout(("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    Layout(("wq", "wk", "wv"), ("wo", "proj")),
    Layout(("Wq", "Wk", "Wv"), ("Wo", "dense")),
    Layout(("query_proj", "key_proj", "value_proj"), ("out_proj", "^output.dense")),
    Layout(("linear_q", "linear_k", "linear_v"), ("linear_out", "linear_o")),
    Layout(("project_q", "project_k", "project_v"), ("attention_out",)),
    Layout(("to_q", "to_k", "to_v"), ("to_out", "to_out.0")),
    Layout(("qkv",), ("proj", "projection", "out_proj", "o_proj", "dense", "^output.dense")),
    Layout(("Wqkv",), ("Wo", "out_proj")),
    Layout(("qkv_proj",), ("out_proj", "o_proj")),
    Layout(("query_key_value",), ("dense",)),
    Layout(("att_proj",), ("out_proj",), "by kind"),
    Layout(("c_attn",), ("c_proj",), "by kind"),
    Layout(("q", "kv"), ("proj",)),
)

BIASES = ("q_bias", "k_bias", "v_bias")
"""Biases that an attention may keep apart from the one layer that makes queries, keys and values."""

# What modules call the numbers that they keep about their heads.
HEADS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead"),
    *("num_query_heads", "num_q_heads", "num_attn_heads", "n_local_heads"),
)
GROUPS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_local_kv_heads", "num_heads_kv")
SIZES = (
    *("head_dim", "attention_head_size", "d_head", "dim_head", "head_size"),
    *("key_value_proj_dim", "dim_per_head", "d_kv"),
)
# Widths that are about the heads alone, and those that may as well be about the residual stream.
INNER = ("all_head_size", "inner_dim", "attn_dim", "attention_dim", "split_size", "internal_dim")
WIDTHS = (
    *INNER,
    *("embed_dim", "hidden_size", "d_model", "dim", "dim_out", "kv_dim", "out_dim", "n_embd", "q_size", "kv_size"),
)
# How many heads share keys and values: the same before and after, since they go together.
RATIOS = ("num_key_value_groups", "num_kv_groups", "n_rep", "kv_groups", "num_queries_per_kv")
SCALES = (
    *("scale", "scaling", "softmax_scale", "inv_norm_factor", "norm_factor", "scale_factor", "scale_attn"),
    *("attn_scale", "qk_scale", "attention_scale", "scaling_factor"),
)
# Whole numbers that speak of tokens, layers or randomness, never of heads.
OTHER_NUMBERS = re.compile(
    r"layer|window|token|stride|seed|bucket|distance|chunk|block_size|max_pos|seq|rotary_ndims|rotary_dim|_ratio|pad|area"
)


def layout_of(module: nn.Module) -> Layout | None:
    """Return the row whose makers are all projections of `module`, or None.

    Raises:
        NotPrunableError: its parts have the names of a row, and one is no projection.
    """
    for row in LAYOUTS if module._modules else ():
        parts = [module._modules.get(maker) for maker in row.makers]
        if all(map(is_projection, parts)):
            return row
        if all(part is not None for part in parts) and len(parts) == 3:
            name, part = next(
                (name, part) for name, part in zip(row.makers, parts, strict=True) if not is_projection(part)
            )
            raise NotPrunableError(f"{name} is a {type(part).__name__}, which is no linear layer")
    return None


def names_one_of(text: str, names: tuple[str, ...]) -> bool:
    """Whether source text holds one of `names` as a word."""
    return bool(set(re.findall(r"\w+", text)) & set(names))
