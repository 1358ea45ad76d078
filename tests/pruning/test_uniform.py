"""Layers of one tower keep equally many channels, which ones differ, and the budget is met all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import upop
from pruning.families import randomise
from tiers import mostly_slow
from upop.errors import SettingError
from upop.pruning import plan_by_magnitude

WORDS = torch.tensor([[1, 5, 9, 3], [2, 7, 4, 8]])


def llama(bundles: int = 4, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8 * bundles,
        num_hidden_layers=layers,
        num_attention_heads=2 * bundles,
        num_key_value_heads=bundles,
        head_dim=4,
        intermediate_size=96,
        vocab_size=16,
    )
    model = LlamaForCausalLM(config).eval()
    randomise(model)
    return model


def batch() -> dict[str, Tensor]:
    return {"input_ids": WORDS, "labels": WORDS}


def counts(plan: upop.Plan, kind: str) -> set[int]:
    return {len(kept) for name, kept in plan.items() if kind in name}


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, hidden), nn.Linear(hidden, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class TwoTowers(nn.Module):
    """Two lists of blocks of one size, and blocks of another: no configuration knows of them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(Block(24) for _ in range(3))
        self.right = nn.ModuleList([Block(24), Block(24), Block(40)])

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.left, *self.right]:
            x = block(x)
        return x


def test_every_layer_keeps_equally_many_and_not_the_same() -> None:
    model = llama()
    pruner = upop.Pruner(model, 0.5, 4, uniform="tower", example=batch())
    total = sum(pruner.costs[group.name] * group.size for group in pruner.groups)
    for _ in range(4):
        model(**batch()).loss.backward()
        pruner.step()
    plan = pruner.plan()
    assert plan.settings["uniform"] == "tower"
    assert len(counts(plan, "self_attn")) == len(counts(plan, "mlp")) == 1
    assert counts(plan, "self_attn") <= {1, 2, 4}  # transformers' Llama takes no 6 heads for a width of 32
    assert len({kept for name, kept in plan.items() if "mlp" in name}) == 3
    kept = sum(pruner.costs[name] * len(channels) for name, channels in plan.items())
    layer = 3 * pruner.costs["model.layers.0.mlp"]
    assert abs(kept / total - 0.5) <= layer / total
    pruner.shrink()
    assert model.config.intermediate_size == counts(plan, "mlp").pop()


@pytest.mark.parametrize("round_to", mostly_slow([1, {"mlp": 16}], {"mlp": 16}))
def test_calibrate_and_magnitude_keep_alike(round_to: Any) -> None:
    step = round_to["mlp"] if isinstance(round_to, dict) else 1
    for plan in (
        upop.calibrate(llama(), [batch()] * 2, 0.4, stages=2, uniform="tower", round_to=round_to),
        plan_by_magnitude(llama(), 0.4, uniform="tower", round_to=round_to),
    ):
        (neurons,) = counts(plan, "mlp")
        assert len(counts(plan, "self_attn")) == 1
        assert neurons < 96
        assert neurons % step == 0
        assert plan.settings["uniform"] == "tower"


def test_without_a_configuration_towers_are_blocks_of_one_list_and_size() -> None:
    torch.manual_seed(0)
    model = TwoTowers()
    with torch.no_grad():
        for parameter in model.left.parameters():
            parameter.mul_(2)  # what is larger keeps more
    example = torch.randn(4, 16)
    plan = upop.calibrate(
        model, [example], 0.5, loss=lambda one, x: (one(x) * torch.arange(16)).square().mean(), uniform="tower"
    )
    towers = [["left.0", "left.1", "left.2"], ["right.0", "right.1"], ["right.2"]]
    kept = [{len(plan[name]) for name in names} for names in towers]
    assert all(len(sizes) == 1 for sizes in kept)
    assert kept[0] != kept[1]
    model(example)


def test_what_no_configuration_says_is_left_alone_and_named() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=20)
    model = BertModel(config)
    with pytest.warns(UserWarning, match=r"leaves 2 of 4 groups whole, which BertConfig cannot describe"):
        pruner = upop.Pruner(model, 0.5, 4, uniform="tower")
    assert {group.kind for group in pruner.groups} == {"mlp"}
    pruner.remove()
    with pytest.raises(SettingError, match=r"BertConfig .*attention.*intermediate"):
        upop.Pruner(model, 0.5, 4, uniform="tower", include="*attention*")
    with pytest.raises(SettingError, match="include all of these"):
        upop.Pruner(model, 0.5, 4, uniform="tower", include="encoder.layer.0.intermediate")


def test_unknown_and_contradicting_settings_are_refused() -> None:
    with pytest.raises(SettingError, match='uniform is "tower"'):
        upop.Pruner(llama(), 0.5, 4, uniform="layer")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="ranks single channels"):
        upop.Pruner(llama(), 0.5, 4, uniform="tower", cost="reference")
    with pytest.raises(SettingError, match="cannot be reached"):
        upop.Pruner(llama(), 0.9, 4, uniform="tower", round_to=32)


def test_a_resumed_search_goes_on_uniformly_and_another_one_is_refused() -> None:
    def taken(model: LlamaForCausalLM, pruner: upop.Pruner, steps: int) -> upop.Pruner:
        for _ in range(steps):
            model.zero_grad()
            model(**batch()).loss.backward()
            pruner.step()
        return pruner

    whole = taken(model := llama(), upop.Pruner(model, 0.5, 4, 1, uniform="tower"), 4).plan()
    half = taken(model := llama(), upop.Pruner(model, 0.5, 4, 1, uniform="tower"), 2)
    state = half.state_dict()
    with pytest.raises(SettingError, match="settings"):
        upop.Pruner(llama(), 0.5, 4, 1).load_state_dict(state)
    half.remove()
    again = upop.Pruner(model, 0.5, 4, 1, uniform="tower")
    again.load_state_dict(state)
    assert taken(model, again, 2).plan().kept == whole.kept
