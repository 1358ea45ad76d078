"""What can be removed from a model, as plain records.

A unit is one axis that several tensors share: the head dimensions of an attention, the hidden neurons of an
MLP. Everything the method does (mask, score, cost, cut) is a loop over these records, so a new model family is
a new row in `layouts.py` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Slice:
    """One tensor that carries a unit's axis.

    Along `dim` the tensor is laid out as (`outer`, size of the unit, `inner`), flattened: a fused qkv weight of
    12 heads has outer = 36, a whole-head axis has inner = head_dim.

    Attributes:
        tensor: dotted name of the parameter, from the model.
        dim: the dimension of the tensor along which the axis lies (0: rows, 1: columns of a linear layer).
        outer: how many times the axis is repeated along `dim`.
        inner: how many neighbouring rows belong to one entry.
        produces: True where the tensor produces the axis (it is masked and scored), False where it consumes it.
        query_groups: how many of the first `outer` groups are queries; `shrink` folds the softmax scale into them.
        follows: True for a tensor of a momentum copy, which is cut with the axis and otherwise left alone: it is
            neither masked, nor scored, nor counted.
    """

    tensor: str
    dim: int = 0
    outer: int = 1
    inner: int = 1
    produces: bool = True
    query_groups: int = 0
    follows: bool = False

    def length(self, size: int) -> int:
        """Return the length of the tensor along `dim` when the unit has `size` entries."""
        return self.outer * size * self.inner

    def index(self, kept: Tensor, size: int) -> Tensor:
        """Return the positions along `dim` that belong to the `kept` entries (int64, ascending per group)."""
        outer = torch.arange(self.outer, device=kept.device).view(-1, 1, 1)
        inner = torch.arange(self.inner, device=kept.device).view(1, 1, -1)
        return ((outer * size + kept.view(1, -1, 1)) * self.inner + inner).reshape(-1)

    def expand(self, entries: Tensor) -> Tensor:
        """Repeat one value per entry, shape [size], to one value per row, shape [outer * size * inner]."""
        return entries.repeat_interleave(self.inner).repeat(self.outer)

    def reduce(self, rows: Tensor) -> Tensor:
        """Sum one value per row, shape [outer * size * inner], to one value per entry, shape [size]."""
        return rows.view(self.outer, -1, self.inner).sum(dim=(0, 2))


@dataclass(frozen=True)
class Attribute:
    """A number that a module keeps about the axis, to be set again after the cut.

    Its new value is `factor * kept`, or `kept ** -0.5` where `factor` is None (a softmax scale).
    """

    module: str
    name: str
    factor: int | None = 1

    def value(self, kept: int) -> int | float:
        """Return the attribute's value for `kept` entries."""
        return kept**-0.5 if self.factor is None else self.factor * kept


@dataclass(frozen=True)
class Unit:
    """One axis that can be pruned, entry by entry (the mask vector of one layer in the paper).

    Attributes:
        name: dotted name of the module that holds it, unique in the model.
        kind: "attention" (entries are head dimensions, shared by all heads) or "mlp" (entries are neurons).
        modality: "vision", "text" or "other"; for reports, and for the published cost weights.
        size: number of entries before pruning.
        heads: number of attention heads that share the entries; 1 for an MLP.
        slices: every tensor that carries the axis; the first that produces it is the query, the second the key
            (or the first is a fused query-key-value).
        attributes: the numbers to set again after the cut.
    """

    name: str
    kind: Kind
    modality: str
    size: int
    heads: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()

    @property
    def producers(self) -> tuple[Slice, ...]:
        """The slices that produce the axis: masked while searching, scored at every step."""
        return tuple(part for part in self.slices if part.produces and not part.follows)

    @property
    def online(self) -> tuple[Slice, ...]:
        """The slices that are no momentum copy's: what an entry costs."""
        return tuple(part for part in self.slices if not part.follows)


@dataclass(frozen=True)
class Skipped:
    """A part of a model that looks prunable but is left alone, and why."""

    name: str
    reason: str


def tensor_of(model: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter called `name`.

    Raises:
        AttributeError: there is no such parameter.
    """
    return model.get_parameter(name)


def owner_of(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    """Return the module that holds the parameter `tensor`, and the parameter's name inside it."""
    path, _, leaf = tensor.rpartition(".")
    return model.get_submodule(path), leaf
