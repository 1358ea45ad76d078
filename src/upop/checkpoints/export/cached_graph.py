"""The graph of a generating decoder, with its key-value cache as inputs and outputs.

One graph takes the prompt (with an empty cache) and every token after it. Inputs and outputs have optimum's names:
`past_key_values.N.key`, `present.N.key`. Layers may differ in key-value heads and head_dim, as after a cut; a layer
without attention has no cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upop.checkpoints.export.any_graph import AnyGraph, axes_of, untraceable
from upop.errors import SettingError
from upop.libraries import is_pretrained
from upop.pruning.costs import evaluating

_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"
_CACHES = ("cache", "past_key_values")
"""Names of the argument in transformers: since 5.24, and before."""
_TRACED = (2, 3, 5)
"""Batch, tokens and cached tokens of the trace: all different, and so is their sum."""


@dataclass(frozen=True)
class CachedGraph(AnyGraph):
    """A traced graph of one call of a decoder with its cache.

    Attributes:
        words: vocabulary size, for random token ids.
        cached: per cached layer: its index, key-value heads, and head_dim of keys and of values.
    """

    cached: tuple[tuple[int, int, int, int], ...] = ()

    def draw(self, batch: int, tokens: int) -> tuple[Tensor, ...]:
        """Return inputs of a call: for a batch of 1 a prompt, for a larger one the next token of several texts."""
        return self.drawn(batch, tokens, 0) if batch == 1 else self.drawn(batch, 1, tokens)

    def drawn(self, batch: int, tokens: int, past: int) -> tuple[Tensor, ...]:
        """Return random token ids, a mask with left padding in the last text, positions, and keys and values."""
        generator = torch.Generator().manual_seed(batch)
        mask = torch.ones(batch, past + tokens, dtype=torch.long)
        mask[-1, : past // 2] = 0
        given = [torch.randint(1, self.words, (batch, tokens), generator=generator), mask]
        if _POSITIONS in self.inputs:
            given.append((mask.cumsum(1) - 1).clamp(min=0)[:, past:].clone())
        for _, heads, key, value in self.cached:
            given += [torch.randn(batch, heads, past, size, generator=generator) for size in (key, value)]
        return tuple(given)


class _OneStep(nn.Module):
    """A decoder that takes and gives its cache as tensors."""

    def __init__(self, model: nn.Module, layers: tuple[int, ...], names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self._layers, self._names = layers, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        given = dict(zip(self._names, inputs, strict=False))
        past, cache = inputs[len(self._names) :], DynamicCache()
        for place, layer in enumerate(self._layers):
            cache.update(past[2 * place], past[2 * place + 1], layer)
        out = self.model(**given, **{_taken(self.model): cache}, use_cache=True)
        held = _given(out).layers
        return (out.logits, *(value for layer in self._layers for value in (held[layer].keys, held[layer].values)))


def graph_with_cache(model: nn.Module) -> CachedGraph:
    """Return the graph of one call of a decoder, with its cache as inputs and outputs.

    Args:
        model: a transformers decoder, on the CPU, in evaluation mode and in float32.

    Raises:
        SettingError: its cache holds no keys and values, or torch.export cannot trace it; the message gives the reason
            and alternatives.
    """
    names = _names(model)
    words = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    try:
        with evaluating(model):
            cached = tuple(_held_by(model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True)))
    except Exception as error:  # a model's own
        raise _refused(model, f"a call with a cache fails: {' '.join(str(error).split())[:200]}") from error
    if not cached:
        raise _refused(model, "its cache holds no keys and values by layer")
    layers = tuple(layer for layer, *_ in cached)
    inputs = (*names, *(f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")))
    outputs = ("logits", *(f"present.{layer}.{part}" for layer in layers for part in ("key", "value")))
    graph = CachedGraph(
        lambda model, *given: _OneStep(model, layers, names)(*given),
        dict.fromkeys(inputs, ()),
        outputs,
        words=words,
        cached=cached,
    )
    example = graph.drawn(*_TRACED)
    auto = torch.export.Dim.AUTO
    free = tuple({0: auto, 2 if value.dim() == 4 else 1: auto} for value in example)
    try:
        with evaluating(model):
            traced = torch.export.export(
                _OneStep(model, layers, names).eval(), example, dynamic_shapes={"inputs": free}, strict=False
            )
    except Exception as error:  # one of the many of torch.export
        raise untraceable(model, error) from error
    axes, symbols, ranges = axes_of(traced, inputs, _called)
    return CachedGraph(
        graph.forward,
        axes,
        outputs,
        words=words,
        traced=traced,
        example=example,
        symbols=symbols,
        ranges=ranges,
        cached=cached,
    )


def _names(model: nn.Module) -> tuple[str, ...]:
    """Return the arguments of a decoder's call except its cache."""
    asked = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    if not is_pretrained(model) or not model.can_generate() or not _taken(model) or _IDS not in asked:
        raise _refused(model, "it is not a transformers model that generates token by token")
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(model, "it has an encoder beside its decoder")
    return (_IDS, _MASK, *([_POSITIONS] if _POSITIONS in asked else []))


def _taken(model: nn.Module) -> str:
    """Return the name of the cache argument, or ""."""
    asked = inspect.signature(model.forward).parameters
    return next((name for name in _CACHES if name in asked), "")


def _given(outputs: Any) -> Any:
    """Return the cache in the outputs of a call, or None."""
    return next((getattr(outputs, name) for name in _CACHES if getattr(outputs, name, None) is not None), None)


def _held_by(outputs: Any) -> Iterator[tuple[int, int, int, int]]:
    """Yield index, key-value heads, and head_dim of keys and of values, for every layer in a cache."""
    for layer, held in enumerate(getattr(_given(outputs), "layers", ())):
        keys, values = getattr(held, "keys", None), getattr(held, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4:
            yield layer, keys.shape[1], keys.shape[3], values.shape[3]


def _called(name: str, place: int) -> str:
    """Return the name of a dynamic axis of an input."""
    if place == 0:
        return "batch"
    return "tokens" if name in (_IDS, _POSITIONS) else "all_tokens" if name == _MASK else "past_tokens"


def _refused(model: nn.Module, why: str) -> SettingError:
    return SettingError(
        f"upop cannot export a {type(model).__name__} with a cache: {why}. Export it without one, as one call "
        "(cache=False, without --cache)."
    )
