"""Replaces modules that a trial does not involve by stubs that return recorded shapes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from upop.pruning.axes.label import Made
from upop.pruning.axes.mode import tensors_in


class Idle:
    """The stub forward of an idle module.

    Args:
        path: its dotted name.
        gave: the recorded output of each call.
        mode: of fake tensors; None with real numbers.

    Attributes:
        path: its dotted name.
        given: input tensors since `start`.
    """

    def __init__(self, path: str, gave: Sequence[Any], mode: FakeTensorMode | None = None) -> None:
        self.path, self._gave, self._mode = path, gave, mode
        self._made: dict[tuple[int, torch.dtype], Any] = {}

    def start(self, dtype: torch.dtype) -> None:
        """Start a run of the model in a precision."""
        self._calls, self._dtype = 0, dtype
        self.given: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record the inputs, and return the same random numbers in every run."""
        tensors = tensors_in((args, kwargs))
        key = self._calls, self._dtype
        with _disable_current_modes():  # it is no operation of the model
            if self._mode is None:
                self.given += [each.detach().clone() for each in tensors if each.is_floating_point()]
            if key not in self._made:
                device = next((each.device for each in tensors), torch.device("cpu"))
                self._made[key] = self._new(self._gave[self._calls % len(self._gave)], device)
            self._calls += 1
            # A forward may write into what it is given.
            return tree_map_only(Tensor, Tensor.clone, self._made[key])

    def _new(self, gave: Any, device: torch.device) -> Any:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.path} {self._calls}".encode()))

        def made(each: Made) -> Tensor:
            if not each.dtype.is_floating_point:
                return torch.ones(each.shape, dtype=each.dtype, device=device)
            if self._mode is not None:
                with self._mode:
                    return torch.empty(each.shape, dtype=each.dtype, device=device)
            return torch.randn(each.shape, generator=generator).to(device, self._dtype)

        return tree_map_only(Made, made, gave)


@contextmanager
def resting(model: nn.Module, idle: Iterable[Idle]) -> Iterator[None]:
    """Replace modules of a copy by stubs within the block."""
    held = [(vars(model.get_submodule(each.path)), each) for each in idle]
    own = [attributes.get("forward") for attributes, _ in held]
    for attributes, each in held:
        attributes["forward"] = each
    try:
        yield
    finally:
        for (attributes, _), forward in zip(held, own, strict=True):
            del attributes["forward"]
            attributes.update({} if forward is None else {"forward": forward})
