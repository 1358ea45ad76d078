"""Cuts an optimizer's state (moments, averages) with its weights, so that training continues."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_leaves

from upop.pruning.errors import some_of
from upop.pruning.slicing import Slicing

_DEGREES = {
    "exp_avg": -1,
    "exp_avg_diff": -1,
    "momentum_buffer": -1,
    "exp_inf": -1,
    "grad_avg": -1,
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "square_avg": -2,
    "sum": -2,
}
"""How what an optimizer of torch keeps grows with the gradient's inverse: a query that the cut multiplies by c has
gradients that are divided by c from then on. What has another name is taken as it is."""


class HasState(Protocol):
    """A `torch.optim.Optimizer`, or a wrapper of one."""

    @property
    def state(self) -> Any:
        """The state of each parameter, by name."""
        ...


def cut_optimizer(optimizer: HasState, cuts: Mapping[Tensor, Slicing]) -> None:
    """Cut the state of an optimizer like its weights, so that training continues.

        cuts = {tensor_of(model, name): left for name, left in slicings(model, groups, plan).items()}
        shrink(model, plan)  # every parameter stays the same object
        cut_optimizer(optimizer, cuts)

    Tensors of a weight's old shape are cut like the weight: moving averages, momentum, master copies. Numbers such as
    step counts stay. If an optimizer keeps anything else for a weight (factored moments as in Adafactor, 8-bit
    states), its state for this weight is dropped with a warning, and starts anew at the next step. State that is
    already cut, and weights without state, are left alone.

    Args:
        optimizer: created before the cut.
        cuts: parameter -> its slicing.
    """
    dropped: list[str] = []
    for parameter, left in cuts.items():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        kept = [each for each in tree_leaves(dict(state)) if isinstance(each, Tensor) and each.numel() > 1]
        if all(each.shape == left.shape and each.is_floating_point() for each in kept):
            for name, value in state.items():
                state[name] = _cut(name, value, left)
        elif any(each.shape != left.after for each in kept):
            del optimizer.state[parameter]
            dropped.append("x".join(map(str, left.shape)))
    if dropped:
        warnings.warn(
            f"{type(optimizer).__name__} keeps of {len(dropped)} weights what cannot be cut with them (of shapes "
            f"{some_of(list(dict.fromkeys(dropped)), 3)}): it begins anew with these.",
            stacklevel=2,
        )


def _cut(name: str, value: Any, left: Slicing) -> Any:
    if isinstance(value, Tensor) and value.numel() > 1:
        return left.of(value, _DEGREES.get(name, 0))
    if isinstance(value, list | tuple):
        return type(value)(_cut(name, each, left) for each in value)
    return value
