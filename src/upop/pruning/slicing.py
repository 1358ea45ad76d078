"""What a cut leaves of a tensor, as a record, by which its gradient and what an optimizer keeps of it are cut too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from upop.pruning.groups import Group, tensor_of
from upop.pruning.sharded import is_sharded_tensor, through_whole


@dataclass(frozen=True)
class Slicing:
    """What a cut leaves of one tensor.

    Attributes:
        shape: of the tensor before the cut.
        kept: dimension -> the positions along it that stay, ascending, int64, on the CPU.
        scaled: (dimension, positions along it before the cut, factor): the queries, which the cut multiplies by it.
    """

    shape: torch.Size
    kept: Mapping[int, Tensor]
    scaled: tuple[tuple[int, Tensor, float], ...] = ()

    @property
    def after(self) -> torch.Size:
        """The tensor's shape after the cut."""
        return torch.Size(len(self.kept[dim]) if dim in self.kept else size for dim, size in enumerate(self.shape))

    @torch.no_grad()
    def of(self, tensor: Tensor, degree: int) -> Tensor:
        """Return what is left of a tensor, in memory of its own.

        Args:
            tensor: of the shape before the cut.
            degree: by which power of their factor queries are multiplied: 1 for weights, -1 for what grows with their
                gradient, -2 for what grows with its square, 0 for what depends on neither.
        """
        if is_sharded_tensor(tensor):
            return through_whole(tensor.detach(), lambda full: self.of(full, degree))
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            return tensor.new_empty(self.after)  # it has no numbers to choose from
        new = tensor.detach()
        if degree:
            for dim, positions, factor in self.scaled:
                rows = positions.to(new.device)
                new = new.index_copy(dim, rows, new.index_select(dim, rows) * factor**degree)
        for dim, positions in self.kept.items():
            new = new.index_select(dim, positions.to(new.device))
        return new


def slicings(
    model: nn.Module, groups: Iterable[Group], plan: Mapping[str, Sequence[int]], *, fold: bool = True
) -> dict[str, Slicing]:
    """Return what a cut leaves of every tensor that it changes, by their names, in the order of the groups.

    Args:
        model: not cut yet; masked or not.
        groups: of the model.
        plan: what they keep.
        fold: whether queries are multiplied for a softmax scale that follows the size.
    """
    going = [group for group in groups if len(plan[group.name]) < group.size]
    names = dict.fromkeys(part.tensor for group in going for part in group.slices)
    return {name: slicing(tensor_of(model, name), name, going, plan, fold) for name in names}


def slicing(
    tensor: Tensor, name: str, groups: Iterable[Group], plan: Mapping[str, Sequence[int]], fold: bool
) -> Slicing:
    """Return what is left of one tensor, along all axes that groups cut it along."""
    stays: dict[int, Tensor] = {}
    scaled: list[tuple[int, Tensor, float]] = []
    for group, part in ((each, part) for each in groups for part in each.slices if part.tensor == name):
        kept = torch.tensor(
            plan[group.name], dtype=torch.long, device="cpu"
        )  # models may be built with another device as the default
        here = torch.zeros(tensor.shape[part.dim], dtype=torch.bool, device="cpu")
        here[part.index(kept, group.size)] = True
        stays[part.dim] = stays.get(part.dim, torch.ones_like(here)) & here
        if fold and part.power:
            queries = part.query_rows(group.size)
            if len(queries) and len(kept):
                scaled.append((part.dim, queries, (len(kept) / group.size) ** part.power))
    return Slicing(tensor.shape, {dim: here.nonzero().flatten() for dim, here in stays.items()}, tuple(scaled))
