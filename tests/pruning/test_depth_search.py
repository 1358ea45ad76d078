"""Branches that go whole, in the same ranking and budget as channels: by what they lose for all that they cost."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from pruning.families import FAMILIES, Split, loss_of
from upop.errors import SettingError
from upop.pruning import budget
from upop.pruning.depth import Depth
from upop.pruning.groups import Group, Slice
from upop.pruning.latency import Layers, Profile

VIT = next(family for family in FAMILIES if family.name == "vit-fused")
WORDS = torch.arange(12).view(2, 6)


def branch(name: str, size: int) -> Group:
    return Group(name, "mlp", "vision", size, 1, (Slice(f"{name}.weight"),), channel="neuron")


def ranked(scores: dict[str, list[float]], beside: float = 0.0) -> budget.Ranking:
    groups = [branch(name, len(values)) for name, values in scores.items()]
    depth = Depth({(name,): beside for name in scores}, dict.fromkeys(scores, 1.0))
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}
    return budget.rank(groups, tensors, standardised=False, depth=depth)


def test_the_last_channel_goes_in_its_turn() -> None:
    found = ranked({"weak": [-1.0, -2.0, -3.0], "strong": [-4.0, -5.0]})
    assert [found.kept(count) for count in range(1, 6)] == [
        {"weak": 2, "strong": 2},
        {"weak": 1, "strong": 2},
        {"weak": 0, "strong": 2},
        {"weak": 0, "strong": 1},
        {"weak": 0, "strong": 0},
    ]


def test_what_goes_beside_the_channels_has_a_branch_go_sooner_and_at_once() -> None:
    scores = {"weak": [-1.0, -2.0, -3.0], "strong": [-1.5, -5.0]}
    # -6 for 3 channels and 9 beside them is -0.5 for each: less than any channel alone, and -0.59 for the other one
    found = ranked(scores, beside=9.0)
    assert [found.kept(count) for count in (1, 2)] == [{"weak": 0, "strong": 2}, {"weak": 0, "strong": 0}]
    # with 1 beside them the first channel is cheaper than the rest
    found = ranked(scores, beside=1.0)
    assert [found.kept(count)["weak"] for count in range(1, 5)] == [2, 2, 0, 0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.floats(0, 20), st.integers(0, 6))
def test_blocks_go_by_falling_scores_and_each_channel_once(seed: int, beside: float, gone: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores = {f"branch{number}": (-torch.rand(7, generator=draws)).tolist() for number in range(3)}
    for number in range(gone):  # channels that went before
        scores["branch0"][number] = math.inf
    found = ranked(scores, beside)
    means = found.means[found.walk]
    assert bool((means[1:] <= means[:-1]).all())
    assert found.kept(len(found.walk)) == dict.fromkeys(scores, 0)
    whole = found.selection(len(found.walk), dict.fromkeys(scores, 1.0))
    assert all(bool(marked.all()) for marked in whole.marked.values())
    went = found.selection(gone, dict.fromkeys(scores, 1.0)).marked["branch0"]
    assert went.tolist()[:gone] == [True] * gone


def searched(model: nn.Module, inputs: Any, steps: int = 8, **given: Any) -> upop.Plan:
    pruner = upop.Pruner(model, steps=steps, example=inputs, depth=True, **given)
    gone: dict[str, Tensor] = {}
    for _ in range(steps):
        model.zero_grad()
        loss_of(model(**inputs)).backward()
        pruner.step()
        assert all(bool((pruner.masks[name][mask == 0] == 0).all()) for name, mask in gone.items())  # for good
        gone = pruner.masks
    plan = pruner.plan()
    pruner.shrink()
    return plan


def test_a_search_empties_branches_meets_its_budget_and_what_is_cut_is_what_was_masked() -> None:
    model, inputs = VIT.build(), VIT.inputs(2)
    groups, dense = upop.find_groups(model), upop.count_parameters(model)
    with pytest.raises(SettingError, match=r"down to params=0\.\d+ if all are pruned") as refused:
        upop.Pruner(model, steps=1, target="params=0.37")
    least = float(str(refused.value).split("down to params=")[1].split(" ")[0])
    plan = searched(model, inputs, target=f"params={least + 0.02}")  # shrink() compares the two in float64
    assert least < upop.count_parameters(model) / dense <= least + 0.02
    assert any(not plan[group.name] for group in groups)
    assert plan.settings["depth"] is True


def test_a_search_with_a_ratio_empties_branches_and_is_resumed() -> None:
    inputs = VIT.inputs(2)
    plans = []
    for broken in (False, True):
        model = VIT.build()
        pruner = upop.Pruner(model, 0.95, 4, example=inputs, depth=True, correct=False)
        for step in range(4):
            if broken and step == 2:
                state = copy.deepcopy(pruner.state_dict())
                pruner.remove()
                pruner = upop.Pruner(model, 0.95, 4, example=inputs, depth=True, correct=False)
                pruner.load_state_dict(state)
            model.zero_grad()
            loss_of(model(**inputs)).backward()
            pruner.step()
        assert pruner.kept_share() <= 0.05
        plans.append(pruner.plan())
        pruner.remove()
    assert dict(plans[0]) == dict(plans[1])
    assert () in plans[0].values()


@pytest.mark.parametrize("correct", [True, False])
def test_calibration_empties_branches_and_a_bias_makes_up_for_what_they_gave(correct: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 30, "intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mlp_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("down_proj.bias")}
    batches = [{"input_ids": WORDS + at, "labels": WORDS + at} for at in range(6)]
    plan = upop.calibrate(model, batches, 0.9, stages=3, depth=True, correct=correct)
    empty = [name for name, kept in plan.items() if not kept and name.endswith("mlp")]
    assert empty
    moved = [not torch.equal(model.get_parameter(name), value) for name, value in before.items()]
    assert any(moved) is correct


def test_a_target_in_milliseconds_counts_what_a_branch_takes_however_small_it_is() -> None:
    model, inputs = VIT.build(), VIT.inputs(2)
    groups = upop.find_groups(model)
    # channels save next to nothing on this machine, branches all that there is to save
    layers = tuple(Layers((group.name,), group.size, (0, 1, group.size), (2.0, 0.1, 0.0)) for group in groups)
    plan = searched(model, inputs, target="latency=6ms", profile=Profile(10.0, layers))
    assert sorted(len(kept) == 0 for kept in plan.values()) == [False, False, True, True]
    assert all(len(kept) == group.size for group, kept in zip(groups, plan.values(), strict=True) if kept)


@pytest.mark.parametrize(
    ("given_settings", "said"),
    [
        ({"progress": "soft"}, "needs a search in stages"),
        ({"depth": "yes"}, r"depth is True .* found 'yes'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given_settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        upop.Pruner(VIT.build(), 0.5, 4, **{"depth": True, **given_settings})


def test_a_model_that_runs_without_none_of_its_branches_is_told_before_training() -> None:
    with pytest.raises(SettingError, match="1 branches"):
        upop.Pruner(Split(), 0.5, 4, example=torch.randn(2, 5, 16), depth=True)
