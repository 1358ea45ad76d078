"""Hooks that report forward passes to an observer, as long as it is alive; copies of a hook report nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle


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


class _OfOne:
    """A hook that does nothing when it was copied or unpickled with a model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class _Hook(_OfOne):
    """A hook that holds its observer weakly."""

    def __init__(self, observer: Observer | None = None, name: str = "") -> None:
        self._observer, self._name = None if observer is None else weakref.ref(observer), name

    def _alive(self) -> Observer | None:
        """Return the observer; None if it was freed, or while torch.compile traces."""
        return None if self._observer is None or torch.compiler.is_compiling() else self._observer()


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


class WeakHook(_OfOne):
    """A hook on a module or a parameter that calls a method as long as its object lives, and not in compiled code."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *given: Any) -> Any:
        """Call the method."""
        if torch.compiler.is_compiling():
            return None
        method = None if self._method is None else self._method()
        return None if method is None else method(*given)


class EagerHook(WeakHook):
    """A hook that runs eagerly where the module is compiled."""

    @_disable_dynamo
    def __call__(self, *given: Any) -> Any:
        """Call the method."""
        return super().__call__(*given)


def remove_all(hooks: list[RemovableHandle]) -> None:
    """Remove hooks, and clear the list of them."""
    for hook in hooks:
        hook.remove()
    hooks.clear()
