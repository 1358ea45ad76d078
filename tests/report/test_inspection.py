"""What belongs to a modality adds up to the whole, and a budget takes what it says."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import upop
from pruning.families import BY_NAME, FAMILIES
from tiers import mostly_slow
from upop.errors import SettingError
from upop.pruning.goal import Goal
from upop.report.inspection import SHARED, after_budget, inspect_model

NAMES = [family.name for family in FAMILIES[:12]]


@pytest.mark.parametrize("name", mostly_slow(NAMES, "vit-fused", "vit-registers", "segmenter", "clip"))
def test_parts_add_up_to_the_whole(name: str) -> None:
    family = BY_NAME[name]
    model, inputs = family.build(torch.float32), family.inputs(1, torch.float32)
    found = inspect_model(model, inputs)
    assert found.parameters == upop.count_parameters(model)
    assert found.macs == upop.count_macs(model, inputs)
    groups = upop.find_groups(model)
    assert sum(len(panel.layers) for panel in found.panels) == len(groups)
    held = {part.modality: part for part in found.parts}
    for group in groups:
        assert held[group.modality].prunable >= found.group_parameters[group.name]
    assert all(part.prunable <= part.parameters for part in found.parts)
    assert sum(part.prunable for part in found.parts) == sum(found.group_parameters.values())


def test_weights_between_two_groups_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    found = inspect_model(model)
    assert len(found.group_parameters) == 2
    assert sum(part.prunable for part in found.parts) == upop.count_parameters(model) - 8  # the last bias stays
    assert sum(found.group_parameters.values()) == upop.count_parameters(model) - 8 + 32 * 32


def test_towers_are_told_apart() -> None:
    model = BY_NAME["nlvr"].build(torch.float32)
    found = {part.modality: part.parameters for part in inspect_model(model).parts}
    expected = {
        "vision": upop.count_parameters(model.visual_encoder),  # type: ignore[arg-type]
        "text": upop.count_parameters(model.text_encoder),  # type: ignore[arg-type]
        SHARED: upop.count_parameters(model.cls_head),  # type: ignore[arg-type]
    }
    assert found == expected
    assert inspect_model(model).macs is None


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_budget_takes_its_share_and_leaves_the_model_alone(ratio: float) -> None:
    family = BY_NAME["vit-fused"]
    model, inputs = family.build(torch.float32), family.inputs(1, torch.float32)
    before = inspect_model(model, inputs)
    smaller, plan = after_budget(model, Goal(ratio, None))
    after = inspect_model(smaller, inputs, plan.sizes)
    share = 1 - sum(part.prunable for part in after.parts) / sum(part.prunable for part in before.parts)
    assert share == pytest.approx(ratio, abs=0.03)
    assert after.macs is not None and before.macs is not None and after.macs < before.macs
    assert inspect_model(model, inputs) == before
    assert {group.size for panel in after.panels for group in panel.layers} == {
        group.size for panel in before.panels for group in panel.layers
    }


def test_sizes_are_aligned_where_groups_are_large_enough() -> None:
    model = BY_NAME["nlvr"].build(torch.float32)
    _, plan = after_budget(model, Goal(0.4, None), round_to=8)
    assert {len(kept) % 8 for name, kept in plan.items() if plan.sizes[name] > 8} == {0}
    for ratio, round_to, message in ((1.0, 1, "strictly between"), (0.5, 0, "round_to must be")):
        with pytest.raises(SettingError, match=message):
            after_budget(model, Goal(ratio, None), round_to)


def test_a_target_for_the_whole_model_is_previewed_as_it_will_be() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    images = torch.zeros(1, 3, 32, 32)
    dense, goal = inspect_model(model, images), Goal(None, {"params": 0.7, "macs": "2x"})
    smaller, plan = after_budget(model, goal, example=images)
    found = inspect_model(smaller, images)
    assert dense.macs is not None
    assert found.macs is not None
    assert 0.495 < found.macs / dense.macs <= 0.5  # which takes more than the parameters do
    assert plan.settings["reached"]["params"]["left"] == found.parameters < 0.7 * dense.parameters
    assert plan.settings["reached"]["macs"]["left"] == found.macs
