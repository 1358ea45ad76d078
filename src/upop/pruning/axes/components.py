"""From followed axes to components: what can be cut, and which slices of which tensors go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from upop.pruning.axes.axis import Axis
from upop.pruning.axes.label import Use
from upop.pruning.axes.trace import Trace


@dataclass(eq=False)
class Part:
    """One dimension of one tensor that carries a component's axis.

    Attributes:
        use: the tensor.
        dim: its dimension.
        channels: which channel each position belongs to, [length]; -1 where none.
        roles: what the tensor does with the axis.
        gates: whether it only gates what the others make.
    """

    use: Use
    dim: int
    channels: Tensor
    roles: set[str]
    gates: bool


@dataclass(eq=False)
class Component:
    """Axes that can be cut together, channel by channel.

    Attributes:
        axis: the axis.
        parts: all that carries it.
        above: axes outside it in the same tensors (heads, around their dimensions).
    """

    axis: Axis
    parts: list[Part] = field(default_factory=list)
    above: set[Axis] = field(default_factory=set)

    @property
    def attends(self) -> bool:
        """Whether it is of an attention: what is contracted between activations, heads, or what lies inside heads."""
        return bool(self.axis.marks & {"dimension", "head"}) or self.inside_heads

    @property
    def inside_heads(self) -> bool:
        """Whether a channel is a dimension of all heads."""
        return "head" not in self.axis.marks and any("head" in axis.marks for axis in self.above)

    @property
    def producers(self) -> list[Part]:
        """The parts whose rows open the axis."""
        return [part for part in self.parts if "produces" in part.roles]

    @property
    def consumers(self) -> list[Part]:
        """The parts that sum over the axis."""
        return [part for part in self.parts if "consumes" in part.roles]


def components(trace: Trace) -> dict[Axis, Component]:
    """Return every axis of the model's parameters that something produces, fixed or not."""
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
