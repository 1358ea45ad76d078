"""Narrow heads for torch.nn.MultiheadAttention, and for callers of `F.multi_head_attention_forward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upop.pruning.uncut import Uncut, mixed


class _Calls(TorchFunctionMode):
    """Computes torch's attention function with the head width that the weights have."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return (_called if func is F.multi_head_attention_forward else func)(*args, **(kwargs or {}))


class NarrowCalls(Uncut):
    """Mixin for a module that calls `F.multi_head_attention_forward`, once its heads are narrower.

    Parameters, arguments and results stay those of the original class.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward; torch's function computes narrow heads for it."""
        with _Calls():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class NarrowMultihead(NarrowCalls):
    """Mixin for a `torch.nn.MultiheadAttention` with narrower heads."""

    # torch's encoder layers ask for this before they hand the weights to a fused kernel, which could not read them.
    _qkv_same_embed_dim = property(lambda _self: False)

    def forward(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend; nested tensors, which torch's encoder passes for sequences of several lengths, stay nested."""
        if query.is_nested:
            return _nested(super().forward, query, kwargs, batch_first=self.batch_first)
        return super().forward(query, *args, **kwargs)

    def _reset_parameters(self: Any) -> None:
        """Initialise the projections as torch does; transformers calls this after it has read a file.

        torch.nn.init gets whole parameters, since transformers marks the ones that it has read and must keep.
        """
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.constant_(bias, 0.0)


def _nested(
    forward: Callable[..., Any], query: Tensor, options: dict[str, Any], *, batch_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend within a batch of sequences of several lengths."""
    lengths = [len(each) for each in query.unbind()]
    padded = query.to_padded_tensor(0.0)
    places = torch.arange(padded.shape[1], device=padded.device)
    padding = places[None] >= torch.tensor(lengths, device=padded.device)[:, None]
    padded = padded if batch_first else padded.transpose(0, 1)
    options = {name: value for name, value in options.items() if name not in ("query", "key", "value")}
    found, weights = forward(padded, padded, padded, **{**options, "key_padding_mask": padding})
    found = found if batch_first else found.transpose(0, 1)
    parts = [each[:length] for each, length in zip(found, lengths, strict=True)]
    return torch.nested.as_nested_tensor(parts), weights


def _called(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001 - of the tokens, and no longer of the heads
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # noqa: ARG001 - a hint; torch demands the mask beside it
) -> tuple[Tensor, Tensor | None]:
    """Compute `F.multi_head_attention_forward` with its own arguments; return [tokens, batch, width]."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    weights: Sequence[Tensor | None] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if in_proj_weight is not None and (q_proj_weight is None or not use_separate_proj_weight):
        weights = in_proj_weight.chunk(3)
    biases = in_proj_bias.chunk(3) if in_proj_bias is not None else (None, None, None)
    queries, keys, values = (
        F.linear(tensor, weight, bias).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        for tensor, weight, bias in zip((query, key, value), weights, biases, strict=True)
        if weight is not None
    )
    keys = keys if static_k is None else static_k.unflatten(0, (-1, num_heads))
    values = values if static_v is None else static_v.unflatten(0, (-1, num_heads))
    mask = _mask(attn_mask, key_padding_mask, queries, num_heads)
    more = int(add_zero_attn)
    if bias_k is not None and bias_v is not None:
        more += 1
        keys, values = (
            torch.cat(
                [tensor, bias.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3).expand(len(tensor), -1, -1, -1)], 2
            )
            for tensor, bias in ((keys, bias_k), (values, bias_v))
        )
    if add_zero_attn:
        keys, values = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (keys, values))
    mask = None if mask is None else F.pad(mask, (0, more))
    dropout = dropout_p if training else 0.0
    shares = None
    if need_weights:
        scores = queries @ keys.transpose(-2, -1) * max(1, queries.shape[-1]) ** -0.5
        shares = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
        heads = shares @ values
        shares = shares.mean(1) if average_attn_weights else shares
    else:
        heads = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
    result = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if batched:
        return result, shares
    return result.squeeze(1), None if shares is None else shares.squeeze(0)


def _mask(attention: Tensor | None, padding: Tensor | None, queries: Tensor, heads: int) -> Tensor | None:
    """Combine both masks into one that is added to the scores, [batch or 1, heads or 1, queries, keys]."""
    masks = []
    if attention is not None:
        attention = attention if attention.dim() == 3 else attention.unsqueeze(0)
        per_head = attention.shape[0] == queries.shape[0] * heads
        masks.append(attention.unflatten(0, (-1, heads)) if per_head else attention.unsqueeze(1))
    if padding is not None:
        masks.append(padding[:, None, None, :])
    added = [
        torch.zeros_like(mask, dtype=queries.dtype).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask.to(queries.dtype)
        for mask in masks
    ]
    return None if not added else added[0] if len(added) == 1 else added[0] + added[1]


def narrow_multihead(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class for a cut module of class `kind` that calls torch's attention function."""
    if issubclass(kind, NarrowCalls):
        return kind
    return mixed(NarrowMultihead if issubclass(kind, nn.MultiheadAttention) else NarrowCalls, kind)
