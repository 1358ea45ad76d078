"""What a model is made of, by modality: units, parameters and multiply-adds; and what a budget would make of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning import Plan, Skipped, Unit, survey
from upop.pruning.align import Align, check_align, entries_in_block
from upop.pruning.costs import entry_costs, macs_by_module
from upop.pruning.coverage import Coverage, coverage
from upop.pruning.goal import Goal
from upop.pruning.shrink import apply_plan
from upop.pruning.units import tensor_of
from upop.report.shares import Panel, UnitShare, panels

SHARED = "shared"
"""The modality of what belongs to several: heads, projections into a common space, temperatures."""


@dataclass(frozen=True)
class Part:
    """What belongs to one modality.

    Attributes:
        modality: "vision", "text", "other", or `SHARED`.
        parameters: how many; shared tensors are counted once, momentum copies not at all.
        prunable: those of them that go with the units' entries.
        macs: multiply-adds of one forward pass; None where none was run.
    """

    modality: str
    parameters: int
    prunable: int
    macs: int | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        panels: the units, by structure, with what they keep of the dense model's entries.
        parts: one per modality.
        skipped: what looks prunable and is left alone, and why.
        unit_parameters: parameters that go with the entries of each unit.
        coverage: what is in units, left alone, and outside.
    """

    panels: tuple[Panel, ...]
    parts: tuple[Part, ...]
    skipped: tuple[Skipped, ...]
    unit_parameters: Mapping[str, int]
    coverage: Coverage

    @property
    def parameters(self) -> int:
        """Of the whole model, without momentum copies."""
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int | None:
        """Of one forward pass of the whole model; None where none was run."""
        counts = [part.macs for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)


def inspect_model(model: nn.Module, inputs: Any = None, dense: Mapping[str, int] | None = None) -> Inspection:
    """Look at a model, dense or compressed, without changing it.

    Args:
        model: the model.
        inputs: for one forward pass that counts multiply-adds (a tensor, a tuple of arguments, a mapping of keyword
            arguments, or a function of the model); None counts none.
        dense: unit -> entries of the dense model, where the model is compressed and this is known.

    What the model raises for inputs that it cannot take is passed on.
    """
    found = survey(model)
    where = _Modalities(found.units)
    parameters: dict[str, int] = {}
    copies = tuple(f"{twin}." for twin in getattr(model, "momentum_twins", {}).values())
    for name, parameter in model.named_parameters():
        if not name.startswith(copies):
            modality = where.of(name)
            parameters[modality] = parameters.get(modality, 0) + parameter.numel()
    left = [unit for unit in found.units if unit.size]  # nothing may be left of a branch
    costs = entry_costs(model, left, "params") if left else {}
    by_unit = {unit.name: round(costs.get(unit.name, 0) * unit.size) for unit in found.units}
    own = macs_by_module(model, inputs) if inputs is not None else None
    macs = _macs(own, where) if own is not None else {}
    held = {name for counts in (parameters, macs) for name, count in counts.items() if count}
    order = sorted(held, key=lambda name: (name == SHARED, name != "vision", name))
    parts = tuple(
        Part(
            modality,
            parameters.get(modality, 0),
            _prunable(model, [unit for unit in found.units if unit.modality == modality]),
            macs.get(modality, 0) if inputs is not None else None,
        )
        for modality in order
    )
    shares = [
        UnitShare(unit.name, unit.modality, unit.kind, max(unit.size, (dense or {}).get(unit.name, 0)), unit.size)
        for unit in found.units
    ]
    covered = coverage(model, found.units, found.skipped, own)
    return Inspection(tuple(panels(shares)), parts, found.skipped, by_unit, covered)


def _prunable(model: nn.Module, units: Sequence[Unit]) -> int:
    """Return how many parameters go with the entries of some units: a weight between two of them is counted once."""
    cut: dict[str, dict[int, Tensor]] = {}
    for unit in units:
        for part in unit.slices:
            inside = part.entries(unit.size) >= 0
            dims = cut.setdefault(part.tensor, {})
            dims[part.dim] = inside | dims.get(part.dim, torch.zeros_like(inside))
    names = {id(each): name for name, each in model.named_parameters()}
    count = 0
    for name, dims in cut.items():
        tensor = tensor_of(model, name)
        if names.get(id(tensor)) == name:
            rest = (size - int(dims[at].sum()) if at in dims else size for at, size in enumerate(tensor.shape))
            count += tensor.numel() - math.prod(rest)
    return count


def after_budget(model: nn.Module, goal: Goal, align: Align | str = 1, example: Any = None) -> tuple[nn.Module, Plan]:
    """Return a copy of a model in which every unit has lost the same share of its entries, and the plan of that.

    A search spends the same budget unevenly. How many parameters are left does not depend on that (but for rounding),
    how many multiply-adds are left does a little.

    Args:
        model: the model; it is left alone.
        goal: the share of the units' cost to remove, or what is to be left of the whole model.
        align: kept channels are multiples of this, where units are that large.
        example: inputs of the forward pass that a goal counts.

    Raises:
        SettingError: `align` is out of range, or the goal cannot be reached.
    """
    align = check_align(align)
    smaller = copy.deepcopy(model)
    units = list(survey(smaller).units)
    ratio = goal.ratio
    if ratio is None:
        goal.begin(smaller, units, entry_costs(smaller, units, "params"), align, example)
        ratio = goal.share(lambda share: {unit.name: _kept(unit, share, align) for unit in units})
    kept = {unit.name: range(_kept(unit, ratio, align)) for unit in units}
    told = goal.told({name: len(entries) for name, entries in kept.items()})
    plan = Plan.of(units, kept, **told, align=align)
    if units:
        apply_plan(smaller, plan, verify=False)
    return smaller, plan


def _kept(unit: Unit, ratio: float, align: Align) -> int:
    block = entries_in_block(unit, align)
    blocks = max(1, round(unit.size * (1 - ratio) / block))
    return min(unit.size, blocks * block)


class _Modalities:
    """Tells the modality of a module or parameter by the units that it shares the longest path with."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._known: dict[str, set[str]] = {}
        for unit in units:
            path = unit.name
            while path:
                self._known.setdefault(path, set()).add(unit.modality)
                path = path.rpartition(".")[0]
        self._all = {unit.modality for unit in units}

    def of(self, name: str) -> str:
        path = name
        while path and path not in self._known:
            path = path.rpartition(".")[0]
        found = self._known[path] if path else self._all
        return next(iter(found)) if len(found) == 1 else SHARED


def _macs(own: Mapping[str, int], where: _Modalities) -> dict[str, int]:
    result: dict[str, int] = {}
    for path, count in own.items():
        modality = where.of(path)
        result[modality] = result.get(modality, 0) + count
    return result
