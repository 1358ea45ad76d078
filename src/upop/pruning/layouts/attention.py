"""Attention: which projections make queries, keys and values, and whether dimensions or only whole heads can go.

The names of the projections come from the table `LAYOUTS`. What may be done with them follows from what the forward
names (see `source`): rotary embeddings and norms over the head leave only whole heads (or key-value groups), biases
per head leave only dimensions, and anything that no rule here speaks of leaves the module alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from upop.pruning.layouts.elements import is_neutral
from upop.pruning.layouts.heads import Level, Touch, trace
from upop.pruning.layouts.reading import (
    NotPrunableError,
    checked,
    columns_of,
    is_projection,
    join,
    layer_at,
    library_of,
    modality_of,
    rows_of,
    true_class,
    widths,
)
from upop.pruning.layouts.source import Source, live_methods, source_of
from upop.pruning.layouts.widths import without_input_width
from upop.pruning.units import Attribute, Slice, Swap, Unit

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

# What modules call the numbers that they keep about their heads.
_BIASES = ("q_bias", "k_bias", "v_bias")
_HEADS = [
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "num_query_heads",
    "num_q_heads",
    "num_attn_heads",
    "nhead",
    "n_local_heads",
]
_GROUPS = ["num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_local_kv_heads", "num_heads_kv"]
_SIZES = [
    "head_dim",
    "attention_head_size",
    "d_head",
    "dim_head",
    "head_size",
    "key_value_proj_dim",
    "dim_per_head",
    "d_kv",
]
_WIDTHS = [
    "all_head_size",
    "inner_dim",
    "attn_dim",
    "attention_dim",
    "split_size",
    "embed_dim",
    "hidden_size",
    "d_model",
    "dim",
    "dim_out",
    "kv_dim",
    "out_dim",
    "internal_dim",
    "n_embd",
    "q_size",
    "kv_size",
]
# Widths that are about the heads alone, never about the residual stream.
_INNER = ("all_head_size", "inner_dim", "attn_dim", "attention_dim", "split_size", "internal_dim")
_RATIOS = ("num_key_value_groups", "num_kv_groups", "n_rep", "kv_groups", "num_queries_per_kv")
_SCALES = [
    "scale",
    "scaling",
    "softmax_scale",
    "inv_norm_factor",
    "norm_factor",
    "scale_factor",
    "scale_attn",
    "attn_scale",
    "qk_scale",
    "attention_scale",
    "scaling_factor",
]
# Whole numbers that speak of tokens, layers or randomness, never of the heads' dimensions.
_OTHER_NUMBERS = re.compile(
    r"layer|window|token|stride|seed|bucket|distance|chunk|block_size|max_pos|seq|rotary_ndims|rotary_dim|_ratio|pad|area"
)
_ROTARY = re.compile(r"(^|_)(rot|rotary|rope|cos|sin|freqs|rotate)(_|$|cis)|rotary|rope", re.IGNORECASE)
# Named in a forward whose scores get something per head.
_PER_HEAD = re.compile(
    r"alibi|position_bias|relative_position|relative_attention|rel_pos|attention_biases|attn_bias$|bias_table|"
    r"logit_scale|cpb_mlp|meta_mlp|temperature|proj_l$|proj_w$|layer_head_mask|slopes"
)
# The same, as parts of the module: they belong to heads, whatever the heads' dimensions.
_HEAD_PARTS = re.compile(
    r"^(rel_pos|relative_position_bias\w*|relative_position_index|relative_attention_bias|attention_bias\w*|"
    r"logit_scale|cpb_mlp|meta_mlp|relative_coord\w*|temperature|proj_l|proj_w|attn_bias)$"
)
_QUERY_NORMS = re.compile(r"^(q|k|query|key)_?(layer)?_?(norm|ln)$|^(norm|ln)_(q|k)$|^(q|k)_norm\w*$")
# What may be called with projections, whatever goes: reshapes, casts, caches, attention itself.
_HARMLESS = frozenset(
    [
        ".view",
        ".reshape",
        ".transpose",
        ".permute",
        ".contiguous",
        ".unbind",
        ".flatten",
        ".unflatten",
        ".unsqueeze",
        ".squeeze",
        ".expand",
        ".view_as",
        ".repeat_interleave",
        ".to",
        ".type_as",
        ".float",
        ".type",
        ".half",
        ".clone",
        ".clamp",
        ".clamp_",
        ".update",
        ".append",
        ".split",
        ".chunk",
        ".repeat",
        "repeat_kv",
        "torch.cat",
        "torch.stack",
        "torch.unbind",
        "torch.split",
        "torch.chunk",
        "torch.clamp",
        "torch.repeat_interleave",
        "zip",
        "list",
        "tuple",
        "dropout",
        "F.dropout",
        "nn.functional.dropout",
        "torch.nn.functional.dropout",
        "F.normalize",
        "nn.functional.normalize",
        "torch.nn.functional.normalize",
        "F.linear",
        "getattr",
        ".is_contiguous",
        "torch.squeeze",
        "torch.unsqueeze",
        "float",
        "max_seqlen",
        "get_max_seqlen",
        "expand_kv",
    ]
)
# What may be done to scores where whole heads go, beside that: nothing that joins the scores of several heads.
_PER_SCORE = frozenset(
    [
        ".masked_fill",
        ".masked_fill_",
        ".softmax",
        "torch.where",
        "torch.tanh",
        ".tanh",
        "torch.max",
        ".max",
        ".amax",
        ".exp",
        "torch.finfo",
        "softmax",
        "nn.functional.softmax",
        "F.softmax",
        "torch.softmax",
        "torch.nn.functional.softmax",
        "nn.Softmax",
        "maybe_add_mask",
        "torch.masked_fill",
        "resolve_self_attn_mask",
        ".new_full",
        ".new_zeros",
        ".reshape_as",
        ".add_",
        "torch.zeros_like",
        "torch.full_like",
        "torch.nan_to_num",
    ]
)
_SPLITS = (".split", ".chunk", "torch.split", "torch.chunk")
_STATE = (bool, float, str, tuple, list, dict, type(None))


@dataclass
class _Heads:
    """The numbers of an attention: `heads` of `size` dimensions, `groups` of keys and values."""

    heads: int
    groups: int
    size: int

    @property
    def repeat(self) -> int:
        return self.heads // self.groups


def layout_of(module: nn.Module) -> Layout | None:
    """Return the row whose makers are all projections of `module`, or None."""
    for row in LAYOUTS:
        if all(is_projection(module._modules.get(maker)) for maker in row.makers):
            return row
    return None


def read_attention(model: nn.Module, name: str, module: nn.Module, row: Layout) -> Unit:
    """Return the unit of an attention that names its projections as `row` says.

    Raises:
        NotPrunableError: it cannot be cut, with the reason.
    """
    reading = _Reading(model, name, module, row)
    dimensions = reading.against_dimensions()
    if dimensions is None:
        return reading.dimensions()
    heads = reading.against_heads()
    if heads is None:
        return reading.whole_heads()
    raise NotPrunableError(f"{dimensions}, so no dimension can go; {heads}, so no head can go")


class _Reading:
    """One attention module, read once."""

    def __init__(self, model: nn.Module, name: str, module: nn.Module, row: Layout) -> None:
        self.model, self.name, self.module, self.row = model, name, module, row
        found, methods = source_of(module), live_methods(module)
        if found is None or methods is None:
            raise NotPrunableError("the source of its forward is not there to be read")
        self.source: Source = found
        self.makers = [join(name, maker) for maker in row.makers]
        self.output, own_output = self._output()
        self.separate_bias = [
            part
            for part in _BIASES
            if part in self.source.attributes and isinstance(getattr(module, part, None), Tensor)
        ]
        sources = {*row.makers, *self.separate_bias}
        self.trace = trace(methods, sources, own_output)
        if own_output is not None and not self.trace.reached:
            raise NotPrunableError(f"what becomes of its heads before {own_output} cannot be followed")
        self.swap = self._swap(frozenset(sources), own_output)
        self.normed = self.tabled = self.per_head = False
        self.head_tables: list[str] = []
        self.norm_sizes: dict[str, int] = {}
        self.unknown = self._check_parts(own_output)
        self.heads = self._count()
        self.order = self._order() if len(self.makers) < 3 else "by kind"
        self.rotary = self._is_rotary()
        self.per_head |= any(_PER_HEAD.search(each) for each in self.source.names)
        self.attributes = self._numbers()
        self._check_touches()

    # -- what is there

    def _output(self) -> tuple[str, str | None]:
        """Return the projection that consumes the heads, and its attribute if it is the module's own."""
        # NLVR's twin cross-attention names its halves self0 and self1, and their outputs dense0 and dense1.
        number = self.name.rpartition(".")[2].removeprefix("self")
        number = number if number.isdigit() else ""
        for candidate in self.row.outputs:
            above = candidate.startswith("^")
            path = join(self.name, candidate + (number if above else ""))
            try:
                layer = self.model.get_submodule(path)
            except AttributeError:
                continue
            if is_projection(layer) and (not above or self._parent_is_plain(path)):
                return path, None if above else candidate.partition(".")[0]
        kind = true_class(self.module).__name__
        raise NotPrunableError(
            f"no layout is known for {library_of(self.module)} {kind}: which layer consumes its heads is not clear"
        )

    def _parent_is_plain(self, output: str) -> bool:
        """Whether the module around it hands the heads to the output layer as they are."""
        parent = self.model.get_submodule(self.name.rpartition(".")[0])
        around = source_of(parent)
        holder, _, leaf = output.rpartition(".")
        consumer = source_of(self.model.get_submodule(holder))
        return around is not None and consumer is not None and leaf in consumer.attributes

    def _swap(self, makers: frozenset[str], output: str | None) -> type[nn.Module] | None:
        """Return the class that the module takes on when cut, if its forward insists on the uncut width."""
        if not self.trace.widths and not self.trace.strays:
            return None
        width = f"self.{self.row.makers[0]}.out_features" if len(self.makers) == 3 else f"self.{output}.in_features"
        kind = None
        if all(isinstance(self.model.get_submodule(layer), nn.Linear) for layer in (*self.makers, self.output)):
            kind = without_input_width(true_class(self.module), makers, output, width)
        if kind is None or self.trace.strays:
            raise NotPrunableError("its forward takes the width of its heads from its input")
        return kind

    def _check_parts(self, output: str | None) -> str | None:
        """Sort what the forward reads from the module: norms, tables, numbers; name a part of which no rule speaks."""
        touched = {touch.name for touch in self.trace.touches if touch.what == "part"}
        unknown = None
        for part in sorted(
            self.source.attributes - {*self.row.makers, output, *self.separate_bias, "config", "training"}
        ):
            value = getattr(self.module, part, None)
            if isinstance(value, nn.Module | Tensor):
                known = self._is_known_part(part, value)
                if not known and part in touched:
                    raise NotPrunableError(f"its heads go through {part} ({type(value).__name__})")
                unknown = unknown if known else f"its forward also uses {part} ({type(value).__name__})"
            elif isinstance(value, int) and not isinstance(value, bool):
                if not (part in (*_HEADS, *_GROUPS, *_SIZES, *_WIDTHS, *_RATIOS) or _OTHER_NUMBERS.search(part)):
                    raise NotPrunableError(f"its forward reads {part}={value}, of which no rule speaks")
        config = getattr(self.module, "config", None)
        for part in sorted(self.source.config):
            value = getattr(config, part, None)
            if isinstance(value, int) and not isinstance(value, bool):
                raise NotPrunableError(f"its forward reads {part} from the configuration that all layers share")
        return unknown

    def _is_known_part(self, part: str, value: nn.Module | Tensor) -> bool:
        """Take note of a part that a rule speaks of, and return whether one does."""
        if is_neutral(value) or isinstance(value, nn.Softmax):
            return True
        if _HEAD_PARTS.search(part):
            self.per_head = True
        elif part == "sinks" and isinstance(value, nn.Parameter) and value.dim() == 1:
            self.head_tables.append(part)
        elif part in ("rel_pos_h", "rel_pos_w"):
            self.tabled = True  # over the dimensions of a head, the same for all heads
        elif isinstance(value, nn.Module) and (_ROTARY.search(type(value).__name__) or part == "rope"):
            pass
        elif isinstance(value, nn.Module) and (_QUERY_NORMS.search(part) or part == "v_norm"):
            self.normed = True
            self.norm_sizes[part] = max((weight.numel() for weight in value.parameters()), default=0)
        else:
            return False
        return True

    def _check_touches(self) -> None:
        """Refuse what is done to heads and dimensions alike."""
        for touch in self.trace.touches:
            if touch.what != "call" or touch.level != Level.PROJECTION or touch.name in _HARMLESS:
                continue
            if _ROTARY.search(touch.name) or (touch.name in _PER_SCORE and "oftmax" in touch.name):
                continue
            if (self.tabled and "einsum" in touch.name) or "rel_pos" in touch.name:
                continue
            raise NotPrunableError(f"its heads go through {touch.name.lstrip('.')}(), of which no rule speaks")

    def _count(self) -> _Heads:
        query = widths(layer_at(self.model, self.makers[0]))[1]
        inner = widths(layer_at(self.model, self.output))[0]
        heads, size = (_first(self.module, names) for names in (_HEADS, _SIZES))
        key = query
        if len(self.makers) == 1:
            query, rest = divmod(query, 3)
            key = query
            if rest or query != inner:
                raise NotPrunableError(
                    f"its {self.row.makers[0]} makes no three parts of the {inner} that are consumed"
                )
        elif len(self.makers) == 2:
            key = widths(layer_at(self.model, self.makers[1]))[1] // 2
        else:
            key, value = (widths(layer_at(self.model, maker))[1] for maker in self.makers[1:])
            if key != value:
                raise NotPrunableError(f"its keys have {key} numbers, its values {value}")
        if query != inner:
            raise NotPrunableError(f"it makes {query} numbers of queries, and {inner} are consumed")
        if heads is None and size is None:
            raise NotPrunableError("it keeps no number of heads and no size of a head")
        if size is None or (heads is not None and heads * size != query):
            size, rest = divmod(query, heads or 1)
            if rest:
                raise NotPrunableError(f"its {query} queries are no whole number for each of {heads} heads")
        heads, rest = divmod(query, size)
        groups, rest_too = divmod(key, size)
        if rest or rest_too or not groups or heads % groups:
            raise NotPrunableError(f"{query} queries and {key} keys make no whole number of heads of {size}")
        for part, length in self.norm_sizes.items():
            if length != size:
                raise NotPrunableError(f"{part} normalises over all heads together")
        return _Heads(heads, groups, size)

    def _order(self) -> Order:
        """Return how the outputs of one layer for two or three kinds are ordered."""
        if self.row.order != "read":
            return self.row.order
        kinds = str(4 - len(self.makers)) if len(self.makers) == 1 else "2"
        orders: set[Order] = set()
        for shape in self.source.shapes:
            for place, part in enumerate(shape):
                if part != kinds:
                    continue
                before, after = shape[place - 1] if place else "", shape[place + 1] if place + 1 < len(shape) else ""
                if _names_heads(after):
                    orders.add("by kind")
                elif _names_heads(before):
                    orders.add("by head")
        if len(orders) != 1:
            raise NotPrunableError(f"how {self.row.makers[-1]} orders what it makes cannot be read off its forward")
        return orders.pop()

    def _is_rotary(self) -> bool:
        names = {each for each in self.source.names if _ROTARY.search(each)}
        rope = getattr(self.module, "rope", "none")
        if rope is None and names <= {"rope", "apply_rot_embed_cat"} and "rope" not in self.source.arguments:
            return False
        return bool(names) or "position_ids" in self.source.arguments

    def _numbers(self) -> dict[str, int]:
        """Return the whole numbers that the module keeps about its heads; raise if one has an unexpected value."""
        heads, found = self.heads, {}
        for part in (*_HEADS, *_GROUPS, *_SIZES, *_WIDTHS):
            value = self.module.__dict__.get(part)
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            right = {
                **dict.fromkeys(_HEADS, heads.heads),
                **dict.fromkeys(_GROUPS, heads.groups),
                **dict.fromkeys(_SIZES, heads.size),
            }.get(part, heads.heads * heads.size)
            used = part in self.source.attributes
            if part in _WIDTHS and not (part in _INNER or (used and self._is_inner(part))):
                if used and self.swap is None:
                    raise NotPrunableError(f"its forward reads {part} elsewhere than in the shape of its heads")
                continue
            if value == right or (part == "kv_dim" and value == heads.groups * heads.size):
                found[part] = value
            elif used:
                raise NotPrunableError(f"its forward reads {part}={value}, expected {right}")
        return found

    def _is_inner(self, part: str) -> bool:
        """Whether a width is read between the projections alone, where heads are put side by side."""
        lines, output = self.source.lines.get(part, []), self.output.rpartition(".")[2]
        consumed = min(self.source.lines.get(output, [10**9]))
        made = min((line for maker in self.row.makers for line in self.source.lines.get(maker, [])), default=0)
        return bool(lines) and all(made <= line <= consumed for line in lines)

    # -- what can go

    def against_dimensions(self) -> str | None:
        """Say why no dimension of the heads can go, or None."""
        if self.rotary:
            return "rotary embeddings tie its dimensions together"
        if self.normed:
            return "its queries and keys are normalised over head_dim"
        if self.tabled:
            return "its relative positions are tables over head_dim"
        if self._scale() == "unclear":
            return "its softmax scale cannot be read off its forward"
        if self.order == "by head" and self._scale() == "natural":
            return "its softmax scale cannot be folded into queries that lie between keys and values"
        if any(_misplaced(shape) for shape in self.source.shapes):
            return "it lays out dimensions before heads"
        for touch in self.trace.touches:
            if touch.level == Level.PROJECTION and not self._spares_dimensions(touch):
                return f"`{touch.text[:50]}` touches its dimensions"
        return None

    def _spares_dimensions(self, touch: Touch) -> bool:
        if touch.what == "mix":
            return bool(self.separate_bias) and "bias" in touch.text
        if touch.what == "call":
            return touch.name in _HARMLESS and (touch.name not in _SPLITS or self._splits_kinds_or_tokens(touch.text))
        return touch.what in ("part", "take")

    def _splits_kinds_or_tokens(self, text: str) -> bool:
        return bool(
            re.search(r"chunk\((.*, )?[23],|tolist|lengths|split_size|self\.(embed_dim|hidden_size|inner_dim)", text)
        )

    def against_heads(self) -> str | None:
        """Say why no head can go, or None."""
        if self.per_head:
            return "its scores are biased head by head"
        if self.unknown:
            return self.unknown
        for touch in self.trace.touches:
            if not self._spares_heads(touch):
                return f"`{touch.text[:50]}` touches its heads"
        return None

    def _spares_heads(self, touch: Touch) -> bool:
        if touch.level == Level.SCORES:
            return touch.what == "part" or touch.name in _HARMLESS - set(_SPLITS) or touch.name in _PER_SCORE
        if touch.what in ("sum", "product", "mix"):
            names = set(re.findall(r"[A-Za-z_]\w*", touch.text if touch.what == "mix" else touch.name)) - {"self"}
            return (
                any(_ROTARY.search(name) for name in names)
                if touch.what != "product"
                else all(_ROTARY.search(name) or "scal" in name for name in names)
            )
        if touch.name in _SPLITS:
            return bool(re.search(r"dim=-1|, -1\)", touch.text)) or self._splits_kinds_or_tokens(touch.text)
        return touch.what != "take"

    def _scale(self) -> Literal["natural", "fixed", "unclear"]:
        """Return whether the softmax scale follows the size of the heads, or is a number of its own."""
        source, natural = self.source, self.heads.size**-0.5
        kept = [getattr(self.module, part, None) for part in _SCALES if part in source.attributes]
        given = [value for value in kept if isinstance(value, float | int) and not isinstance(value, bool)]
        follows = [abs(value - natural) < 1e-6 * natural for value in given]
        roots = [self._follows_size(text) for text in source.scales]
        if any(root is None for root in roots) or len({*follows, *roots, *([True] if source.unscaled else [])}) > 1:
            return "unclear"
        return "natural" if any((*follows, *roots, source.unscaled)) else "fixed"

    def _follows_size(self, root: str) -> bool | None:
        """Whether a square root is that of the current size of a head; None if that cannot be told."""
        if any(f"self.{part}" in root for part in _SIZES) or re.search(r"(size\(-1\)|shape\[-1\])", root):
            return True
        return None

    def dimensions(self) -> Unit:
        """Return the unit whose entries are dimensions, the same in every head."""
        heads = self.heads
        natural = self._scale() == "natural"
        slices = self._slices(
            [heads.heads, heads.groups, heads.groups], [1, 1, 1], queries=heads.heads if natural else 0
        )
        attributes = [Attribute(self.name, part) for part in self.attributes if part in _SIZES]
        attributes += [
            Attribute(self.name, part, value // heads.size)
            for part, value in self.attributes.items()
            if part in _WIDTHS
        ]
        if natural:
            kept = [part for part in _SCALES if isinstance(self.module.__dict__.get(part), float)]
            attributes += [Attribute(self.name, part, None) for part in kept]
        return self._unit(heads.size, heads.heads, slices, attributes, "dimension")

    def whole_heads(self) -> Unit:
        """Return the unit whose entries are heads, or groups of heads that share keys and values."""
        heads = self.heads
        inner = heads.repeat * heads.size
        slices = self._slices([1, 1, 1], [inner, heads.size, heads.size], queries=0)
        for table in self.head_tables:
            slices.append(Slice(join(self.name, table), 0, 1, heads.repeat, produces=False))
        factors = {**dict.fromkeys(_HEADS, heads.repeat), **dict.fromkeys(_GROUPS, 1), "kv_dim": heads.size}
        attributes = [
            Attribute(self.name, part, factors.get(part, inner)) for part in self.attributes if part not in _SIZES
        ]
        return self._unit(heads.groups, 1, slices, attributes, "head" if heads.repeat == 1 else "group")

    def _slices(self, outers: list[int], inners: list[int], queries: int) -> list[Slice]:
        """Return the slices of all projections; `outers` and `inners` speak of queries, keys and values."""
        out = columns_of(self.model, self.output, outer=outers[0], inner=inners[0])
        if len(self.makers) == 3:
            slices = [
                part
                for maker, outer, inner, first in zip(self.makers, outers, inners, (queries, 0, 0), strict=True)
                for part in rows_of(self.model, maker, outer=outer, inner=inner, query_groups=first)
            ]
        elif len(self.makers) == 2:
            slices = rows_of(self.model, self.makers[0], outer=outers[0], inner=inners[0], query_groups=queries)
            slices += rows_of(self.model, self.makers[1], **self._several(outers[1:], inners[1:]))
        else:
            slices = rows_of(self.model, self.makers[0], query_groups=queries, **self._several(outers, inners))
            slices = self._with_separate_bias(slices, outers, inners, queries)
        return [*slices, out]

    def _several(self, outers: list[int], inners: list[int]) -> dict[str, int]:
        """Return the axis of a layer that makes several kinds of the same size."""
        if self.order == "by kind":
            return {"outer": sum(outers), "inner": inners[0]}
        # Head by head: a whole head is one run, a dimension is repeated for every kind of every head.
        return {"outer": sum(outers), "inner": 1} if inners[0] == 1 else {"outer": 1, "inner": sum(inners)}

    def _with_separate_bias(
        self, slices: list[Slice], outers: list[int], inners: list[int], queries: int
    ) -> list[Slice]:
        """Add the biases that some attentions keep apart from the layer, whose weight they then read themselves."""
        from dataclasses import replace

        if not self.separate_bias:
            return slices
        slices = [replace(part, direct=True) for part in slices]
        for part in self.separate_bias:
            place = _BIASES.index(part)
            slices.append(
                Slice(
                    join(self.name, part),
                    0,
                    outers[place],
                    inners[place],
                    produces=part in self.module._parameters,
                    query_groups=queries if part == "q_bias" else 0,
                    direct=True,
                )
            )
        return slices

    def _unit(
        self,
        size: int,
        heads: int,
        slices: list[Slice],
        attributes: Iterable[Attribute],
        entry: Literal["dimension", "head", "group"],
    ) -> Unit:
        swaps = (Swap(self.name, self.swap),) if self.swap is not None else ()
        modality = modality_of(self.model, self.name)
        unit = Unit(self.name, "attention", modality, size, heads, tuple(slices), tuple(attributes), swaps, entry)
        return checked(self.model, unit)


def _first(module: nn.Module, names: Iterable[str]) -> int | None:
    """Return the first whole number of the module that is kept under one of `names`."""
    values = (module.__dict__.get(name) for name in names)
    return next(
        (value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), None
    )


def _names_heads(text: str) -> bool:
    return any(re.search(rf"\b{name}\b", text) for name in (*_HEADS, "groups"))


def _names_size(text: str) -> bool:
    return any(re.search(rf"\b{name}\b", text) for name in _SIZES)


def _misplaced(shape: tuple[str, ...]) -> bool:
    """Whether a shape puts the size of a head right before the number of heads."""
    return any(
        _names_size(a) and _names_heads(b) and not _names_heads(a) for a, b in zip(shape, shape[1:], strict=False)
    )
