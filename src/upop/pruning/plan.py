"""The plan: which entries every unit keeps. It is all that a compressed model has to carry beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import index
from typing import Any

from torch import nn

from upop.pruning.errors import PlanError, nearest
from upop.pruning.json_text import parse_json
from upop.pruning.known import sized
from upop.pruning.surveys import find_units
from upop.pruning.units import Unit, tensor_of
from upop.pruning.written import as_json, from_json

_VERSION = 1


@dataclass(frozen=True)
class Plan(Mapping[str, tuple[int, ...]]):
    """Kept indices per unit; a mapping from unit names to ascending tuples of entries.

    Attributes:
        kept: unit name -> kept entries, ascending; none where the whole branch goes.
        sizes: unit name -> number of entries before pruning.
        settings: how the plan came about (ratio, cost, ...); JSON values, for people to read.
        slices: unit name -> all that a cut takes, as JSON values: a model is cut by them and not read again.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    slices: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __getitem__(self, unit: str) -> tuple[int, ...]:
        """The entries that the unit keeps."""
        return self.kept[unit]

    def __iter__(self) -> Iterator[str]:
        """The names of the units."""
        return iter(self.kept)

    def __len__(self) -> int:
        """The number of units."""
        return len(self.kept)

    @classmethod
    def of(cls, units: list[Unit], kept: Mapping[str, Any], **settings: Any) -> Plan:
        """Build a plan from one's own indices: unit name -> entries to keep (any iterable of integers)."""
        sizes = {unit.name: unit.size for unit in units}
        unknown = [name for name in kept if name not in sizes]
        if unknown:
            raise PlanError(
                f"The plan names {unknown[0]!r}, which is no unit of the model{nearest(unknown[0], list(sizes))}."
            )
        indices = {name: tuple(sorted(int(entry) for entry in entries)) for name, entries in kept.items()}
        written = {unit.name: as_json(unit) for unit in units if unit.name in indices}
        slices = {name: unit for name, unit in written.items() if unit is not None}
        return cls(indices, {name: sizes[name] for name in indices}, settings, slices)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        units = {name: {"size": self.sizes[name], "kept": list(kept)} for name, kept in self.kept.items()}
        content = {"version": _VERSION, "settings": dict(self.settings), "units": units}
        return json.dumps(content | ({"slices": dict(self.slices)} if self.slices else {}), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON text.

        Raises:
            PlanError: the text is not a plan, or one of a later version.
        """
        try:
            content = parse_json(text, nan=True)
            version = content["version"]
            units = content["units"]
            kept = {name: tuple(_entry(entry) for entry in unit["kept"]) for name, unit in units.items()}
            sizes = {name: _entry(unit["size"]) for name, unit in units.items()}
            settings = dict(content.get("settings", {}))
            slices = dict(content.get("slices", {}))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise PlanError(f"Expected a plan as Plan.to_json writes it, found {text[:60]!r}: {error!r}.") from error
        if isinstance(version, bool) or version != _VERSION:
            raise PlanError(f"The plan has version {version!r}; this upop reads version {_VERSION}. Update upop.")
        return cls(kept, sizes, settings, slices)

    def units(self, model: nn.Module) -> list[Unit]:
        """Return the units that the plan was made of, where it holds their slices; else those that the model has.

        Raises:
            PlanError: the slices are damaged, or the model has no such tensors.
        """
        if not self.slices or not set(self.kept) <= set(self.slices):
            return find_units(model)
        from upop.pruning.axes import SWAPS

        try:
            return [from_json(content, model, SWAPS) for content in self.slices.values()]
        except ValueError as error:
            raise PlanError(
                f"The slices of the plan do not fit {type(model).__name__}: {error}. Give the model that it was made "
                "for, in its dense form."
            ) from error

    def check(self, model: nn.Module) -> list[Unit]:
        """Return the units of `model` that the plan speaks of, in forward order.

        Raises:
            PlanError: a unit is unknown or of another size, or its indices are repeated or out of range;
                every such unit is listed.
        """
        units = {unit.name: unit for unit in self.units(model)}
        wrong = []
        for name, kept in self.kept.items():
            unit = units.get(name)
            now = None if unit is None else sized(model, unit)
            if unit is None:
                wrong.append(f"{name}: no such unit{nearest(name, list(units))}")
            elif now is not None and now.size != self.sizes[name]:
                wrong.append(f"{name}: the plan is for {self.sizes[name]} entries, the model has {now.size}")
            elif unit.size != self.sizes[name]:
                wrong.append(f"{name}: the plan is for {self.sizes[name]} entries, its slices for {unit.size}")
            elif (found := misfit(model, unit)) is not None:
                wrong.append(f"{name}: {found}")
            elif list(kept) != sorted(set(kept)):
                wrong.append(f"{name}: indices must be ascending, without repeats")
            elif kept and (kept[0] < 0 or kept[-1] >= unit.size):
                wrong.append(f"{name}: indices must lie in 0..{unit.size - 1}, found {kept[0]}..{kept[-1]}")
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise PlanError(f"The plan does not fit {type(model).__name__}: " + "; ".join(wrong[:5]) + more + ".")
        return [unit for name, unit in units.items() if name in self.kept]


def misfit(model: nn.Module, unit: Unit) -> str | None:
    """Say which tensor of a model a unit does not fit."""
    for part in unit.slices:
        try:
            length = tensor_of(model, part.tensor).shape[part.dim]
        except (AttributeError, IndexError):
            return f"the model has no tensor {part.tensor} with a dimension {part.dim}"
        if length != part.length(unit.size):
            return f"{part.tensor} has {length} along dimension {part.dim}, the plan is for {part.length(unit.size)}"
    return None


def _entry(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("true and false are no numbers")
    return index(value)
