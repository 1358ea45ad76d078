"""Momentum copies: what follows the modules of a model is cut with them, and proved in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from upop.pruning.alike import likeness
from upop.pruning.axes.copies import numbered
from upop.pruning.axes.proof import Bench, at_random
from upop.pruning.units import Skipped, Unit, tensor_of


def with_twins(
    model: nn.Module, example: Any, units: list[Unit], skipped: list[Skipped]
) -> tuple[list[Unit], list[Skipped]]:
    """Return the units of a model that keeps momentum copies of its own parts: the copies are cut with what they copy.

    A copy need not run when the model does. One that differs from what it copies in its weights alone computes the
    same, masked and cut, since units are proved whatever the weights are. Another one is put into the place of what it
    copies, on numbers of its own, and has to compute the same; a unit whose copy does not is left alone.

    Args:
        model: may have an attribute `momentum_twins`: names of modules or parameters -> names of their copies.
        example: what a call of it is given.
        units: of all that the model computes with, copies included.
        skipped: what was left alone.
    """
    twins: Mapping[str, str] = getattr(model, "momentum_twins", {})
    if not twins:
        return units, skipped
    own = [unit for unit in units if any(_moved(part.tensor, _turned(twins)) is None for part in unit.producers)]
    skipped = [part for part in skipped if _moved(part.name, _turned(twins)) is None]
    lost = {unit.name: reason for unit in own if (reason := _misfit(model, unit, twins)) is not None}
    others = {original: copy for original, copy in twins.items() if not _alike(model, original, copy)}
    followed = [unit for unit in own if unit.name not in lost and any(_moved(p.tensor, others) for p in unit.slices)]
    lost |= _unproved(model, example, followed, twins)
    return (
        [_with_copies(unit, twins) for unit in own if unit.name not in lost],
        [*skipped, *(Skipped(name, reason) for name, reason in lost.items())],
    )


def _turned(twins: Mapping[str, str]) -> dict[str, str]:
    return {copy: original for original, copy in twins.items()}


def _moved(name: str, twins: Mapping[str, str]) -> str | None:
    """Return what a tensor or module is called in the copy of the part that holds it; None where it has no copy."""
    for original, copy in twins.items():
        if name == original or name.startswith(f"{original}."):
            return copy + name.removeprefix(original)
    return None


def _misfit(model: nn.Module, unit: Unit, twins: Mapping[str, str]) -> str | None:
    """Say where the copy of a unit's layers is another one than they are."""
    for part in unit.slices:
        copy = _moved(part.tensor, twins)
        if copy is None:
            continue
        try:
            same = tensor_of(model, copy).shape == tensor_of(model, part.tensor).shape
        except AttributeError:
            same = False
        if not same:
            return f"its momentum copy has no {copy} of the same shape"
    return None


def _alike(model: nn.Module, original: str, copy: str) -> bool:
    """Whether a part of a model and its copy differ in their weights alone."""
    try:
        kinds = [likeness(model.get_submodule(name)) for name in (original, copy)]
    except AttributeError:  # a parameter, or nothing
        return original in dict(model.named_parameters(remove_duplicate=False))
    return None not in kinds and kinds[0] == kinds[1]


def _unproved(model: nn.Module, example: Any, units: list[Unit], twins: Mapping[str, str]) -> dict[str, str]:
    """Return the units whose copies do not compute the same masked and cut, with the reason."""
    if not units:
        return {}
    twin = numbered(model)
    for original, copy in twins.items():
        owner, _, leaf = original.rpartition(".")
        holder, _, name = copy.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, getattr(twin.get_submodule(holder), name))
    bench = Bench(twin, example)
    if bench.difference(units, at_random(units, 3))[0] <= 1:
        return {}
    lost = {}
    for unit in units:
        worst, reason = bench.difference([unit], at_random([unit], 3))
        if not worst <= 1:
            lost[unit.name] = f"with its momentum copy in its place, {reason}"
    return lost


def _with_copies(unit: Unit, twins: Mapping[str, str]) -> Unit:
    """Return the unit with the same axis of its momentum copy, if the model keeps one."""
    slices = [part for part in unit.slices if _moved(part.tensor, _turned(twins)) is None]
    copies = [replace(part, tensor=copy, follows=True) for part in slices if (copy := _moved(part.tensor, twins))]
    attributes = [replace(each, module=copy) for each in unit.attributes if (copy := _moved(each.module, twins))]
    swaps = [replace(each, module=copy) for each in unit.swaps if (copy := _moved(each.module, twins))]
    return replace(
        unit,
        slices=(*slices, *copies),
        attributes=tuple(dict.fromkeys((*unit.attributes, *attributes))),
        swaps=tuple(dict.fromkeys((*unit.swaps, *swaps))),
    )
