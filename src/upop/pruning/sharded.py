"""Models whose weights are sharded over processes by `torch.distributed.fsdp.fully_shard` (FSDP2).

Scores need whole rows: each process scores its own rows, and one sum over the processes gives all scores to each, equal
to those of an unsharded model. A cut needs whole tensors: `full_copy` makes an unsharded copy, and nothing is cut while
it is sharded.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from upop.pruning.deprecated import older_names
from upop.pruning.errors import LayoutError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Key = TypeVar("Key")


def many_processes() -> bool:
    """Whether several processes train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes."""
    kinds = sys.modules.get("torch.distributed.tensor")  # not imported: there can be none
    return kinds is not None and isinstance(tensor, kinds.DTensor)


def sharded_modules(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that `fully_shard` was called on."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is not None:
        yield from (module for module in model.modules() if isinstance(module, sharding.FSDPModule))


def unsharded_class(kind: type) -> type | None:
    """Return the original class of a module that `fully_shard` wrapped; None for other modules."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    return kind.__bases__[1] if sharding is not None and kind.__bases__[0] is sharding.FSDPModule else None


def sharded_class(kind: type, like: type) -> type:
    """Return a class with the FSDP class in front of it, as in `like`."""
    content = {name: value for name, value in like.__dict__.items() if name == "__deepcopy__"}
    return type(f"FSDP{kind.__name__}", (like.__bases__[0], kind), content)


def reshard(model: nn.Module) -> None:
    """Reshard weights that a forward pass without a backward pass left gathered."""
    for module in sharded_modules(model):
        module.reshard()


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise a `LayoutError` if `model` is sharded: `what` needs its whole weights."""
    if any(True for _ in sharded_modules(model)) or any(is_sharded_tensor(part) for part in model.parameters()):
        raise LayoutError(
            f"{what} needs the whole weights of a model, and those of this {type(model).__name__} are sharded over "
            "processes by fully_shard. Make a plain copy on all processes, whole = upop.full_copy(model), and continue "
            "with it; upop.Compression, pruner.shrink and upop.shrink take the sharded model itself."
        )


def refuse_flattened(model: nn.Module) -> None:
    """Raise a `LayoutError` if FSDP1 has flattened the weights of a module of `model`."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is not None and any(
        isinstance(module, sharding.FullyShardedDataParallel) for module in model.modules()
    ):
        raise LayoutError(
            "FullyShardedDataParallel flattens weights, so their rows cannot be masked or scored. "
            "Use torch.distributed.fsdp.fully_shard (with Accelerate: fsdp_version=2)."
        )


@dataclass(frozen=True)
class HeldRows:
    """One number per row of a sharded tensor, for the rows of this process.

    Attributes:
        values: [held rows].
        first: index of the first held row.
        rows: number of all rows.
        mesh: the device mesh.
        along: the mesh dimension along which rows are sharded.
    """

    values: Tensor
    first: int
    rows: int
    mesh: Any
    along: int


def held_rows(
    weight: Tensor, gradient: Tensor, dim: int, function: Callable[[Tensor, Tensor, int], Tensor], dtype: torch.dtype
) -> HeldRows:
    """Apply `function` to the rows of this process.

    Args:
        weight: a sharded tensor; if sharded along another dimension than `dim`, it is first redistributed by rows.
        gradient: of the same shape.
        dim: the dimension of the rows.
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
            f"A weight has the placements {sharded.placements}; scores need weights that fully_shard "
            "shards along one mesh dimension. Do not combine it with tensor parallelism."
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


def whole_rows(held: Mapping[Key, HeldRows]) -> dict[Key, Tensor]:
    """Return all rows of every tensor, on every process alike; one sum over the processes for each mesh.

    Every process must call it with the same names. Each row is added to zeros, so nothing is rounded.
    """
    found: dict[Key, Tensor] = {}
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
    """Apply `function` to the full tensor and shard the result as before; all processes call it together."""
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    found = function(sharded.detach().full_tensor())
    return distribute_tensor(found, sharded.device_mesh, sharded.placements, src_data_rank=None)


def copied(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Return a deep copy of `model` with replaced parameters and buffers; shared ones stay shared.

    Args:
        model: not sharded.
        replace: (name, parameter or buffer) -> its replacement in the copy.
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
    """Copy the weights and buffers of a sharded model into an unsharded one; all processes call it together.

    Raises:
        LayoutError: the two models have different parameters.
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
