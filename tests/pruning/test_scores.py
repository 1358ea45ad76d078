"""Scores are taken early, while a gradient is in the processor's cache, and must never be stale."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import upop
from upop.errors import SettingError


class Model(nn.Module):
    """An MLP with the layout of timm's."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import Mlp

        torch.manual_seed(0)
        self.mlp = Mlp(6, 10, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.mlp(inputs)


def backward(model: nn.Module, seed: int = 1) -> None:
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().mean().backward()


def expected(model: Model) -> Tensor:
    fc1 = model.mlp.fc1
    assert fc1.weight.grad is not None
    assert fc1.bias.grad is not None
    return ((fc1.weight.grad * fc1.weight).sum(1) + fc1.bias.grad * fc1.bias).detach()


def unscaled(model: Model) -> None:
    for parameter in model.parameters():
        parameter.grad.mul_(0.125)


def replaced(model: Model) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.grad.flip(0)


def replaced_after_freeing(model: Model) -> None:
    """What per-sample gradient methods do; the new gradient may lie where the old one lay."""
    copies = [parameter.grad.flip(0) for parameter in model.parameters()]
    model.zero_grad()
    for parameter, gradient in zip(model.parameters(), copies, strict=True):
        parameter.grad = gradient.clone()


def another_pass(model: Model) -> None:
    backward(model, seed=2)


def untouched(_model: Model) -> None:
    pass


@pytest.mark.parametrize("between", [untouched, unscaled, replaced, replaced_after_freeing, another_pass])
def test_a_score_is_of_the_gradient_as_it_stands_when_step_is_called(between: Callable[[Model], None]) -> None:
    model = Model()
    pruner = upop.Pruner(model, 0.5, steps=3, interval=10, importance="signed")
    backward(model)
    between(model)
    wanted = expected(model)
    pruner.step()
    torch.testing.assert_close(pruner.scores["mlp"], wanted)


def test_a_step_that_was_thrown_away_leaves_nothing_behind() -> None:
    model = Model()
    pruner = upop.Pruner(model, 0.5, steps=5, interval=10, importance="signed", update_first_step=False)
    backward(model)
    pruner.skip()
    model.zero_grad()
    backward(model, seed=3)
    wanted = expected(model)
    pruner.step()
    torch.testing.assert_close(pruner.scores["mlp"], wanted)


def test_no_gradient_is_kept_alive_after_the_step() -> None:
    model = Model()
    pruner = upop.Pruner(model, 0.5, steps=3)
    backward(model)
    pruner.step()
    gradient = weakref.ref(model.mlp.fc1.weight.grad)
    model.zero_grad()
    assert gradient() is None


def test_nothing_is_computed_once_the_masks_are_off() -> None:
    calls = []

    def counted(weight: Tensor, gradient: Tensor) -> Tensor:
        calls.append(weight.shape)
        return (weight * gradient).sum(1)

    model = Model()
    pruner = upop.Pruner(model, 0.5, steps=3, importance=counted)
    backward(model)
    assert calls
    pruner.remove()
    calls.clear()
    backward(model)
    assert not calls


def test_an_importance_gives_one_score_per_row() -> None:
    pruner = upop.Pruner(model := Model(), 0.5, steps=3, importance=lambda weight, gradient: weight * gradient)
    with pytest.raises(
        SettingError, match=r"returned \[10, (\d)\] for a weight of \[10, \1\]\. Return one score per row"
    ):
        backward(model)
    pruner.remove()
