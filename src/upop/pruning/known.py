"""What is known of a model's units: found once, remembered as long as its tensors have the shapes that they cut."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from upop.pruning.units import Skipped, Slice, Unit, tensor_of


@dataclass(frozen=True)
class Survey:
    """What `survey` found: the units, in forward order, and what was left alone and why."""

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]


_MOST = 3
"""How many sizes of one model are remembered: it may be cut, and put back."""
_known: weakref.WeakKeyDictionary[nn.Module, list[Survey]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, found: Survey) -> None:
    """Have `survey` give these units for a model from now on, as long as its tensors have the shapes that they cut."""
    _known[model] = [found, *_known.get(model, [])][:_MOST]


def remembered(model: nn.Module) -> Survey | None:
    """Return what was found of a model before, its units at today's sizes; None where its tensors are others."""
    for found in _known.get(model, []):
        units = [sized(model, unit) for unit in found.units]
        if None not in units:
            return replace(found, units=tuple(unit for unit in units if unit is not None))
    return None


def remember_cut(model: nn.Module, units: Iterable[Unit], plan: Mapping[str, Sequence[int]]) -> None:
    """After a cut, remember what lies between the rows of units: it may have been another unit's, and is smaller now.

    Args:
        model: cut already.
        units: those that were cut, as they were before.
        plan: what they keep.
    """
    cut = {unit.name: unit for unit in units}
    for found in _known.get(model, [])[:1]:
        before = [cut.get(unit.name, unit) for unit in found.units]
        if not any(part.gaps for unit in before for part in unit.slices):
            continue
        stays: dict[tuple[str, int], Tensor] = {}
        for unit in cut.values():
            for part in unit.slices:
                here = torch.zeros(part.length(unit.size), dtype=torch.bool, device="cpu")
                here[part.index(torch.tensor(plan[unit.name], device="cpu"), unit.size)] = True
                place = part.tensor, part.dim
                stays[place] = stays.get(place, torch.ones_like(here)) & here
        after = [
            replace(
                unit,
                size=len(plan[unit.name]) if unit.name in cut else unit.size,
                slices=tuple(_with_gaps(part, unit.size, stays.get((part.tensor, part.dim))) for part in unit.slices),
            )
            for unit in before
        ]
        remember(model, replace(found, units=tuple(after)))


def _with_gaps(part: Slice, size: int, stays: Tensor | None) -> Slice:
    if stays is None or not part.gaps:
        return part
    gaps, at = [], 0
    for gap, inner in zip(part.gaps, (*part.inners, 0), strict=True):
        gaps.append(int(stays[at : at + gap].sum()))
        at += gap + inner * size
    return replace(part, gaps=tuple(gaps))


def sized(model: nn.Module, unit: Unit) -> Unit | None:
    """Return a unit at the size that a model's tensors have; None where they have none that it can have."""
    sizes = set()
    for part in unit.slices:
        try:
            length = tensor_of(model, part.tensor).shape[part.dim]
        except (AttributeError, IndexError):
            return None
        sizes.add(divmod(length - sum(part.gaps), sum(part.inners)))
    if len(sizes) != 1:
        return None
    size, rest = sizes.pop()
    return None if rest or size < 1 else replace(unit, size=size)
