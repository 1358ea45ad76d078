"""Fewer tokens in the image encoders of any model, without training: `merge_tokens`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from upop.pruning.axes.examples import example_for
from upop.pruning.axes.inputs import own_image_size
from upop.pruning.costs import call, evaluating
from upop.pruning.errors import LayoutError, SettingError
from upop.pruning.masks import unwrapped
from upop.tokens.layer import Merger, Place, place_of, set_merging
from upop.tokens.matching import removable
from upop.tokens.proofs import check_layers, check_readers, prefix_of
from upop.tokens.reading import Encoder, encoders

_NAME = "_upop_tokens_removed"


def merge_tokens(model: nn.Module, vision: int | float | Sequence[int], *, example: Any = None) -> nn.Module:
    """Have the layers of a model's image encoders merge tokens that are alike; the model is changed in place.

    Each layer matches its tokens by their keys (complete-graph matching, CrossGET, arXiv 2305.17455), keeps those that
    the class token looks for, and attends to merged tokens by how many they stand for. Nothing is trained, and no
    weight is changed; training goes through it. A model that was cut merges like any other.

    Args:
        model: any model with an image encoder whose layers are modules: timm's, transformers', open_clip's, one's own.
        vision: tokens that every layer removes; or as many as there are layers, one for each; or, between 0 and 1, the
            share of the encoder's multiply-adds to remove, for which one number is found. 0 takes merging off.
        example: inputs for one call, as `upop.find_prunable` takes them; made up where the model says what it takes.

    Returns:
        The model.

    Raises:
        LayoutError: no image encoder was found; or its layers, or what reads them, compute with the places of tokens
            (windows, relative or rotary positions, grids). The message says which. The model is as it was.
        SettingError: so many tokens are not there to be removed.
    """
    inner = unwrapped(model)
    _take_off(inner)
    if not (isinstance(vision, int) and vision == 0):
        _merge(inner, example, lambda _number, found: _removed(found, vision))
    return model


def merge_again(model: nn.Module, removed: Sequence[Sequence[int]]) -> nn.Module:
    """Have a model merge as `removed_tokens` said of it; everything is found and proved anew.

    Raises:
        LayoutError: as `merge_tokens`.
        SettingError: as `merge_tokens`; or the model has more encoders.
    """

    def again(number: int, found: _Proved) -> tuple[int, ...]:
        # Counts were looked at when they were asked for; images may have another size here.
        return _listed(found, removed[number] if number < len(removed) else ())

    return _merge(model, None, again)


def removed_tokens(model: nn.Module) -> list[list[int]] | None:
    """Return what every layer of every image encoder removes; None where `merge_tokens` changed nothing."""
    return getattr(unwrapped(model), _NAME, None)


@dataclass(frozen=True)
class _Proved:
    """An encoder whose tokens may be merged, but for so many first ones; `tokens` is how many its first layer takes."""

    encoder: Encoder
    prefix: int
    tokens: int


def _merge(model: nn.Module, example: Any, plan: Callable[[int, _Proved], tuple[int, ...]]) -> nn.Module:
    if any(place_of(each) is not None for each in model.modules()):
        raise SettingError(
            f"This {type(model).__name__} merges tokens already, led by cross tokens. Set how many by its set_removed, "
            "or by --rv and --rl."
        )
    made_up, example = example is None, example_for(model) if example is None else example
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # another image than that of an example, which is made up with 0
        found = [_proved(model, example, each) for each in encoders(model, example) if each.inputs == {"pixels"}]
    if not found:
        raise LayoutError(
            f"No image encoder whose tokens can be merged was found in this {type(model).__name__}: that takes layers "
            "with attention among all tokens of an image, each given what the one before it returned. Windows of "
            "tokens and grids are none."
        )
    if made_up:
        found = _as_large(model, example, found)
    # All are planned before any is changed.
    plans = [(each, plan(number, each)) for number, each in enumerate(found)]
    for each, removed in plans:
        merger = Merger(removed, prefix=each.prefix, head_mean=True, weighted=False)
        for number, layer in enumerate(each.encoder.layers):
            set_merging(layer.call.module, Place(merger, layer.site, number))
    try:
        with evaluating(model):
            call(model, example)
    except Exception as error:
        for layer in (layer for each in found for layer in each.encoder.layers):
            set_merging(layer.call.module, None)
        raise LayoutError(
            f"With fewer tokens {type(model).__name__} does not run: {error}. What reads the encoder needs as many as "
            "there were; give merge_tokens the encoder alone if the rest is told how many there are."
        ) from error
    setattr(model, _NAME, [list(removed) for _, removed in plans])
    return model


def _proved(model: nn.Module, example: Any, encoder: Encoder) -> _Proved:
    modules = [each.call.module for each in encoder.layers]
    try:
        if len(set(modules)) < len(modules):
            raise LayoutError("one module is several of its layers")
        prefix = prefix_of(model, example, encoder)
        check_layers(encoder, prefix)
        check_readers(model, example, encoder, prefix)
    except LayoutError as error:
        raise LayoutError(
            f"The tokens of the encoder {encoder.layers[0].call.path} to {encoder.layers[-1].call.path} cannot be "
            f"merged: {error}."
        ) from None
    return _Proved(encoder, prefix, encoder.tokens.shape[1])


def _as_large(model: nn.Module, example: Any, found: list[_Proved]) -> list[_Proved]:
    """Return encoders with as many tokens as they take of the images that the model says it takes.

    What is made up for a model that takes images of any size is a small one.
    """
    size = own_image_size(model) or 0

    def enlarged(value: Any) -> Any:
        is_small = isinstance(value, Tensor) and value.dim() > 3 and value.shape[-2] == value.shape[-1] < size
        return torch.randn(*value.shape[:-2], size, size).to(value) if is_small else value

    large = tree_map(enlarged, example)
    if all(one is other for one, other in zip(tree_leaves(large), tree_leaves(example), strict=True)):
        return found
    counts: dict[str, int] = {}

    def note(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        counts.setdefault(path, tokens.shape[1])

    first = [each.encoder.layers[0].call for each in found]
    hooks = [
        each.module.register_forward_pre_hook(
            lambda _, args, kwargs, path=each.path: note(path, args, kwargs), with_kwargs=True
        )
        for each in first
    ]
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            call(model, large)
    except Exception:  # it takes images of that one size alone, whatever it says of itself
        return found
    finally:
        for hook in hooks:
            hook.remove()
    return [replace(each, tokens=counts.get(at.path, each.tokens)) for each, at in zip(found, first, strict=True)]


def _listed(found: _Proved, asked: int | Sequence[int]) -> tuple[int, ...]:
    """Return one number for each layer."""
    depth = len(found.encoder.layers)
    removed = tuple(asked) if isinstance(asked, Sequence) else (asked,) * depth
    if len(removed) != depth or min(removed) < 0:
        raise SettingError(
            f"vision={list(removed)} was asked for, and the encoder has {depth} layers. Give one number for all, or "
            f"{depth} numbers of 0 or more."
        )
    return removed


def _removed(found: _Proved, asked: int | float | Sequence[int]) -> tuple[int, ...]:
    if isinstance(asked, float):
        return _within(found, asked)
    removed = _listed(found, asked)
    counts, depth = _counts(found, removed), len(removed)
    for layer, (tokens, wanted) in enumerate(zip(counts, removed, strict=False)):
        if wanted and not removable(tokens, found.prefix, wanted):
            raise SettingError(
                f"vision={asked} leaves nothing to merge: layer {layer} of {depth} would have {tokens} tokens, "
                f"{found.prefix} of them protected. At most {_most(found)} can go from every layer."
            )
    return removed


def _counts(found: _Proved, removed: Sequence[int]) -> list[int]:
    """Return how many tokens every layer starts with, and how many are left."""
    counts = [found.tokens]
    for asked in removed:
        counts.append(counts[-1] - removable(counts[-1], found.prefix, asked))
    return counts


def _most(found: _Proved) -> int:
    """Return the largest number of tokens that each layer can remove, the last ones perhaps fewer."""
    depth = len(found.encoder.layers)
    fits = [
        asked
        for asked in range(1, found.tokens)
        if all(removable(tokens, found.prefix, 1) for tokens in _counts(found, (asked,) * depth)[:-1])
    ]
    return max(fits, default=0)


def _within(found: _Proved, share: float) -> tuple[int, ...]:
    """Return the smallest equal numbers for which the layers cost so much less."""
    if not 0 < share < 1:
        raise SettingError(f"vision={share} is no share of the multiply-adds. Give a number between 0 and 1.")
    depth, most = len(found.encoder.layers), _most(found)
    dense = _cost(found, (0,) * depth)
    for asked in range(1, most + 1):
        removed = (asked,) * depth
        if _cost(found, removed) <= (1 - share) * dense:
            return removed
    reached = 1 - _cost(found, (most,) * depth) / dense
    raise SettingError(
        f"vision={share} asks for {share:.0%} of the encoder's multiply-adds, and merging can save {reached:.0%} of "
        f"them, by {most} tokens per layer. Ask for less, and cut weights for the rest."
    )


def _cost(found: _Proved, removed: Sequence[int]) -> float:
    """Return the multiply-adds of the layers: those of attention on all tokens, the rest on those that are left."""
    counts, width, total = _counts(found, removed), found.encoder.tokens.shape[2], 0.0
    for layer, before, after in zip(found.encoder.layers, counts[:-1], counts[1:], strict=True):
        weights = sum(each.numel() for each in layer.call.module.parameters() if each.dim() > 1)
        attention = min(4 * width**2, weights)
        total += before * attention + after * (weights - attention) + 2 * before**2 * width
    return total


def _take_off(model: nn.Module) -> None:
    for layer in model.modules():
        if place_of(layer) is not None and removed_tokens(model) is not None:
            set_merging(layer, None)
    vars(model).pop(_NAME, None)
