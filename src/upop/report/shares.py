"""How much every unit keeps, gathered into the panels of a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upop.pruning import Unit
from upop.pruning.units import Kind


@dataclass(frozen=True)
class UnitShare:
    """How many of a unit's entries stay.

    Attributes:
        name: the unit's name.
        modality: "vision", "text" or "other".
        kind: "attention" or "mlp".
        size: entries before pruning.
        kept: entries that stay.
    """

    name: str
    modality: str
    kind: Kind
    size: int
    kept: int

    @classmethod
    def of(cls, units: Sequence[Unit], plan: Mapping[str, Sequence[Any]]) -> list[UnitShare]:
        """Return one record per unit, in the given order; a unit that the plan does not name keeps all.

        Args:
            units: the units of the dense model.
            plan: unit name -> kept entries; an `upop.Plan`.
        """
        kept = {unit.name: len(plan[unit.name]) if unit.name in plan else unit.size for unit in units}
        return [cls(unit.name, unit.modality, unit.kind, unit.size, kept[unit.name]) for unit in units]

    @property
    def share(self) -> float:
        """The share of the entries that stay, in [0, 1]."""
        return self.kept / self.size


@dataclass(frozen=True)
class Panel:
    """The same structure in all layers of one tower: one row of bars.

    Attributes:
        title: in plain words, unique within its modality: "Cross-attention 2".
        modality: "vision", "text" or "other".
        layers: the units, from the input to the output.
    """

    title: str
    modality: str
    layers: tuple[UnitShare, ...]


def kept_share(units: Iterable[UnitShare]) -> float:
    """Return the share of all entries of some units that stay, in [0, 1]; 1 when there are none."""
    listed = list(units)
    size = sum(unit.size for unit in listed)
    return sum(unit.kept for unit in listed) / size if size else 1.0


def panels(shares: Iterable[UnitShare]) -> list[Panel]:
    """Gather units whose names differ by their layer number alone, in order of first appearance.

    Modalities come in the order vision, text, others.
    """
    groups: dict[tuple[str, str, str], list[UnitShare]] = {}
    for unit in shares:
        groups.setdefault((unit.modality, _template(unit.name), unit.kind), []).append(unit)
    order = {"vision": 0, "text": 1}
    result: list[Panel] = []
    for modality in sorted({key[0] for key in groups}, key=lambda name: (order.get(name, 2), name)):
        mine = {key: units for key, units in groups.items() if key[0] == modality}
        titles = _titles([(template, kind) for _, template, kind in mine])
        result += [Panel(title, modality, tuple(units)) for title, units in zip(titles, mine.values(), strict=True)]
    return result


def _template(name: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def _titles(structures: Sequence[tuple[str, str]]) -> list[str]:
    """Return a title for every (template, kind): what it is; where that repeats, its tower; then a number."""
    crosses = any("cross" in template for template, _ in structures)
    plain = []
    for template, kind in structures:
        if kind == "mlp":
            plain.append("MLP")
        elif "cross" in template:
            plain.append("Cross-attention")
        else:
            plain.append("Self-attention" if crosses else "Attention")
    towers = [template.partition(".")[0].replace("_", " ") for template, _ in structures]
    several = {
        title
        for title in plain
        if len({tower for tower, found in zip(towers, plain, strict=True) if found == title}) > 1
    }
    named = [f"{title} ({tower})" if title in several else title for title, tower in zip(plain, towers, strict=True)]
    repeated = {title for title, count in Counter(named).items() if count > 1}
    seen: Counter[str] = Counter()
    titles = []
    for title in named:
        seen[title] += 1
        titles.append(f"{title} {seen[title]}" if title in repeated else title)
    return titles
