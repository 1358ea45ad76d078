"""Numbers that a module keeps beside its parameters: they are cut with the axis that they meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.test_axes import EXAMPLE, HEADS, WIDTH, built, turned
from pruning.test_hand_written import Attention, check

HIDDEN = 40


class Ticket(nn.Module):
    """An MLP with a mask on each of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("of_up", (torch.rand(HIDDEN, WIDTH) > 0.3).float())
        self.register_buffer("of_down", torch.rand(WIDTH, HIDDEN) > 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, self.up.weight * self.get_buffer("of_up"), self.up.bias))
        return F.linear(hidden, self.down.weight * self.get_buffer("of_down"), self.down.bias)


class Reservoir(nn.Module):
    """An MLP whose second weights are random and stay."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.register_buffer("back", torch.randn(HIDDEN, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.up(x)) @ self.get_buffer("back")


class Slopes(Attention):
    """Rotary positions, and a slope for each head."""

    def more(self) -> None:
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        far = (places[None] - places[:, None]).abs()
        bias = -self.get_buffer("slopes").view(1, -1, 1, 1) * far
        return F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=bias.to(q))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        (Ticket, {("mlp", "neuron"): 2}),
        (Reservoir, {("mlp", "neuron"): 2}),
        (Slopes, {("attention", "head"): 2}),
    ],
)
def test_buffers_are_cut_with_what_they_meet(inner: Callable[[], nn.Module], found: dict[tuple[str, str], int]) -> None:
    check(inner, found)


class Frequencies(nn.Module):
    """Attentions that share one table of frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.register_buffer("frequencies", 0.5 ** torch.arange(WIDTH // HEADS // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.get_buffer("frequencies").repeat(2)
        for layer in self.layers:
            q, k, v = (f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
            q, k = (
                each * angles.cos() + torch.cat([-each[..., 4:], each[..., :4]], -1) * angles.sin() for each in (q, k)
            )
            x = x + layer.out(layer.attend(q, k, v).transpose(1, 2).flatten(2))
        return x


def test_heads_of_each_attention_go_rather_than_dimensions_that_all_of_them_share() -> None:
    found = upop.find_prunable(built(Frequencies), EXAMPLE)
    assert [group.channel for group in found.groups] == ["head"] * 4
