"""Records which part of a tensor a cut keeps, so that its gradient and optimizer state are cut alike."""

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
    """The part of a tensor that a cut keeps.

    Attributes:
        shape: of the tensor before the cut.
        kept: dimension -> kept positions, ascending, int64, on the CPU.
        scaled: (dimension, positions before the cut, factor): the queries that the cut multiplies by the factor.
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
        """Return the kept part of a tensor, in new memory.

        Args:
            tensor: of the shape before the cut.
            degree: power of the factor for queries: 1 for weights, -1 for gradients and their averages, -2 for averages
                of squared gradients, 0 for neither.
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
    """Return tensor name -> slicing for every tensor that a cut changes, in the order of the groups.

    Args:
        model: before the cut; masked or not.
        groups: of the model.
        plan: their kept channels.
        fold: whether to rescale queries for a softmax scale that depends on the size.
    """
    going = [group for group in groups if len(plan[group.name]) < group.size]
    names = dict.fromkeys(part.tensor for group in going for part in group.slices)
    return {name: slicing(tensor_of(model, name), name, going, plan, fold) for name in names}


def slicing(
    tensor: Tensor, name: str, groups: Iterable[Group], plan: Mapping[str, Sequence[int]], fold: bool
) -> Slicing:
    """Return the slicing of one tensor along all dimensions that groups cut."""
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
