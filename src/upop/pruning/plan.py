"""The plan: the kept channels of every group, all that a compressed model needs besides its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import index
from typing import Any

from torch import nn

from upop.pruning.deprecated import renamed_arguments, renamed_attributes
from upop.pruning.errors import PlanError, nearest
from upop.pruning.file_keys import PLAN, VERSION, current, is_readable
from upop.pruning.groups import Group, tensor_of
from upop.pruning.json_text import parse_json
from upop.pruning.known import sized
from upop.pruning.prunable import find_groups
from upop.pruning.written import as_json, from_json


@renamed_attributes(units="groups")
@dataclass(frozen=True)
class Plan(Mapping[str, tuple[int, ...]]):
    """Kept indices per group; a mapping from group names to ascending tuples of channels.

    Attributes:
        kept: group name -> kept channels, ascending; none if the branch is pruned whole.
        sizes: group name -> number of channels before pruning.
        settings: the settings that led to the plan (ratio, cost, ...); JSON values, for people.
        slices: group name -> its slices as JSON values, so that a model can be cut without tracing it.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    slices: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __getitem__(self, group: str) -> tuple[int, ...]:
        """The channels that the group keeps."""
        return self.kept[group]

    def __iter__(self) -> Iterator[str]:
        """The names of the groups."""
        return iter(self.kept)

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.kept)

    @classmethod
    @renamed_arguments(units="groups")
    def of(cls, groups: list[Group], kept: Mapping[str, Any], **settings: Any) -> Plan:
        """Build a plan from given indices: group name -> channels to keep (any iterable of integers)."""
        sizes = {group.name: group.size for group in groups}
        unknown = [name for name in kept if name not in sizes]
        if unknown:
            raise PlanError(
                f"The plan names {unknown[0]!r}, which is no group of the model{nearest(unknown[0], list(sizes))}."
            )
        indices = {name: tuple(sorted(int(channel) for channel in channels)) for name, channels in kept.items()}
        written = {group.name: as_json(group) for group in groups if group.name in indices}
        slices = {name: group for name, group in written.items() if group is not None}
        return cls(indices, {name: sizes[name] for name in indices}, settings, slices)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        groups = {name: {"size": self.sizes[name], "kept": list(kept)} for name, kept in self.kept.items()}
        content = {"version": VERSION, "settings": dict(self.settings), "groups": groups}
        return json.dumps(content | ({"slices": dict(self.slices)} if self.slices else {}), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON text.

        Raises:
            PlanError: the text is not a plan, or is of a later version.
        """
        try:
            content = current(parse_json(text, nan=True), PLAN)
            version = content["version"]
            if not is_readable(version):
                raise PlanError(f"The plan has version {version!r}; this upop reads 1 to {VERSION}. Update upop.")
            groups = content["groups"]
            kept = {name: tuple(_channel(channel) for channel in group["kept"]) for name, group in groups.items()}
            sizes = {name: _channel(group["size"]) for name, group in groups.items()}
            settings = dict(content.get("settings", {}))
            slices = dict(content.get("slices", {}))
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise PlanError(f"Expected a plan as Plan.to_json writes it, found {text[:60]!r}: {error!r}.") from error
        return cls(kept, sizes, settings, slices)

    def groups(self, model: nn.Module) -> list[Group]:
        """Return the groups from the slices of the plan, if it holds them; else the groups of the model.

        Raises:
            PlanError: the slices are damaged, or the model has no such tensors.
        """
        if not self.slices or not set(self.kept) <= set(self.slices):
            return find_groups(model)
        from upop.pruning.axes import SWAPS

        try:
            return [from_json(content, model, SWAPS) for content in self.slices.values()]
        except ValueError as error:
            raise PlanError(
                f"The slices of the plan do not fit {type(model).__name__}: {error}. Give the model that it was made "
                "for, in its dense form."
            ) from error

    def check(self, model: nn.Module) -> list[Group]:
        """Return the groups of `model` in the plan, in forward order.

        Raises:
            PlanError: a group is unknown or of another size, or its indices are repeated or out of range;
                every such group is listed.
        """
        groups = {group.name: group for group in self.groups(model)}
        wrong = []
        for name, kept in self.kept.items():
            group = groups.get(name)
            now = None if group is None else sized(model, group)
            if group is None:
                wrong.append(f"{name}: no such group{nearest(name, list(groups))}")
            elif now is not None and now.size != self.sizes[name]:
                wrong.append(f"{name}: the plan is for {self.sizes[name]} channels, the model has {now.size}")
            elif group.size != self.sizes[name]:
                wrong.append(f"{name}: the plan is for {self.sizes[name]} channels, its slices for {group.size}")
            elif (found := misfit(model, group)) is not None:
                wrong.append(f"{name}: {found}")
            elif list(kept) != sorted(set(kept)):
                wrong.append(f"{name}: indices must be ascending, without repeats")
            elif kept and (kept[0] < 0 or kept[-1] >= group.size):
                wrong.append(f"{name}: indices must lie in 0..{group.size - 1}, found {kept[0]}..{kept[-1]}")
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise PlanError(f"The plan does not fit {type(model).__name__}: " + "; ".join(wrong[:5]) + more + ".")
        return [group for name, group in groups.items() if name in self.kept]


def misfit(model: nn.Module, group: Group) -> str | None:
    """Return the first tensor of a model that a group does not fit, in words."""
    for part in group.slices:
        try:
            length = tensor_of(model, part.tensor).shape[part.dim]
        except (AttributeError, IndexError):
            return f"the model has no tensor {part.tensor} with a dimension {part.dim}"
        if length != part.length(group.size):
            return f"{part.tensor} has {length} along dimension {part.dim}, the plan is for {part.length(group.size)}"
    return None


def _channel(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("true and false are no numbers")
    return index(value)
