"""What is known about one attention: its projections, heads, parts and numbers, and what its forward does to them.

The names of the projections come from the table in `rows`; the rest is read off the module and its forward. Whatever
no rule here speaks of leaves the module alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from upop.pruning.layouts.elements import is_neutral
from upop.pruning.layouts.heads import Level, Trace, trace
from upop.pruning.layouts.reading import (
    NotPrunableError,
    has_foreign_forward,
    hooks_of_accelerate,
    is_projection,
    join,
    layer_at,
    library_of,
    true_class,
    widths,
)
from upop.pruning.layouts.rows import (
    BIASES,
    GROUPS,
    HEADS,
    INNER,
    OTHER_NUMBERS,
    RATIOS,
    SIZES,
    WIDTHS,
    Layout,
    Order,
    names_one_of,
)
from upop.pruning.layouts.source import Source, live_methods, source_of
from upop.pruning.layouts.widths import without_input_width

ROTARY = re.compile(r"(^|_)(rot|rotary|rope|cos|sin|freqs|rotate)(_|$|cis)|rotary|rope", re.IGNORECASE)
# Named in a forward whose scores get something head by head.
_PER_HEAD = re.compile(
    r"alibi|position_bias|relative_position|relative_attention|rel_pos|attention_biases|attn_bias$|bias_table|"
    r"logit_scale|cpb_mlp|meta_mlp|temperature|proj_l$|proj_w$|layer_head_mask|slopes"
)
# The same, as parts of the module.
_HEAD_PARTS = re.compile(
    r"^(rel_pos|relative_position_bias\w*|relative_position_index|relative_attention_bias|attention_bias\w*|"
    r"logit_scale|cpb_mlp|meta_mlp|relative_coord\w*|temperature|proj_l|proj_w|attn_bias)$"
)
# Names of what is computed from tables over the dimensions of a head, where there are such tables.
_OF_TABLES = re.compile("rel_pos|relative_pos|attn_bias")
_NORMS = re.compile(r"^(q|k|v|query|key)_?(layer)?_?(norm|ln)\w*$|^(norm|ln)_(q|k)$")
# Keys and values of one layer that another one reads have to keep the heads of both.
_SHARED = re.compile(r"kv_shared|shared_kv|shared_layer")
# What may be called with projections, whatever goes: reshapes, casts, caches.
HARMLESS = re.compile(
    r"^\.(view|reshape|transpose|permute|contiguous|unbind|flatten|unflatten|unsqueeze|squeeze|expand|view_as|repeat"
    r"|repeat_interleave|to|type|type_as|float|half|clone|clamp_?|update|append|split|chunk|is_contiguous)$"
    r"|^torch\.(cat|stack|unbind|split|chunk|clamp|repeat_interleave|squeeze|unsqueeze)$"
    r"|^((torch\.)?nn\.functional|F)\.(dropout|normalize|linear)$"
    r"|^(repeat_kv|zip|list|tuple|dropout|getattr|float|get_max_seqlen)$"
)
SOFTMAX = re.compile(r"(^|\.)(softmax|Softmax)$")


@dataclass(frozen=True)
class Heads:
    """The numbers of an attention: `heads` of `size` dimensions, `groups` of them with keys and values of their own."""

    heads: int
    groups: int
    size: int

    @property
    def repeat(self) -> int:
        """How many heads share keys and values."""
        return self.heads // self.groups


class Attention:
    """One attention module, read once.

    Attributes:
        makers: the projections that make queries, keys and values, by their names in the model.
        output: the projection that consumes the heads, by its name in the model.
        separate_bias: biases kept apart from the one maker.
        trace: what the forward does to heads and dimensions.
        swap: the class that the module takes on when cut, if its own forward insists on the uncut width.
        rotary: whether positions turn pairs of dimensions.
        normed: whether queries or keys are normalised over the dimensions of a head.
        tabled: whether there are tables over the dimensions of a head, the same for all heads.
        per_head: whether scores get something head by head.
        head_tables: parameters with one number per head.
        unknown: a part of which no rule speaks; it matters where heads go.
        numbers: the numbers about its heads that the module keeps, and that are to be set again.

    Raises:
        NotPrunableError: it cannot be cut, with the reason.
    """

    def __init__(self, model: nn.Module, name: str, module: nn.Module, row: Layout) -> None:
        self.model, self.name, self.module, self.row = model, name, module, row
        found, methods = source_of(module), live_methods(module)
        hooked = hooks_of_accelerate(module)
        if hooked is not None:
            raise NotPrunableError(f"it {hooked}")
        if found is None or methods is None or has_foreign_forward(module):
            raise NotPrunableError("the source of its forward is not there to be read")
        self.source: Source = found
        self.makers = [join(name, maker) for maker in row.makers]
        self.output, own_output = self._output()
        self.separate_bias = [part for part in BIASES if isinstance(self._used(part), Tensor)]
        sources = frozenset((*row.makers, *self.separate_bias))
        self.trace = trace(methods, sources, own_output)
        if own_output is not None and not self.trace.reached:
            raise NotPrunableError(f"what becomes of its heads before {own_output} cannot be followed")
        if any(_SHARED.search(each) for each in self.source.names):
            raise NotPrunableError("it shares keys and values with other layers")
        self.swap = self._swap(sources, own_output)
        self.normed = self.tabled = self.per_head = False
        self.head_tables: list[str] = []
        self._norm_sizes: dict[str, int] = {}
        self.unknown = self._check_parts({*sources, own_output, "config", "training"})
        self.heads = self._count()
        self.order: Order = self._order() if len(self.makers) < 3 else "by kind"
        self.rotary = self._is_rotary()
        biases = {each for each in self.source.names if _PER_HEAD.search(each)}
        self.per_head |= any(not (self.tabled and _OF_TABLES.search(each)) for each in biases)
        self.numbers = self._numbers()
        self._check_calls()

    def _used(self, part: str) -> object:
        """Return an attribute of the module, if its forward reads it."""
        return getattr(self.module, part, None) if part in self.source.attributes else None

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
            if is_projection(layer) and (not above or self._is_handed_on(path)):
                return path, None if above else candidate.partition(".")[0]
        kind = true_class(self.module).__name__
        raise NotPrunableError(
            f"no layout is known for {library_of(self.module)} {kind}: which layer consumes its heads is not clear"
        )

    def _is_handed_on(self, output: str) -> bool:
        """Whether the module around it hands the heads as they are to the module that holds the output layer."""
        above, _, own = self.name.rpartition(".")
        holder, _, leaf = output.rpartition(".")
        around, inside = (live_methods(self.model.get_submodule(path)) for path in (above, holder))
        if around is None or inside is None:
            return False
        place = len(inside["forward"].args.args) - 1
        given = trace(around, frozenset((own,)), holder.rpartition(".")[2])
        return _is_plain(given) and any(
            _is_plain(trace(inside, frozenset(), leaf, (*[Level.NOTHING] * before, Level.PROJECTION)))
            for before in range(max(1, place))
        )

    def _swap(self, makers: frozenset[str], output: str | None) -> type[nn.Module] | None:
        if not self.trace.widths and not self.trace.strays:
            return None
        width = f"self.{self.row.makers[0]}.out_features" + (" // 3" if len(self.makers) == 1 else "")
        kind = None
        if all(isinstance(self.model.get_submodule(layer), nn.Linear) for layer in (*self.makers, self.output)):
            kind = without_input_width(true_class(self.module), makers, output, width)
        if kind is None or self.trace.strays:
            raise NotPrunableError("its forward takes the width of its heads from its input")
        return kind

    def _check_parts(self, known: set[str | None]) -> str | None:
        """Sort what the forward reads from the module; return why heads cannot go because of a part."""
        touched = {touch.name for touch in self.trace.touches if touch.what == "part"}
        unknown = None
        for part in sorted(self.source.attributes - known):
            value = getattr(self.module, part, None)
            if isinstance(value, nn.Module | Tensor):
                if self._is_known_part(part, value):
                    continue
                if part in touched:
                    raise NotPrunableError(f"its heads go through {part} ({type(value).__name__})")
                unknown = f"its forward also uses {part} ({type(value).__name__})"
            elif _is_whole(value) and self._is_unknown_number(part):
                raise NotPrunableError(f"its forward reads {part}={value}, of which no rule speaks")
        config = getattr(self.module, "config", None)
        for part in sorted(self.source.config):
            if _is_whole(getattr(config, part, None)):
                raise NotPrunableError(f"its forward reads {part} from the configuration that all layers share")
        return unknown

    def _is_unknown_number(self, part: str) -> bool:
        """Whether a shape names a whole number that may speak of heads, and no rule says how."""
        if part in (*HEADS, *GROUPS, *SIZES, *WIDTHS, *RATIOS) or OTHER_NUMBERS.search(part):
            return False
        return any(f"self.{part}" in text for shape in self.source.shapes for text in shape)

    def _is_known_part(self, part: str, value: nn.Module | Tensor) -> bool:
        """Take note of a part that a rule speaks of, and return whether one does."""
        if is_neutral(value) or isinstance(value, nn.Softmax):
            return True
        if _HEAD_PARTS.search(part):
            self.per_head = True
        elif part == "sinks" and isinstance(value, nn.Parameter) and value.dim() == 1:
            self.head_tables.append(part)
        elif part in ("rel_pos_h", "rel_pos_w"):
            self.tabled = True
        elif isinstance(value, nn.Module) and _NORMS.search(part):
            self.normed = True
            self._norm_sizes[part] = max((weight.numel() for weight in value.parameters()), default=0)
        else:
            return isinstance(value, nn.Module) and (bool(ROTARY.search(type(value).__name__)) or part == "rope")
        return True

    def _check_calls(self) -> None:
        """Refuse functions of which no rule speaks."""
        if self.separate_bias and len(self.makers) != 1:
            raise NotPrunableError("it keeps biases apart from several layers")
        for touch in self.trace.touches:
            if touch.what != "call" or touch.level != Level.PROJECTION:
                continue
            known = HARMLESS.search(touch.name) or ROTARY.search(touch.name) or SOFTMAX.search(touch.name)
            if not (known or "rel_pos" in touch.name or (self.tabled and "einsum" in touch.name)):
                raise NotPrunableError(f"its heads go through {touch.name.lstrip('.')}(), of which no rule speaks")

    def _count(self) -> Heads:
        """Return the heads, from the widths of the projections and what the module keeps about them."""
        query, inner = widths(layer_at(self.model, self.makers[0]))[1], widths(layer_at(self.model, self.output))[0]
        rest = 0
        if len(self.makers) == 1:
            query, rest = divmod(query, 3)
            key = query
        elif len(self.makers) == 2:
            key, rest = divmod(widths(layer_at(self.model, self.makers[1]))[1], 2)
        else:
            key, value = (widths(layer_at(self.model, maker))[1] for maker in self.makers[1:])
            if key != value:
                raise NotPrunableError(f"its keys have {key} numbers, its values {value}")
        if query != inner or rest:
            raise NotPrunableError(f"what its {self.row.makers[0]} makes is not what is consumed ({inner} numbers)")
        heads, size = (_first(self.module, names) for names in (HEADS, SIZES))
        if heads is None and size is None:
            raise NotPrunableError("it keeps no number of heads and no size of a head")
        if size is None or (heads is not None and heads * size != query):
            size, rest = divmod(query, heads or 1)
        heads, rest_too = divmod(query, size)
        groups, rest_of_keys = divmod(key, size)
        if rest or rest_too or rest_of_keys or not groups or heads % groups:
            raise NotPrunableError(f"{query} queries and {key} keys make no whole number of heads of {size}")
        for part, length in self._norm_sizes.items():
            if length != size:
                raise NotPrunableError(f"{part} normalises over all heads together")
        return Heads(heads, groups, size)

    def _order(self) -> Order:
        """Return how the outputs of one layer for two or three kinds are ordered."""
        if self.row.order != "read":
            return self.row.order
        kinds = "3" if len(self.makers) == 1 else "2"
        orders = {order for shape in self.source.shapes if (order := _order_in(shape, kinds)) is not None}
        if len(orders) != 1:
            raise NotPrunableError(f"how {self.row.makers[-1]} orders what it makes cannot be read off its forward")
        return orders.pop()

    def _is_rotary(self) -> bool:
        names = {each for each in self.source.names if ROTARY.search(each)}
        # Angles that are learned may differ from head to head.
        self.per_head |= any(True for module in self._rotary_modules() for _ in module.parameters())
        if self._used("rope") is None and names <= {"rope", "apply_rot_embed_cat"}:
            # Embeddings that a module may own, and this one does not.
            return bool(names) and "rope" in self.source.arguments
        return bool(names) or "position_ids" in self.source.arguments

    def _rotary_modules(self) -> Iterator[nn.Module]:
        """Yield the modules that make rotary embeddings, in this one and beside those around it."""
        path = self.name
        while True:
            children = self.model.get_submodule(path).children()
            named = [child for child in children if ROTARY.search(type(child).__name__)]
            yield from (child for child in named if not any(map(is_projection, child.modules())))
            if not path:
                return
            path = path.rpartition(".")[0]

    def _numbers(self) -> dict[str, int]:
        """Return the numbers to set again; raise if one that the forward reads has an unexpected value."""
        heads, found = self.heads, {}
        inner = heads.heads * heads.size
        right = {
            **dict.fromkeys(WIDTHS, inner),
            **dict.fromkeys(HEADS, heads.heads),
            **dict.fromkeys(GROUPS, heads.groups),
            **dict.fromkeys(SIZES, heads.size),
        }
        for part, expected in right.items():
            value = self.module.__dict__.get(part)
            if not _is_whole(value):
                continue
            used = part in self.source.attributes
            if part in WIDTHS and not (part in INNER or (used and self._is_between(part))):
                if used and self.swap is None:
                    raise NotPrunableError(f"its forward reads {part} elsewhere than in the shape of its heads")
                continue
            if value == expected or (part == "kv_dim" and value == heads.groups * heads.size):
                found[part] = value
            elif used:
                raise NotPrunableError(f"its forward reads {part}={value}, expected {expected}")
        return found

    def _is_between(self, part: str) -> bool:
        """Whether a width is read between the projections alone, where heads are put side by side."""
        lines, output = self.source.lines.get(part, []), self.output.rpartition(".")[2]
        consumed = min(self.source.lines.get(output, [10**9]))
        made = min((line for maker in self.row.makers for line in self.source.lines.get(maker, [])), default=0)
        return bool(lines) and all(made <= line <= consumed for line in lines)

    def is_number(self, text: str) -> bool:
        """Whether source text is one number: made of constants and of the module's own numbers."""
        own = re.findall(r"\bself\.(\w+)", text)
        others = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\bself\.\w+", "", text)))
        numbers = (getattr(self.module, name, None) for name in own)
        return others <= {"math", "torch", "sqrt", "float"} and all(isinstance(each, int | float) for each in numbers)

    def lays_dimensions_first(self) -> bool:
        """Whether a shape puts the size of a head before the number of heads, or does not say where heads are."""
        return any(
            names_one_of(size, SIZES)
            and not names_one_of(size, HEADS)
            and (names_one_of(heads, HEADS) or (heads == "-1" and not names_one_of(before, HEADS)))
            for shape in self.source.shapes
            for before, (size, heads) in zip(("", *shape), pairwise(shape), strict=False)
        )


def _is_plain(found: Trace) -> bool:
    """Whether heads reach their output with nothing done to them but casts and dropout."""
    return found.reached and all(
        touch.what == "part" or (touch.what == "call" and HARMLESS.search(touch.name)) for touch in found.touches
    )


def _order_in(shape: tuple[str, ...], kinds: str) -> Order | None:
    """Return how one shape orders kinds and heads, or None if it does not speak of both."""
    if shape[:2] == (".chunk", kinds) and shape[2:] in (("dim=2",), ("2",)):
        return "by kind"  # of three axes the last, before heads are told apart
    for place, part in enumerate(shape):
        if re.search(rf"^{kinds} \* | \* {kinds}$", part) and names_one_of(part, SIZES):
            return "by head"
        if part != kinds:
            continue
        before = shape[place - 1] if place else ""
        after, last = (*shape[place + 1 : place + 3], "", "")[:2]
        if names_one_of(after, (*HEADS, "groups")) or (after == "-1" and names_one_of(last, SIZES)):
            return "by kind"
        if names_one_of(before, HEADS):
            return "by head"
    return None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first(module: nn.Module, names: Iterable[str]) -> int | None:
    """Return the first positive whole number that the module keeps under one of `names`."""
    values = (module.__dict__.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and _is_whole(value) and value > 0), None)
