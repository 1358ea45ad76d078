"""Rules for elementwise operations, and for operations that only move numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from upop.pruning.axes.axis import (
    Axis,
    Dim,
    axes_in,
    concatenate,
    cut_out,
    dim_of,
    factors_of,
    fix,
    leaves_of,
    length,
    regroup,
    tie,
)
from upop.pruning.axes.label import Label, Rows, plain
from upop.pruning.axes.mode import tensors_in
from upop.pruning.axes.rule import CONSTANT, argument, attends_of, like, past_of, rule, unknown
from upop.pruning.axes.trace import Trace


@rule(
    "arange eye linspace _local_scalar_dense rand randn randint sym_size is_nonzero equal empty_strided "
    "new_empty_strided _fused_sdp_choice is_same_size lift_fresh detach_ item randperm bernoulli_p _assert_async "
    "_assert_scalar resize"
)
def _nothing(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Creates new numbers, or reads metadata only."""


@rule("zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor")
def _blank(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    trace.set(result, Label(plain(result), blank=True))


# -- number by number ---------------------------------------------------------------------------------------------


_LINEAR = {
    *("add", "sub", "mul", "div", "neg", "clone", "detach", "alias", "_to_copy", "to", "copy", "rsub", "lerp"),
    *("where", "masked_fill", "addcmul", "contiguous", "lift_fresh_copy", "dropout", "native_dropout", "view_as_real"),
}
_PRODUCTS = {"mul", "addcmul"}


@rule(
    "zeros_like ones_like full_like empty_like rand_like randn_like bernoulli native_dropout _to_copy clone "
    "detach alias lift_fresh_copy copy masked_fill where dropout fill zero nan_to_num _conj conj to contiguous "
    "isin isfinite isnan isinf glu_jvp hardswish hardsigmoid hardtanh silu gelu relu relu6 leaky_relu elu mish "
    "mul softplus pow square prelu _prelu_kernel celu selu logical_not bitwise_not type_as normal"
)
def _elementwise(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
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
        dims.append(_tied(meeting, ()))
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


def _tied(meeting: Sequence[tuple[Label, Dim]], otherwise: Dim) -> Dim:
    """Tie the dimensions that meet; return one that has axes, if any has."""
    for (_, one), (_, other) in pairwise(meeting):
        tie(one, other, CONSTANT)
    return next((dim for _, dim in meeting if any(axes_in([dim]))), meeting[0][1] if meeting else otherwise)


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
        leaves = leaves_of(dims)
        trace.added.update((source, leaf) for leaf in leaves for source in sources)
        own = [trace.bits(label.sources) for label in active]
        again = any(own[at] and own[at] & active[1 - at].past == own[at] for at in (0, 1))
        for leaf in leaves if again else ():
            if trace.summed(leaf, past_of(active)):
                leaf.mark("residual")
    if name in _PRODUCTS and len(active) == 2:
        gate, value = (0, 1) if _gates(trace, *active) else (1, 0)
        for source in active[gate].sources - active[value].sources:
            trace.gates.update((source, leaf) for leaf in leaves_of(dims))
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

Move = Callable[[list[Dim], Any, Any, Any, str], Sequence[Dim]]


def _moves(names: str) -> Callable[[Move], Move]:
    """Register how operations from one tensor to another one move its dimensions."""

    def register(move: Move) -> Move:
        @rule(names)
        def moved(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
            label = trace.label(args[0])
            trace.set(result, like(label, move(list(label.dims), args, kwargs, result, name)))

        return move

    return register


@rule("view _unsafe_view reshape _reshape_alias unflatten flatten")
def _view(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    if args[0].dtype != result.dtype and args[0].shape != result.shape:
        return unknown(trace, args, kwargs, result, name)
    trace.set(result, like(label, regroup(label.dims, tuple(result.shape))))
    return None


@_moves("as_strided")
def _as_strided(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    """Takes windows of some dimensions; those that keep their length and stride stay what they were."""
    places = {each: place for place, each in enumerate(zip(args[0].shape, args[0].stride(), strict=True))}
    whence = [places.get(each) for each in zip(result.shape, result.stride(), strict=True)]
    for place, dim in enumerate(dims):
        if place not in whence:
            fix(dim, "windows of it are taken")
    windows = plain(result)
    return [windows[at] if place is None else dims[place] for at, place in enumerate(whence)]


@_moves("permute")
def _permute(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    return [dims[place] for place in args[1]]


@_moves("transpose t numpy_T")
def _transpose(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    if len(dims) > 1:
        a, b = args[1:3] if len(args) > 2 else (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    return dims


@_moves("view_as_complex view_as_real")
def _pairs(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    if name == "view_as_real":
        return [*dims, (2,)]
    fix(dims.pop(), "real and imaginary parts are told apart by their places")
    return dims


@_moves("expand")
def _expand(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    old = [()] * (result.dim() - len(dims)) + dims
    # What is the same everywhere fits any axis; where its number is written out, the run of a cut copy tells.
    return [dim if length(dim) == size else (Axis(size),) for dim, size in zip(old, result.shape, strict=True)]


@_moves("unsqueeze")
def _unsqueeze(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    dims.insert(args[1] % result.dim(), ())
    return dims


@_moves("squeeze")
def _squeeze(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    given = args[1] if len(args) > 1 else range(len(dims))
    places = {place % max(1, len(dims)) for place in (given if isinstance(given, list | tuple | range) else [given])}
    return [dim for place, dim in enumerate(dims) if not (place in places and args[0].shape[place] == 1)]


@rule("slice")
def _slice(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dim = argument(args, kwargs, 1, "dim", 0)
    size = args[0].shape[dim]
    bounds = (argument(args, kwargs, 2 + at, word, None) for at, word in enumerate(("start", "end", "step")))
    start, stop, step = slice(*bounds).indices(size)
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


@_moves("unfold")
def _unfold(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    place = args[1] % len(dims)
    fix(dims[place], "windows of it are taken")
    dims[place] = dim_of(result.shape[place])
    return [*dims, dim_of(args[2])]


@rule("select unbind")
def _unbind(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dims = list(label.dims)
    taken = dims.pop(argument(args, kwargs, 1, "dim", 0) % len(dims))
    fix(taken, "a channel of it is taken by its place")
    axes = list(axes_in([tuple(factors_of(taken))]))
    for place, each in enumerate(result) if name == "unbind" else [(args[2] % length(taken), result)]:
        places = (*label.places, (axes[0], place)) if len(axes) == 1 else label.places
        trace.set(each, replace(label, dims=list(dims), places=places))


@rule("split split_with_sizes chunk unsafe_split unsafe_chunk split_copy split_with_sizes_copy")
def _split(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dim = argument(args, kwargs, 2, "dim", 0) % len(label.dims)
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


@rule("cat concat")
def _cat(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    tensors = [tensor for tensor in args[0] if not (tensor.dim() == 1 and tensor.shape[0] == 0)]
    labels = [trace.label(each, joined=True) for each in tensors]
    dim = argument(args, kwargs, 1, "dim", 0) % result.dim()
    _join(trace, labels, dim, result, lambda: concatenate([label.dims[dim] for label in labels]))


@rule("stack")
def _stack(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    labels = [trace.label(tensor) for tensor in args[0]]
    dim = argument(args, kwargs, 1, "dim", 0) % result.dim()
    widened = [like(label, [*label.dims[:dim], (), *label.dims[dim:]]) for label in labels]
    _join(trace, widened, dim, result, lambda: dim_of(len(labels)))


def _join(trace: Trace, labels: list[Label], dim: int, result: Tensor, along: Callable[[], Dim]) -> None:
    dims: list[Dim] = []
    for place in range(result.dim()):
        if place == dim:
            dims.append(along())
            continue
        dims.append(_tied(_meeting(labels, place - result.dim()), labels[0].dims[place]))
        for label in labels:
            trace.note(label, place, "added")
    active = [label for label in labels if not label.parameter]
    sources = frozenset().union(*(label.sources for label in active or labels))
    made = Label(dims, sources, all(label.linear for label in labels), not active, past_of(labels))
    made.places = tuple(place for label in labels for place in label.places)
    made.attends = attends_of(labels)
    trace.set(result, made)


@_moves("repeat")
def _repeat(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    old = [()] * (result.dim() - len(dims)) + dims
    return [(*dim_of(times), *dim) for times, dim in zip(args[1], old, strict=True)]


@_moves("roll flip rot90")
def _roll(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    given = argument(args, kwargs, 2, "dims", []) if name == "roll" else args[1]
    for place in [given] if isinstance(given, int) else given or range(len(dims)):
        fix(dims[place], f"{name} moves it")
        dims[place] = dim_of(length(dims[place]))
    return dims


@_moves("constant_pad_nd pad")
def _pad(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    for place, size in enumerate(result.shape):
        if size != args[0].shape[place]:
            fix(dims[place], "it is padded")
            dims[place] = dim_of(size)
    return dims


_CHOSEN = "its channels are chosen by number"


@rule("index_add index_copy index_put _index_put_impl")
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
            fix(dims[place], _CHOSEN)
            fix(new.dims[place] if known else (), _CHOSEN)
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


@rule("embedding")
def _embedding(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    fix(label.dims[0], "its channels are looked up")
    trace.note(label, 1, "produces")
    trace.set(result, Label([*trace.label(args[1]).dims, label.dims[1]], label.sources, past=label.past))


@_moves("index_select")
def _index_select(dims: list[Dim], args: Any, kwargs: Any, result: Any, name: str) -> Sequence[Dim]:
    place = args[1] % len(dims)
    fix(dims[place], _CHOSEN)
    dims[place] = dim_of(result.shape[place])
    return dims


@rule("index _unsafe_index")
def _index(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dims = list(label.dims)
    indices = {place: index for place, index in enumerate(args[1]) if index is not None}
    first, last = min(indices, default=0), max(indices, default=0)
    if not indices or any(index.dtype in (torch.bool, torch.uint8) for index in indices.values()):
        return unknown(trace, args, kwargs, result, name)
    run = _run(indices[first], args[0].shape[first]) if len(indices) == 1 else None
    if run is not None:  # a slice, written as numbers
        dims[first] = cut_out(dims[first], *run)
    else:
        for place in indices:
            fix(dims[place], _CHOSEN)
        rank = max(index.dim() for index in indices.values())
        at = first if last - first + 1 == len(indices) else 0
        kept = [dim for place, dim in enumerate(dims) if place not in indices]
        dims = [*kept[:at], *map(dim_of, result.shape[at : at + rank]), *kept[at:]]
    trace.set(result, like(label, dims))
    return None
