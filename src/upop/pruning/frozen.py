"""Scores of frozen weights: nothing trains these, and the training loop never sees their gradients.

An adapter (LoRA) beside a frozen weight makes both producers of one group. Scored by the adapter alone, which starts at
zero, its channels would be ranked by noise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upop.pruning.again import is_transformed
from upop.pruning.groups import Group, owner_of, tensor_of
from upop.pruning.observers import EagerHook, WeakHook, remove_all
from upop.pruning.sharded import is_sharded_tensor, many_processes
from upop.pruning.width import blocks_among


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


def partly_frozen(model: nn.Module, groups: Iterable[Group]) -> dict[str, tuple[Tensor, int]]:
    """Return the frozen producers of groups of which another producer is trained: by name, with their dimension."""
    found: dict[str, tuple[Tensor, int]] = {}
    for group in blocks_among(groups):
        tensors = {part.tensor: (tensor_of(model, part.tensor), part.dim) for part in group.producers}
        if any(each.requires_grad for each, _ in tensors.values()):
            found |= {name: (each, dim) for name, (each, dim) in tensors.items() if _can_learn(each)}
    return found


def _can_learn(tensor: Tensor) -> bool:
    is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return is_frozen and tensor.is_floating_point() and not is_sharded_tensor(tensor)


class FrozenRows:
    """Scores the rows of frozen weights, from the forward pass to the end of a step.

    A weight is frozen again when its step ends, and its `grad` stays None, so that optimizers, gradient clipping and
    `zero_grad` find what they would find without a search. Weights that the training loop thaws meanwhile are its own.

    Args:
        model: whose forward passes are looked at.
        tensors: name -> a frozen parameter, and the dimension along which its rows lie.
        function: (weight, gradient, dimension) -> [rows], homogeneous of degree 1 in the gradient.
        additive: whether the scores of several gradients add up to that of their sum: then no gradient is held.

    Attributes:
        scale: the factor that a GradScaler put on the loss, which only optimizers take off.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, tuple[Tensor, int]],
        function: Callable[[Tensor, Tensor, int], Tensor],
        additive: bool,
    ) -> None:
        self._dims, self._function, self._additive, self.scale = dict(tensors.values()), function, additive, 1.0
        self._held: dict[Tensor, Tensor] = {}  # scores, or gradients
        self._thawed: set[Tensor] = set()
        with thawed(self._dims):
            self._taking = {each: each.register_post_accumulate_grad_hook(WeakHook(self._take)) for each in self._dims}
        # A part of the model may be called by itself, and a weight be read by another module than its own.
        owners = dict.fromkeys(owner_of(model, name)[0] for name in tensors)
        thawing = [each.register_forward_pre_hook(WeakHook(self._thaw)) for each in owners]
        thawing.append(model.register_forward_pre_hook(EagerHook(self._thaw)))
        self._end = weakref.finalize(self, _end, [*self._taking.values(), *thawing], self._thawed)

    def __contains__(self, parameter: Tensor) -> bool:
        """Whether a parameter is scored here."""
        return parameter in self._dims

    def rows(self) -> dict[Tensor, Tensor]:
        """Return the scores of this step, by weight, [rows] each.

        Data parallelism averages the gradients of trained weights alone: these scores are averaged here, so that all
        processes call this together.
        """
        score = (lambda _, rows: rows) if self._additive else self._score
        found = {each: score(each, held) / self.scale for each, held in self._held.items()}
        return _averaged(found, self._dims) if many_processes() else found

    def forget(self) -> None:
        """Let go of a step's scores, and freeze the weights again."""
        self._held.clear()
        _freeze(self._thawed)

    def release(self) -> None:
        """Score nothing any more."""
        self._end()
        self._held.clear()
        self._dims.clear()

    def _thaw(self, *_: Any) -> None:
        if not torch.is_grad_enabled() or is_transformed():
            return
        for each in [each for each in self._dims if each.requires_grad and each not in self._thawed]:
            self._taking[each].remove()  # the training loop thawed it
            del self._dims[each]
        for each in self._dims:
            each.requires_grad_(True)
        self._thawed.update(self._dims)

    def _score(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return self._function(parameter, gradient, self._dims[parameter])

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            found = self._score(parameter, gradient) if self._additive else gradient
            before = self._held.get(parameter)
            self._held[parameter] = found if before is None else before + found


def _freeze(thawed: set[Tensor]) -> None:
    for each in thawed:
        each.requires_grad_(False)
    thawed.clear()


def _end(hooks: list[RemovableHandle], thawed: set[Tensor]) -> None:
    remove_all(hooks)
    _freeze(thawed)


def _averaged(rows: Mapping[Tensor, Tensor], dims: Mapping[Tensor, int]) -> dict[Tensor, Tensor]:
    """Return the mean over all processes of the scores of those weights that were scored in any of them."""
    device = next((each.device for each in dims if each.device.type != "cpu"), torch.device("cpu"))
    kind = torch.float64 if any(each.dtype == torch.float64 for each in dims) else torch.float32
    sizes = [each.shape[dim] for each, dim in dims.items()]
    flags = torch.tensor([each in rows for each in dims], dtype=kind, device=device)
    given = [
        rows[each].to(device, kind) if each in rows else torch.zeros(size, dtype=kind, device=device)
        for each, size in zip(dims, sizes, strict=True)
    ]
    flat = torch.cat([flags, *given])
    torch.distributed.all_reduce(flat)
    scored, *means = (flat / torch.distributed.get_world_size()).split([len(sizes), *sizes])
    found = zip(dims, means, scored.tolist(), strict=True)
    return {each: mean.to(each.device) for each, mean, any_has in found if any_has}
