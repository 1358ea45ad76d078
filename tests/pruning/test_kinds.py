"""Layers of one kind are proved by one of them; nothing of a model's size is made, and the model is left as it is."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from upop.pruning.axes import tried


class Block(nn.Module):
    """Attention and an MLP, whose width the block keeps, or is told."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.hidden = heads, hidden
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, hidden: int | None) -> Tensor:
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x).reshape(*x.shape[:2], hidden or self.hidden)))


class Stack(nn.Module):
    """Blocks that are alike; each knows its width, or the model tells all of them one."""

    def __init__(self, depth: int = 4, *, tells: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.blocks = nn.ModuleList(Block(24, 3, 40) for _ in range(depth))
        self.head = nn.Linear(24, 50)
        self.hidden = 40 if tells else None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x, self.hidden)
        return self.head(x)


IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["whole", "by kind"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "by kind":
        monkeypatch.setattr(tried, "MOST_MULTIPLY_ADDS", 0)
    return str(request.param)


def test_what_is_found_of_one_layer_holds_for_its_twins(way: str) -> None:
    torch.manual_seed(0)
    model = Stack().double().eval()
    groups = upop.find_prunable(model, IDS).groups
    assert [group.size for group in groups] == [8, 40] * 4
    draw = random.Random(1)
    plan = {group.name: sorted(draw.sample(range(group.size), draw.randint(1, group.size - 1))) for group in groups}
    upop.shrink(copy.deepcopy(model), upop.Plan.of(list(groups), plan), verify=IDS)
    for at in range(4):  # every layer's own number is set again, in the layer
        names = {(each.module, each.name) for each in groups[2 * at + 1].attributes}
        assert (f"blocks.{at}", "hidden") in names


def test_a_number_that_is_kept_for_all_layers_forbids_that_they_are_cut_one_by_one(way: str) -> None:
    found = upop.find_prunable(Stack(tells=True).double(), IDS)
    assert {group.kind for group in found.groups} == {"attention"}


def test_the_memory_of_a_proof_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(8).double()
    one = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    monkeypatch.setattr(tried, "MOST_MULTIPLY_ADDS", 0)
    monkeypatch.setattr(tried, "MOST_MEMORY", 2 * 8 * one)  # one block in float64
    assert len(upop.find_prunable(model, IDS).groups) == 16
    monkeypatch.setattr(tried, "MOST_MEMORY", 2 * 4 * (one // 4))
    found = upop.find_prunable(model, IDS)
    assert not found.groups
    assert any("GiB of memory" in part.reason for part in found.skipped)


@pytest.mark.parametrize("on_meta", [True, False])
def test_a_model_on_the_meta_device_is_proved(on_meta: bool) -> None:
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ids = torch.ones(2, 6, dtype=torch.long, device="meta" if on_meta else "cpu")
    groups = upop.find_prunable(model, {"input_ids": ids}).groups
    assert [(group.kind, group.channel, group.size) for group in groups] == [
        ("attention", "group", 2),
        ("mlp", "neuron", 48),
    ] * 3
    assert all(parameter.is_meta for parameter in model.parameters())


def test_reading_leaves_the_model_and_the_random_state_as_they_are() -> None:
    torch.manual_seed(3)
    model = Stack().train()
    model.register_buffer("calls", torch.zeros(()))
    seen: list[Any] = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    held = {name: set(vars(module)) for name, module in model.named_modules()}
    state, python = torch.get_rng_state(), random.getstate()
    assert upop.find_prunable(model, IDS).groups
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert modes == [module.training for module in model.modules()]
    assert held == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not seen  # hooks are part of what a model computes; what they keep is kept on the copies
