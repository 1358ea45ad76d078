"""Records of one traced run: what is known of tensors, parameters and operations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from upop.pruning.axes.axis import Axis, Dim, axes_in, dim_of

Rows = dict[tuple[str, int], Tensor]
"""Positions along dimensions of parameters: (parameter's name, dimension) -> [length], bool."""


@dataclass
class Label:
    """What is known of one tensor during a traced run.

    Attributes:
        dims: the factors of each dimension.
        sources: the parameters whose rows it comes from through elementwise operations.
        linear: whether it is proportional to them, and so zero where they are.
        parameter: whether it is a parameter, or computed from parameters alone.
        past: all parameters that it depends on, as bits; the inputs of the model are one more bit.
        attends: for attention scores, the axes over which queries and keys were contracted.
        latent: whether it is a product of parameters alone: a merged weight, or learned tokens after a layer.
        places: positions that were selected on the way, as (axis, position).
        blank: whether it is constant, so that it fits any axis; if its size is hard-coded, the run of a cut copy
            shows that.
    """

    dims: list[Dim]
    sources: frozenset[str] = frozenset()
    linear: bool = True
    parameter: bool = False
    past: int = 0
    attends: Dim = ()
    latent: bool = False
    places: tuple[tuple[Axis, int], ...] = ()
    blank: bool = False

    @property
    def active(self) -> bool:
        """Whether it is an activation that carries, or may carry, an axis."""
        return (self.latent or not self.parameter) and any(axes_in(self.dims))


@dataclass
class Use:
    """How a parameter uses its axes.

    Attributes:
        axes: one for each dimension.
        roles: dimension -> "produces" (it opens the axis), "consumes" (the axis is summed over), "follows" (it is
            one number per channel: a bias, a scale), "added" (it follows, and is not 0 where the axis is).
        direct: whether anything besides the `nn.Linear.forward` of its own module reads it.
    """

    name: str
    axes: list[Axis]
    roles: dict[int, set[str]] = field(default_factory=dict)
    direct: bool = False

    def note(self, dim: int, role: str) -> None:
        """Add a role."""
        self.roles.setdefault(dim, set()).add(role)


@dataclass(frozen=True)
class Step:
    """One operation of the forward.

    Attributes:
        name: the name of the ATen operation.
        module: dotted name of the running module.
        dims: factors of each output; None for outputs that carry no axis.
        inputs: factors of each input.
        numbers: the plain-number arguments.
        line: file and line of the calling code.
    """

    name: str
    module: str
    dims: tuple[tuple[Dim, ...] | None, ...]
    inputs: tuple[tuple[Dim, ...] | None, ...]
    numbers: tuple[int | float, ...]
    line: str

    @property
    def given(self) -> tuple[Dim, ...] | None:
        """The factors of the first input."""
        return self.inputs[0] if self.inputs else None


@dataclass(frozen=True)
class Made:
    """A recorded output tensor of a module."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def plain(tensor: Tensor) -> list[Dim]:
    """Return plain dimensions, for tensors that carry no axis."""
    return list(map(dim_of, tensor.shape))
