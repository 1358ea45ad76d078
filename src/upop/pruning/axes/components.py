"""Turns traced axes into components: the tensor slices that must be pruned together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from upop.pruning.axes.axis import Axis
from upop.pruning.axes.label import Use
from upop.pruning.axes.trace import Trace


@dataclass(eq=False)
class Part:
    """One tensor dimension that carries the axis of a component.

    Attributes:
        use: the tensor.
        dim: its dimension.
        channels: the channel at each position, [length]; -1 where there is none.
        roles: how the tensor uses the axis.
        gates: whether it only gates the output of other producers.
    """

    use: Use
    dim: int
    channels: Tensor
    roles: set[str]
    gates: bool


@dataclass(eq=False)
class Component:
    """Coupled axes, pruned channel by channel.

    Attributes:
        axis: the axis.
        parts: all tensor dimensions that carry it.
        above: axes that enclose it in the same tensors (heads enclose head dimensions).
    """

    axis: Axis
    parts: list[Part] = field(default_factory=list)
    above: set[Axis] = field(default_factory=set)

    @property
    def attends(self) -> bool:
        """Whether the axis belongs to an attention: head dimensions, heads, or anything inside heads."""
        return bool(self.axis.marks & {"dimension", "head"}) or self.inside_heads

    @property
    def inside_heads(self) -> bool:
        """Whether each channel is the same dimension in all heads."""
        return "head" not in self.axis.marks and any("head" in axis.marks for axis in self.above)

    @property
    def is_dimension(self) -> bool:
        """Whether each channel is a dimension of heads; what reads all heads at once contracts whole heads, too."""
        return "head" not in self.axis.marks and (self.inside_heads or "dimension" in self.axis.marks)

    @property
    def producers(self) -> list[Part]:
        """The parts that produce the axis."""
        return [part for part in self.parts if "produces" in part.roles]

    @property
    def consumers(self) -> list[Part]:
        """The parts that sum over the axis."""
        return [part for part in self.parts if "consumes" in part.roles]


def components(trace: Trace) -> dict[Axis, Component]:
    """Return every produced axis among the model's parameters, fixed or not."""
    found: dict[Axis, Component] = {}
    gating, added = ({(name, axis.root) for name, axis in pairs} for pairs in (trace.gates, trace.added))
    gates = gating - added
    for use in trace.uses.values():
        for dim, axis in enumerate(use.axes):
            roles = use.roles.get(dim, set())
            seen: set[Axis] = set()
            for leaf, above in _leaves(axis.root, frozenset()):
                if leaf.size < 2 or leaf in seen:
                    continue
                seen.add(leaf)
                component = found.setdefault(leaf, Component(leaf))
                channels = axis.channels(leaf)
                component.parts.append(Part(use, dim, channels, roles, (use.name, leaf) in gates))
                component.above |= above
    return {axis: component for axis, component in found.items() if component.producers}


def _leaves(axis: Axis, above: frozenset[Axis]) -> Iterator[tuple[Axis, frozenset[Axis]]]:
    root = axis.root
    if not root.parts:
        yield root, above
        return
    outer = above
    for part in root.parts:
        yield from _leaves(part, outer)
        if root.joined == "product":
            outer = outer | frozenset(part.leaves())
