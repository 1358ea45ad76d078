"""torch.nn.MultiheadAttention at any width of its heads, for the class itself and for those made of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """A MultiheadAttention whose heads are narrower than its tokens; torch's own insists that they are not.

    Parameters, arguments and results are those of `torch.nn.MultiheadAttention`, of which an instance takes on this
    class when it is cut.
    """

    uncut_class = nn.MultiheadAttention
    # torch's encoder layers ask for this before they hand the weights to a fused kernel, which could not read them.
    _qkv_same_embed_dim = property(lambda _self: False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002 - a hint; torch demands the mask beside it
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; shapes as in `torch.nn.MultiheadAttention`: [tokens, batch, width], or as batch_first says.

        torch's encoder hands sequences of several lengths on as nested tensors, which come back as such.
        """
        if query.is_nested:
            return self._nested(query, need_weights=need_weights, attn_mask=attn_mask)
        batched = query.dim() == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        queries, keys, values = (
            F.linear(tensor, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tensor, weight, bias in zip((query, key, value), self._weights(), biases, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, queries)
        if self.add_zero_attn:
            keys, values = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (keys, values))
            mask = None if mask is None else F.pad(mask, (0, 1))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = F.dropout(weights, dropout)
            heads = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        result = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return (result if self.batch_first else result.transpose(0, 1)), weights

    def _nested(self, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Attend within sequences of several lengths."""
        lengths = [len(each) for each in tokens.unbind()]
        padded = tokens.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        padding = places[None] >= torch.tensor(lengths, device=padded.device)[:, None]
        padded = padded if self.batch_first else padded.transpose(0, 1)
        found, weights = self(padded, padded, padded, key_padding_mask=padding, **options)
        found = found if self.batch_first else found.transpose(0, 1)
        parts = [each[:length] for each, length in zip(found, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts), weights

    def _reset_parameters(self) -> None:
        """Give the projections fresh weights, as torch does; transformers calls it when it has read a file.

        Whole parameters are handed to torch.nn.init: transformers marks on them what it has read and is to stay.
        """
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.constant_(bias, 0.0)

    def _weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _mask(self, attention: Tensor | None, padding: Tensor | None, queries: Tensor) -> Tensor | None:
        """Return both masks as one that is added to scores, [batch or 1, heads or 1, queries, keys]."""
        masks = []
        if attention is not None:
            attention = attention if attention.dim() == 3 else attention.unsqueeze(0)
            per_head = attention.shape[0] == queries.shape[0] * self.num_heads
            masks.append(attention.unflatten(0, (-1, self.num_heads)) if per_head else attention.unsqueeze(1))
        if padding is not None:
            masks.append(padding[:, None, None, :])
        added = [
            torch.zeros_like(mask, dtype=queries.dtype).masked_fill(mask, float("-inf"))
            if mask.dtype == torch.bool
            else mask.to(queries.dtype)
            for mask in masks
        ]
        return None if not added else added[0] if len(added) == 1 else added[0] + added[1]


_classes: dict[type[nn.Module], type[nn.Module]] = {nn.MultiheadAttention: NarrowMultiheadAttention}


def narrow_multihead(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a MultiheadAttention of class `kind` takes on when it is cut.

    What `kind` adds to torch's class stays: its forward, where it has one, calls the narrow one for torch's.
    """
    if kind not in _classes:
        content = {"uncut_class": kind, "__reduce__": _reduced}
        _classes[kind] = type(f"Narrow{kind.__name__}", (kind, NarrowMultiheadAttention), content)
    return _classes[kind]


def _reduced(self: nn.Module) -> object:
    """Copy and pickle by the class as it was: no module holds the narrow one."""
    return _revived, (type(self).__dict__["uncut_class"],), self.__dict__


def _revived(kind: type[nn.Module]) -> nn.Module:
    return narrow_multihead(kind).__new__(narrow_multihead(kind))
