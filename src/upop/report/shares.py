"""The share of channels that every group keeps, arranged in panels of a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upop.pruning import Group
from upop.pruning.groups import Kind


@dataclass(frozen=True)
class GroupShare:
    """How many of a group's channels are kept.

    Attributes:
        name: the group's name.
        modality: "vision", "text" or "other".
        kind: "attention", "mlp" or "residual".
        size: channels before pruning.
        kept: channels after pruning.
    """

    name: str
    modality: str
    kind: Kind
    size: int
    kept: int

    @classmethod
    def of(cls, groups: Sequence[Group], plan: Mapping[str, Sequence[Any]]) -> list[GroupShare]:
        """Return one share per group, in the given order; a group that the plan does not name keeps all channels.

        Args:
            groups: the groups of the dense model.
            plan: group name -> kept channels; an `upop.Plan`.
        """
        kept = {group.name: len(plan[group.name]) if group.name in plan else group.size for group in groups}
        return [cls(group.name, group.modality, group.kind, group.size, kept[group.name]) for group in groups]

    @property
    def share(self) -> float:
        """The share of channels that are kept, from 0 to 1."""
        return self.kept / self.size


@dataclass(frozen=True)
class Panel:
    """One structure in all layers of a tower: a row of bars.

    Attributes:
        title: unique within its modality: "Cross-attention 2".
        modality: "vision", "text" or "other".
        layers: the groups, from the input to the output.
    """

    title: str
    modality: str
    layers: tuple[GroupShare, ...]


def kept_share(groups: Iterable[GroupShare]) -> float:
    """Return the share of channels that some groups keep together, from 0 to 1; 1 without groups."""
    listed = list(groups)
    size = sum(group.size for group in listed)
    return sum(group.kept for group in listed) / size if size else 1.0


def panels(shares: Iterable[GroupShare]) -> list[Panel]:
    """Arrange groups in panels: those whose names differ only in layer numbers share one.

    Panels are in the order of first appearance, and by modality: vision, text, others.
    """
    alike: dict[tuple[str, str, str], list[GroupShare]] = {}
    for group in shares:
        alike.setdefault((group.modality, _template(group.name), group.kind), []).append(group)
    order = {"vision": 0, "text": 1}
    result: list[Panel] = []
    for modality in sorted({key[0] for key in alike}, key=lambda name: (order.get(name, 2), name)):
        mine = {key: groups for key, groups in alike.items() if key[0] == modality}
        titles = _titles([(template, kind) for _, template, kind in mine])
        result += [Panel(title, modality, tuple(groups)) for title, groups in zip(titles, mine.values(), strict=True)]
    return result


def _template(name: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def _titles(structures: Sequence[tuple[str, str]]) -> list[str]:
    """Return a unique title for every (template, kind): its structure, then its tower and a number if needed."""
    crosses = any("cross" in template for template, _ in structures)
    plain = []
    for template, kind in structures:
        if kind == "mlp":
            plain.append("MLP")
        elif kind == "residual":
            plain.append("Residual stream")
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
