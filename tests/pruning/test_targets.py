"""A target for the whole model: reached within 1 % by what torch counts of the cut model, or refused beforehand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from pruning.families import FAMILIES, loss_of
from tiers import mostly_slow
from upop.errors import SettingError
from upop.pruning import plan_by_magnitude
from upop.pruning.counting import cache_of, multiply_adds_of, parameters_of
from upop.pruning.targets import format_target, read_target

VIT = next(family for family in FAMILIES if family.name == "vit-fused")
WORDS = torch.arange(12).view(2, 6)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1)).eval()


class Mixed(nn.Module):
    """One layer makes what two groups are, side by side; a convolution lies between two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Conv2d(20, 16, 1))
        self.both, self.one, self.other = nn.Linear(16, 18), nn.Linear(8, 16), nn.Linear(10, 16)
        self.packed = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)  # cut, it computes in another way

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        first, second = self.both(tokens).split([self.one.in_features, self.other.in_features], -1)
        packed: Tensor = self.packed(tokens + self.one(first.relu()) + self.other(second.sigmoid()))
        return packed


def searched(model: nn.Module, inputs: Any, steps: int = 8, **settings: Any) -> upop.Plan:
    pruner = upop.Pruner(model, steps=steps, example=inputs, **settings)
    for _ in range(steps):
        model.zero_grad()
        loss_of(model(**inputs)).backward()
        pruner.step()
    plan = pruner.plan()
    pruner.shrink()
    return plan


def cases() -> dict[str, tuple[nn.Module, Any]]:
    return {
        "vit": (VIT.build(), VIT.inputs(2)),
        "mixed": (Mixed(), (torch.randn(2, 3, 8, 8),)),
    }


@pytest.mark.parametrize("name", ["vit", "mixed"])
def test_counts_of_a_cut_model_are_told_exactly_before_it_is_cut(name: str) -> None:
    model, inputs = cases()[name]
    groups = upop.find_groups(model, inputs)
    parameters, products = parameters_of(model, groups), multiply_adds_of(model, groups, inputs)
    assert (parameters.whole, products.whole) == (upop.count_parameters(model), upop.count_macs(model, inputs))
    plan = {group.name: range(1 + place % group.size) for place, group in enumerate(groups, 2)}
    kept = {group: len(channels) for group, channels in plan.items()}
    upop.shrink(model, plan)
    assert parameters.at(kept) == upop.count_parameters(model) < parameters.whole
    assert products.at(kept) == upop.count_macs(model, inputs) < products.whole


def test_the_cache_of_a_decoder_is_told_in_bytes() -> None:
    model = llama()
    groups = upop.find_groups(model)
    cache = cache_of(model, groups, {"input_ids": WORDS})
    products = multiply_adds_of(model, groups, {"input_ids": WORDS})
    # keys and values of 2 layers, 12 tokens, 4 bundles of 4 dimensions, in float32
    assert cache.whole == 2 * 2 * 12 * 16 * 4
    half = {group.name: range(2) for group in groups if group.kind == "attention"}
    assert cache.at(dict.fromkeys(half, 2)) == cache.whole // 2
    upop.shrink(model, half)
    assert products.at(dict.fromkeys(half, 2)) == upop.count_macs(model, {"input_ids": WORDS})
    assert cache_of(model, upop.find_groups(model), {"input_ids": WORDS}).whole == cache.whole // 2


@pytest.mark.parametrize("target", [{"macs": "1.5x"}, {"params": 0.8, "macs": 0.6}])
def test_a_search_reaches_what_was_asked_of_the_whole_model(target: dict[str, Any]) -> None:
    model, inputs = VIT.build(), VIT.inputs(2)
    dense = {"params": upop.count_parameters(model), "macs": upop.count_macs(model, inputs)}
    plan = searched(model, inputs, target=target)
    left = {"params": upop.count_parameters(model), "macs": upop.count_macs(model, inputs)}
    shares = {kind: left[kind] / dense[kind] for kind in target}
    most = {kind: 1 / 1.5 if value == "1.5x" else value for kind, value in target.items()}
    assert all(shares[kind] <= most[kind] for kind in target)  # all hold,
    assert any(shares[kind] > most[kind] - 0.01 for kind in target)  # and no more goes than they take
    described = {kind: (each["dense"], each["left"]) for kind, each in plan.settings["reached"].items()}
    assert {kind: described[kind] for kind in target} == {kind: (dense[kind], left[kind]) for kind in target}
    assert "ratio" not in plan.settings


def test_every_stage_goes_as_far_towards_it() -> None:
    model, inputs = VIT.build(), VIT.inputs(2)
    groups, dense = upop.find_groups(model), upop.count_parameters(model)
    pruner = upop.Pruner(model, steps=4, interval=1, target="params=0.6", example=inputs)
    counts, gone = [], {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
    for _ in range(4):
        loss_of(model(**inputs)).backward()
        pruner.step()
        counts.append(parameters_of(model, groups).at({name: int(mask.sum()) for name, mask in pruner.masks.items()}))
        assert all(bool((mask[gone[name]] == 0).all()) for name, mask in pruner.masks.items())  # for good
        gone = {name: mask == 0 for name, mask in pruner.masks.items()}
    assert [count / dense for count in counts] == pytest.approx([0.9, 0.8, 0.7, 0.6], abs=0.005)
    assert pruner.current_ratio == pytest.approx(1 - pruner.kept_share())
    pruner.remove()


@pytest.mark.parametrize("settings", [{"progress": "soft"}, {"round_to": {"mlp": 2}}])
def test_other_searches_reach_it_too(settings: dict[str, Any]) -> None:
    model, inputs = VIT.build(), VIT.inputs(2)
    dense = upop.count_parameters(model)
    searched(model, inputs, steps=3, target={"params": "1.6x"}, **settings)
    assert 1 / 1.6 - 0.03 < upop.count_parameters(model) / dense <= 1 / 1.6
    sizes = {group.size for group in upop.find_groups(model) if group.kind == "mlp"}
    assert "round_to" not in settings or all(size % 2 == 0 for size in sizes)


def test_calibration_and_a_cut_by_magnitude_take_targets() -> None:
    model, inputs = VIT.build(), VIT.inputs(8)
    dense = upop.count_macs(model, inputs)
    by_magnitude = copy.deepcopy(model)
    upop.shrink(by_magnitude, plan_by_magnitude(by_magnitude, target={"macs": 0.6}, example=inputs))
    plan = upop.calibrate(model, [inputs], target={"macs": 0.6}, stages=3)
    for cut in (model, by_magnitude):
        assert 0.59 < upop.count_macs(cut, inputs) / dense <= 0.6
    assert plan.settings["reached"]["macs"]["left"] == upop.count_macs(model, inputs)


def test_a_compression_takes_a_target_and_is_resumed_with_it() -> None:
    inputs = VIT.inputs(2)

    def begun(target: str = "params=0.6") -> tuple[nn.Module, upop.Compression, torch.optim.Optimizer]:
        model = VIT.build()
        found = upop.Compression(model, steps=6, search_share=0.5, target=target, teacher=False)
        return model, found, torch.optim.SGD(model.parameters(), 1e-3)

    def step(model: nn.Module, found: upop.Compression, optimizer: torch.optim.Optimizer) -> None:
        found.loss(loss_of(model(**inputs))).backward()
        found.step(optimizer)
        optimizer.zero_grad()

    model, compression, optimizer = begun()
    dense = upop.count_parameters(model)
    step(model, compression, optimizer)
    state = compression.state_dict()
    compression.close()
    _, other, _ = begun("params=0.7")
    with pytest.raises(SettingError, match=r"'target': 'params=0\.6'.* this one .*'params=0\.7'"):
        other.load_state_dict(state)
    other.close()
    model, compression, optimizer = begun()
    compression.load_state_dict(state)
    for _ in range(4):
        step(model, compression, optimizer)
    compression.finish()
    assert 0.59 < upop.count_parameters(model) / dense <= 0.6


@pytest.mark.parametrize(
    ("target", "read"),
    [
        ("params=0.5", "params=0.5"),
        ({"macs": "2x", "params": 12_000_000}, "params=12000000,macs=2x"),
        ("params=40MB@float16, macs=50%", "params=40MB@float16,macs=50%"),
        ({"cache": "8MiB"}, "cache=8MiB"),
    ],
)
def test_targets_are_read_as_they_are_told(target: Any, read: str) -> None:
    limits = read_target(target)
    assert format_target(limits) == read
    assert read_target(read) == limits


def test_bytes_are_those_of_the_precision_asked_for() -> None:
    whole = read_target("params=40MB@float16")[0]
    assert (whole.in_bytes, whole.dtype, whole.most(10**9)) == (True, "float16", 40e6)
    model, inputs = VIT.build(torch.float32), VIT.inputs(2, torch.float32)
    kilobytes = upop.count_parameters(model) * 2 * 0.7 / 1000
    searched(model, inputs, steps=2, target={"params": f"{kilobytes:.3f}KB@float16"})
    assert upop.count_parameters(model) * 2 == pytest.approx(kilobytes * 1000, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "Give either ratio=.* or target=.*neither"),
        ({"ratio": 0.5, "target": "params=0.5"}, "found ratio=0.5 and target='params=0.5'"),
        ({"target": 0.5}, "target limits the size of the whole model"),
        ({"target": {"parms": 0.5}}, "did you mean 'params'"),
        ({"target": {"params": 1.5}}, "cannot be read"),
        ({"target": "params=0"}, "cannot be read"),
        ({"target": "params=12MB@int3"}, "cannot be read"),
        ({"target": "macs=12MB"}, "cannot be read"),
        ({"target": "params=0.5,params=0.4"}, "twice"),
        ({"target": "params=100%"}, "cannot be read"),
        ({"target": "macs=0.5"}, "no example inputs were given"),
        ({"target": "params=90M"}, "removes nothing"),
        ({"target": "params=0.5", "cost": "reference"}, "takes a ratio"),
        ({"target": "params=0.01"}, r"the model still has [\d,]+ of [\d,]+\. Ask for params=0\.\d+ or more\."),
        (
            {"target": "params=0.93", "round_to": 16},
            r"cannot be reached within 1 %.*Ask for params=0\.8933 or 0\.9467,",
        ),
    ],
)
def test_what_cannot_be_reached_is_refused_before_training(settings: dict[str, Any], said: str) -> None:
    model = VIT.build()
    with pytest.raises(SettingError, match=said):
        upop.Pruner(model, steps=4, **settings)
    assert {type(each) for each in model.modules()} == {type(each) for each in VIT.build().modules()}


def test_a_refusal_names_what_would_go_further() -> None:
    with pytest.raises(SettingError) as refused:
        upop.Pruner(llama(), steps=1, target="params=0.01")
    said = str(refused.value)
    assert "depth=True" in said and "down to params=0." in said
    assert "upop.reduce_vocabulary (embeddings have 7% of the parameters)" in said
    with pytest.raises(SettingError, match="depth=True"):
        upop.Pruner(llama(), 0.999, 1)


def test_what_is_told_as_the_least_can_be_asked_for() -> None:
    model, inputs = VIT.build(), VIT.inputs(2)
    with pytest.raises(SettingError) as refused:
        upop.Pruner(model, steps=1, target={"macs": 0.01}, example=inputs)
    least = str(refused.value).split("Ask for macs=")[1].split(" ")[0]
    searched(model, inputs, steps=1, target={"macs": float(least)})
    assert {group.size for group in upop.find_groups(model)} == {1}


def test_a_cache_is_asked_of_a_model_that_has_one() -> None:
    with pytest.raises(SettingError, match="returns no cache for the example"):
        upop.Pruner(VIT.build(), steps=1, target={"cache": 0.5}, example=tuple(VIT.inputs(2).values()))


@pytest.mark.parametrize("uniform", mostly_slow([None, "tower"], "tower"))
def test_a_whole_number_of_bundles_may_be_asked_of_a_small_cache(uniform: Any) -> None:
    batches = [{"input_ids": WORDS, "labels": WORDS}]

    def cut(target: str) -> float:
        reached = upop.calibrate(llama(), batches, target=target, stages=1, uniform=uniform).settings["reached"]
        share: float = reached["cache"]["left"] / reached["cache"]["dense"]
        return share

    assert cut("cache=0.5") == 0.5
    with pytest.raises(SettingError, match="cannot be reached within 1 %") as refused:
        cut("cache=0.7")
    for near in str(refused.value).split("Ask for cache=")[1].split(",")[0].split(" or "):
        assert cut(f"cache={near}") == pytest.approx(float(near), abs=1e-4)
    if uniform:
        with pytest.raises(SettingError, match='These allow more: no uniform="tower"'):
            cut("params=0.01")
