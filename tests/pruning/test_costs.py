"""What a channel costs: the parameters or multiply-adds that it really takes away."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn

import upop
from pruning.families import BY_NAME, FAMILIES, NLVR, VIT, Family, nlvr
from pruning.registry import ARCHITECTURES
from tiers import mostly_slow, since
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.pruning.costs import channel_costs
from upop.pruning.errors import SettingError


@since("timm", "1.0.22", "it reads numbers off torch.linspace")
@pytest.mark.parametrize("depth", mostly_slow([1, 12], 1))
def test_the_papers_numbers_for_vit_base(depth: int) -> None:
    small = {"image_size": 32, "vocab_size": 64} if depth == 1 else {}
    with torch.device("meta"):
        model = BlipNlvr(NlvrConfig(vision_depth=depth, text_depth=depth, **small))
    groups = upop.find_groups(model)
    costs = channel_costs(model, groups, "params")
    assert {(group.kind, costs[group.name]) for group in groups} == {("attention", 36_900.0), ("mlp", 1_537.0)}
    assert costs[groups[0].name] / costs[groups[1].name] == pytest.approx(24.008, abs=5e-4)
    assert len(groups) == 2 * depth + 4 * depth


@since("timm", "1.0.22", "it reads numbers off torch.linspace")
def test_the_numbers_hold_for_timms_vit_too() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", depth=1)
    assert set(channel_costs(model, upop.find_groups(model), "params").values()) == {36_900.0, 1_537.0}


def test_cross_attention_costs_by_its_own_key_width() -> None:
    model = nlvr()
    costs = channel_costs(model, upop.find_groups(model), "params")
    # Per channel and head: a row and a bias of query, key and value, and a column of the output.
    assert costs["text_encoder.encoder.layer.0.attention.self"] == 4 * (3 * (32 + 1) + 32)
    assert costs["text_encoder.encoder.layer.0.crossattention.self1"] == 4 * ((32 + 1) + 2 * (24 + 1) + 32)
    assert costs["visual_encoder.blocks.0.attn"] == 3 * (3 * (24 + 1) + 24)
    assert costs["visual_encoder.blocks.0.mlp"] == 24 + 1 + 24
    assert costs["text_encoder.encoder.layer.1.intermediate"] == 32 + 1 + 32


def _form(group: upop.Group) -> tuple[object, ...]:
    return group.kind, group.modality, group.size, *(re.sub(r"\.\d+\.", ".", part.tensor) for part in group.slices)


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, BY_NAME["clip"], VIT), ids=lambda case: case.name)
@pytest.mark.parametrize("cost", ["params", "macs"])
def test_a_channel_costs_what_removing_it_saves(family: Family, cost: str) -> None:
    # One group of each form: blocks repeat.
    forms = {_form(group): number for number, group in enumerate(upop.find_groups(family.build()))}
    for number in forms.values():
        model, inputs = family.build(), family.inputs(3)
        group = upop.find_groups(model)[number]
        costs = channel_costs(model, [group], cost, inputs)

        def size(model: nn.Module = model, inputs: dict = inputs) -> int:
            return upop.count_parameters(model) if cost == "params" else upop.count_macs(model, inputs)

        before = size()
        upop.shrink(model, {group.name: range(1, group.size)}, verify=inputs)
        assert before - size() == costs[group.name], group.name


COUNTED = ("llama", "TransformerDecoder", "beit_base_patch16_224", "gpt2", "vit_giant_patch14_dinov2", "gpt_neox")


@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_of_every_kind_of_channel(name: str) -> None:
    (architecture,) = (each for each in ARCHITECTURES if each.name == name)
    model = architecture.build()
    inputs = architecture.batch(model)
    groups = upop.find_groups(model)
    costs = channel_costs(model, groups, "macs", inputs)
    with architecture.ways(model)[-1][1]:
        before = upop.count_macs(model, inputs)
    for group in groups:
        cut = architecture.build()
        upop.shrink(cut, {group.name: range(1, group.size)})
        with architecture.ways(cut)[-1][1]:
            assert before - upop.count_macs(cut, inputs) == pytest.approx(costs[group.name])


def test_counting_changes_nothing() -> None:
    model, inputs = NLVR.build(), NLVR.inputs()
    model.cls_head.eval()
    modes = [module.training for module in model.modules()]
    channel_costs(model, upop.find_groups(model), "macs", inputs)
    upop.count_macs(model, inputs)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError):
        channel_costs(model, upop.find_groups(model), "macs", {"nonsense": 1})
    assert not any(module._forward_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_reference_costs() -> None:
    for model, attention in ((NLVR.build(), 36.0), (VIT.build(), 12.0)):
        groups = upop.find_groups(model)
        costs = channel_costs(model, groups, "reference")
        assert all(costs[group.name] == (attention if group.kind == "attention" else 1.0) for group in groups)


def test_given_costs() -> None:
    model = VIT.build()
    groups = upop.find_groups(model)
    costs = channel_costs(model, groups, {"*.attn": 7, "blocks.1.attn": 9, "*.mlp": 0.5})
    assert costs == {"blocks.0.attn": 7.0, "blocks.0.mlp": 0.5, "blocks.1.attn": 9.0, "blocks.1.mlp": 0.5}
    assert channel_costs(model, groups, lambda group: 2 * group.heads) == {
        group.name: 6.0 if group.kind == "attention" else 2.0 for group in groups
    }
    # The budget counts what was given: attention for free-ish, so MLP channels carry it.
    pruner = upop.Pruner(model, 0.5, 2, cost={"*attn": 1e-6, "*mlp": 1.0})
    assert pruner.costs["blocks.0.attn"] == 1e-6


@pytest.mark.parametrize(
    ("cost", "fragments"),
    [
        ("parms", ["cost='parms' is not known", "did you mean 'params'", "'macs'"]),
        ("latency", ["is not known", "mapping"]),
        (3, ["cost=3 is not known"]),
        ("macs", ["cost='macs'", "no example", "example="]),
        ({"*.atn": 1, "*.mlp": 1}, ["'*.atn'", "matches no group"]),
        ({"blocks.0.atn": 1, "*": 1}, ["did you mean 'blocks.0.attn'"]),
        ({"*.attn": 1}, ["no number for group 'blocks.0.mlp'", "exclude"]),
        ({"*": 0}, ["must be positive", "blocks.0.attn"]),
        ({"*": -1}, ["must be positive"]),
        ({"*": float("nan")}, ["must be positive"]),
        (lambda group: float("inf"), ["must be positive"]),
    ],
)
def test_errors_of_costs(cost: object, fragments: list[str]) -> None:
    model = VIT.build()
    with pytest.raises(SettingError) as caught:
        upop.Pruner(model, 0.5, 2, cost=cost)  # type: ignore[arg-type]
    assert all(fragment in str(caught.value) for fragment in fragments)
    upop.Pruner(model, 0.5, 2)  # nothing was left attached


@pytest.mark.filterwarnings("ignore:50 % of the parameters")
def test_what_the_example_does_not_run_is_no_group() -> None:
    class Partly(nn.Module):
        __module__ = "timm"  # read by its modules, as models of libraries are; others hold what runs alone

        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = VIT.build(), VIT.build()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    pruner = upop.Pruner(Partly(), 0.5, 2, cost="macs", example=VIT.inputs())
    assert {group.name.partition(".")[0] for group in pruner.groups} == {"used"}
