"""Gives branches that were pruned whole one channel of zeros, for runtimes that reject empty tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from upop.pruning.groups import Group, Slice, has_number, owner_of, tensor_of
from upop.pruning.known import Prunable, remember
from upop.pruning.shrink import Edit, channels, width_attribute


def without_empty(model: nn.Module, groups: Sequence[Group]) -> nn.Module:
    """Return an equivalent copy without empty branches; the model itself, if none is empty.

    Args:
        model: the cut model, left unchanged.
        groups: its groups at their current sizes.
    """
    empty = [group for group in groups if not group.size and not any(part.gaps for part in group.slices)]
    if not empty:
        return model
    filled = copy.deepcopy(model)
    for group in empty:
        for part in group.slices:
            _widen(filled, part)
        holder = dict(filled.named_modules(remove_duplicate=False)).get(group.name)
        plain = None if holder is None else type(holder).__dict__.get("uncut_class")
        if holder is not None and plain is not None and not group.swaps:
            holder.__class__ = plain
        for number in group.attributes:
            module = filled.get_submodule(number.module)
            if has_number(module, number.name):
                Edit(module, number.name, number.value(1)).apply()
    wide = {group.name for group in empty}
    remember(filled, Prunable(tuple(replace(group, size=1) if group.name in wide else group for group in groups), ()))
    return filled


def _widen(model: nn.Module, part: Slice) -> None:
    """Add the rows or columns of one zero channel to a tensor."""
    module, leaf = owner_of(model, part.tensor)
    old = tensor_of(model, part.tensor)
    shape = list(old.shape)
    shape[part.dim] = part.length(1)
    new: Tensor = torch.zeros(shape, dtype=old.dtype, device=old.device)
    setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    width = width_attribute(module, part.dim) if leaf == "weight" else None
    for edit in ([Edit(module, width, shape[part.dim])] if width else []) + channels(module):
        edit.apply()
