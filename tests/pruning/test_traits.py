"""`upop.ModelTraits`: what a model from outside of upop may say of itself. Momentum encoders have their own tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upop
from upop.pruning.traits import momentum_encoders, read_by_others, replay_arguments


class Noisy(nn.Module, upop.ModelTraits):
    """Adds noise that it draws to its input, unless it is given the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.last = nn.LayerNorm(8)
        self.drawn: Tensor | None = None

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        self.drawn = torch.randn_like(x) if noise is None else noise
        x = x + self.drawn
        return self.last(x + self.down(torch.relu(self.up(self.norm(x)))))


class Replaying(Noisy):
    read_by_others = ("last",)

    def replay_arguments(self) -> dict[str, Any]:
        return {"noise": self.drawn}


class Older(nn.Module):
    """Has what an older version of upop asked for."""

    momentum_twins = {"online": "slow"}  # noqa: RUF012 - read-only
    read_across = ("online",)

    def for_teacher(self) -> dict[str, Any]:
        return {"x": 1}


def _first_loss(build: Callable[[], Noisy]) -> float:
    torch.manual_seed(0)
    model, teacher = build(), build()
    teacher.load_state_dict(model.state_dict())
    distillation = upop.distill(model.train(), teacher)
    model(torch.randn(2, 3, 8))
    return float(distillation.loss().detach())


def test_a_teacher_is_given_what_the_model_drew() -> None:
    assert _first_loss(Replaying) == 0
    assert _first_loss(Noisy) > 0.1


def test_a_model_that_derives_from_the_protocol_has_the_members_that_it_does_not_set() -> None:
    model = Noisy()
    assert (momentum_encoders(model), read_by_others(model), replay_arguments(model)) == ({}, (), {})
    assert [group.name for group in upop.find_groups(model, torch.randn(2, 3, 8))] == ["up"]


def test_members_are_read_by_their_older_names() -> None:
    read = {
        "momentum_encoders": momentum_encoders,
        "read_by_others": read_by_others,
        "replay_arguments": replay_arguments,
    }
    expected = ({"online": "slow"}, ("online",), {"x": 1})
    for (name, function), value in zip(read.items(), expected, strict=True):
        with pytest.warns(DeprecationWarning, match=f"now called Older.{name}"):
            assert function(Older()) == value


def test_the_names_that_the_method_held_before() -> None:
    with pytest.warns(DeprecationWarning, match=r"now called upop\.distillation\.distill"):
        from upop.pruning import distill
    assert distill is upop.distill
