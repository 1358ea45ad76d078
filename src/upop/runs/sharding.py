"""FSDP2 in the training loop: shards weights, gradients and optimizer state over the processes of a run.

Accelerate limits FSDP to GPUs; `fully_shard` works on any device, so two CPU processes can test it. Each phase trains a
sharded copy. The model itself stays on the CPU, and gets the full weights back for evaluation, saving and the cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from upop.errors import LayoutError
from upop.pruning import unmask
from upop.pruning.sharded import gather_into, is_sharded_tensor
from upop.pruning.traits import momentum_encoders, read_by_others

State = Mapping[str, Any]


class Search(Protocol):
    """A search or teacher that can move to another copy of the model."""

    def move_to(self, model: nn.Module) -> None:
        """Continue with another copy of the model."""
        ...


class Sharding:
    """The sharded copy of a model that one phase trains.

    Args:
        model: the model, with its masks if it has any; it moves to the CPU.
        device: of this process.
        search: the `Pruner` or `Compression` of the model; it moves to the copy.
        average: moving average of the model; its module is sharded too.

    Attributes:
        module: the copy.

    Raises:
        LayoutError: two parts of the model that are sharded separately share a weight.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, search: Search | None, average: ModelEmaV3 | None
    ) -> None:
        self._model, self._device, self._search, self._average = model, device, search, average
        self.module = sharded_copy(model, device)
        if search is not None:
            search.move_to(self.module)
        if average is not None:
            self._whole_average = average.module
            average.module = self._sharded_average = sharded_copy(average.module, device)
            # torch's foreach operations reject lists with both sharded and plain tensors.
            average.foreach = all(is_sharded_tensor(value) for value in self._sharded_average.state_dict().values())

    @contextmanager
    def whole(self, device: torch.device | None = None) -> Iterator[None]:
        """Within the block, the model and its average have the current weights, unsharded; all processes enter it.

        Args:
            device: of the two within the block; by default that of this process.
        """
        self.finish(device)
        yield
        if self._search is not None:
            self._search.move_to(self.module)
        self._model.to("cpu")
        if self._average is not None:
            self._whole_average.to("cpu")
            self._average.module = self._sharded_average

    def finish(self, device: torch.device | None = None) -> None:
        """Copy the weights back to the model and its average; all processes call it together."""
        device = self._device if device is None else device
        gather_into(self._model, self.module)
        if self._search is not None:
            self._search.move_to(self._model)
        self._model.to(device)
        if self._average is not None:
            gather_into(self._whole_average, self._sharded_average)
            self._average.module = self._whole_average.to(device)


def sharded_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model, sharded over all processes; the model moves to the CPU.

    Blocks are gathered one at a time: children of one class in a ModuleList or Sequential. Momentum encoders and their
    originals are sharded separately, so that one can be updated from the other shard by shard.

    Raises:
        LayoutError: two of these parts share a weight.
    """
    whole = unmask(copy.deepcopy(model.to("cpu")))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    kept = set(_unsharded(whole))
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    parts = [*_blocks(whole), *_momentum_encoders(whole)]
    _refuse_shared(whole, parts, kept)
    for part in [*parts, whole]:
        fully_shard(part, mesh=mesh, ignored_params=kept)
    return whole


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        layers = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = len({type(layer) for layer in layers}) == 1 and any(True for _ in layers[0].parameters())
        if len(layers) > 1 and alike:
            yield from layers
        else:
            yield from _blocks(child)


def _momentum_encoders(model: nn.Module) -> Iterator[nn.Module]:
    names = [name for pair in momentum_encoders(model).items() for name in pair]
    yield from (model.get_submodule(name) for name in names)


def _unsharded(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield parameters that cannot be sharded: scalars, and weights read outside their module's forward."""
    yield from (parameter for parameter in model.parameters() if not parameter.dim())
    for name in read_by_others(model):
        yield from model.get_submodule(name).parameters()


def _refuse_shared(model: nn.Module, parts: list[nn.Module], kept: set[nn.Parameter]) -> None:
    """Raise a `LayoutError` if two parts share a weight; a part may lie within another."""
    names = {module: name for name, module in model.named_modules()}
    holders: dict[nn.Parameter, str] = {}
    for module in model.modules():
        path = names[module]
        inside = [names[part] for part in parts if f"{path}.".startswith(f"{names[part]}.")]
        innermost = max(inside, key=len, default="")
        for parameter in module.parameters(recurse=False):
            other = holders.setdefault(parameter, innermost)
            if other != innermost and parameter not in kept:
                raise LayoutError(
                    f"{other or 'The model'} and {innermost or 'the model'} share a weight, but FSDP shards them "
                    "separately. Train this model without FSDP (sharding: none)."
                )


def _split(tensors: Iterable[Any]) -> list[list[Any]]:
    """Return the sharded tensors and the plain ones, as non-empty lists: torch rejects mixed lists."""
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for tensor in tensors:
        kinds[not is_sharded_tensor(tensor)].append(tensor)
    return [kind for kind in kinds if kind]


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    """Move unsharded parameters to optimizer groups of their own, with the same options."""
    for group in list(optimizer.param_groups):
        first, *others = _split(group["params"])
        group["params"] = first
        for params in others:
            optimizer.add_param_group({**group, "params": params})


def average_unsharded(model: nn.Module) -> None:
    """Average the gradients of unsharded parameters over processes, which `fully_shard` does not do."""
    for parameter in model.parameters():
        if parameter.grad is not None and not is_sharded_tensor(parameter):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients, a plain scalar; equal on all processes if they are sharded."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.nn.utils.get_total_norm(kind) for kind in _split(gradients)]
    plain = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return plain[0] if len(plain) == 1 else torch.nn.utils.get_total_norm(plain)


def clip(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scale all gradients by the same factor, so that their total `norm` is at most `largest`."""
    for kind in _split(parameters):
        torch.nn.utils.clip_grads_with_norm_(kind, largest, norm)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Any]:
    """Return the state of an optimizer, with sharded tensors gathered on the CPU; all processes call it together.

    Args:
        optimizer: its state for unsharded parameters is returned as it is.
        keep: False replaces gathered tensors by None, on processes that do not save.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None

    state = optimizer.state_dict()
    state["state"] = {
        number: {key: whole(value) for key, value in each.items()} for number, each in state["state"].items()
    }
    return state


class GatheredState:
    """The state of an optimizer of sharded weights, keyed by the whole model's parameters, so that a cut can slice it.

    Args:
        optimizer: of the copy; all processes make this together.
        module: the sharded copy.
        model: the whole model, with parameters of the same names.

    Attributes:
        state: parameter of the whole model -> its optimizer state, gathered on the CPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module, model: nn.Module) -> None:
        names = {parameter: name for name, parameter in module.named_parameters()}
        whole = dict(model.named_parameters())
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._content = whole_optimizer_state(optimizer)
        self._order = [whole[names[parameter]] for parameter in order]
        self.state = {self._order[number]: kept for number, kept in self._content["state"].items()}

    def content(self) -> dict[str, Any]:
        """Return the state in the form of `whole_optimizer_state`."""
        numbers = {parameter: number for number, parameter in enumerate(self._order)}
        return self._content | {"state": {numbers[parameter]: kept for parameter, kept in self.state.items()}}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load a state from `whole_optimizer_state`; each process keeps its shard, whatever their number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def distributed(number: int, value: Any) -> Any:
        parameter = parameters[number]
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        placed = value.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)

    each = {
        number: {key: distributed(number, value) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": each})
