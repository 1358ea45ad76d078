"""Compares models apart from their weights; models that are alike have the same groups."""

from __future__ import annotations

import enum
import types
from collections.abc import Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_MOST_BYTES = 2**16
"""Of a buffer whose content is compared."""
_OWN = frozenset(vars(nn.Module()))
_NOTED = frozenset({"upop_plan", "_upop_cut_beyond", "upop_preparation", "upop_in_training", "_is_accelerate_prepared"})
"""What is noted on a model, and no forward reads: the last by Accelerate."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.layout, enum.Enum)
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)


class _OtherError(Exception):
    """A value that cannot be compared."""


def likeness(model: nn.Module) -> Hashable | None:
    """Return a key that is equal for models that differ in their weights alone; None if there is no such key.

    It contains the classes and attributes of all modules and the shapes of all tensors. Models with hooks, or with
    attributes of unknown types, have no key. The precision of the weights does not count, since groups are proved in
    float64.
    """
    try:
        return tuple(_parts(model))
    except (_OtherError, RecursionError):
        return None


def _parts(model: nn.Module) -> Iterator[Hashable]:
    numbers: dict[int, int] = {}
    parameters = [each for each in model.parameters() if each.is_floating_point()]
    plain = parameters[0].dtype if len({each.dtype for each in parameters}) == 1 else None

    def number(thing: object) -> int:
        """Number shared objects, so that both models must share the same ones."""
        return numbers.setdefault(id(thing), len(numbers))

    for name, module in model.named_modules(remove_duplicate=False):
        if any(module.__dict__.get(hooks) for hooks in _HOOKS):
            raise _OtherError
        yield name, type(module), type(module).forward, number(module)
        for key, value in sorted(vars(module).items()):
            if key not in _OWN and key not in _NOTED:
                yield key, _plain(value)
        for key, parameter in module._parameters.items():
            yield key, None if parameter is None else (number(parameter), *_shape(parameter, plain))
        for key, buffer in module._buffers.items():
            yield key, None if buffer is None else (number(buffer), *_shape(buffer, plain), _content(buffer))


def _shape(tensor: Tensor, plain: torch.dtype | None) -> tuple[Hashable, ...]:
    """Return the shape, dtype (None for that of all weights) and device type of a tensor."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise _OtherError
    return tuple(tensor.shape), None if tensor.dtype == plain else tensor.dtype, tensor.device.type


def _content(buffer: Tensor) -> bytes | None:
    """Return the values of a buffer that may steer the forward."""
    if buffer.is_meta or buffer.is_floating_point() or buffer.is_complex():
        return None
    if buffer.nbytes > _MOST_BYTES:
        raise _OtherError
    return buffer.cpu().contiguous().numpy().tobytes()


def _plain(value: Any) -> Hashable:
    """Return a hashable form of a value.

    Raises:
        _OtherError: values of its type cannot be compared.
    """
    if isinstance(value, (*_PLAIN, *_CODE)):
        return type(value), value
    if isinstance(value, Tensor):
        return _shape(value, None), _content(value)
    if isinstance(value, list | tuple):
        return type(value), *map(_plain, value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_plain, value))
    if isinstance(value, Mapping):
        return type(value), *((_plain(key), _plain(each)) for key, each in value.items())
    if isinstance(value, partial):
        return partial, _plain(value.func), _plain(value.args), _plain(value.keywords)
    if hasattr(value, "to_dict") or hasattr(value, "model_dump"):  # configurations of transformers, and of pydantic
        return type(value), _plain(vars(value))
    raise _OtherError
