"""Rules for elementwise operations, and for operations that only move numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from upop.pruning.axes.axis import Axis, Dim, axes_in, concatenate, cut_out, factors_of, fix, length, regroup, tie
from upop.pruning.axes.label import Label, Rows, plain
from upop.pruning.axes.mode import tensors_in
from upop.pruning.axes.rule import CONSTANT, attends_of, like, past_of, rule, unknown
from upop.pruning.axes.trace import Trace


@rule(
    *("arange", "eye", "linspace", "_local_scalar_dense", "rand", "randn", "randint", "sym_size", "is_nonzero"),
    *(
        "equal",
        "empty_strided",
        "new_empty_strided",
        "_fused_sdp_choice",
        "is_same_size",
        "lift_fresh",
        "detach_",
        "item",
    ),
    *("randperm", "bernoulli_p", "_assert_async", "_assert_scalar", "resize"),
)
def _nothing(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Creates new numbers, or reads metadata only."""


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def _blank(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    trace.set(result, Label(plain(result), blank=True))


# -- number by number ---------------------------------------------------------------------------------------------


_LINEAR = {
    *("add", "sub", "mul", "div", "neg", "clone", "detach", "alias", "_to_copy", "to", "copy", "rsub", "lerp"),
    *("where", "masked_fill", "addcmul", "contiguous", "lift_fresh_copy", "dropout", "native_dropout", "view_as_real"),
}
_PRODUCTS = {"mul", "addcmul"}


@rule(
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli", "native_dropout"),
    *("_to_copy", "clone", "detach", "alias", "lift_fresh_copy", "copy", "masked_fill", "where", "dropout", "fill"),
    *("zero", "nan_to_num", "_conj", "conj", "to", "contiguous", "isin", "isfinite", "isnan", "isinf", "glu_jvp"),
    *("hardswish", "hardsigmoid", "hardtanh", "silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "mish", "softplus"),
    *("pow", "square", "prelu", "_prelu_kernel", "celu", "selu", "logical_not", "bitwise_not", "type_as", "normal"),
)
def elementwise(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Tie the aligned dimensions of all inputs, from the last one backwards."""
    base = name.removesuffix("_").removesuffix("_like") if name.endswith("_") else name
    inputs = tensors_in((args, kwargs))
    outputs = tensors_in(result)
    if not inputs:
        return
    if base == "copy" and len(inputs) > 1 and not any(axes_in(trace.label(inputs[0]).dims)):
        inputs = inputs[1:]  # numbers are put where there were none
    labels = [trace.label(tensor) for tensor in inputs]
    rows = _rows_that_meet(trace, labels) if base in _PRODUCTS else []
    rank = max(outputs[0].dim(), *(len(label.dims) for label in labels))
    dims: list[Dim] = []
    for place in range(-rank, 0):
        meeting = _meeting(labels, place)
        if not meeting:
            dims.append(())
            continue
        for (_, one), (_, other) in pairwise(meeting):
            tie(one, other, CONSTANT)
        dims.append(next((dim for _, dim in meeting if any(True for _ in axes_in([dim]))), meeting[0][1]))
        for label, _ in meeting:
            added = base in ("add", "sub", "addcmul", "rsub") and len(meeting) > 1
            if not label.latent:
                trace.note(label, place, "added" if added else "follows")
    active = [label for label in labels if label.active]
    given = any(label.past and not label.parameter for label in labels)
    if not active:
        sources = frozenset().union(*(label.sources for label in labels))
        made = Label(dims, sources, True, not given and any(label.parameter for label in labels), past_of(labels))
        made.latent = made.parameter and any(label.latent for label in labels)
    else:
        made = _merged(trace, active, dims, base, rows)
        if base in ("add", "sub"):
            made.sources = made.sources.union(*(label.sources for label in labels if label.parameter))
        made.latent = made.parameter = not given
        made.past = past_of(labels)
        made.places = tuple(place for label in active for place in label.places)
    made.attends, made.blank = attends_of(labels), all(label.blank for label in labels)
    for output in outputs:
        if tuple(output.shape) == tuple(length(dim) for dim in dims):
            trace.set(output, made)


def _meeting(labels: Sequence[Label], place: int) -> list[tuple[Label, Dim]]:
    """Return the aligned dimensions at a position, counted from the end; constants fit any axis."""
    found = [(each, each.dims[place]) for each in labels if -place <= len(each.dims) and length(each.dims[place]) > 1]
    return [(label, dim) for label, dim in found if not label.blank] or found


def _rows_that_meet(trace: Trace, labels: list[Label]) -> list[Rows]:
    """Return the rows of shared parameters that two activations come from, such as the halves of a gated MLP."""
    active = [label for label in labels if label.active]
    if len(active) != 2 or active[0].sources.isdisjoint(active[1].sources):
        return []
    return [trace.rows(label, label.dims) for label in active]


def _merged(trace: Trace, active: list[Label], dims: list[Dim], name: str, rows: Sequence[Rows] = ()) -> Label:
    """Return the label of combined activations; a gate becomes silent."""
    linear = name in _LINEAR or all(not label.linear for label in active)
    sources = frozenset().union(*(label.sources for label in active))
    if name in ("add", "sub") and len(active) == 2 and active[0].sources != active[1].sources:
        leaves = {leaf for axis in axes_in(dims) for leaf in axis.leaves()}
        trace.added.update((source, leaf) for leaf in leaves for source in sources)
        own = [trace.bits(label.sources) for label in active]
        again = any(own[at] and own[at] & active[1 - at].past == own[at] for at in (0, 1))
        for leaf in leaves if again else ():
            if trace.summed(leaf, past_of(active)):
                leaf.mark("residual")
    if name in _PRODUCTS and len(active) == 2:
        gate, value = (0, 1) if _gates(trace, *active) else (1, 0)
        for source in active[gate].sources - active[value].sources:
            trace.gates.update((source, leaf) for axis in axes_in(dims) for leaf in axis.leaves())
        if (rows and trace.gate(rows[gate], rows[value])) or active[0].sources != active[1].sources:
            for axis in axes_in(dims):
                axis.mark("bent")
            return Label(dims, active[value].sources, active[value].linear)
    return Label(dims, sources, all(label.linear for label in active) and linear)


def _gates(trace: Trace, one: Label, other: Label) -> bool:
    """Whether the first of two activations gates the second: it is nonlinear, or computed from the other."""
    if one.linear != other.linear:
        return other.linear
    made, makes = trace.bits(one.sources), trace.bits(other.sources)
    return bool(makes) and one.past & makes == makes and other.past & made != made


# -- moving -------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def _view(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    if args[0].dtype != result.dtype and args[0].shape != result.shape:
        return unknown(trace, args, kwargs, result, name)
    trace.set(result, like(label, regroup(label.dims, tuple(result.shape))))
    return None


@rule("as_strided")
def _as_strided(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Takes windows of some dimensions; those that keep their length and stride stay what they were."""
    label = trace.label(args[0])
    places = {each: place for place, each in enumerate(zip(args[0].shape, args[0].stride(), strict=True))}
    whence = [places.get(each) for each in zip(result.shape, result.stride(), strict=True)]
    for place, dim in enumerate(label.dims):
        if place not in whence:
            fix(dim, "windows of it are taken")
    windows = plain(result)
    trace.set(
        result, like(label, [windows[at] if place is None else label.dims[place] for at, place in enumerate(whence)])
    )


@rule("permute")
def _permute(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    trace.set(result, like(label, [label.dims[place] for place in args[1]]))


@rule("transpose", "t", "numpy_T")
def _transpose(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dims = list(label.dims)
    if len(dims) > 1:
        a, b = args[1:3] if len(args) > 2 else (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    trace.set(result, like(label, dims))


@rule("view_as_complex", "view_as_real")
def _pairs(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dims = list(label.dims)
    if name == "view_as_complex":
        fix(dims.pop(), "real and imaginary parts are told apart by their places")
    trace.set(result, like(label, dims if name == "view_as_complex" else [*dims, (2,)]))


@rule("expand")
def _expand(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    new = result.dim() - len(label.dims)
    dims: list[Dim] = []
    for place, size in enumerate(result.shape):
        old = label.dims[place - new] if place >= new else ()
        # What is the same everywhere fits any axis; where its number is written out, the run of a cut copy tells.
        dims.append(old if length(old) == size else (Axis(size),))
    trace.set(result, like(label, dims))


@rule("unsqueeze")
def _unsqueeze(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dims = list(label.dims)
    dims.insert(args[1] % result.dim(), ())
    trace.set(result, like(label, dims))


@rule("squeeze")
def _squeeze(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    rank = len(label.dims)
    given = args[1] if len(args) > 1 else range(rank)
    places = (
        {place % rank for place in (given if isinstance(given, list | tuple | range) else [given])} if rank else set()
    )
    dims = [dim for place, dim in enumerate(label.dims) if not (place in places and args[0].shape[place] == 1)]
    trace.set(result, like(label, dims))


@rule("slice")
def _slice(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    size = args[0].shape[dim]
    step = args[4] if len(args) > 4 else kwargs.get("step", 1)
    start = args[2] if len(args) > 2 else kwargs.get("start")
    stop = args[3] if len(args) > 3 else kwargs.get("end")
    start, stop, step = slice(start, stop, step).indices(size)
    dims = list(label.dims)
    if step == 1:
        trace.slices(label, dims[dim])
        dims[dim] = cut_out(dims[dim], start, max(start, stop))
    elif size % step == 0 and start < step and stop > size - step + start:  # one of every `step` that lie together
        dims[dim], among = regroup([dims[dim]], (size // step, step))
        fix(among, "a channel of it is taken by its place")
    else:
        fix(dims[dim], "a slice takes every few of it")
        dims[dim] = (result.shape[dim],)
    trace.set(result, like(label, dims))


@rule("unfold")
def _unfold(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dims = list(label.dims)
    place = args[1] % len(dims)
    fix(dims[place], "windows of it are taken")
    dims[place] = (result.shape[place],) if result.shape[place] > 1 else ()
    trace.set(result, like(label, [*dims, (args[2],) if args[2] > 1 else ()]))


@rule("select")
def _select(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dims = list(label.dims)
    rank = len(dims)
    dim = dims.pop(args[1] % rank)
    trace.set(result, _taken(label, dims, dim, args[2]))


def _taken(label: Label, dims: Sequence[Dim], dim: Dim, place: int) -> Label:
    """Return the label after selecting one index of a dimension."""
    fix(dim, "a channel of it is taken by its place")
    axes = list(axes_in([tuple(factors_of(dim))]))
    places = (*label.places, (axes[0], place % length(dim))) if len(axes) == 1 else label.places
    return replace(label, dims=list(dims), places=places)


@rule("unbind")
def _unbind(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(label.dims)
    dims = list(label.dims)
    taken = dims.pop(dim)
    for place, each in enumerate(result):
        trace.set(each, _taken(label, dims, taken, place))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "split_copy", "split_with_sizes_copy")
def _split(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(label.dims)
    start = 0
    for each in result:
        dims = list(label.dims)
        stop = start + each.shape[dim]
        dims[dim] = cut_out(dims[dim], start, stop)
        start = stop
        trace.set(each, like(label, dims))
    sizes = {each.shape[dim] for each in result}
    if name in ("split", "chunk") and len(sizes) == 1:  # whatever is cut, they have to stay alike
        for one, other in pairwise(result):
            trace.pair(trace.label(one).dims[dim], trace.label(other).dims[dim])


@rule("cat", "concat")
def _cat(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    tensors = [tensor for tensor in args[0] if not (tensor.dim() == 1 and tensor.shape[0] == 0)]
    labels = [trace.label(each, joined=True) for each in tensors]
    rank = result.dim()
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % rank
    _join(trace, labels, dim, result, lambda: concatenate([label.dims[dim] for label in labels]))


@rule("stack")
def _stack(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    labels = [trace.label(tensor) for tensor in args[0]]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.dim()
    widened = [like(label, [*label.dims[:dim], (), *label.dims[dim:]]) for label in labels]
    _join(trace, widened, dim, result, lambda: (len(labels),) if len(labels) > 1 else ())


def _join(trace: Trace, labels: list[Label], dim: int, result: Tensor, along: Callable[[], Dim]) -> None:
    dims: list[Dim] = []
    for place in range(result.dim()):
        if place == dim:
            dims.append(along())
            continue
        for (_, one), (_, other) in pairwise(_meeting(labels, place - result.dim())):
            tie(one, other, CONSTANT)
        for label in labels:
            trace.note(label, place, "added")
        with_axes = [label.dims[place] for label in labels if any(True for _ in axes_in([label.dims[place]]))]
        dims.append(with_axes[0] if with_axes else labels[0].dims[place])
    active = [label for label in labels if not label.parameter]
    sources = frozenset().union(*(label.sources for label in active or labels))
    made = Label(dims, sources, all(label.linear for label in labels), not active, past_of(labels))
    made.places = tuple(place for label in labels for place in label.places)
    made.attends = attends_of(labels)
    trace.set(result, made)


@rule("repeat")
def _repeat(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    new = result.dim() - len(label.dims)
    dims: list[Dim] = []
    for place, times in enumerate(args[1]):
        old = label.dims[place - new] if place >= new else ()
        dims.append((*((times,) if times > 1 else ()), *old))
    trace.set(result, like(label, dims))


@rule("roll", "flip", "rot90")
def _roll(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    given = (args[2] if len(args) > 2 else kwargs.get("dims", [])) if name == "roll" else args[1]
    dims = list(label.dims)
    for place in [given] if isinstance(given, int) else given or range(len(dims)):
        fix(dims[place], f"{name} moves it")
        dims[place] = (length(dims[place]),) if length(dims[place]) > 1 else ()
    trace.set(result, like(label, dims))


@rule("constant_pad_nd", "pad")
def _pad(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dims = list(label.dims)
    for place, size in enumerate(result.shape):
        if size != args[0].shape[place]:
            fix(dims[place], "it is padded")
            dims[place] = (size,) if size > 1 else ()
    trace.set(result, like(label, dims))


@rule("index_add", "index_copy", "index_put", "_index_put_impl", "scatter", "scatter_add", "scatter_reduce")
def _put(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Scatters rows by index: the dimensions behind the indexed ones are tied."""
    label = trace.label(args[0])
    new = trace.label([each for each in args[1:] if isinstance(each, Tensor)][-1])
    if name.startswith(("index_add", "index_copy")):
        chosen = args[1] % len(label.dims) + 1
    elif "index_put" in name and all(each is not None and each.dtype != torch.bool for each in args[1]):
        chosen = len(args[1])
    else:
        return unknown(trace, args, kwargs, result, name)
    dims = list(label.dims)
    for place in range(-len(dims), 0):
        known = -place <= len(new.dims)
        if place < chosen - len(dims):
            fix(dims[place], "its channels are chosen by number")
            fix(new.dims[place] if known else (), "its channels are chosen by number")
        elif known and length(new.dims[place]) > 1:
            tie(dims[place], new.dims[place], CONSTANT)
            dims[place] = new.dims[place]
    trace.set(result, Label(dims, label.sources | new.sources, past=past_of([label, new])))
    return None


def _run(index: Tensor, size: int) -> tuple[int, int] | None:
    """Return the bounds of a run of consecutive known indices; None for any other indices."""
    if index.dim() != 1 or not index.numel() or isinstance(index, FakeTensor) or index.dtype == torch.bool:
        return None
    with unset_fake_temporarily():
        first, *others = (index % size).tolist()
    return (first, first + len(index)) if others == list(range(first + 1, first + len(index))) else None


@rule("embedding", "index_select", "gather", "index", "_unsafe_index", "take")
def _index(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    if name == "embedding":
        fix(label.dims[0], "its channels are looked up")
        trace.note(label, 1, "produces")
        trace.set(result, Label([*trace.label(args[1]).dims, label.dims[1]], label.sources, past=label.past))
        return
    if name == "index_select":
        dims = list(label.dims)
        place = args[1] % len(dims)
        fix(dims[place], "its channels are chosen by number")
        dims[place] = (result.shape[place],) if result.shape[place] > 1 else ()
        trace.set(result, like(label, dims))
        return
    if name in ("index", "_unsafe_index"):
        indices = list(args[1]) + [None] * (len(label.dims) - len(args[1]))
        places = [place for place, index in enumerate(indices) if index is not None]
        boolean = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if len(places) == 1 and not boolean:
            dims, place = list(label.dims), places[0]
            run = _run(indices[place], args[0].shape[place])
            if run is not None:  # a slice, written as numbers
                dims[place] = cut_out(dims[place], *run)
                trace.set(result, like(label, dims))
                return
        if not boolean and places:
            for place in places:
                fix(label.dims[place], "its channels are chosen by number")
            rank = max(indices[place].dim() for place in places)
            apart = places != list(range(places[0], places[-1] + 1))
            at = 0 if apart else places[0]
            kept = [dim for place, dim in enumerate(label.dims) if place not in places]
            shape = tuple(result.shape[at : at + rank])
            dims = [*kept[:at], *((size,) if size > 1 else () for size in shape), *kept[at:]]
            trace.set(result, like(label, dims))
            return
    unknown(trace, args, kwargs, result, name)
