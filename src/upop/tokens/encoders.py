"""Merges tokens in the image encoders of any model, without training: `merge_tokens`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from upop.pruning.merged import suspenders
from upop.pruning.slips import check_model
from upop.pruning.traits import momentum_encoders
from upop.tokens.cross import cross_token_of
from upop.tokens.layer import Merger, Place, place_of, set_merging
from upop.tokens.matching import removable, token_counts
from upop.tokens.proofs import check_layers, places_matter, prefix_of
from upop.tokens.reading import Call, Encoder, encoders

_NAME = "_upop_tokens_removed"


def merge_tokens(model: nn.Module, vision: int | float | Sequence[int], *, example: Any = None) -> nn.Module:
    """Make the layers of a model's image encoders merge similar tokens, in place.

    Each layer matches its tokens by their keys (complete-graph matching, CrossGET, arXiv 2305.17455), keeps those most
    similar to the class token's query, and weighs merged tokens in attention by their size. No weight changes, and
    gradients flow through merging. Compressed models merge like others. If the rest of the model reads a grid of tokens
    (segmentation), all positions are restored after the last layer, each with its merged token.

    Args:
        model: any model with an image encoder whose layers are modules: of timm, transformers, open_clip, or custom.
        vision: number of tokens to remove in every layer; or a list with one number per layer; or, between 0 and 1, the
            share of the encoder's multiply-adds to remove, equally in all layers. 0 removes merging.
        example: inputs for one forward pass, as for `upop.find_prunable`; generated if the model declares its inputs.

    Returns:
        The model.

    Raises:
        LayoutError: no image encoder was found; or its layers, or modules that read tokens between them, depend on
            positions (windows, relative or rotary positions, grids); the message names them. The model is unchanged.
        SettingError: there are fewer tokens to remove.
    """
    check_model(model, "merge_tokens()")
    inner = unwrapped(model)
    _check_numbers(vision)
    _take_off(inner)
    if not (isinstance(vision, int) and vision == 0):
        _merge(inner, example, lambda _number, found: _removed(found, vision))
    return model


def merge_again(model: nn.Module, removed: Sequence[Sequence[int]], example: Any = None) -> nn.Module:
    """Restore merging from the result of `removed_tokens`; the model is traced and verified again.

    Raises:
        LayoutError: as `merge_tokens`.
        SettingError: as `merge_tokens`; or the model has more encoders.
    """

    def again(number: int, found: Mergeable) -> tuple[int, ...]:
        # Counts were checked when merging was set up; images may have another size here.
        return _listed(found, removed[number] if number < len(removed) else ())

    return _merge(model, example, again)


def removed_tokens(model: nn.Module) -> list[list[int]] | None:
    """Return the number of removed tokens, per image encoder and layer; None without merging."""
    return getattr(unwrapped(model), _NAME, None)


def prepare_merging(model: nn.Module, example: Any = None) -> list[Mergeable]:
    """Prepare a model's image encoders for merging without removing tokens yet, and return them.

    Raises:
        LayoutError: as `merge_tokens`.
    """
    found: list[Mergeable] = []

    def none(_number: int, each: Mergeable) -> tuple[int, ...]:
        found.append(each)
        return (0,) * len(each.encoder.layers)

    _merge(unwrapped(model), example, none)
    return found


def set_removed(model: nn.Module, removed: Sequence[Sequence[int]]) -> None:
    """Set how many tokens every layer of every encoder removes; the model must be prepared for merging."""
    model = unwrapped(model)
    for layer in model.modules():
        if (place := place_of(layer)) is not None:
            place.merger.removed = tuple(removed[place.merger.encoder])
    setattr(model, _NAME, [list(each) for each in removed])


@dataclass(frozen=True)
class Mergeable:
    """An encoder whose tokens can be merged.

    Attributes:
        encoder: the encoder.
        prefix: so many first tokens may not.
        tokens: how many its first layer takes.
        restored: whether what reads the encoder needs as many, so that they are put back behind its last layer.
    """

    encoder: Encoder
    prefix: int
    tokens: int
    restored: bool


def _merge(model: nn.Module, example: Any, plan: Callable[[int, Mergeable], tuple[int, ...]]) -> nn.Module:
    if any(place_of(each) is not None for each in model.modules()):
        raise SettingError(
            f"This {type(model).__name__} merges tokens already, guided by cross tokens. Set their number by its "
            "set_removed, or by --rv and --rl."
        )
    made_up, example = example is None, example_for(model) if example is None else example
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found, reasons = _all_proved(model, example)
    if not found and reasons:
        raise reasons[0]
    if not found:
        raise LayoutError(
            f"No image encoder whose tokens can be merged was found in this {type(model).__name__}: its layers must "
            "attend over all tokens of an image, and each must take the output of the one before. Windows, grids, and "
            "rows of the patches of several images do not qualify."
        )
    if made_up:
        found = _as_large(model, example, found)
    # All encoders are planned before any is changed.
    plans = [(each, plan(number, each)) for number, each in enumerate(found)]
    for encoder, (each, removed) in enumerate(plans):
        sites = [layer.site for layer in each.encoder.layers]
        for layers in _with_momentum(model, [layer.call for layer in each.encoder.layers]):
            led = all(cross_token_of(layer) is not None for layer in layers)  # which is then as published
            merger = Merger(
                removed, each.prefix, head_mean=not led, weighted=led, restored=each.restored, encoder=encoder
            )
            for number, (layer, site) in enumerate(zip(layers, sites, strict=True)):
                set_merging(layer, Place(merger, site, number))
    try:
        with evaluating(model):
            call(model, example)
    except Exception as error:
        for layer in model.modules():
            set_merging(layer, None)
        raise LayoutError(
            f"With fewer tokens {type(model).__name__} does not run: {error}. The rest of the model needs all tokens; "
            "give merge_tokens the encoder alone if you handle their number."
        ) from error
    setattr(model, _NAME, [list(removed) for _, removed in plans])
    return model


def _with_momentum(model: nn.Module, layers: Sequence[Call]) -> Iterator[list[nn.Module]]:
    """Yield the layers of an encoder, and those of its momentum encoder, if there is one."""
    yield [layer.module for layer in layers]
    for name, copy in momentum_encoders(model).items():
        if all(layer.path.startswith(f"{name}.") for layer in layers):
            yield [model.get_submodule(copy + layer.path.removeprefix(name)) for layer in layers]


def _all_proved(model: nn.Module, example: Any) -> tuple[list[Mergeable], list[LayoutError]]:
    """Return the image encoders whose tokens can be merged, and the reasons against the others."""
    found: list[Mergeable] = []
    reasons: list[LayoutError] = []
    for each in encoders(model, example):
        try:
            found += [_proved(model, example, each)] if "pixels" in each.inputs else []
        except LayoutError as error:
            reasons.append(error)
    return found, reasons


def _proved(model: nn.Module, example: Any, encoder: Encoder) -> Mergeable:
    modules = [each.call.module for each in encoder.layers]
    try:
        if encoder.inputs != {"pixels"}:
            raise LayoutError("they are computed from images together with integers (words, a mask, grid sizes)")
        if len(set(modules)) < len(modules):
            raise LayoutError("several of its layers are one module")
        prefix = prefix_of(model, example, encoder)
        check_layers(encoder, prefix)
        restored = places_matter(model, example, encoder, prefix)
    except LayoutError as error:
        raise LayoutError(
            f"The tokens of the encoder {encoder.layers[0].call.path} to {encoder.layers[-1].call.path} cannot be "
            f"merged: {error}."
        ) from None
    return Mergeable(encoder, prefix, encoder.tokens.shape[1], restored)


def _as_large(model: nn.Module, example: Any, found: list[Mergeable]) -> list[Mergeable]:
    """Return encoders with the number of tokens for the image size that the model declares.

    Generated images are small for models that accept any size.
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
    except Exception:  # it only accepts the size of the example
        return found
    finally:
        for hook in hooks:
            hook.remove()
    return [replace(each, tokens=counts.get(at.path, each.tokens)) for each, at in zip(found, first, strict=True)]


def _listed(found: Mergeable, asked: int | Sequence[int]) -> tuple[int, ...]:
    """Return one number for each layer."""
    depth = len(found.encoder.layers)
    removed = tuple(asked) if isinstance(asked, Sequence) else (asked,) * depth
    if len(removed) != depth or min(removed) < 0:
        raise SettingError(
            f"vision is one number of at least 0 for all layers, or one for each of the encoder's {depth} layers; "
            f"found {list(removed)}."
        )
    return removed


def _check_numbers(vision: object) -> None:
    """Raise a `SettingError` unless it is a number, or whole numbers in a list."""
    each = vision if isinstance(vision, Sequence) and not isinstance(vision, str) else [vision]
    if any(
        isinstance(number, bool) or not isinstance(number, int | float if vision is number else int) for number in each
    ):
        raise SettingError(
            f"vision={vision!r} is no number of tokens. Give one integer for all layers, a list with one per layer, or "
            "a share of the multiply-adds between 0 and 1."
        )


def _removed(found: Mergeable, asked: int | float | Sequence[int]) -> tuple[int, ...]:
    if isinstance(asked, float):
        return _within(found, asked)
    removed = _listed(found, asked)
    counts, depth = _counts(found, removed), len(removed)
    for layer, (tokens, wanted) in enumerate(zip(counts, removed, strict=False)):
        # A layer gives away half of its free tokens at most; who asks for all that there are has mistaken something.
        if wanted and (not removable(tokens, found.prefix, wanted) or wanted >= found.tokens - found.prefix):
            raise SettingError(
                f"vision={asked} leaves nothing to merge: layer {layer} of {depth} would have {tokens} tokens, "
                f"{found.prefix} of them protected. At most {most_removed(found)} can be removed from every layer."
            )
    return removed


def _counts(found: Mergeable, removed: Sequence[int]) -> list[int]:
    """Return the number of tokens before every layer, and after the last."""
    return token_counts(found.tokens, found.prefix, removed)


def most_removed(found: Mergeable) -> int:
    """Return the largest number of tokens that each layer of an encoder can remove; the last ones may remove fewer."""
    depth = len(found.encoder.layers)
    fits = [
        asked
        for asked in range(1, found.tokens - found.prefix)
        if all(removable(tokens, found.prefix, 1) for tokens in _counts(found, (asked,) * depth)[:-1])
    ]
    return max(fits, default=0)


def _within(found: Mergeable, share: float) -> tuple[int, ...]:
    """Return the smallest number per layer that saves a share of the multiply-adds."""
    if not 0 < share < 1:
        raise SettingError(f"vision={share} is no share of the multiply-adds. Give a number between 0 and 1.")
    depth, most = len(found.encoder.layers), most_removed(found)
    dense = _cost(found, (0,) * depth)
    for asked in range(1, most + 1):
        removed = (asked,) * depth
        if _cost(found, removed) <= (1 - share) * dense:
            return removed
    reached = 1 - _cost(found, (most,) * depth) / dense
    raise SettingError(
        f"vision={share} asks for {share:.0%} of the encoder's multiply-adds, and merging can save {reached:.0%} of "
        f"them, by {most} tokens per layer. Ask for less, and prune weights for the rest."
    )


def _cost(found: Mergeable, removed: Sequence[int]) -> float:
    """Return the multiply-adds of the layers: attention on all tokens, the rest on the kept ones."""
    counts, width, total = _counts(found, removed), found.encoder.tokens.shape[2], 0.0
    for layer, before, after in zip(found.encoder.layers, counts[:-1], counts[1:], strict=True):
        weights = sum(each.numel() for each in layer.call.module.parameters() if each.dim() > 1)
        attention = min(4 * width**2, weights)
        total += before * attention + after * (weights - attention) + 2 * before**2 * width
    return total


@contextmanager
def _all_tokens(model: nn.Module) -> Iterator[None]:
    """Have every layer remove no tokens within the block; cross tokens stay, since they are part of the model."""
    mergers = {id(place.merger): place.merger for layer in model.modules() if (place := place_of(layer)) is not None}
    removed = {key: merger.removed for key, merger in mergers.items()}
    try:
        for merger in mergers.values():
            merger.removed = (0,) * len(merger.removed)
        yield
    finally:
        for key, merger in mergers.items():
            merger.removed = removed[key]


suspenders.append(_all_tokens)


def _take_off(model: nn.Module) -> None:
    for layer in model.modules():
        if place_of(layer) is not None and removed_tokens(model) is not None:
            set_merging(layer, None)
    vars(model).pop(_NAME, None)
