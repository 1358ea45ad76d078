"""Deep copies of models whose functions (hooks, lambdas) refer to the copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def duplicate(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy whose stored functions (hooks, lambdas) refer to the copy, with their own closures.

    `copy.deepcopy` does not copy functions: those of the copy would run layers of the original.

    Args:
        model: left as it is.
        memo: what stands for what, by identity, as of `copy.deepcopy`; added to.
    """
    memo = {} if memo is None else memo
    copied: nn.Module = copy.deepcopy(model, memo)
    for module in copied.modules():
        kept: list[dict[Any, Any]] = [module._forward_pre_hooks, module._forward_hooks, vars(module)]
        for held in kept:
            for name, function in held.items():
                held[name] = _apart(function, memo)
    return copied


def _apart(function: Any, memo: dict[int, Any]) -> Any:
    """Return a function that closes over the copy, and over copies of its lists, mappings and sets."""
    if not isinstance(function, FunctionType):
        return function
    if id(function) in memo:
        return memo[id(function)]
    kinds = (list, dict, set, FunctionType, MethodType)
    if not any(id(each) in memo or isinstance(each, kinds) for each in _held(function)):
        return function

    def own(held: Any) -> Any:
        if isinstance(held, MethodType):  # as torch.compile keeps of a module
            return MethodType(held.__func__, memo.get(id(held.__self__), held.__self__))
        if id(held) not in memo and isinstance(held, list | dict | set):
            try:
                memo[id(held)] = copy.deepcopy(held, memo)
            except Exception:
                memo[id(held)] = copy.copy(held)
        return _apart(memo.get(id(held), held), memo)

    cells = tuple(CellType() for _ in function.__closure__ or ())
    code, given = function.__code__, (function.__globals__, function.__name__)
    apart = FunctionType(code, *given, None, cells)
    memo[id(function)] = memo[id(apart)] = apart
    apart.__defaults__ = tuple(map(own, function.__defaults__ or ())) or None
    apart.__kwdefaults__ = function.__kwdefaults__
    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is not set yet
            cell.cell_contents = own(old.cell_contents)
    return apart


def _held(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents
