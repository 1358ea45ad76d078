"""Modules that are idle while units are tried that have no part in them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from upop.pruning.axes.trace import Made


class Idle:
    """The forward of a module that is idle.

    Args:
        path: its dotted name.
        gave: for each of its calls, what it gave.

    Attributes:
        path: the name.
        given: the tensors that it was given since `start`.
    """

    def __init__(self, path: str, gave: Sequence[Any]) -> None:
        self.path, self._gave = path, gave

    def start(self, dtype: torch.dtype | None) -> None:
        """Begin a run of the model in a precision; None where tensors have no numbers."""
        self._calls, self._dtype = 0, dtype
        self.given: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take note of what is given, and give random numbers, the same in every run."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.path} {self._calls}".encode()))
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        device = next((each.device for each in tensors), torch.device("cpu"))

        def made(each: Any) -> Any:
            if not isinstance(each, Made):
                return each
            if not each.dtype.is_floating_point:
                return torch.ones(each.shape, dtype=each.dtype, device=device)
            if self._dtype is None:
                return torch.empty(each.shape, dtype=each.dtype, device=device)
            return torch.randn(each.shape, generator=generator).to(device, self._dtype)

        with _disable_current_modes():  # it is no operation of the model
            if self._dtype is not None:
                self.given += [each.detach().clone() for each in tensors if each.is_floating_point()]
            gave = self._gave[self._calls % len(self._gave)]
            self._calls += 1
            return tree_map(made, gave)


def rest(model: nn.Module, idle: Mapping[str, Sequence[Any]]) -> list[Idle]:
    """Have modules of a copy be idle."""
    found = []
    for path, gave in idle.items():
        found.append(Idle(path, gave))
        model.get_submodule(path).forward = found[-1]
    return found
