"""What of an attention may go: dimensions of all its heads, else whole heads, else nothing; and the unit for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from torch import nn

from upop.pruning.layouts.attention import HARMLESS, ROTARY, SOFTMAX, Attention
from upop.pruning.layouts.heads import Level, Touch
from upop.pruning.layouts.reading import NotPrunableError, checked, columns_of, join, modality_of, rows_of
from upop.pruning.layouts.rows import BIASES, GROUPS, HEADS, SCALES, SIZES, WIDTHS, Layout
from upop.pruning.units import Attribute, Entry, Slice, Swap, Unit

# What may be done to scores where whole heads go: nothing that joins the scores of several heads.
_PER_SCORE = re.compile(
    r"^\.(masked_fill_?|softmax|tanh|max|amax|exp|new_full|new_zeros|reshape_as|add_)$|^(softmax|maybe_add_mask)$"
    r"|^torch\.(where|tanh|max|masked_fill|zeros_like|full_like|nan_to_num|softmax)$|^resolve_self_attn_mask$"
    r"|^((torch\.)?nn\.functional|F)\.softmax$|^nn\.Softmax"
)
_SPLIT = re.compile(r"(^|\.)(split|chunk)$")
# Splits of what one layer makes into queries, keys and values, and of tokens into sequences.
_KINDS_OR_TOKENS = re.compile(
    r"chunk\((.*, )?[23],|tolist|lengths|split_size|split\(self\.(embed_dim|hidden_size|inner_dim)"
)
_LAST_AXIS = re.compile(r"dim=-1|, -1\)")
_CURRENT_SIZE = re.compile(r"size\(-1\)|shape\[-1\]|" + "|".join(rf"self\.{name}\b" for name in SIZES))


def read_attention(model: nn.Module, name: str, module: nn.Module, row: Layout) -> Unit:
    """Return the unit of an attention that names its projections as `row` says.

    Raises:
        NotPrunableError: it cannot be cut, with the reason.
    """
    attention = Attention(model, name, module, row)
    dimensions = _against_dimensions(attention)
    if dimensions is None:
        return _dimensions(attention)
    heads = _against_heads(attention)
    if heads is None:
        return _whole_heads(attention)
    raise NotPrunableError(f"{dimensions}, so no dimension can go; {heads}, so no head can go")


def _against_dimensions(attention: Attention) -> str | None:
    """Say why no dimension of the heads can go, or None."""
    source = attention.source
    if attention.rotary:
        return "rotary embeddings tie its dimensions together"
    if attention.normed:
        return "its queries and keys are normalised over head_dim"
    if attention.tabled:
        return "its relative positions are tables over head_dim"
    scale = _scale(attention)
    if scale == "unclear":
        return "its softmax scale cannot be read off its forward"
    if attention.order == "by head" and scale == "natural" and (source.roots or source.unscaled):
        return "its softmax scale cannot be folded into queries that lie between keys and values"
    if attention.lays_dimensions_first():
        return "it lays out dimensions before heads"
    for touch in attention.trace.touches:
        if touch.level == Level.PROJECTION and not _spares_dimensions(touch, attention):
            return f"`{touch.text[:50]}` touches its dimensions"
    return None


def _spares_dimensions(touch: Touch, attention: Attention) -> bool:
    if touch.what == "mix":
        return bool(attention.separate_bias) and "bias" in touch.text
    if touch.what == "product":
        return attention.is_number(touch.name)
    if touch.what == "call":
        split = _SPLIT.search(touch.name)
        return bool(HARMLESS.search(touch.name)) and (not split or bool(_KINDS_OR_TOKENS.search(touch.text)))
    return touch.what in ("part", "take")


def _against_heads(attention: Attention) -> str | None:
    """Say why no head can go, or None."""
    if attention.per_head:
        return "its scores are biased head by head"
    if attention.unknown:
        return attention.unknown
    if attention.heads.repeat > 1 and not _repeats_in_place(attention):
        return "how its heads share keys and values cannot be read off its forward"
    if attention.lays_dimensions_first():
        return "it lays out dimensions before heads"
    for touch in attention.trace.touches:
        if not _spares_heads(touch, attention):
            return f"`{touch.text[:50]}` touches its heads"
    return None


def _repeats_in_place(attention: Attention) -> bool:
    """Whether heads that share keys and values are neighbours: the library's own function says so."""
    by_hand = any(touch.name in (".repeat", ".expand", "torch.tile") for touch in attention.trace.touches)
    return bool({"repeat_kv", "repeat_interleave", "attention_interface"} & attention.source.names) and not by_hand


def _spares_heads(touch: Touch, attention: Attention) -> bool:
    if _SPLIT.search(touch.name):
        in_heads = touch.level == Level.PROJECTION and _LAST_AXIS.search(touch.text)
        return bool(in_heads or _KINDS_OR_TOKENS.search(touch.text))
    if touch.level == Level.SCORES:
        return touch.what == "part" or bool(HARMLESS.search(touch.name) or _PER_SCORE.search(touch.name))
    if touch.what == "mix":
        bias = bool(attention.separate_bias) and "bias" in touch.text
        return bias or (attention.rotary and any(ROTARY.search(name) for name in re.findall(r"\w+", touch.text)))
    if touch.what in ("sum", "product"):
        names = set(re.findall(r"[A-Za-z_]\w*", touch.name)) - {"self", "unsqueeze", "to", "dtype", "type_as"}
        scaled = touch.what == "product"
        return (scaled and attention.is_number(touch.name)) or all(
            ROTARY.search(name) or (scaled and "scal" in name) for name in names
        )
    if touch.what == "call" and SOFTMAX.search(touch.name):
        return bool(re.search(r"dim=-[12]", touch.text))
    return touch.what not in ("take", "keep", "turn")


def _scale(attention: Attention) -> Literal["natural", "fixed", "unclear"]:
    """Return whether the softmax scale follows the size of the heads, or is a number of its own."""
    source, natural = attention.source, attention.heads.size**-0.5
    kept = [getattr(attention.module, name, None) for name in SCALES if name in source.attributes]
    given = [value for value in kept if isinstance(value, float | int) and not isinstance(value, bool)]
    follows = [abs(value - natural) < 1e-6 * natural for value in given]
    roots = [bool(_CURRENT_SIZE.search(text)) for text in source.roots]
    if not all(roots) or len({*follows, *roots, *([True] if source.unscaled else [])}) > 1:
        return "unclear"
    return "natural" if any((*follows, *roots, source.unscaled)) else "fixed"


def _dimensions(attention: Attention) -> Unit:
    """Return the unit whose entries are dimensions, the same in every head."""
    heads, name = attention.heads, attention.name
    # Queries between keys and values are not folded: their scale is an attribute, which stays as it is.
    natural = _scale(attention) == "natural" and attention.order != "by head"
    outers = (heads.heads, heads.groups, heads.groups)
    slices = _slices(attention, outers, (1, 1, 1), heads.heads if natural else 0)
    attributes = [Attribute(name, part) for part in attention.numbers if part in SIZES]
    attributes += [
        Attribute(name, part, value // heads.size) for part, value in attention.numbers.items() if part in WIDTHS
    ]
    if natural:
        kept = [part for part in SCALES if isinstance(attention.module.__dict__.get(part), float)]
        attributes += [Attribute(name, part, None) for part in kept]
    return _unit(attention, heads.size, heads.heads, slices, attributes, "dimension")


def _whole_heads(attention: Attention) -> Unit:
    """Return the unit whose entries are heads, or groups of heads that share keys and values."""
    heads, name = attention.heads, attention.name
    inner = heads.repeat * heads.size
    slices = _slices(attention, (1, 1, 1), (inner, heads.size, heads.size), 0)
    tables = [Slice(join(name, table), 0, 1, heads.repeat, produces=False) for table in attention.head_tables]
    slices = [*slices[:-1], *tables, slices[-1]]
    factors = {**dict.fromkeys(HEADS, heads.repeat), **dict.fromkeys(GROUPS, 1), "kv_dim": heads.size}
    attributes = [Attribute(name, part, factors.get(part, inner)) for part in attention.numbers if part not in SIZES]
    return _unit(attention, heads.groups, 1, slices, attributes, "head" if heads.repeat == 1 else "group")


_Kinds = tuple[int, int, int]


def _slices(attention: Attention, outers: _Kinds, inners: _Kinds, queries: int) -> list[Slice]:
    """Return the slices of all projections; `outers` and `inners` speak of queries, keys and values."""
    model, makers = attention.model, attention.makers
    if len(makers) == 3:
        slices = [
            part
            for maker, outer, inner, first in zip(makers, outers, inners, (queries, 0, 0), strict=True)
            for part in rows_of(model, maker, outer=outer, inner=inner, query_groups=first)
        ]
    elif len(makers) == 2:
        slices = rows_of(model, makers[0], outer=outers[0], inner=inners[0], query_groups=queries)
        slices += rows_of(model, makers[1], **_several(attention, outers[1:], inners[1:]))
    else:
        slices = rows_of(model, makers[0], query_groups=queries, **_several(attention, outers, inners))
        if attention.separate_bias:
            # Their attentions read the weight past its layer, to add the biases on their own.
            slices = [replace(part, direct=True) for part in slices]
            slices += _separate_biases(attention, outers, inners, queries)
    return [*slices, columns_of(model, attention.output, outer=outers[0], inner=inners[0])]


def _several(attention: Attention, outers: tuple[int, ...], inners: tuple[int, ...]) -> dict[str, int]:
    """Return the axis of a layer that makes several kinds of the same size."""
    if attention.order == "by head" and inners[0] > 1:
        return {"outer": 1, "inner": sum(inners)}  # all that a head has lies together
    return {"outer": sum(outers), "inner": inners[0]}


def _separate_biases(attention: Attention, outers: _Kinds, inners: _Kinds, queries: int) -> list[Slice]:
    return [
        Slice(
            join(attention.name, part),
            0,
            outers[BIASES.index(part)],
            inners[BIASES.index(part)],
            produces=part in attention.module._parameters,
            query_groups=queries if part == "q_bias" else 0,
            direct=True,
        )
        for part in attention.separate_bias
    ]


def _unit(
    attention: Attention, size: int, heads: int, slices: list[Slice], attributes: Iterable[Attribute], entry: Entry
) -> Unit:
    model, name = attention.model, attention.name
    swaps = (Swap(name, attention.swap),) if attention.swap is not None else ()
    modality = modality_of(model, name)
    unit = Unit(name, "attention", modality, size, heads, tuple(slices), tuple(attributes), swaps, entry)
    return checked(model, unit)
