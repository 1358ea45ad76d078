"""The base of all dispatch modes of the reader."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type


class Mode(TorchDispatchMode):
    """Intercepts every operation; higher-order operations come as one.

    Tensor subclasses (nested tensors, for instance) dispatch first, so that their operations arrive on plain tensors.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on plain tensors; return its result."""
        raise NotImplementedError


def leaves_in(value: Any) -> list[Any]:
    """Return the leaves of nested lists, tuples and dicts, in order; ten times as fast as pytree."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, list | tuple):
        return [value]
    found: list[Any] = []
    for each in value:
        if isinstance(each, list | tuple | dict):
            found += leaves_in(each)
        else:
            found.append(each)
    return found


def kept_by(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module besides its parameters, buffers and modules."""
    return {name: each for name, each in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among arguments or results of an operation."""
    return [each for each in leaves_in(value) if isinstance(each, Tensor)]


def name_of(func: Any) -> str:
    """Return the name of an operation without its namespace."""
    packet = getattr(func, "overloadpacket", None)
    return str(func.name() if packet is None else packet._qualified_op_name).removeprefix("aten::")


def defined(func: Any) -> Any:
    """Return an operation without the restrictions of its kernel on precision and memory layout."""
    return _grouped_product if name_of(func) == "_grouped_mm" else func


def _grouped_product(tokens: Tensor, weights: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Multiply tokens, sorted by expert, by expert weights [experts, in, out]; `offs` are the end offsets."""
    if isinstance(tokens, FakeTensor) or isinstance(offs, FakeTensor):
        return tokens @ weights[0]
    found = tokens.new_zeros(len(tokens), weights.shape[2])
    start = 0
    for expert, stop in enumerate(offs.tolist()):
        found[start:stop] = tokens[start:stop] @ weights[expert]
        start = stop
    return found
