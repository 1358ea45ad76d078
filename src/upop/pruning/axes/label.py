"""What is known while a model runs: of tensors, of parameters, and of the operations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from upop.pruning.axes.axis import Axis, Dim, axes_in

Rows = dict[tuple[str, int], Tensor]
"""Positions along dimensions of parameters: (parameter's name, dimension) -> [length], bool."""


@dataclass
class Label:
    """What is known of one tensor while its model runs.

    Attributes:
        dims: the factors of every dimension.
        sources: the parameters whose rows it comes from, through what is done number by number.
        linear: whether it is 0 where they are, and in proportion to them.
        parameter: whether it is a parameter, or made of parameters alone.
        past: all parameters that it comes from, as bits; what the model is given is one more.
        attends: of scores, what queries and keys were contracted over.
        latent: whether it is a product of parameters alone: a weight, or learned tokens on their way.
        places: what was taken by its place on the way: (axis, place).
        blank: whether it is the same number everywhere, so that it fits any axis; where its size is written out, the
            run of a cut copy tells.
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
        """Whether it is an activation that carries an axis, or may be one."""
        return (self.latent or not self.parameter) and any(True for _ in axes_in(self.dims))


@dataclass
class Use:
    """What a parameter was seen to do with its axes.

    Attributes:
        axes: one for each dimension.
        roles: dimension -> "produces" (it opens the axis), "consumes" (the axis is summed over), "follows" (it is
            one number per channel: a bias, a scale), "added" (it follows, and is not 0 where the axis is).
        direct: whether anything but its own module's `nn.Linear.forward` reads it.
    """

    name: str
    axes: list[Axis]
    roles: dict[int, set[str]] = field(default_factory=dict)
    direct: bool = False

    def note(self, dim: int, role: str) -> None:
        """Take note of a role."""
        self.roles.setdefault(dim, set()).add(role)


@dataclass(frozen=True)
class Step:
    """One operation of a forward.

    Attributes:
        name: of the operation, as ATen calls it.
        module: the dotted name of the module that was running.
        dims: of each tensor that came out; None where nothing is known of it.
        inputs: of each tensor that went in.
        numbers: the plain numbers that went in.
        line: the user's file and line.
    """

    name: str
    module: str
    dims: tuple[tuple[Dim, ...] | None, ...]
    inputs: tuple[tuple[Dim, ...] | None, ...]
    numbers: tuple[int | float, ...]
    line: str

    @property
    def given(self) -> tuple[Dim, ...] | None:
        """Of the first tensor that went in."""
        return self.inputs[0] if self.inputs else None


@dataclass(frozen=True)
class Made:
    """What is remembered of a tensor that a module gave."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def plain(tensor: Tensor) -> list[Dim]:
    """Return the dimensions of numbers that nothing is known of."""
    return [(size,) if size != 1 else () for size in tensor.shape]
