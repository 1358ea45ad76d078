"""Masked norms of a residual stream: they normalise the kept channels, as the cut norms will.

A mean and a variance over all channels would count those that are masked. So a masked norm is what it is after the cut:
its input, its parameters and the sizes that it keeps are those of the channels that stay, its own forward runs on them,
and its output is 0 elsewhere. That holds for every module that normalises over the axis, whatever it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.groups import Group, set_number

_NORM = "_upop_row_mask_norm"  # masks take what is called so off again


class Masked:
    """Mixed into the class of a module while it is masked."""

    unmasked_class: type[nn.Module]


class MaskedNorm(Masked):
    """Mixed into the class of a norm while channels of the stream that it normalises are masked."""

    def forward(self: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise the kept channels, [..., size] -> [..., size]."""
        found: _Kept | None = getattr(self, _NORM)
        if found is None:
            whole: Tensor = super().forward(inputs, *args, **kwargs)  # type: ignore[misc]
            return whole
        kept = found.kept.to(inputs.device)
        result: Tensor = found.cut(self, kept).forward(inputs.index_select(-1, kept), *args, **kwargs)
        return result.new_zeros(inputs.shape).index_copy(-1, kept, result)


class _Kept:
    """What stays of a norm.

    Args:
        kept: its channels, int64, ascending.
        parameters: the names of its own parameters that carry the axis, and along which dimension they do.
        numbers: what it is to keep under which names.
    """

    def __init__(self, kept: Tensor, parameters: Mapping[str, int], numbers: Mapping[str, int | float]) -> None:
        self.kept, self._parameters, self._numbers = kept, parameters, numbers

    def cut(self, module: nn.Module, kept: Tensor) -> nn.Module:
        """Return the norm as it will be, for one call: gradients go to the parameters of the one that is there."""
        small = copy.copy(module)
        small.__class__ = type(module).unmasked_class  # type: ignore[attr-defined]
        held: dict[str, Any] = dict(module._parameters)
        for leaf, dim in self._parameters.items():
            tensor = module._parameters[leaf]
            assert tensor is not None
            held[leaf] = tensor.index_select(dim, kept)
        vars(small)["_parameters"] = held
        for name, value in self._numbers.items():
            set_number(small, name, value)
        return small


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def masked_norm_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a norm of class `kind` takes on while it is masked."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Masked{kind.__name__}", (MaskedNorm, kind), {"unmasked_class": kind})
    return _CLASSES[kind]


def set_norms(model: nn.Module, group: Group, kept: Tensor | None) -> None:
    """Make the masked norms of a group normalise the kept channels; all channels if None."""
    for path in group.norms:
        found = None
        if kept is not None:
            inside = [part for part in group.slices if part.tensor.rpartition(".")[0] == path]
            numbers = {each.name: each.value(len(kept)) for each in group.attributes if each.module == path}
            found = _Kept(kept, {part.tensor.rpartition(".")[2]: part.dim for part in inside}, numbers)
        setattr(model.get_submodule(path), _NORM, found)


def kept_by(norm: nn.Module) -> Tensor | None:
    """Return the channels that a masked norm normalises, int64, ascending; None where it is all of them."""
    found: _Kept | None = getattr(norm, _NORM, None)
    return None if found is None else found.kept


@contextmanager
def masked_norms(model: nn.Module, groups: Sequence[Group], plan: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Have the norms of residual streams normalise what a plan keeps, in the block."""
    modules = [model.get_submodule(path) for group in groups for path in group.norms]
    kinds = [type(module) for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        module.__class__ = masked_norm_class(kind)
    for group in groups:
        set_norms(model, group, torch.tensor(list(plan[group.name]), dtype=torch.long, device="cpu"))
    try:
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind
            delattr(module, _NORM)
