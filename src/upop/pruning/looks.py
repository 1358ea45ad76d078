"""The hooks of those who look at forward passes: they tell them as long as anyone holds them, and copies do nothing."""

from __future__ import annotations

import weakref
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class Looking(Protocol):
    """What is told of forward passes."""

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a pass of the model begins."""
        ...

    def end(self, model: nn.Module | None = None) -> None:
        """Note that it ends."""
        ...

    def see(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """See one call of a layer."""
        ...


class _Hook:
    """A hook that tells somebody as long as anyone holds them; a copy, or a pickled one, does nothing any more."""

    def __init__(self, looking: Looking | None = None, name: str = "") -> None:
        self._looking, self._name = None if looking is None else weakref.ref(looking), name

    def _described(self) -> Looking | None:
        """Return who is to be told; code that is being compiled tells nobody."""
        return None if self._looking is None or torch.compiler.is_compiling() else self._looking()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class Look(_Hook):
    """The hook on a layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Tell of a call."""
        del module
        looking = self._described()
        if looking is not None:
            looking.see(self._name, args[0], output)


class Begin(_Hook):
    """The hook before the model's forward pass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell that it begins."""
        looking = self._described()
        if looking is not None:
            looking.begin(module, args, kwargs)


class End(_Hook):
    """The hook after the model's forward pass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Tell that it ends."""
        del args, output
        looking = self._described()
        if looking is not None:
            looking.end(module)
