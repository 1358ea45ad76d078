"""Modules of torch.nn whose weights are read past the layers: MultiheadAttention, and the fused encoder layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop.pruning.layouts.elements import element_function
from upop.pruning.layouts.reading import NotPrunableError, checked, columns_of, layer_at, modality_of, rows_of, widths
from upop.pruning.units import Attribute, Slice, Swap, Unit


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


def read_multihead(model: nn.Module, name: str, module: nn.MultiheadAttention) -> Unit:
    """Return the unit of torch's own attention: dimensions, the same in every head.

    Raises:
        NotPrunableError: it adds learned keys and values, or a layer of it cannot be cut.
    """
    if module.bias_k is not None or module.bias_v is not None:
        raise NotPrunableError("it adds a learned key and value (add_bias_kv)")
    heads = module.num_heads
    output = f"{name}.out_proj" if name else "out_proj"
    size = widths(layer_at(model, output))[0] // heads
    packed = [("in_proj_weight", 3 * heads, heads), ("in_proj_bias", 3 * heads, heads)]
    apart = [("q_proj_weight", heads, heads), ("k_proj_weight", heads, 0), ("v_proj_weight", heads, 0)]
    slices = [
        Slice(f"{name}.{part}" if name else part, 0, outer, query_groups=queries, direct=True)
        for part, outer, queries in (*apart, *packed)
        if module._parameters.get(part) is not None
    ]
    unit = Unit(
        name,
        "attention",
        modality_of(model, name),
        size,
        heads,
        (*slices, columns_of(model, output, outer=heads)),
        (Attribute(name, "head_dim"),),
        (Swap(name, NarrowMultiheadAttention, "multihead"),),
    )
    return checked(model, unit)


def read_encoder_layer(model: nn.Module, name: str, module: nn.TransformerEncoderLayer) -> Unit:
    """Return the MLP of torch's own encoder layer, whose fused kernel reads the weights past the layers' forward.

    Raises:
        NotPrunableError: its activation does not leave 0 at 0, or a layer of it cannot be cut.
    """
    first, second = (f"{name}.{layer}" if name else layer for layer in ("linear1", "linear2"))
    if not element_function(module.activation):
        raise NotPrunableError("its activation does not leave 0 at 0")
    slices = (*rows_of(model, first, direct=True), columns_of(model, second))
    size = widths(layer_at(model, first))[1]
    return checked(model, Unit(first, "mlp", modality_of(model, name), size, 1, slices, entry="neuron"))
