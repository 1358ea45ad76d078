"""Caches the groups of a model, as long as its tensors have the shapes that the groups cut."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.again import random_numbers_kept
from upop.pruning.alike import likeness
from upop.pruning.costs import macs_by_module
from upop.pruning.coverage import Coverage, coverage
from upop.pruning.deprecated import older_names, renamed_attributes
from upop.pruning.errors import LayoutError
from upop.pruning.groups import Group, Skipped, Slice, has_tensor, tensor_of


@renamed_attributes(units="groups")
@dataclass(frozen=True)
class Prunable:
    """The result of `find_prunable`: the groups, and the parts that were skipped.

    Attributes:
        groups: in forward order.
        skipped: parts that look prunable but are in no group, with reasons.
        source: the model and its example.
    """

    groups: tuple[Group, ...]
    skipped: tuple[Skipped, ...]
    source: tuple[nn.Module, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def coverage(self) -> Coverage:
        """The shares of the model's parameters in groups, skipped and outside; of multiply-adds with an example.

        Raises:
            LayoutError: the model of this result is not known.
        """
        if self.source is None:
            raise LayoutError(
                "upop.find_prunable did not return this, so its model is unknown. Call upop.find_prunable(model)."
            )
        model, example = self.source
        return coverage(model, self.groups, self.skipped, _macs(model, example))

    def of(self, model: nn.Module, example: Any = None) -> Prunable:
        """Return the result with its model and example."""
        example = self.source[1] if example is None and self.source is not None else example
        return replace(self, source=(model, example))


def _macs(model: nn.Module, example: Any) -> Mapping[str, int] | None:
    """Count the multiply-adds of each module on fake tensors; None without an example that runs on these."""
    if example is None:
        return None
    from upop.pruning.axes.copies import Shapes

    try:
        with random_numbers_kept():
            shapes = Shapes(model, example, numbers=False)
            with shapes.running():
                return macs_by_module(shapes.copy(), shapes.example)
    except Exception:  # the model's own: it is counted where it can be
        return None


_MOST = 3
"""Sizes of one model that are cached: it may be cut, and restored."""
_MOST_KINDS = 64
"""Kinds of models that are cached besides the models themselves: the last ones used."""
_of_kinds: OrderedDict[Hashable, tuple[Prunable, Any]] = OrderedDict()
_known: weakref.WeakKeyDictionary[nn.Module, list[tuple[Prunable, Any]]] = weakref.WeakKeyDictionary()
"""Model -> results of `find_prunable`, without the model that they belong to, and their example inputs."""


def remember(model: nn.Module, found: Prunable) -> None:
    """Cache the groups of a model for `find_prunable`, valid while its tensors have matching shapes."""
    example = None if found.source is None else found.source[1]
    _known[model] = [(replace(found, source=None), example), *_known.get(model, [])][:_MOST]


def forget(model: nn.Module) -> None:
    """Drop the cached groups of a model."""
    _known.pop(model, None)


def is_known(model: nn.Module) -> bool:
    """Whether groups of a model are cached, for any sizes."""
    return model in _known


def remembered(model: nn.Module) -> Prunable | None:
    """Return the cached groups of a model, at its current sizes; None if its tensors do not match.

    Groups of layers that were dropped meanwhile are left out.
    """
    for found, example in _known.get(model, []):
        groups = [
            sized(model, group)
            for group in found.groups
            if any(has_tensor(model, part.tensor) for part in group.slices)
        ]
        if None not in groups and (groups or not found.groups):
            return replace(found, groups=tuple(group for group in groups if group is not None)).of(model, example)
    return None


def know_as(model: nn.Module, other: nn.Module) -> None:
    """Cache the groups of a model for its copy, if nothing is cached for that."""
    found = remembered(other)
    alike = len(list(model.modules())) == len(list(other.modules()))
    if found is not None and alike and remembered(model) is None:
        remember(model, found)


def remember_kind(model: nn.Module, found: Prunable) -> None:
    """Cache these groups for all models that differ from this one in the weights alone."""
    kind = likeness(model)
    if kind is not None:
        _of_kinds[kind] = replace(found, source=None), None if found.source is None else found.source[1]
        while len(_of_kinds) > _MOST_KINDS:
            _of_kinds.popitem(last=False)


def known_of_kind(model: nn.Module) -> Prunable | None:
    """Return the cached groups of a model that differs from this one in the weights alone, or None."""
    kind = likeness(model) if _of_kinds else None
    if kind is None or kind not in _of_kinds:
        return None
    _of_kinds.move_to_end(kind)
    found, example = _of_kinds[kind]
    return found.of(model, example)


def remember_cut(model: nn.Module, groups: Iterable[Group], plan: Mapping[str, Sequence[int]]) -> None:
    """Update the cached gaps between the rows of groups after a cut, since they may have belonged to other groups.

    Args:
        model: the cut model.
        groups: the cut groups, as before the cut.
        plan: their kept channels.
    """
    cut = {group.name: group for group in groups}
    for found, example in _known.get(model, [])[:1]:
        before = [cut.get(group.name, group) for group in found.groups]
        if not any(part.gaps for group in before for part in group.slices):
            continue
        stays: dict[tuple[str, int], Tensor] = {}
        for group in cut.values():
            for part in group.slices:
                here = torch.zeros(part.length(group.size), dtype=torch.bool, device="cpu")
                here[part.index(torch.tensor(plan[group.name], dtype=torch.long, device="cpu"), group.size)] = True
                place = part.tensor, part.dim
                stays[place] = stays.get(place, torch.ones_like(here)) & here
        after = [
            replace(
                group,
                size=len(plan[group.name]) if group.name in cut else group.size,
                slices=tuple(_with_gaps(part, group.size, stays.get((part.tensor, part.dim))) for part in group.slices),
            )
            for group in before
        ]
        remember(model, replace(found, groups=tuple(after)).of(model, example))


def _with_gaps(part: Slice, size: int, stays: Tensor | None) -> Slice:
    if stays is None or not part.gaps:
        return part
    gaps, at = [], 0
    for gap, inner in zip(part.gaps, (*part.inners, 0), strict=True):
        gaps.append(int(stays[at : at + gap].sum()))
        at += gap + inner * size
    return replace(part, gaps=tuple(gaps))


def sized(model: nn.Module, group: Group) -> Group | None:
    """Return a group at the size that the model's tensors imply; None if they do not fit."""
    sizes = set()
    for part in group.slices:
        try:
            length = tensor_of(model, part.tensor).shape[part.dim]
        except (AttributeError, IndexError):
            return None
        sizes.add(divmod(length - sum(part.gaps), sum(part.inners)))
    if len(sizes) != 1:
        return None
    size, rest = sizes.pop()
    return None if rest or size < 0 else replace(group, size=size)


__getattr__ = older_names(__name__)
