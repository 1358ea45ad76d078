"""Branches of which nothing is left, with one channel of zeros: other runtimes take no empty tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from upop.pruning.known import Survey, remember
from upop.pruning.shrink import Edit, channels, width_attribute
from upop.pruning.units import Slice, Unit, has_number, owner_of, tensor_of


def without_empty(model: nn.Module, units: Sequence[Unit]) -> nn.Module:
    """Return a copy of a model in which no branch is empty, that computes the same; the model, if none of it is.

    Args:
        model: cut; it is left as it is.
        units: of it, as large as they are.
    """
    empty = [unit for unit in units if not unit.size and not any(part.gaps for part in unit.slices)]
    if not empty:
        return model
    filled = copy.deepcopy(model)
    for unit in empty:
        for part in unit.slices:
            _widen(filled, part)
        holder = dict(filled.named_modules(remove_duplicate=False)).get(unit.name)
        plain = None if holder is None else type(holder).__dict__.get("uncut_class")
        if holder is not None and plain is not None and not unit.swaps:
            holder.__class__ = plain
        for number in unit.attributes:
            module = filled.get_submodule(number.module)
            if has_number(module, number.name):
                Edit(module, number.name, number.value(1)).apply()
    wide = {unit.name for unit in empty}
    remember(filled, Survey(tuple(replace(unit, size=1) if unit.name in wide else unit for unit in units), ()))
    return filled


def _widen(model: nn.Module, part: Slice) -> None:
    """Give a tensor rows or columns of zeros for one channel."""
    module, leaf = owner_of(model, part.tensor)
    old = tensor_of(model, part.tensor)
    shape = list(old.shape)
    shape[part.dim] = part.length(1)
    new: Tensor = torch.zeros(shape, dtype=old.dtype, device=old.device)
    setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    width = width_attribute(module, part.dim) if leaf == "weight" else None
    for edit in ([Edit(module, width, shape[part.dim])] if width else []) + channels(module):
        edit.apply()
