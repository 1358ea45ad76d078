"""Gradients of frozen weights, for their scores alone: nothing trains them, and the training loop never sees them.

An adapter (LoRA) beside a frozen weight makes both producers of one group. Scored by the adapter alone, which starts at
zero, its channels would be ranked by noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upop.pruning.groups import Group, owner_of, tensor_of
from upop.pruning.sharded import is_sharded_tensor


@contextmanager
def thawed(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let frozen parameters take part in backward passes within the block."""
    frozen = [each for each in tensors if _can_learn(each)]
    try:
        for each in frozen:
            each.requires_grad_(True)
        yield
    finally:
        for each in frozen:
            each.requires_grad_(False)


def partly_frozen(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """Return the frozen producers, by name, of groups of which another producer is trained."""
    found: dict[str, Tensor] = {}
    for group in groups:
        tensors = {part.tensor: tensor_of(model, part.tensor) for part in group.producers}
        if any(each.requires_grad for each in tensors.values()):
            found |= {name: each for name, each in tensors.items() if _can_learn(each)}
    return found


def _can_learn(tensor: Tensor) -> bool:
    is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return is_frozen and tensor.is_floating_point() and not is_sharded_tensor(tensor)


class FrozenGradients:
    """Collects the gradients of frozen weights, from the forward pass to the end of a step.

    A weight is frozen again when its step ends, and its `grad` stays None, so that optimizers, gradient clipping and
    `zero_grad` find what they would find without a search.

    Args:
        model: whose forward passes are looked at.
        tensors: name -> a frozen parameter.

    Attributes:
        scale: the factor that a GradScaler put on the loss, which only optimizers take off.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self.scale = list(tensors.values()), 1.0
        self._held: dict[Tensor, Tensor] = {}
        with thawed(self._tensors):
            self._hooks: list[RemovableHandle] = [
                each.register_post_accumulate_grad_hook(self._take) for each in self._tensors
            ]
        # A part of the model may be called by itself, and a weight be read by another module than its own.
        callers = [model, *(owner_of(model, name)[0] for name in tensors)] if tensors else []
        self._hooks += [each.register_forward_pre_hook(self._thaw) for each in dict.fromkeys(callers)]

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the gradient of a frozen weight in this step; None of any other."""
        held = self._held.get(tensor)
        return held if held is None or self.scale == 1 else held / self.scale

    def forget(self) -> None:
        """Let go of a step's gradients, and freeze the weights again."""
        self._held.clear()
        for each in self._tensors:
            each.requires_grad_(False)

    def release(self) -> None:
        """Collect nothing any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()
        self._tensors.clear()

    def _thaw(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            for each in self._tensors:
                each.requires_grad_(True)

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            before = self._held.get(parameter)
            self._held[parameter] = gradient if before is None else before.add_(gradient)
