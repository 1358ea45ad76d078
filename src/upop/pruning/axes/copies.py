"""Copies of a model to try things on: one that only has shapes, and one with numbers of its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from upop.pruning.costs import call
from upop.pruning.errors import LayoutError


def copied(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy of a model whose parameters and buffers went through `change`; the model is left alone."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(change(parameter.detach()), requires_grad=False)
    for buffer in model.buffers():
        if id(buffer) not in memo:
            memo[id(buffer)] = change(buffer.detach())
    return copy.deepcopy(model, memo).eval()


class Shapes:
    """A world in which tensors have shapes and no numbers; or numbers, where a forward asks for them.

    Args:
        model: of which `copy` makes copies.
        example: what a call of it is given.
        numbers: whether numbers may be had where a forward asks for them.

    Raises:
        LayoutError: the model cannot be run with the example.
    """

    def __init__(self, model: nn.Module, example: Any, *, numbers: bool = True) -> None:
        self._model, self._given = model, example
        self.mode: FakeTensorMode | None = FakeTensorMode(allow_non_fake_inputs=True)
        self.example = self._example()
        error = self._raises()
        if error is not None and numbers:  # what depends on numbers has no shape without them
            self.mode = None
            self.example = self._example()
            error = self._raises()
        if error is not None:
            first = (str(error).splitlines() or [""])[0]
            raise LayoutError(
                f"{type(model).__name__} cannot be run with the example: {type(error).__name__}: {first[:300]}. "
                "Give what a call of the model takes: a tensor, a tuple of arguments, or a mapping of keywords."
            ) from error

    def _example(self) -> Any:
        mode = self.mode
        if mode is None:
            return self._given
        return tree_map(lambda each: mode.from_tensor(each) if isinstance(each, Tensor) else each, self._given)

    def _raises(self) -> Exception | None:
        try:
            with self.running(), torch.no_grad():
                call(self.copy(), self.example)
        except Exception as error:
            return error
        return None

    def copy(self) -> nn.Module:
        """Return a copy."""
        return copied(self._model, torch.clone if self.mode is None else self.mode.from_tensor)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run things in this world."""
        with written_out(), self.mode or nullcontext():
            yield


@contextmanager
def written_out() -> Iterator[None]:
    """Have attention and compiled code run as they are written, not by one kernel that cannot be looked into."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    fast, told = torch.backends.mha.get_fastpath_enabled(), log.disabled
    log.disabled = True  # what a forward cannot do without numbers is tried with them
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        log.disabled = told


def numbered(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a copy with random numbers where the model's own could hide a difference, in `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        return tensor.to(dtype, copy=True)

    twin = copied(model, change)
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            fan = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            spread = fan**-0.5 if parameter.dim() > 1 else 0.3
            with torch.no_grad():
                parameter.mul_(0.5).add_(spread * noise)
    return twin
