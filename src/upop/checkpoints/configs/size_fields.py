"""Finds which field of a model's configuration sets the size of which group, by trial.

Each trial sets a field to a smaller size, builds the class on the meta device, and compares the shapes of all tensors.
A field sets the size of the groups that shrank with it, provided that nothing else changed. Classes are not known here;
names of fields only suggest which trials to make.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from upop.checkpoints.configs.builders import Builder, Change, Path, nodes
from upop.checkpoints.fitting.likeness import cut_shapes
from upop.pruning import Group
from upop.pruning.groups import tensor_of

SetSize = Callable[[int], Change]
"""Number of kept channels -> new values of the fields."""

_HEADS = re.compile(r"(?:^|_)(?:num_attention_heads|attention_heads|num_heads|n_heads?|num_query_heads)$")
_SHARED_HEADS = re.compile(r"(?:^|_)(?:num_key_value_heads|num_kv_heads|n_head_kv|n_kv_heads?)$")
_OF_A_HEAD = ("head_dim", "attn_head_dim", "attention_head_dim", "d_kv", "kv_channels", "head_size")
_ANY_NUMBER = ("neuron", "channel")
"""Kinds of channels that a layer may have any number of."""
_RATIO = re.compile(r"(?:^|_)(?:mlp|ffn|ff|expansion)_(?:ratio|mult|expansion)$|^expansion_factor$")
_WIDTH = re.compile(r"(?:^|_)(?:intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|hidden_dim|mlp_size)$")


@dataclass(frozen=True)
class SizeField:
    """One or more fields that together set the size of some groups.

    Attributes:
        groups: their names.
        change: number of channels -> new values of the fields.
        sizes: the numbers of channels that the configuration accepts; None for any.
    """

    groups: tuple[str, ...]
    change: SetSize
    sizes: frozenset[int] | None


def size_fields(dense: nn.Module, groups: Sequence[Group], builder: Builder) -> list[SizeField]:
    """Return the fields that set the sizes of a model's groups; each group is in at most one.

    Args:
        dense: the dense model, with or without memory.
        groups: its groups.
        builder: builds such models.
    """
    found: list[SizeField] = []
    described: set[str] = set()
    tried: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for group in groups:
        if group.name in described:
            continue
        for change in _candidates(dense, group, builder):
            probe = _probe(group, change, builder)
            if probe is None:
                continue
            key = probe, *sorted(change(probe).items())
            if key not in tried:
                tried[key] = _follow(dense, groups, builder.meta_model(change(probe)), probe)
            names = tried[key]
            if group.name in names and described.isdisjoint(names):
                found.append(SizeField(names, change, _sizes(group, change, builder)))
                described.update(names)
                break
    return found


def sized_config(dense: nn.Module, groups: Sequence[Group], kept: Mapping[str, int], builder: Builder) -> Change | str:
    """Return the change by which a configuration describes a cut model; or, as a text, the reason why none does.

    Args:
        dense: the dense model.
        groups: its groups.
        kept: how many channels each keeps.
        builder: builds such models.
    """
    change: dict[Path, Any] = {}
    small = {group.name for group in groups if kept.get(group.name, group.size) < group.size}
    size_of = {group.name: group.size for group in groups}
    streams = {group.name: group.size for group in groups if group.kind == "residual" and group.name in small}
    widths = {size: kept[name] for name, size in streams.items()}
    found = size_fields(dense, groups, builder) if small else []
    for field in sorted(found, key=lambda each: streams.keys().isdisjoint(each.groups)):  # ratios refer to widths
        if small.isdisjoint(field.groups) and not _is_ratio_of(field.change, widths):
            continue
        counts = {kept.get(name, size_of[name]) for name in field.groups}
        if len(counts) > 1:
            return (
                f"{field.groups[0]} and {len(field.groups) - 1} more follow one number of {builder.by}, and keep "
                f"{', '.join(map(str, sorted(counts)))} channels"
            )
        (count,) = counts
        if field.sizes is not None and count not in field.sizes:
            return f"{builder.by} does not take {count} of {size_of[field.groups[0]]} for {field.groups[0]}"
        change |= _at_width(field.change, widths)(count)
        small -= set(field.groups)
    if small:
        first = next(group.name for group in groups if group.name in small)
        more = f" and {len(small) - 1} more" if len(small) > 1 else ""
        return f"no field of {builder.by} sets the size of {first}{more}"
    return change


def _follow(dense: nn.Module, groups: Sequence[Group], built: nn.Module | None, kept: int) -> tuple[str, ...]:
    """Return the groups that now have `kept` channels, provided that nothing else of the model changed."""
    if built is None:
        return ()
    shapes = shapes_of(built)
    names = tuple(
        group.name
        for group in groups
        if kept < group.size
        and all(part.tensor in shapes and shapes[part.tensor][part.dim] == part.length(kept) for part in group.slices)
    )
    wanted = cut_shapes(dense, [group for group in groups if group.name in names], dict.fromkeys(names, kept))
    return names if names and wanted == shapes else ()


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of a model's parameters and buffers."""
    return {name: list(value.shape) for name, value in {**dict(model.named_buffers()), **model.state_dict()}.items()}


def _probe(group: Group, change: SetSize, builder: Builder) -> int | None:
    """Return a smaller size that the configuration accepts."""
    if group.channel in _ANY_NUMBER:
        tried = [group.size - 1, group.size // 2]
    else:
        tried = [group.size // 2, *range(group.size - 1, 0, -1)]
    return next((size for size in tried if 0 < size < group.size and builder.takes(change(size))), None)


def _sizes(group: Group, change: SetSize, builder: Builder) -> frozenset[int] | None:
    if group.channel in _ANY_NUMBER and builder.takes(change(group.size - 1)):
        return None  # otherwise a ratio that must be a whole number
    return frozenset(size for size in range(1, group.size + 1) if builder.takes(change(size)))


def _candidates(dense: nn.Module, group: Group, builder: Builder) -> Iterator[SetSize]:
    for path, fields in nodes(builder.settings):
        here = {**dict.fromkeys(builder.more if not path else ()), **fields}
        if group.kind == "residual":
            yield from _streams(dense, group, path, here)
        else:
            yield from _widths(dense, group, path, here) if group.kind == "mlp" else _heads(group, path, here)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _widths(dense: nn.Module, group: Group, path: Path, fields: Mapping[str, Any]) -> Iterator[SetSize]:
    first = group.producers[0]
    shape = tensor_of(dense, first.tensor).shape
    width = shape[1 - first.dim] if len(shape) == 2 else 1  # ratios refer to it
    for name, value in fields.items():
        if (_is_number(value) and value == group.size) or (value is None and _WIDTH.search(name)):
            yield partial(_number, (*path, name))
        elif _RATIO.search(name) and (value is None or isinstance(value, int | float)):
            yield partial(_ratio, (*path, name), width)


def _heads(group: Group, path: Path, fields: Mapping[str, Any]) -> Iterator[SetSize]:
    heads = [name for name, value in fields.items() if _HEADS.search(name) and _is_number(value)]
    named = [name for name in _OF_A_HEAD if name in fields]
    inner = min(size for part in group.producers for size in part.inners)
    if group.channel == "dimension":
        for name in named or (_OF_A_HEAD[:1] if heads else ()):
            yield partial(_times, {(*path, name): inner}, {})
        return
    shared = {(*path, name): 1 for name, value in fields.items() if _SHARED_HEADS.search(name) and value == group.size}
    for name in heads:
        each, rest = divmod(fields[name], group.size)
        if each and not rest:
            numbers = {(*path, name): each, **shared}
            for of_a_head in named or _OF_A_HEAD[:1]:
                yield partial(_times, numbers, {(*path, of_a_head): inner})
            yield partial(_times, numbers, {})


def _streams(dense: nn.Module, group: Group, path: Path, fields: Mapping[str, Any]) -> Iterator[SetSize]:
    """Yield changes that set the width of a residual stream alone: head_dim and MLP widths stay as they are."""
    rows = {tensor_of(dense, part.tensor).shape[0] for part in group.scored if part.dim == 1}
    lengths: list[Change] = [{}]
    for heads in (value for name, value in fields.items() if _HEADS.search(name) and _is_number(value) and value):
        lengths += [{(*path, name): group.size // heads} for name in _OF_A_HEAD if name in fields]
    ratios = [(*path, name) for name in fields if _RATIO.search(name)]
    for name in (name for name, value in fields.items() if _is_number(value) and value == group.size):
        for fixed in lengths:
            yield partial(_times, {(*path, name): 1}, fixed)
            for ratio, neurons in itertools.product(ratios, sorted(rows, reverse=True)):
                yield partial(_width, (*path, name), fixed, ratio, neurons)


def _width(place: Path, fixed: Change, ratio: Path, neurons: int, kept: int) -> Change:
    return {place: kept, **fixed, **_ratio(ratio, kept, neurons)}


def _is_ratio_of(change: SetSize, widths: Mapping[int, int]) -> bool:
    """Whether a field gives a size as a ratio to a width that changes."""
    return isinstance(change, partial) and change.func is _ratio and change.args[1] in widths


def _at_width(change: SetSize, widths: Mapping[int, int]) -> SetSize:
    """Return the same change relative to the new widths."""
    if isinstance(change, partial) and _is_ratio_of(change, widths):
        return partial(_ratio, change.args[0], widths[change.args[1]])
    return change


def _number(place: Path, kept: int) -> Change:
    return {place: kept}


def _ratio(place: Path, width: int, kept: int) -> Change:
    # Libraries round down; half a channel on top absorbs what the product loses.
    return {place: kept // width if kept % width == 0 else (kept + 0.5) / width}


def _times(numbers: Mapping[Path, int], fixed: Change, kept: int) -> Change:
    return {**{place: number * kept for place, number in numbers.items()}, **fixed}
