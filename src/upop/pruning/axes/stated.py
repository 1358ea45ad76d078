"""Proves groups that the user states, and reports those that do not hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from upop.pruning.again import random_numbers_kept
from upop.pruning.axes.copies import message_of, numbered
from upop.pruning.axes.proof import POWERS, Bench, at_random
from upop.pruning.axes.settle import kept_numbers
from upop.pruning.errors import LayoutError
from upop.pruning.groups import Attribute, Group, Slice
from upop.pruning.known import Prunable
from upop.pruning.stated import Meant, Stated, meant, positions
from upop.pruning.words import modality_of

_MOST_TRIED = 6
"""How many numbers that a module keeps are tried, one by one and two by two."""


def with_stated(model: nn.Module, stated: Sequence[Stated], example: Any, found: Prunable) -> Prunable:
    """Add stated groups to the groups found; they take precedence over groups that cut the same channels.

    Each is proved on numbers: masked and cut outputs must agree. The dependence of softmax scales and of stored
    numbers on the size is inferred from what makes the proof hold.

    Raises:
        SettingError: a statement does not fit the model.
        LayoutError: a proof fails; the message has the measured difference, or the error of the cut model.
    """
    with random_numbers_kept():
        groups = _proved(model, meant(model, stated, modality_of), example)
    taken: dict[tuple[str, int], set[int]] = {}
    for place, here in (item for group in groups for item in positions(group).items()):
        taken.setdefault(place, set()).update(here)
    left = [
        group
        for group in found.groups
        if not any(here & taken.get(place, set()) for place, here in positions(group).items())
    ]
    names = [group.name for group in groups]
    groups += [replace(group, name=f"{group.name}[2]") if group.name in names else group for group in left]
    order = {name: place for place, (name, _) in enumerate((*model.named_parameters(), *model.named_buffers()))}
    groups.sort(key=lambda group: min(order.get(part.tensor, len(order)) for part in group.slices))
    holders = tuple(f"{name}." for name in names if name)
    skipped = tuple(each for each in found.skipped if not f"{each.name}.".startswith(holders))
    return replace(found, groups=tuple(groups), skipped=skipped)


def _proved(model: nn.Module, wanted: Sequence[Meant], example: Any) -> list[Group]:
    bench = Bench(numbered(model), example)
    try:
        called = bench.called()
    except Exception as error:
        raise LayoutError(
            f"{type(model).__name__} cannot be run with the example, so its groups cannot be verified: "
            f"{message_of(error)}."
        ) from error
    groups: list[Group] = []
    best: tuple[Any, ...] = ()
    for each in wanted:
        tried = list(_forms(model, each))
        tried.sort(key=lambda form: _shape_of(form, each) != best)  # like the one before
        reasons = []
        for form in tried:
            reason = bench.difference([form], at_random([form], 0))
            if not reason:
                groups.append(_masked_where_read(model, form, called))
                best = _shape_of(form, each)
                break
            reasons.append(reason)
        else:
            raise LayoutError(_message(model, each, reasons))
    reason = bench.difference(groups, at_random(groups, 1)) if groups else ""
    if reason:
        raise LayoutError(f"The stated groups hold one by one, but not together ({reason}). Leave some of them out.")
    return groups


def _forms(model: nn.Module, meant: Meant) -> Iterator[Group]:
    """Yield variants of a stated group: each scaling of queries, and each set of stored numbers."""
    for more in _numbers(model, meant):
        group = replace(meant.group, attributes=(*meant.group.attributes, *more))
        yield group
        for power, way in itertools.product(POWERS, meant.queries):
            if power:
                yield replace(
                    group,
                    slices=tuple(
                        _scaled(part, way[at], power) if at in way else part for at, part in enumerate(group.slices)
                    ),
                )


def _scaled(part: Slice, queries: tuple[int, ...], power: float) -> Slice:
    others = () if queries == tuple(range(len(queries))) else queries
    return replace(part, queries=others, query_groups=0 if others else len(queries), power=power)


def _numbers(model: nn.Module, meant: Meant) -> Iterator[tuple[Attribute, ...]]:
    """Yield sets of stored numbers to update, the empty set first."""
    size, known = meant.group.size, {(each.module, each.name) for each in meant.group.attributes}
    found = [
        Attribute(meant.holder, name, value // size)
        for name, value in kept_numbers(model.get_submodule(meant.holder))
        if value > 0 and value % size == 0 and (meant.holder, name) not in known
    ][:_MOST_TRIED]
    yield ()
    for count in (1, 2):
        yield from itertools.combinations(found, count)


def _shape_of(group: Group, meant: Meant) -> tuple[Any, ...]:
    queries = tuple((part.queries, part.power) for part in group.slices)
    return queries, tuple(each.name for each in group.attributes[len(meant.group.attributes) :])


def _masked_where_read(model: nn.Module, group: Group, called: set[str]) -> Group:
    """Mask the weights themselves, except for linear layers that are called as modules."""
    slices = []
    for part in group.slices:
        layer = part.tensor.rpartition(".")[0]
        module = model.get_submodule(layer)
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and layer in called
        slices.append(replace(part, direct=part.produces and not plain))
    return replace(group, slices=tuple(slices))


def _message(model: nn.Module, meant: Meant, reasons: list[str]) -> str:
    group, module = meant.group, model.get_submodule(meant.holder)
    kept = dict.fromkeys(name for name, value in kept_numbers(module) if value and value % group.size == 0)
    hint = f" It keeps {', '.join(kept)}: say in sets which of them follow the size." if kept else ""
    return (
        f"{group.name} cannot be cut as groups says: {reasons[0]}, where masked and cut should compute the same.{hint} "
        "Is the order of the words that of the layers, do all layers that carry the axis stand in rows, also or "
        "columns, and are the queries the first of rows?"
    )
