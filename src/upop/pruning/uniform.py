"""Towers: layers that keep equally many channels, so that an ordinary configuration says the sizes of all of them.

Which channels they keep differs by layer. What belongs to one tower is told by how layers are held (the same place in
one list of blocks) and by what their groups cut; a library that builds models from configurations may know more: which
sizes follow one of its numbers, and which follow none (`register`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from upop.pruning.errors import SettingError, some_of
from upop.pruning.groups import Group, Slice, tensor_of
from upop.pruning.round_to import RoundTo, channels_in_block
from upop.pruning.width import blocks_among

Uniform = Literal["tower"]


@dataclass(frozen=True)
class Tower:
    """Groups of one size that keep equally many channels.

    Attributes:
        groups: their names.
        sizes: how many channels they may keep, where not every number will do; None where it will.
    """

    groups: tuple[str, ...]
    sizes: frozenset[int] | None = None


@dataclass(frozen=True)
class ConfigSizes:
    """The sizes that the configuration of a model can express.

    Attributes:
        towers: the groups whose sizes follow one number of it.
        by: the configuration's usual name, for messages.
        layers: returns the layers that it can leave out, by its own count: path -> names of the groups inside.
    """

    towers: tuple[Tower, ...]
    by: str
    layers: Callable[[], Mapping[str, tuple[str, ...]]] = dict


Reader = Callable[[nn.Module, Sequence[Group]], ConfigSizes | None]
_readers: list[Reader] = []


def register(reader: Reader) -> None:
    """Register a function that returns a library's `ConfigSizes`, or None for models that are not its own."""
    if reader not in _readers:
        _readers.append(reader)


def check_uniform(uniform: Uniform | None) -> None:
    """Raise a `SettingError` unless a setting is "tower" or None."""
    if uniform not in ("tower", None):
        raise SettingError(
            'uniform is "tower" (all layers of a tower keep equally many heads and neurons) or None; found '
            f"{uniform!r}."
        )


def apart(model: nn.Module, groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Return the towers that a model has by its structure alone, as names of groups, in forward order.

    They are groups of one kind and size at the same place in the blocks of one list, whose tensors have the same
    shapes.
    """
    found: dict[Hashable, list[str]] = {}
    for group in groups:
        tensors = tuple((tensor_of(model, part.tensor).shape, _layout(part)) for part in group.slices)
        key = (_place(model, group.name), group.kind, group.channel, group.size, group.heads, tensors)
        found.setdefault(key, []).append(group.name)
    return [tuple(names) for names in found.values()]


def _layout(part: Slice) -> Slice:
    return replace(part, tensor="")


def _place(model: nn.Module, name: str) -> tuple[str, ...]:
    """Return the path of a module without its places in lists of modules."""
    parts: list[str] = []
    here: nn.Module | None = model
    for part in name.split(".") if name else ():
        parts.append("*" if isinstance(here, nn.ModuleList | nn.Sequential) else part)
        here = here._modules.get(part) if here is not None else None
    return tuple(parts)


def layers_of(model: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[str, ...]]:
    """Return path -> the names of the groups of each layer: of each place in a list of blocks alike in their groups.

    Of lists in lists the outermost counts whose blocks are alike.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    groups = blocks_among(groups)
    found: dict[str, tuple[str, ...]] = {}
    for path in lists:  # the outer ones come first
        start = f"{path}." if path else ""
        inside: dict[str, list[Group]] = {}
        for group in groups:
            if group.name.startswith(start):
                inside.setdefault(group.name.removeprefix(start).partition(".")[0], []).append(group)
        within = {
            tuple((group.name.removeprefix(f"{start}{at}"), group.size) for group in own) for at, own in inside.items()
        }
        taken = {name for names in found.values() for name in names}
        if (
            len(inside) > 1
            and len(within) == 1
            and not any(group.name in taken for own in inside.values() for group in own)
        ):
            found |= {f"{start}{at}": tuple(group.name for group in own) for at, own in inside.items()}
    return found


def to_keep_alike(
    model: nn.Module,
    groups: Sequence[Group],
    uniform: Uniform | None,
    every: Sequence[Group] | None = None,
    *,
    depth: bool = False,
) -> tuple[list[Group], tuple[Tower, ...], Mapping[str, tuple[str, ...]]]:
    """Return which chosen groups are searched, which keep equally many, and which can be pruned as a layer.

    Args:
        model: the dense model.
        groups: those that were chosen.
        uniform: None searches them all, each for itself.
        every: all groups of the model, the chosen ones among them.
        depth: whether layers may be pruned.

    Raises:
        SettingError: the model's configuration has no number for any of them; the message says what could be done.
    """
    if uniform is None:
        return list(groups), (), {}
    every = groups if every is None else every
    config = next((found for reader in _readers if (found := reader(model, every)) is not None), None)
    if config is None:
        return (
            list(groups),
            tuple(Tower(names) for names in apart(model, groups)),
            layers_of(model, groups) if depth else {},
        )
    names = {group.name for group in groups}
    towers = tuple(tower for tower in config.towers if names.issuperset(tower.groups))
    inside = {name for tower in towers for name in tower.groups}
    layers = {path: layer for path, layer in (config.layers() if depth else {}).items() if names.issuperset(layer)}
    for group in groups:  # what no number speaks of goes with its layer or stays whole
        if group.name not in inside and any(group.name in layer for layer in layers.values()):
            towers += (Tower((group.name,), frozenset({group.size})),)
            inside.add(group.name)
    lacking = [group.name for group in groups if group.name not in inside]
    broken = [
        name for tower in config.towers if tower not in towers for name in tower.groups if name in {*names} - inside
    ]
    if not towers:
        could = [group.name for group in every if any(group.name in tower.groups for tower in config.towers)]
        raise SettingError(
            f"uniform='tower' prunes nothing here: {config.by} has no number for the sizes of {some_of(lacking, 4)}. "
            + (
                f"It has numbers for {some_of(could, 4)}: include all of these, or leave uniform out."
                if could
                else "Leave uniform out: the cut model then loads with upop, and `upop export --to padded` or "
                "`--to onnx` makes it plain."
            )
        )
    if lacking:
        why = (
            "one of its numbers also sets layers that were not included"
            if broken
            else "it has no number for their sizes"
        )
        warnings.warn(
            f"uniform='tower' leaves {len(lacking)} of {len(groups)} groups whole, which {config.by} cannot describe: "
            f"{why} ({some_of(lacking, 4)}). They are not part of the budget.",
            stacklevel=6,
        )
    return [group for group in groups if group.name in inside], towers, layers


def together(groups: Sequence[Group], towers: Sequence[Tower]) -> list[tuple[list[Group], Tower | None]]:
    """Return the groups that are ranked as one, with their tower; a group in none is ranked alone."""
    towers_of = {name: tower for tower in towers for name in tower.groups}
    found: dict[Hashable, tuple[list[Group], Tower | None]] = {}
    for group in groups:
        tower = towers_of.get(group.name)
        found.setdefault(tower or group.name, ([], tower))[0].append(group)
    return list(found.values())


def removable_blocks(group: Group, round_to: RoundTo, tower: Tower | None = None) -> list[int]:
    """Return the sizes of a group's blocks in pruning order, without those that are always kept."""
    block = channels_in_block(group, round_to)
    whole, rest = divmod(group.size, block)
    if whole == 0:
        return []  # smaller than one block: it stays as it is
    blocks = ([rest] if rest else []) + [block] * (whole - 1)
    if tower is None or tower.sizes is None:
        return blocks
    joined, left, pruned = [], group.size, 0
    for each in blocks:
        left, pruned = left - each, pruned + each
        if left in tower.sizes:
            joined.append(pruned)
            pruned = 0
    return joined
