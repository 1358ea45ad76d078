"""The proof of what a user states: like that of what is read, and an error that says what does not hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from upop.pruning.axes.copies import numbered, told
from upop.pruning.axes.proof import POWERS, Bench, at_random
from upop.pruning.axes.settle import kept_numbers
from upop.pruning.errors import LayoutError
from upop.pruning.known import Survey
from upop.pruning.stated import Meant, Stated, meant, positions
from upop.pruning.units import Attribute, Slice, Unit
from upop.pruning.words import modality_of

_MOST_TRIED = 6
"""How many numbers that a module keeps are tried, one by one and two by two."""


def with_stated(model: nn.Module, stated: Sequence[Stated], example: Any, found: Survey) -> Survey:
    """Return what was found of a model, with the units that a user states before all that cut the same.

    Each is proved on numbers: what is masked and what is cut compute the same. How softmax scales follow the size is
    found by what makes the proof hold, and so are numbers that a module keeps.

    Raises:
        SettingError: what is stated does not fit the model.
        LayoutError: a unit does not hold; the message has the measured difference, or what the cut model raises.
    """
    with torch.random.fork_rng(devices=[]):
        units = _proved(model, meant(model, stated, modality_of), example)
    taken: dict[tuple[str, int], set[int]] = {}
    for place, here in (item for unit in units for item in positions(unit).items()):
        taken.setdefault(place, set()).update(here)
    left = [
        unit
        for unit in found.units
        if not any(here & taken.get(place, set()) for place, here in positions(unit).items())
    ]
    names = [unit.name for unit in units]
    units += [replace(unit, name=f"{unit.name}[2]") if unit.name in names else unit for unit in left]
    order = {name: place for place, (name, _) in enumerate((*model.named_parameters(), *model.named_buffers()))}
    units.sort(key=lambda unit: min(order.get(part.tensor, len(order)) for part in unit.slices))
    holders = tuple(f"{name}." for name in names if name)
    skipped = tuple(each for each in found.skipped if not f"{each.name}.".startswith(holders))
    return replace(found, units=tuple(units), skipped=skipped)


def _proved(model: nn.Module, wanted: Sequence[Meant], example: Any) -> list[Unit]:
    bench = Bench(numbered(model), example)
    try:
        called = bench.called()
    except Exception as error:
        raise LayoutError(
            f"{type(model).__name__} cannot be run with the example, so that nothing can be proved: {told(error)}."
        ) from error
    units: list[Unit] = []
    best: tuple[Any, ...] = ()
    for each in wanted:
        tried = list(_forms(model, each))
        tried.sort(key=lambda form: _shape_of(form, each) != best)  # like the one before
        reasons = []
        for form in tried:
            worst, reason = bench.difference([form], at_random([form], 0))
            if worst <= 1:
                units.append(_masked_where_read(model, form, called))
                best = _shape_of(form, each)
                break
            reasons.append(reason)
        else:
            raise LayoutError(_told(model, each, reasons))
    worst, reason = bench.difference(units, at_random(units, 1)) if units else (0.0, "")
    if not worst <= 1:
        raise LayoutError(f"What units says holds unit by unit and not together ({reason}). Leave some of them out.")
    return units


def _forms(model: nn.Module, meant: Meant) -> Iterator[Unit]:
    """Yield a unit as it is stated, with every way in which the queries may be scaled, and numbers that are kept."""
    for more in _numbers(model, meant):
        unit = replace(meant.unit, attributes=(*meant.unit.attributes, *more))
        yield unit
        for power, way in itertools.product(POWERS, meant.queries):
            if power:
                yield replace(
                    unit,
                    slices=tuple(
                        _scaled(part, way[at], power) if at in way else part for at, part in enumerate(unit.slices)
                    ),
                )


def _scaled(part: Slice, queries: tuple[int, ...], power: float) -> Slice:
    others = () if queries == tuple(range(len(queries))) else queries
    return replace(part, queries=others, query_groups=0 if others else len(queries), power=power)


def _numbers(model: nn.Module, meant: Meant) -> Iterator[tuple[Attribute, ...]]:
    """Yield numbers that the module may have to be told, none at first."""
    size, known = meant.unit.size, {(each.module, each.name) for each in meant.unit.attributes}
    found = [
        Attribute(meant.holder, name, value // size)
        for name, value in kept_numbers(model.get_submodule(meant.holder))
        if value > 0 and value % size == 0 and (meant.holder, name) not in known
    ][:_MOST_TRIED]
    yield ()
    for count in (1, 2):
        yield from itertools.combinations(found, count)


def _shape_of(unit: Unit, meant: Meant) -> tuple[Any, ...]:
    queries = tuple((part.queries, part.power) for part in unit.slices)
    return queries, tuple(each.name for each in unit.attributes[len(meant.unit.attributes) :])


def _masked_where_read(model: nn.Module, unit: Unit, called: set[str]) -> Unit:
    """Have masks scale weights where they are kept, but for those of plain linear layers that are called as such."""
    slices = []
    for part in unit.slices:
        layer = part.tensor.rpartition(".")[0]
        module = model.get_submodule(layer)
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and layer in called
        slices.append(replace(part, direct=part.produces and not plain))
    return replace(unit, slices=tuple(slices))


def _told(model: nn.Module, meant: Meant, reasons: list[str]) -> str:
    unit, module = meant.unit, model.get_submodule(meant.holder)
    kept = dict.fromkeys(name for name, value in kept_numbers(module) if value and value % unit.size == 0)
    hint = f" It keeps {', '.join(kept)}: say in sets which of them follow the size." if kept else ""
    return (
        f"{unit.name} cannot be cut as units says: {reasons[0]}, where masked and cut should compute the same.{hint} "
        "Is the order of the words that of the layers, do all layers that carry the axis stand in rows, also or "
        "columns, and are the queries the first of rows?"
    )
