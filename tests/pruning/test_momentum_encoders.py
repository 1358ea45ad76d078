"""Momentum copies: they are cut with what they copy, or the group is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upop
from upop.errors import LayoutError
from upop.pruning.groups import tensor_of

WIDTH, HIDDEN, HEADS = 16, 40, 2


class Tower(nn.Module):
    """A layer of torch with an MLP behind it."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Contrast(nn.Module):
    """An encoder, whose momentum copy runs in training alone, under a name that says nothing of it."""

    momentum_encoders = {"online": "slow", "head": "late"}  # noqa: RUF012 - read-only

    def __init__(self, slow: nn.Module | None = None) -> None:
        super().__init__()
        self.online, self.slow = Tower(), slow or Tower()
        self.head, self.late = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.slower = Tower()  # no copy, though its name begins like one's

    def forward(self, x: Tensor) -> Any:
        outputs = self.head(self.slower(self.online(x)))
        return (outputs, self.late(self.slow(x))) if self.training else outputs


def batch() -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def test_a_copy_is_cut_with_what_it_copies() -> None:
    torch.manual_seed(0)
    model = Contrast()
    groups = {group.name: group for group in upop.find_prunable(model, batch()).groups}
    assert set(groups) == {"online.attention", "online.up", "slower.attention", "slower.up"}
    copied = {part.tensor for group in groups.values() for part in group.slices if part.follows}
    assert copied == {name.replace("online", "slow") for name in _cut(groups["online.up"], groups["online.attention"])}
    plan = {"online.up": range(1, 30), "online.attention": range(2, 7)}
    masked = _masked(model.slow, groups, plan)
    upop.shrink(model, plan)
    assert model.slow.up.out_features == model.online.up.out_features == 29
    assert torch.allclose(model.slow.eval()(batch()), masked, atol=1e-6)
    assert model.train()(batch())[1].shape == (4, 5, 3)


def _cut(*groups: upop.Group) -> set[str]:
    return {part.tensor for group in groups for part in group.slices if not part.follows}


@torch.no_grad()
def _masked(tower: nn.Module, groups: dict[str, upop.Group], plan: dict[str, range]) -> Tensor:
    """Return what a tower gives whose rows are set to zero by hand, which is put back."""
    held = {name: value.clone() for name, value in tower.state_dict().items()}
    for name, kept in plan.items():
        keep = torch.zeros(groups[name].size)
        keep[list(kept)] = 1
        for part in groups[name].producers:
            tensor = tensor_of(tower, part.tensor.removeprefix("online."))
            tensor.mul_(part.expand(keep).view(-1, *[1] * (tensor.dim() - 1)))
    found: Tensor = tower.eval()(batch())
    tower.load_state_dict(held)
    return found


def test_a_copy_of_another_size_leaves_the_group_alone() -> None:
    found = upop.find_prunable(Contrast(Tower(HIDDEN + 8)), batch())
    assert {group.name for group in found.groups} == {"online.attention", "slower.attention", "slower.up"}
    assert any("no slow.up.weight of the same shape" in part.reason for part in found.skipped)


def test_a_copy_that_computes_something_else_leaves_the_group_alone() -> None:
    class Peeking(Tower):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x)
            return super().forward(x) + (hidden * torch.linspace(0, 1, hidden.shape[-1]).to(hidden)).sum(-1, True)

    found = upop.find_prunable(Contrast(Peeking()), batch())
    assert {group.name for group in found.groups} == {"online.attention", "slower.attention", "slower.up"}
    assert any("momentum copy in its place" in part.reason for part in found.skipped)


def test_a_copy_that_runs_makes_no_groups_of_its_own() -> None:
    class Both(Contrast):
        def forward(self, x: Tensor) -> Any:
            return self.head(self.slower(self.online(x))), self.late(self.slow(x))

    model = Both()
    groups = upop.find_prunable(model, batch()).groups
    assert {group.name for group in groups} == {"online.attention", "online.up", "slower.attention", "slower.up"}
    upop.shrink(model, {group.name: range(group.size // 2) for group in groups})
    assert model.slow.up.out_features == HIDDEN // 2


@pytest.mark.parametrize(
    ("said", "why"),
    [({"onlyne": "slow"}, "names 'onlyne'"), ({"online": "slo"}, "names 'slo'"), (["online"], "found .*online")],
)
def test_a_trait_that_names_what_is_not_there_is_refused(said: Any, why: str) -> None:
    model: Any = Contrast()
    model.momentum_encoders = said
    with pytest.raises(LayoutError, match=f"momentum_encoders .*{why}"):
        upop.find_prunable(model, batch())
