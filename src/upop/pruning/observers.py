"""Hooks that report forward passes to an observer, as long as it is alive; copies of a hook report nothing."""

from __future__ import annotations

import weakref
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class Observer(Protocol):
    """Receives forward passes from hooks."""

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle the start of a forward pass."""
        ...

    def end(self, model: nn.Module | None = None) -> None:
        """Handle the end of a forward pass."""
        ...

    def see(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Handle one call of a layer."""
        ...


class _Hook:
    """A hook that holds its observer weakly. Copied or unpickled with a model, it does nothing."""

    def __init__(self, observer: Observer | None = None, name: str = "") -> None:
        self._observer, self._name = None if observer is None else weakref.ref(observer), name

    def _alive(self) -> Observer | None:
        """Return the observer; None if it was freed, or while torch.compile traces."""
        return None if self._observer is None or torch.compiler.is_compiling() else self._observer()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class LayerHook(_Hook):
    """The forward hook of a layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Report a call."""
        del module
        observer = self._alive()
        if observer is not None:
            observer.see(self._name, args[0], output)


class BeginHook(_Hook):
    """The hook before the model's forward pass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Report the start of the pass."""
        observer = self._alive()
        if observer is not None:
            observer.begin(module, args, kwargs)


class EndHook(_Hook):
    """The hook after the model's forward pass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Report the end of the pass."""
        del args, output
        observer = self._alive()
        if observer is not None:
            observer.end(module)
