"""Merges tokens within a layer of any class, between its attention and its MLP.

Between `x = x + attention(norm(x))` and `x = x + mlp(norm(x))` there is no module to hook, and code differs by library.
What they compute is the same: an attention, and the addition of its output to the tokens. A torch function mode
intercepts both while the layer runs: it adds log(size) to the attention logits (proportional attention), reads queries
and keys, and merges the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upop.pruning.errors import LayoutError
from upop.pruning.precision import accumulator, precise
from upop.tokens.cross import cross_token_of
from upop.tokens.flow import Flow, carry, flow_of, note
from upop.tokens.matching import Match, cosine, exactly, match, merge, removable

Guidance = Literal["query", "attention"]

ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__})
PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm})
SCALED_PRODUCTS = frozenset({torch.baddbmm, Tensor.baddbmm})
SOFTMAXES = frozenset({F.softmax, torch.softmax, Tensor.softmax})
PACKED = F.multi_head_attention_forward
FUSED = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Site:
    """Where a layer merges: the index of its self-attention, and of the addition that joins the output to the tokens.

    Only additions of two tensors with the shape of the layer's tokens count.
    """

    attention: int = 0
    addition: int = 0


@dataclass(eq=False)
class Merger:
    """How the layers of one encoder merge.

    Attributes:
        removed: tokens to remove in each layer, at most half of the unprotected ones (`removable`).
        prefix: number of first tokens that are protected (class and distillation tokens, registers).
        guidance: importance is the cosine of a key with the query of the guiding token ("query"), or the attention that
            a token gets on average ("attention", as LLaVA's).
        head_mean: whether to match by the mean of the heads' keys, instead of their concatenation.
        weighted: whether importance weighs merged tokens, as published; otherwise they are means.
        causal: whether attention is causal; the mask is rebuilt for the kept tokens.
        merge_padding: whether tokens after the guiding one are treated like others, as published; otherwise they are
            removed first, and contribute nothing.
        restored: whether the last layer restores all tokens, with merged ones at each of their positions.
        encoder: index of the encoder in its model.
    """

    removed: tuple[int, ...]
    prefix: int = 1
    guidance: Guidance = "query"
    head_mean: bool = False
    weighted: bool = True
    causal: bool = False
    merge_padding: bool = True
    restored: bool = False
    encoder: int = 0

    def start(self, tokens: Tensor, guide: Tensor | None = None, cross: Tensor | None = None) -> Tensor:
        """Return the input of the first layer, [batch, tokens, hidden], with a cross token appended if there are any.

        Args:
            tokens: [batch, tokens, hidden].
            guide: position of the end of each text, [batch].
            cross: the cross tokens of all layers, [1, layers, hidden].
        """
        size = None
        if not self.merge_padding and guide is not None and any(self.removed):
            places = torch.arange(tokens.shape[1], device=tokens.device)
            exact = accumulator(tokens)
            size = (places <= guide.unsqueeze(1)).to(exact)
        if cross is not None:
            first = tokens[:, 0] if guide is None else _row(tokens, guide)
            tokens = torch.cat([tokens, first.unsqueeze(1)], 1)
            size = None if size is None else F.pad(size, (0, 1), value=1.0)
        flow = Flow(self, size=size, guide=guide, cross=cross)
        if cross is not None:
            note(tokens, flow)
        return carry(tokens, flow)

    def enter(self, tokens: Tensor, flow: Flow, own: Tensor | None = None) -> tuple[Tensor, Flow]:
        """Return the tokens and the state with which a layer runs: its cross token replaces the last token.

        Args:
            tokens: [batch, tokens, hidden].
            flow: the state of the pass.
            own: a cross token of the layer's own, [hidden]; by default that of the state.
        """
        if flow.cross is None:
            return tokens, flow
        carrier = tokens[:, -1] if flow.guide is None else _row(tokens, flow.guide)
        cross = carrier.detach() + (flow.cross[:, flow.layer] if own is None else own)
        tokens = torch.cat([tokens[:, :-1], cross.unsqueeze(1)], 1)
        return tokens, flow.with_cross(cross)

    def protected(self, tokens: Tensor, flow: Flow) -> tuple[Tensor, int]:
        """Return the tokens that are never merged, [batch, tokens] or [tokens], and their number per row."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        kept, count = places < self.prefix, self.prefix
        if flow.cross is not None:
            kept, count = kept | (places == tokens.shape[1] - 1), count + 1
        if flow.guide is not None:
            kept, count = kept | (places == flow.guide.unsqueeze(1)), count + 1
        return kept, count


class LayerPass:
    """One pass through one layer.

    Attributes:
        attentions, additions: numbers of intercepted operations, as a `Site` counts them.
        found: the match; None before merging, and if nothing is merged.
        size: number of original tokens in each token; see `Flow`.
    """

    def __init__(self, site: Site, flow: Flow, tokens: Tensor) -> None:
        self.merger: Merger = flow.owner
        self.flow, self.site = flow, site
        self.batch, self.tokens, _ = self.shape = tokens.shape
        self.size = flow.size
        self.found: Match | None = None
        self.attentions = self.additions = 0
        self.met = False
        self._operands: tuple[Tensor, Tensor] | None = None
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None
        self._probabilities: Tensor | None = None

    def meet(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the layer, and intercept the attention and the addition."""
        if func is FUSED:
            return self._fused(*args, **kwargs)
        if func is PACKED:
            return self._packed(*args, **kwargs)
        if func in SOFTMAXES and self._is_attention(args, kwargs):
            return self._softmax(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in PRODUCTS and self._square(result):
            self._operands = (args[0], args[1])
        elif func in SCALED_PRODUCTS and self._square(result):
            self._operands = (args[1], args[2])
        elif func in ADDITIONS and self._joins(args) and self.attentions > self.site.attention and not self.met:
            self.additions += 1
            if self.additions > self.site.addition:
                self.met = True
                return self._merged(result)
        return result

    def _square(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 2 and value.shape[-2:] == (self.tokens, self.tokens)

    def _joins(self, args: tuple[Any, ...]) -> bool:
        return len(args) > 1 and all(isinstance(each, Tensor) and each.shape == self.shape for each in args[:2])

    def _is_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        logits = args[0] if args else kwargs.get("input")
        over = args[1] if len(args) > 1 else kwargs.get("dim")
        return self._square(logits) and over in (-1, logits.dim() - 1)  # type: ignore[union-attr]

    def _here(self) -> bool:
        """Count an attention; return whether it is the one of the `Site`."""
        self.attentions += 1
        return self.attentions == self.site.attention + 1

    def _bias(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the bias of the logits, [batch, 1, 1 or tokens, tokens], or None."""
        bias = None if self.size is None else self.size.log()[:, None, None, :].to(dtype)
        if self.merger.causal:
            later = torch.full((self.tokens, self.tokens), -torch.inf, dtype=dtype, device=device).triu(1)
            bias = later[None, None] if bias is None else bias + later
        return bias

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        if query.shape[-2] != self.tokens or key.shape[-2] != self.tokens or not self._here():
            return FUSED(query, key, value, attn_mask, dropout_p, is_causal, **more)
        self._saw(query, key, more.get("scale"))
        if self.merger.causal:
            attn_mask, is_causal = None, False
        elif attn_mask is not None:
            attn_mask = self.flow.masked(attn_mask, self.tokens)
        bias = self._bias(query.dtype, query.device)
        if bias is not None and query.dim() == 3:
            bias = bias.expand(-1, query.shape[0] // self.batch, -1, -1).flatten(0, 1)
        if attn_mask is not None and bias is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=bias.dtype).masked_fill(~attn_mask, -torch.inf)
            bias = bias + attn_mask
        mask = attn_mask if bias is None else bias
        return FUSED(query, key, value, mask, dropout_p, is_causal, **more)

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._operands is None or not self._here():
            result: Tensor = func(*args, **kwargs)
            return result
        logits = args[0] if args else kwargs.pop("input")
        bias = self._bias(logits.dtype, logits.device)
        if bias is not None:
            logits = (logits.view(self.batch, -1, self.tokens, self.tokens) + bias).view(logits.shape)
        result = func(logits, *args[1:], **kwargs)
        queries, keys = self._operands
        self._saw(queries, keys.transpose(-1, -2), None)
        self._probabilities = result.detach()
        return result

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _width: int,
        heads: int,
        weight: Tensor | None,
        bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero: bool,
        dropout: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute torch.nn.MultiheadAttention, [tokens, batch, hidden], by parts, to see queries and keys."""
        special = [bias_k, bias_v, key_padding_mask, more.get("static_k"), more.get("static_v")]
        if weight is None or add_zero or not (query is key is value) or any(each is not None for each in special):
            raise LayoutError("an attention of torch with several inputs, a padding mask or extra keys")
        parts = F.linear(query, weight, bias).chunk(3, -1)
        split = [each.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for each in parts]  # [B, heads, T, head_dim]
        causal = bool(more.get("is_causal")) and attn_mask is None
        query, key, value = split
        attended = self._fused(query, key, value, attn_mask, dropout if training else 0.0, causal)
        joined = attended.permute(2, 0, 1, 3).flatten(2)
        return F.linear(joined, out_weight, out_bias), None

    def _saw(self, queries: Tensor, keys: Tensor, scale: float | None) -> None:
        """Keep queries and keys, [batch, heads, tokens, head_dim], without gradients."""
        shape = (self.batch, -1, self.tokens, queries.shape[-1])
        self._queries, self._keys = queries.detach().reshape(shape), keys.detach().reshape(shape)
        if self._keys.shape[1] != self._queries.shape[1]:  # grouped-query attention
            self._keys = self._keys.repeat_interleave(self._queries.shape[1] // self._keys.shape[1], 1)
        self._scale = self._queries.shape[-1] ** -0.5 if scale is None else scale

    def _merged(self, tokens: Tensor) -> Tensor:
        """Merge tokens in the sum of the stream and the attention's output."""
        merger = self.merger
        asked = merger.removed[self.flow.layer] if self.flow.layer < len(merger.removed) else 0
        protected, count = merger.protected(tokens, self.flow)
        remove = removable(self.tokens, count, asked)
        if not remove:
            if self.flow.cross is not None:
                note(tokens, self.flow.after(self.size, None))
            return tokens
        assert self._keys is not None
        size = self.flow.sizes(tokens)
        with torch.no_grad(), exactly(tokens):
            keys = precise(self._keys)
            joined = keys.transpose(1, 2).flatten(2)
            self.found = match(
                keys.mean(1) if merger.head_mean else joined,
                self._importance(joined),
                remove,
                protected,
                empty=None if merger.merge_padding or self.flow.guide is None else size == 0,
                weighted=merger.weighted,
            )
        merged, self.size = merge(tokens, size, self.found)
        note(merged, self.flow.after(self.size, self.found))
        return merged

    def _importance(self, keys: Tensor) -> Tensor:
        """Return the importance of each token, [batch, tokens], from the keys of all heads, [batch, tokens, hidden]."""
        assert self._queries is not None
        merger, guide = self.merger, self.flow.guide
        place = -1 if self.flow.cross is not None else 0 if merger.prefix else None
        if merger.guidance == "attention":
            attended = self._attention().mean(1)
            if place is None:
                return attended.mean(1)
            others = attended[:, :-1] if place == -1 else attended[:, 1:]
            return others.mean(1) + attended[:, place]
        queries = self._queries.transpose(1, 2).flatten(2).to(keys.dtype)
        if guide is not None:
            return cosine(keys, _row(queries, guide))
        return cosine(keys, queries.mean(1) if place is None else queries[:, place])

    def _attention(self) -> Tensor:
        if self._probabilities is not None:
            return self._probabilities.view(self.batch, -1, self.tokens, self.tokens)
        assert self._queries is not None and self._keys is not None
        logits = self._queries @ self._keys.transpose(-1, -2) * self._scale
        bias = self._bias(logits.dtype, logits.device)
        return (logits if bias is None else logits + bias).softmax(-1)


class _Mode(TorchFunctionMode):
    """Passes the operations of a layer to its `LayerPass`."""

    def __init__(self, layer: LayerPass) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation."""
        return self.layer.meet(func, args, dict(kwargs or {}))


@dataclass(eq=False)
class Place:
    """What a layer that merges keeps: its encoder's `Merger`, where it merges, and its number there."""

    merger: Merger
    site: Site
    number: int


_PLACE = "_upop_merging"
_classes: dict[type[nn.Module], type[nn.Module]] = {}


def place_of(layer: nn.Module) -> Place | None:
    """Return the merging of a layer, or None."""
    found = layer.__dict__.get(_PLACE)
    return found if isinstance(found, Place) else None


def set_merging(layer: nn.Module, place: Place | None) -> None:
    """Make a layer merge, or stop it (None). Its class becomes a subclass of the same name."""
    base = type(layer) if place_of(layer) is None else type(layer).__mro__[1]
    if place is None:
        if layer.__dict__.pop(_PLACE, None) is not None:
            layer.__class__ = base
        return
    layer.__dict__[_PLACE] = place
    layer.__class__ = _merging(base)


def _merging(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _classes and base.__dict__.get("wraps_forward"):
        # A checkpointed layer must recompute the merging forward, not the one inside it.
        inner = _merging(base.__mro__[1])
        names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _classes[base] = type(base.__name__, (base, inner), names)
    elif base not in _classes:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _run(self, base.forward, args, kwargs)

        forward.__doc__ = base.forward.__doc__
        names = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
        _classes[base] = type(base.__name__, (base,), names)
    return _classes[base]


def _run(layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a layer's own forward; its tokens are the first tensor among its inputs, and among its outputs."""
    place = place_of(layer)
    assert place is not None
    name = None if args else next(each for each, value in kwargs.items() if isinstance(value, Tensor))
    tokens: Tensor = args[0] if name is None else kwargs[name]
    flow = flow_of(tokens, place.merger)
    if flow is not None and flow.layer != place.number:
        flow = None
    if flow is None and place.number:
        raise LayoutError(
            f"A {type(layer).__name__} that merges tokens got other tokens than the layer before returned, so their "
            "sizes are unknown. Pass on its output unchanged (gradient checkpointing: use_reentrant=False)."
        )
    own = cross_token_of(layer)
    if flow is None:
        tokens = place.merger.start(tokens, cross=None if own is None else own.view(1, 1, -1))
        flow = flow_of(tokens, place.merger)
        assert flow is not None
    tokens, flow = place.merger.enter(tokens, flow, own)
    met = LayerPass(place.site, flow, tokens)
    with _Mode(met):
        result = (
            forward(layer, tokens, *args[1:], **kwargs) if name is None else forward(layer, **{**kwargs, name: tokens})
        )
    if not met.met:
        raise LayoutError(
            f"A {type(layer).__name__} cannot merge tokens: its implementation of attention is unknown. Use torch's "
            "scaled_dot_product_attention or plain softmax (attn_implementation='sdpa' or 'eager')."
        )
    after = flow.after(met.size, met.found)
    if place.merger.restored and after.layer == len(place.merger.removed):
        return with_first(result, after.unmerged(first_of(result)))
    carry(first_of(result), after)
    return result


def first_of(output: Any) -> Tensor:
    """Return the tokens in the output of a layer."""
    tokens: Tensor = output if isinstance(output, Tensor) else output[0]
    return tokens


def with_first(output: Any, tokens: Tensor) -> Any:
    """Return the output of a layer with other tokens."""
    return tokens if isinstance(output, Tensor) else type(output)([tokens, *output[1:]])


def _row(tokens: Tensor, places: Tensor) -> Tensor:
    """Return one token per row, [batch, hidden], from tokens [batch, tokens, hidden] and positions [batch]."""
    return tokens.gather(1, places[:, None, None].expand(-1, 1, tokens.shape[2])).squeeze(1)
