"""Gradient checkpointing for stacks of layers, where activations would take much memory.

The outputs of a recomputed layer are compared with the first ones, which detects layers with state between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

_SHARE, _SMALL, _LARGE = 16, 2**28, 2**29
"""Activations of one in so many bytes of the weights are kept, and 256 MiB beside weights of less than 512 MiB."""
_OFF = 1e-2
"""What rounding may change in a layer's outputs, as a share of the largest."""


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Recompute the activations of stacked layers in backward passes within the block, if they are large.

    Their size is measured on the first layer that runs; layers without gradients are left alone. Key-value caches are
    turned off meanwhile, since recomputation would fill them twice.

    Raises:
        RuntimeError: in a backward pass: a recomputed layer gives other outputs.
    """
    layers = list(dict.fromkeys(_layers(model)))
    weights = sum(each.nbytes for each in model.parameters())
    most = weights // _SHARE if weights >= _LARGE else _SMALL
    decided: list[bool] = []

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if not decided:
                counting = _Counting(model)
                with counting:
                    found = forward(*args, **kwargs)
                decided.append(counting.total * len(layers) > most)
                return found
            if not decided[0]:
                return forward(*args, **kwargs)
            return checkpoint(_Compared(forward), *args, use_reentrant=False, **kwargs)

        return run

    configs = {id(each): each for module in model.modules() if (each := getattr(module, "config", None)) is not None}
    caching = [each for each in configs.values() if getattr(each, "use_cache", None) is True]
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for each in caching:
            each.use_cache = False
        for layer in layers:
            layer.forward = wrapped(layer.forward)
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for layer, forward in before:
            del layer.forward
            if forward is not None:
                layer.forward = forward
        for each in caching:
            each.use_cache = True


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists and sequences of modules of one class."""
    row = list(model) if isinstance(model, nn.ModuleList | nn.Sequential) else []
    if len(row) > 1 and len({type(each) for each in row}) == 1 and any(True for _ in row[0].children()):
        yield from row
        return
    for child in model.children():
        yield from _layers(child)


class _Compared:
    """The forward of a layer, which compares recomputed outputs with the first ones."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._first: list[tuple[Tensor, int]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._forward(*args, **kwargs)
        given = [each.detach() for each in tree_leaves(found) if isinstance(each, Tensor)]
        if self._first is None:
            self._first = [(each, each._version) for each in given]
        elif len(given) != len(self._first) or any(
            _differ(old, new) for (old, version), new in zip(self._first, given, strict=True) if old._version == version
        ):
            raise RuntimeError("A layer returns other outputs when it runs again on the same inputs.")
        return found


def _differ(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape:
        return True
    if type(old) is not Tensor or old.is_meta or torch.equal(old, new) or not old.is_floating_point():
        return False
    apart = (old - new).abs().max()
    return not bool(apart <= _OFF * old.abs().max())


class _Counting(saved_tensors_hooks):
    """Counts the bytes saved for a backward pass, apart from the model's own tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._own = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
        self._seen: set[int] = set()
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own | self._seen:
            self._seen.add(storage._cdata)
            self.total += storage.nbytes()
        return tensor
