"""Models whose weights are sharded over processes by `torch.distributed.fsdp.fully_shard` (FSDP2).

Scores need whole rows: each process scores the rows that it holds, and one sum over the processes gives every process
all of them, the very numbers that a model in one piece would give. Cutting needs whole tensors: `full_copy` makes a
plain copy of the model from them, and nothing is cut while it is sharded.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upop.pruning.deprecated import older_names
from upop.pruning.errors import LayoutError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def many_processes() -> bool:
    """Whether this is one of several processes that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether a parameter or gradient is spread over processes."""
    kinds = sys.modules.get("torch.distributed.tensor")  # not imported: there can be none
    return kinds is not None and isinstance(tensor, kinds.DTensor)


def sharded_modules(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that `fully_shard` was called on."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is not None:
        yield from (module for module in model.modules() if isinstance(module, sharding.FSDPModule))


def unsharded_class(kind: type) -> type | None:
    """Return the class that `fully_shard` put its own in front of, or None where it did not."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    return kind.__bases__[1] if sharding is not None and kind.__bases__[0] is sharding.FSDPModule else None


def sharded_class(kind: type, like: type) -> type:
    """Return a class with FSDP's own in front of it, as `like` has it."""
    content = {name: value for name, value in like.__dict__.items() if name == "__deepcopy__"}
    return type(f"FSDP{kind.__name__}", (like.__bases__[0], kind), content)


def reshard(model: nn.Module) -> None:
    """Free weights that a forward pass without a backward one left gathered, so that each is in its shards again."""
    for module in sharded_modules(model):
        module.reshard()


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise a `LayoutError` if `model` is sharded: `what` needs its whole weights."""
    if any(True for _ in sharded_modules(model)) or any(is_sharded_tensor(part) for part in model.parameters()):
        raise LayoutError(
            f"{what} needs the whole weights of a model, and those of this {type(model).__name__} are sharded over "
            "processes by fully_shard. On all processes, make a plain copy, whole = upop.full_copy(model), and go on "
            "with that; upop.Compression, pruner.shrink and upop.shrink take the sharded model itself."
        )


def refuse_flattened(model: nn.Module) -> None:
    """Raise a `LayoutError` if the first version of FSDP has flattened the weights of a module of `model`."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is not None and any(
        isinstance(module, sharding.FullyShardedDataParallel) for module in model.modules()
    ):
        raise LayoutError(
            "FullyShardedDataParallel flattens weights, and then no row of them can be masked or scored. "
            "Use torch.distributed.fsdp.fully_shard (with Accelerate: fsdp_version=2)."
        )


@dataclass(frozen=True)
class HeldRows:
    """The rows of a sharded tensor that this process holds: one number for each of them.

    Attributes:
        values: [held rows].
        first: where they begin among all rows.
        rows: how many all processes hold.
        mesh: the processes, and along which of its dimensions they share the rows.
        along: that dimension.
    """

    values: Tensor
    first: int
    rows: int
    mesh: Any
    along: int


def held_rows(
    weight: Tensor, gradient: Tensor, dim: int, function: Callable[[Tensor, Tensor, int], Tensor], dtype: torch.dtype
) -> HeldRows:
    """Return `function` of the rows that this process holds.

    Args:
        weight: a sharded tensor; one that is sharded along another dimension than `dim` is first dealt out by rows.
        gradient: of the same shape.
        dim: the dimension along which the rows lie.
        function: (weight, gradient, dim), plain tensors of whole rows -> [rows].
        dtype: of the result.

    Raises:
        LayoutError: the tensor is sharded along more than one dimension of its mesh.
    """
    from torch.distributed.tensor import Shard

    sharded: DTensor = weight  # type: ignore[assignment]
    along = [place for place, placement in enumerate(sharded.placements) if placement.is_shard()]
    if len(along) != 1:
        raise LayoutError(
            f"A weight is placed as {sharded.placements} over its processes; scores can be taken from weights that "
            "fully_shard shards along one dimension of its mesh. Do not combine it with tensor parallelism."
        )
    placements = [Shard(dim) if place == along[0] else old for place, old in enumerate(sharded.placements)]
    parts = [
        each.detach().redistribute(placements=placements).to_local()  # type: ignore[attr-defined]
        for each in (weight, gradient)
    ]
    rows, held = weight.shape[dim], parts[0].shape[dim]
    share = -(-rows // sharded.device_mesh.size(along[0]))  # as torch.chunk deals them out
    first = min(share * sharded.device_mesh.get_local_rank(along[0]), rows)
    # A function of one's own need not know what to do with no row at all.
    values = function(parts[0], parts[1], dim).to(dtype) if held else parts[0].new_empty(0, dtype=dtype)
    return HeldRows(values, first, rows, sharded.device_mesh, along[0])


def whole_rows(held: Mapping[str, HeldRows]) -> dict[str, Tensor]:
    """Return all rows of every tensor, on every process alike; one sum over the processes for each mesh.

    Every process calls it with the same names. Each row is added to zeros, so nothing is rounded.
    """
    found: dict[str, Tensor] = {}
    meshes = {(part.mesh, part.along): part for part in held.values()}
    for mesh, along in meshes:
        parts = {name: part for name, part in held.items() if (part.mesh, part.along) == (mesh, along)}
        filled = []
        for part in parts.values():
            rows = part.values.new_zeros(part.rows)
            rows[part.first : part.first + len(part.values)] = part.values
            filled.append(rows)
        device = filled[0].device
        # With weights kept on the CPU the processes may still speak by way of their GPUs alone.
        flat = torch.cat(filled).to(mesh.device_type)
        torch.distributed.all_reduce(flat, group=mesh.get_group(along))
        sizes = [part.rows for part in parts.values()]
        found.update(zip(parts, flat.to(device).split(sizes), strict=True))
    return found


def through_whole(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `function` of a sharded tensor in one piece, shared out as it was; all processes call it together."""
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    found = function(sharded.detach().full_tensor())
    return distribute_tensor(found, sharded.device_mesh, sharded.placements, src_data_rank=None)


def copied(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Return a deep copy of `model` with other parameters and buffers; those that are shared stay shared.

    Args:
        model: not sharded.
        replace: (name, parameter or buffer) -> what the copy has in its place.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(replace(name, parameter.detach()), requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers():
        memo[id(buffer)] = replace(name, buffer)
    return copy.deepcopy(model, memo)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device, before it is sharded: the argument `like` of `full_copy`."""
    refuse_sharded(model, "skeleton()")
    parameters = {name for name, _ in model.named_parameters()}
    return copied(model, lambda name, old: old.to("meta") if name in parameters else old.detach().clone())


@torch.no_grad()
def gather_into(whole: nn.Module, model: nn.Module) -> None:
    """Fill a plain model with the weights and buffers of a sharded one; all processes call it at the same time.

    Raises:
        LayoutError: the two models have other parameters.
    """
    reshard(model)
    held: dict[str, Any] = dict(model.named_parameters())
    wanted: dict[str, Tensor] = dict(whole.named_parameters())
    shapes, found = ({name: part.shape for name, part in each.items()} for each in (wanted, held))
    if shapes != found:
        wrong = sorted({name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)})
        raise LayoutError(
            f"Weights can be gathered into the model as it was before it was sharded; {len(wrong)} parameters differ "
            f"in name or shape ({', '.join(wrong[:3])}, ...)."
        )
    held |= dict(model.named_buffers())
    for name, old in (wanted | dict(whole.named_buffers())).items():
        part = held.get(name, old)
        old.copy_(part.full_tensor() if is_sharded_tensor(part) else part)


__getattr__ = older_names(__name__)
