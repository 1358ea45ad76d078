"""Checks numerically whether the tokens of an encoder can be merged: nothing may depend on their positions.

Merging treats tokens as a set. So does a layer if permuted tokens give permuted outputs; with relative positions,
windows or rotary embeddings they do not. Modules that read tokens of the encoder must not depend on positions either:
the model's outputs must stay the same or be permuted, or else become so when the last tokens are restored. Weights that
are zero are filled with noise for this check, so that tables which training is yet to fill count.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from upop.pruning.costs import call, evaluating
from upop.pruning.errors import LayoutError
from upop.tokens.layer import with_first
from upop.tokens.reading import Encoder, Found

_NOISE = 0.1
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
_COARSE = 5e-2
"""Largest relative difference that another order of summation may cause, in other precisions."""


def prefix_of(model: nn.Module, example: Any, encoder: Encoder) -> int:
    """Return the number of first tokens that do not depend on the image, such as class tokens.

    Raises:
        LayoutError: such tokens are elsewhere in the sequence.
    """

    def changed_from(leaf: Any) -> Any:  # whatever it was drawn with
        return torch.randn_like(leaf) - leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    other = tree_map(changed_from, example)
    with evaluating(model):
        changed = _tokens_with(model, other, encoder.layers[0])
    if changed.shape != encoder.tokens.shape:
        raise LayoutError("the number of tokens depends on the image's content")
    fixed = (changed == encoder.tokens).all(2).all(0)
    count = int((~fixed).int().argmax()) if not fixed.all() else len(fixed)
    if count == len(fixed) or fixed[count:].any():
        raise LayoutError("tokens that do not depend on the image are among those that do")
    return count


def check_layers(encoder: Encoder, prefix: int) -> None:
    """Raise a `LayoutError` if a layer depends on the order of tokens."""
    order = _order(encoder.tokens.shape[1], prefix, encoder.tokens.device)
    for found in encoder.layers:
        layer = copy.deepcopy(found.call.module)
        with evaluating(layer):
            for parameter in layer.parameters():
                parameter.add_(_NOISE * torch.randn_like(parameter))
            plain, mixed = (_run(layer, found, each) for each in (None, order))
        if not _alike(plain[:, order], mixed):
            raise LayoutError(
                f"{found.call.path} depends on the positions of its tokens (windows, relative or rotary positions, a "
                "mask), which merging would change"
            )


def places_matter(model: nn.Module, example: Any, encoder: Encoder, prefix: int) -> bool:
    """Return whether the rest of the model needs the last tokens at their original positions.

    Raises:
        LayoutError: modules that read tokens between the layers, or after them, depend on positions in any case.
    """
    order = _order(encoder.tokens.shape[1], prefix, encoder.tokens.device)
    with evaluating(model), _filled(model):
        plain = _outputs(model, example)
        for back in (False, True):
            with _mixed(encoder, order, back=back):
                mixed = _outputs(model, example)
            if all(
                any(_alike(each, other) for each in (one, *_reordered(one, order, prefix)))
                for one, other in zip(plain, mixed, strict=True)
            ):
                return back
    raise LayoutError("modules that read tokens between its layers depend on their positions (a grid, or a part of it)")


@contextmanager
def _mixed(encoder: Encoder, order: Tensor, *, back: bool) -> Iterator[None]:
    """Permute the tokens before the first layer; with `back`, restore the order after the last."""
    first, last = (encoder.layers[place].call.module for place in (0, -1))
    inverse = order.argsort()

    def mix(_layer: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens = _first((args, kwargs))
        return tree_map(lambda leaf: leaf[:, order] if leaf is tokens else leaf, (args, kwargs))

    def unmix(_layer: nn.Module, _args: Any, output: Any) -> Any:
        return with_first(output, _first(output)[:, inverse])

    handles = [first.register_forward_pre_hook(mix, with_kwargs=True)]
    handles += [last.register_forward_hook(unmix)] if back else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reordered(output: Tensor, order: Tensor, prefix: int) -> Iterator[Tensor]:
    """Yield an output permuted along each axis that may hold the tokens, with or without the first ones."""
    for left in range(prefix + 1):
        kept = order[left:] - left
        for axis, size in enumerate(output.shape):
            if size == len(kept):
                yield output.index_select(axis, kept)


def _order(tokens: int, prefix: int, device: torch.device) -> Tensor:
    mixed = prefix + torch.randperm(tokens - prefix, device=device)
    return torch.cat([torch.arange(prefix, device=device), mixed])


def _run(layer: nn.Module, found: Found, order: Tensor | None) -> Tensor:
    tokens = found.call.tokens

    def mixed(leaf: Any) -> Any:
        return leaf[:, order] if isinstance(leaf, Tensor) and leaf is tokens and order is not None else leaf

    args, kwargs = tree_map(mixed, found.call.args), tree_map(mixed, found.call.kwargs)
    return _first(layer(*args, **kwargs))


def _tokens_with(model: nn.Module, example: Any, found: Found) -> Tensor:
    seen: list[Tensor] = []

    def hook(_layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(_first((args, kwargs)))

    handle = found.call.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call(model, example)
    finally:
        handle.remove()
    return seen[0]


def _first(values: Any) -> Tensor:
    return next(each for each in tree_leaves(values) if isinstance(each, Tensor))


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    found = call(model, example)
    leaves = tree_leaves(dict(found) if hasattr(found, "keys") else found)
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    most = _TOLERANCE.get(one.dtype, _COARSE)
    return bool((one - other).abs().amax() <= most * one.abs().amax())


@contextmanager
def _filled(model: nn.Module) -> Iterator[None]:
    """Fill weights that are zero with noise within the block."""
    empty = [each for each in model.parameters() if not each.any()]
    try:
        with torch.no_grad():
            for each in empty:
                each.normal_(std=_NOISE)
        yield
    finally:
        with torch.no_grad():
            for each in empty:
                each.zero_()
