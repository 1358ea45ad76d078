"""Rules for operations that contract or normalise axes: sums, products, attention, norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from upop.pruning.axes.axis import Dim, axes_in, cut_out, dim_of, fix, length, regroup, tie
from upop.pruning.axes.label import Label
from upop.pruning.axes.mode import tensors_in
from upop.pruning.axes.rule import CONSTANT, argument, like, past_of, rule, unknown
from upop.pruning.axes.trace import Trace

# -- sums ---------------------------------------------------------------------------------------------------------

_SUMS = ("sum", "linalg_vector_norm", "norm", "nansum")
_MOMENTS = ("mean", "var", "std", "var_mean", "std_mean")
"""What norms are made of: each is one number, of the channels that there are."""


@rule(
    "mean amax amin max min argmax argmin var std var_mean std_mean logsumexp sum prod any all linalg_vector_norm "
    "norm median count_nonzero nansum"
)
def _reduce(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    outputs = tensors_in(result)
    rank = len(label.dims)
    place = 2 if name in ("linalg_vector_norm", "norm") else 1
    given = argument(args, kwargs, place, "dim", None)
    places = {each % rank for each in ([given] if isinstance(given, int) else given or range(rank))} if rank else set()
    for each in places:
        if name not in _SUMS:
            fix(label.dims[each], f"{name} is taken over it", bars=name not in _MOMENTS)
            trace.norm(label.dims[each])
        else:
            trace.note(label, each, "consumes")
    kept = len(outputs[0].shape) == rank
    dims = [dim if at not in places else () for at, dim in enumerate(label.dims) if kept or at not in places]
    for output in outputs:
        own = label.parameter and name in _SUMS  # a token that is learnt is one until its mean is taken
        trace.set(
            output, replace(label, dims=list(dims), linear=name == "sum" and label.linear, parameter=own, attends=())
        )


@rule("_softmax _log_softmax _safe_softmax softmax cumsum cumprod sort topk argsort logcumsumexp")
def _along(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    given = argument(args, kwargs, 2 if name == "topk" else 1, "dim", -1)
    fix(label.dims[given], f"{name.strip('_')} is taken over it")
    for output in tensors_in(result):
        here = list(label.dims)
        here[given] = dim_of(output.shape[given])
        trace.set(output, replace(label, dims=here, linear=False))


# -- products -----------------------------------------------------------------------------------------------------


@rule("mm bmm addmm baddbmm mv addmv dot matmul linear")
def _product(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    added, (left, right) = (args[0], args[1:3]) if name in ("addmm", "baddbmm", "addmv") else (None, args[:2])
    if name == "linear":
        added = argument(args, kwargs, 2, "bias", None)
    a, b = trace.label(left), trace.label(right)
    if name in ("bmm", "baddbmm") or (a.parameter and b.parameter and (a.latent or b.latent)):
        a, b = _activation(a), _activation(b)
    else:  # what is computed of parameters and meets an activation is its weight
        a, b = (replace(each, latent=False) for each in (a, b))
    b_dims = list(b.dims)
    if name == "linear":
        b_dims = [b_dims[1], b_dims[0]]
    inner_b = -2 if len(b_dims) > 1 else -1
    _contract(trace, a, a.dims[-1], b, b_dims[inner_b])
    dims: list[Dim] = list(a.dims[:-1])
    if len(b_dims) > 1:
        dims.append(b_dims[-1])
    if name in ("bmm", "baddbmm"):
        tie(a.dims[0], b.dims[0], CONSTANT)
        if not any(axes_in([dims[0]])):
            dims[0] = b.dims[0]
        for axis in axes_in(dims[:1]) if a.parameter == b.parameter else ():
            axis.mark("head")
    own = len(dims) - (len(b_dims) > 1)
    made = _produced(trace, a, dims[:own], b, dims[own:], dims, a.dims[-1])
    if added is not None:
        _shift(trace, [added], made.dims)
        extra = trace.label(added)
        made = replace(made, sources=made.sources | extra.sources, past=made.past | extra.past)
    trace.set(result, made)


@rule("_grouped_mm transformers::grouped_mm_fallback")
def _grouped_product(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Multiplies tokens, sorted by expert, by expert weights [experts, in, out]."""
    tokens, weights = trace.label(args[0]), trace.label(args[1])
    if len(tokens.dims) != 2 or len(weights.dims) != 3:
        return unknown(trace, args, kwargs, result, name)
    fix(weights.dims[0], "its channels are chosen by number")
    _contract(trace, tokens, tokens.dims[1], weights, weights.dims[1])
    dims = [tokens.dims[0], weights.dims[2]]
    trace.set(result, _produced(trace, tokens, dims[:1], weights, dims[1:], dims, tokens.dims[1]))
    return None


@rule("_trilinear")
def _bilinear(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Contracts two inputs with a weight [out, in, in], as torch.nn.Bilinear does."""
    one, weight, other = (trace.label(each) for each in args[:3])
    if not weight.parameter or [list(each) for each in args[3:7]] != [[1, 3], [0], [1, 2], [2, 3]]:
        return unknown(trace, args, kwargs, result, name)
    for label, place in ((one, 1), (other, 2)):
        for axis in axes_in(label.dims[-1:]):
            axis.mark("bent")
        _contract(trace, label, label.dims[-1], weight, weight.dims[place])
    trace.note(weight, 0, "produces")
    past = past_of([one, weight, other])
    trace.set(result, Label([*one.dims[:-1], weight.dims[0]], weight.sources, past=past))
    return None


def _activation(label: Label) -> Label:
    """Treat learned tokens behind a layer like any other activation."""
    return replace(label, parameter=False, latent=False) if label.latent else label


def _contract(trace: Trace, a: Label, a_dim: Dim, b: Label, b_dim: Dim) -> None:
    """Contract a dimension of two tensors."""
    if a.active and b.active:
        trace.queries(a, a_dim)
    tie(a_dim, b_dim, "it is multiplied with numbers of that shape which are no parameters")
    for label, dim, other in ((a, a_dim, b), (b, b_dim, a)):
        if label.parameter:
            for axis in axes_in([dim]) if not (other.parameter or other.linear) else ():
                axis.mark("bent")
            place = next(place for place, each in enumerate(label.dims) if each is dim or each == dim)
            trace.note(label, place, "consumes")
    if a.active and b.active:
        for axis in axes_in([a_dim, b_dim]):
            axis.mark("dimension")


def _produced(
    trace: Trace, a: Label, a_dims: Sequence[Dim], b: Label, b_dims: Sequence[Dim], dims: list[Dim], over: Dim
) -> Label:
    """Return the label of a product; its dimensions come from either side, and `over` was contracted."""
    for label, outer in ((a, a_dims), (b, b_dims)):
        if label.parameter and (label is b or not b.parameter):  # what goes through a layer opens nothing
            for place, dim in enumerate(label.dims):
                if any(dim == each for each in outer):
                    trace.note(label, place, "produces")
    past = a.past | b.past
    if a.parameter != b.parameter:
        weight, given, rest = (a, b, b_dims) if a.parameter else (b, a, a_dims)
        attends = given.attends if any(axes_in([over])) else ()  # scores whose heads are mixed are scores
        if trace.opens(given.sources, rest):  # it is summed over another axis: what made this one still does
            return Label(dims, weight.sources | given.sources, given.linear, past=past, attends=attends)
        return Label(dims, weight.sources, past=past, attends=attends)
    if a.parameter:
        return Label(dims, a.sources | b.sources, parameter=True, latent=True, past=past)
    summed = a.attends or b.attends or over
    values = a_dims[-1:] if b.attends and not a.attends else b_dims[-1:]
    if trace.opens(a.sources | b.sources, values):
        trace.pair(summed, values[0])
        for axis in axes_in(values) if a.attends or b.attends else ():
            axis.mark("dimension")
        summed = ()  # these are no scores
    return Label(dims, a.sources | b.sources, a.linear and b.linear, past=past, attends=summed)


@rule("convolution _convolution conv2d conv1d conv3d mkldnn_convolution")
def _convolution(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    inputs, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    x, w = trace.label(inputs), trace.label(weight)
    channels = x.dims[1]
    rows, columns = (w.dims[1], w.dims[0]) if transposed else (w.dims[0], w.dims[1])
    if groups == 1:
        _contract(trace, x, channels, w, columns)
        made: Dim = rows
        trace.note(w, 1 if transposed else 0, "produces")
    elif transposed:
        return unknown(trace, args, kwargs, result, name)
    else:
        outer = regroup([rows], (groups, length(rows) // groups))
        inner = regroup([channels], (groups, length(channels) // groups))
        tie(outer[0], inner[0], CONSTANT)
        tie(inner[1], columns, CONSTANT)
        trace.note(w, 0, "follows" if length(channels) == groups else "produces")
        if length(channels) != groups:
            trace.note(w, 1, "consumes")
        made = (*outer[0], *outer[1])
    sources, past = x.sources if groups > 1 and length(channels) == groups else w.sources, x.past | w.past
    if isinstance(bias, Tensor):
        _shift(trace, [bias], [made])
        extra = trace.label(bias)
        sources, past = sources | extra.sources, past | extra.past
    spatial: list[Dim] = []
    for place, dim in enumerate(x.dims[2:]):
        if weight.shape[2 + place] == 1 and result.shape[2 + place] == inputs.shape[2 + place]:
            spatial.append(dim)
            continue
        fix(dim, "a convolution moves over it")
        spatial.append(dim_of(result.shape[2 + place]))
    mixes = trace.opens(x.sources, spatial)  # what made these axes still does
    sources |= x.sources if mixes else frozenset()
    linear = not mixes or (x.linear and bias is None)
    trace.set(result, Label([x.dims[0], made, *spatial], sources, linear, past=past, attends=x.attends))
    return None


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention flex_attention"
)
def _attention(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    labels = [replace(trace.label(each), parameter=False, latent=False) for each in args[:3]]
    queries, keys, values = labels
    mask = kwargs.get("attn_mask", kwargs.get("attn_bias"))
    mask = next((each for each in args[3:] if isinstance(each, Tensor)), mask)
    _contract(trace, queries, queries.dims[-1], keys, keys.dims[-1])
    for axis in axes_in([queries.dims[-1], values.dims[-1]]):
        axis.mark("dimension")
    rank = len(queries.dims)
    for place in range(rank - 2):
        if length(queries.dims[place]) != length(keys.dims[place]):  # torch's own grouped queries
            heads, groups = length(queries.dims[place]), length(keys.dims[place])
            tie(queries.dims[place], (*keys.dims[place], heads // groups), CONSTANT)
        else:
            tie(queries.dims[place], keys.dims[place], CONSTANT)
        tie(keys.dims[place], values.dims[place], CONSTANT)
        if isinstance(mask, Tensor):
            dims = trace.label(mask).dims
            at = place - rank
            if -at <= len(dims) and length(dims[at]) > 1:
                tie(dims[at], queries.dims[place], CONSTANT)
                trace.note(trace.label(mask), at, "follows")
    for axis in axes_in([queries.dims[place] for place in range(1, rank - 2)] if rank > 3 else []):
        axis.mark("head")
    output = result[0] if isinstance(result, tuple) else result
    trace.pair(queries.dims[-1], values.dims[-1])
    trace.set(output, Label([*queries.dims[:-1], values.dims[-1]], values.sources, False, past=past_of(labels)))


# -- normalisation ------------------------------------------------------------------------------------------------


@rule("native_layer_norm layer_norm _fused_rms_norm rms_norm")
def _layer_norm(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    over = label.dims[-len(args[1]) :]
    for dim in over:
        fix(dim, "it is normalised over", bars=False)
        trace.norm(dim)
    _shift(trace, args[2:4], over)
    trace.set(tensors_in(result)[0], replace(label, dims=list(label.dims), linear=False, parameter=False))


@rule(
    "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm "
    "_batch_norm_with_update _batch_norm_no_update batch_norm"
)
def _batch_norm(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    _shift(trace, args[1:5], label.dims[1:2])
    trace.set(tensors_in(result)[0], replace(label, dims=list(label.dims), linear=False))


@rule("native_group_norm group_norm")
def _group_norm(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    groups = args[6]
    parts = regroup([label.dims[1]], (groups, length(label.dims[1]) // groups))
    fix(parts[1], "it is normalised over")
    _shift(trace, args[1:3], label.dims[1:2])
    outputs = tensors_in(result)
    trace.set(outputs[0], replace(label, dims=list(label.dims), linear=False))
    for each in outputs[1:]:
        trace.set(each, Label([label.dims[0], parts[0]]))


def _shift(trace: Trace, tensors: Sequence[Any], dims: Sequence[Dim]) -> None:
    """Tie biases, and the weights of norms, to the last of the dimensions that they act on."""
    for each in tensors:
        if isinstance(each, Tensor):
            own = trace.label(each)
            for place in range(-len(own.dims), 0):
                if length(own.dims[place]) > 1:
                    tie(own.dims[place], dims[place], CONSTANT)
                    trace.note(own, place, "added")


@rule("glu")
def _glu(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    dim = argument(args, kwargs, 1, "dim", -1) % len(label.dims)
    half = result.shape[dim]
    one, other = cut_out(label.dims[dim], 0, half), cut_out(label.dims[dim], half, 2 * half)
    trace.gate(trace.rows(label, [other]), trace.rows(label, [one]))
    tie(one, other, CONSTANT)
    for axis in axes_in([one]):
        axis.mark("bent")
    dims = list(label.dims)
    dims[dim] = one
    trace.set(result, like(label, dims))


@rule(
    "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d upsample_bilinear2d "
    "upsample_bicubic2d upsample_nearest2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa avg_pool1d "
    "max_pool3d_with_indices reflection_pad2d grid_sampler_2d upsample_linear1d"
)
def _over_places(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    label = trace.label(args[0])
    for dim in label.dims[2:]:
        fix(dim, f"{name} moves over it")
    for output in tensors_in(result):
        if output.dim() == len(label.dims):
            trace.set(output, like(label, [*label.dims[:2], *map(dim_of, output.shape[2:])]))


@rule("im2col col2im")
def _windows(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Unfolds windows into channels, or folds them back."""
    label = trace.label(args[0])
    for dim in label.dims[2:]:
        fix(dim, f"{name} moves over it")
    channels, window = label.dims[1], math.prod(args[1] if name == "im2col" else args[2])
    if name == "im2col":
        made: Dim = (*channels, window)
    else:
        made, rest = regroup([channels], (length(channels) // window, window))
        fix(rest, f"{name} sums over it")
    trace.set(result, like(label, [label.dims[0], made, *map(dim_of, result.shape[2:])]))
