"""Momentum encoders: each is cut together with the modules that it follows, and proved in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from upop.pruning.alike import likeness
from upop.pruning.axes.copies import numbered
from upop.pruning.axes.proof import Bench, at_random
from upop.pruning.errors import LayoutError
from upop.pruning.groups import Group, Skipped, tensor_of
from upop.pruning.traits import momentum_encoders


def with_momentum_encoders(
    model: nn.Module, example: Any, groups: list[Group], skipped: list[Skipped]
) -> tuple[list[Group], list[Skipped]]:
    """Extend the groups of a model to its momentum encoders, which are cut with the modules that they follow.

    A momentum encoder need not run in the forward. If it differs from its original in the weights alone, the proof
    covers it, since groups are proved for any weights. Otherwise it runs in place of its original, with its own
    numbers; if masked and cut outputs differ there, the group is skipped.

    Args:
        model: may have an attribute `momentum_encoders`: module or parameter name -> name of its momentum encoder.
        example: the arguments of a call.
        groups: all groups of the model, momentum encoders included.
        skipped: the parts that were left alone.

    Raises:
        LayoutError: the attribute names what the model does not have.
    """
    copies = momentum_encoders(model)
    if not copies:
        return groups, skipped
    _check_names(model, copies)
    own = [group for group in groups if any(_moved(part.tensor, _turned(copies)) is None for part in group.producers)]
    skipped = [part for part in skipped if _moved(part.name, _turned(copies)) is None]
    lost = {group.name: reason for group in own if (reason := _misfit(model, group, copies)) is not None}
    others = {original: copy for original, copy in copies.items() if not _alike(model, original, copy)}
    followed = [
        group for group in own if group.name not in lost and any(_moved(p.tensor, others) for p in group.slices)
    ]
    lost |= _unproved(model, example, followed, copies)
    return (
        [_with_copies(group, copies) for group in own if group.name not in lost],
        [*skipped, *(Skipped(name, reason) for name, reason in lost.items())],
    )


def _check_names(model: nn.Module, copies: Mapping[str, str]) -> None:
    held = {name for name, _ in (*model.named_modules(remove_duplicate=False), *model.named_parameters())}
    for name in (name for pair in copies.items() for name in pair):
        if name not in held:
            raise LayoutError(
                f"{type(model).__name__}.momentum_encoders names {name!r}, and the model has no such module or "
                "parameter. Correct the name, or leave it out."
            )


def _turned(copies: Mapping[str, str]) -> dict[str, str]:
    return {copy: original for original, copy in copies.items()}


def _moved(name: str, copies: Mapping[str, str]) -> str | None:
    """Return the name of a tensor or module within the momentum encoder; None if it has none."""
    for original, copy in copies.items():
        if name == original or name.startswith(f"{original}."):
            return copy + name.removeprefix(original)
    return None


def _misfit(model: nn.Module, group: Group, copies: Mapping[str, str]) -> str | None:
    """Describe how the momentum copy of a group differs from its layers; None if it does not."""
    for part in group.slices:
        copy = _moved(part.tensor, copies)
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
    """Whether a module and its momentum copy differ in their weights alone."""
    try:
        kinds = [likeness(model.get_submodule(name)) for name in (original, copy)]
    except AttributeError:  # a parameter, or nothing
        return original in dict(model.named_parameters(remove_duplicate=False))
    return None not in kinds and kinds[0] == kinds[1]


def _unproved(model: nn.Module, example: Any, groups: list[Group], copies: Mapping[str, str]) -> dict[str, str]:
    """Return the groups whose momentum copies fail the proof, with the reason."""
    if not groups:
        return {}
    swapped = numbered(model)
    for original, copy in copies.items():
        owner, _, leaf = original.rpartition(".")
        holder, _, name = copy.rpartition(".")
        setattr(swapped.get_submodule(owner), leaf, getattr(swapped.get_submodule(holder), name))
    bench = Bench(swapped, example)
    if not bench.difference(groups, at_random(groups, 3)):
        return {}
    reasons = ((group.name, bench.difference([group], at_random([group], 3))) for group in groups)
    return {name: f"with its momentum copy in its place, {reason}" for name, reason in reasons if reason}


def _with_copies(group: Group, copy_of: Mapping[str, str]) -> Group:
    """Return the group with the slices of its momentum copy, if there is one."""
    slices = [part for part in group.slices if _moved(part.tensor, _turned(copy_of)) is None]
    copies = [replace(part, tensor=copy, follows=True) for part in slices if (copy := _moved(part.tensor, copy_of))]
    attributes = [replace(each, module=copy) for each in group.attributes if (copy := _moved(each.module, copy_of))]
    swaps = [replace(each, module=copy) for each in group.swaps if (copy := _moved(each.module, copy_of))]
    return replace(
        group,
        slices=(*slices, *copies),
        attributes=tuple(dict.fromkeys((*group.attributes, *attributes))),
        swaps=tuple(dict.fromkeys((*group.swaps, *swaps))),
    )
