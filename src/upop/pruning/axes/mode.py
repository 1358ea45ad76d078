"""What all dispatch modes of the reader share: which operations they are given."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type


class Mode(TorchDispatchMode):
    """Is given every operation, those of higher order whole.

    Tensors that are made of others (nested ones, say) do theirs first, which come as operations on those.
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
        """Run an operation that is given plain tensors; return what it gives."""
        raise NotImplementedError


def leaves_in(value: Any) -> list[Any]:
    """Return what lists, tuples and dicts of arguments or results hold, in order; pytree takes ten times as long."""
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


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among arguments or results of an operation."""
    return [each for each in leaves_in(value) if isinstance(each, Tensor)]


def name_of(func: Any) -> str:
    """Return what an operation is called, without its namespace."""
    packet = getattr(func, "overloadpacket", None)
    return str(func.name() if packet is None else packet._qualified_op_name).removeprefix("aten::")


def defined(func: Any) -> Any:
    """Return an operation as it is defined, where its kernel asks for more than that: precision, or how tensors lie."""
    return _grouped_product if name_of(func) == "_grouped_mm" else func


def _grouped_product(tokens: Tensor, weights: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Multiply tokens, sorted by their experts, with the weights of those, [experts, in, out]; `offs` are the ends."""
    if isinstance(tokens, FakeTensor) or isinstance(offs, FakeTensor):
        return tokens @ weights[0]
    found = tokens.new_zeros(len(tokens), weights.shape[2])
    start = 0
    for expert, stop in enumerate(offs.tolist()):
        found[start:stop] = tokens[start:stop] @ weights[expert]
        start = stop
    return found
