"""Cuts an optimizer's state (moments, averages) with its weights, so that training continues."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upop.pruning.errors import some_of
from upop.pruning.slicing import Slicing

if TYPE_CHECKING:
    from upop.pruning.rotation import Turn

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
gradients that are divided by c from then on. What has another name is as it is, or a copy of the weight, as its
numbers say."""

_NEAR = 0.5
"""Distance from a weight, as a share of its norm, within which a tensor is a copy or an average of it."""


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

    Tensors of a weight's old shape are cut like the weight: moving averages, momentum, master copies, slow weights.
    Numbers such as step counts stay. If an optimizer keeps anything else for a weight (factored moments as in
    Adafactor, 8-bit states), its state for this weight is dropped with a warning, and starts anew at the next step.
    State that is already cut, and weights without state, are left alone. Optimizers inside of others (timm's
    `Lookahead`) are cut with them.

    Args:
        optimizer: created before the cut.
        cuts: parameter -> its slicing.
    """
    dropped: list[str] = []
    for state in _states(optimizer):
        dropped += _cut_state(state, cuts)
    if dropped:
        warnings.warn(
            f"The state that {type(optimizer).__name__} keeps for {len(dropped)} weights cannot be cut with them "
            f"(shapes {some_of(list(dict.fromkeys(dropped)), 3)}), and is reset.",
            stacklevel=2,
        )


@torch.no_grad()
def rotate_optimizer(optimizer: HasState, turns: Iterable[Turn]) -> None:
    """Rotate the moments that an optimizer keeps like its weights; copies of weights are left to `copies_following`.

    Args:
        optimizer: of the rotated weights.
        turns: the rotations of their rows.
    """
    turns = list(turns)
    for state in _states(optimizer):
        for turn in turns:
            for name, value in (state.get(turn.tensor) or {}).items():
                if name in _DEGREES and isinstance(value, Tensor) and value.shape == turn.tensor.shape:
                    turn.apply(value, _DEGREES[name])


@contextmanager
def copies_following(optimizers: Iterable[HasState]) -> Iterator[None]:
    """Have the copies of weights that optimizers keep follow what the block adds to the weights."""
    copies = [
        (parameter, value)
        for each in optimizers
        for state in _states(each)
        for parameter, own in state.items()
        for name, value in own.items()
        if name not in _DEGREES and isinstance(value, Tensor) and value.numel() > 1
        if value.shape == parameter.shape and value.is_floating_point() and _is_near(value, parameter)
    ]
    before = {parameter: (parameter.detach().clone(), parameter._version) for parameter, _ in copies}
    yield
    for parameter, value in copies:
        old, version = before[parameter]
        if parameter._version != version:
            value.add_((parameter.detach() - old).to(value))


def _states(optimizer: HasState) -> Iterator[Any]:
    """Yield what an optimizer keeps, and what those keep that it holds."""
    waiting: list[HasState] = [optimizer]
    states: list[Any] = []
    for each in waiting:  # it grows
        inner = [held for held in vars(each).values() if isinstance(held, torch.optim.Optimizer)]
        waiting += [held for held in inner if all(held is not known for known in waiting)]
        if all(each.state is not known for known in states):
            states.append(each.state)
    yield from states


def _cut_state(state: Any, cuts: Mapping[Tensor, Slicing]) -> Iterator[str]:
    """Cut what is kept of parameters; yield the shapes of those of which nothing is kept any more."""
    for parameter, left in cuts.items():
        own = state.get(parameter)
        if not own:
            continue
        kept = [each for each in tree_leaves(dict(own)) if isinstance(each, Tensor) and each.numel() > 1]
        if all(each.shape == left.shape and each.is_floating_point() for each in kept):
            for name, value in own.items():
                own[name] = _cut(name, value, left, parameter)
        elif any(each.shape != left.after for each in kept):
            del state[parameter]
            yield "x".join(map(str, left.shape))


def _cut(name: str, value: Any, left: Slicing, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and value.numel() > 1:
        degree = _DEGREES.get(name)
        if degree is None:
            copied = left.of(value, 1)
            return copied if _is_near(copied, parameter) else left.of(value, 0)
        return left.of(value, degree)
    if isinstance(value, list | tuple):
        return type(value)(_cut(name, each, left, parameter) for each in value)
    return value


def _is_near(value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is a copy or an average of a parameter of its shape, by its numbers."""
    if value.is_meta or parameter.is_meta:
        return False
    weight = parameter.detach().to(value.dtype)
    return bool((value - weight.to(value.device)).norm() < _NEAR * weight.norm().to(value.device))
