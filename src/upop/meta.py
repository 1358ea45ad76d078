"""Builds modules on the meta device, even if their constructors read values of small tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_Module = TypeVar("_Module", bound=nn.Module)


def on_meta(build: Callable[[], _Module]) -> _Module:
    """Return the module that `build` builds, on the meta device."""
    with torch.device("meta"):
        try:
            return build()
        except Exception as error:  # of torch, or one of ours that quotes it
            if "meta tensors" not in str(error):
                raise
        with _LinspaceOnCpu():
            return build()


class _LinspaceOnCpu(TorchFunctionMode):
    """Runs `torch.linspace` on the CPU: timm before 1.0.22 reads drop path rates from it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        del types
        return func(*args, **{**(kwargs or {}), **({"device": "cpu"} if func is torch.linspace else {})})
