"""Compression without training: the budget, the cut, the correction of the layers that read what stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import upop
from pruning.families import NLVR, VIT, Family, difference, loss_of, outputs_of, reader_and_inputs
from tiers import mostly_slow
from upop.errors import LayoutError, SettingError, StepError

both = pytest.mark.parametrize("case", mostly_slow([VIT, NLVR], VIT), ids=lambda case: case.name)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return loss_of(model(**batch))


def batches(case: Family, count: int = 3) -> list[dict[str, Tensor]]:
    return [case.inputs(4, seed=seed) for seed in range(count)]


@both
def test_the_budget_is_met_and_the_plan_fits_the_dense_model(case: Family) -> None:
    model, dense = case.build(), case.build()
    groups = upop.find_groups(dense)
    cost = {group.name: 1.0 for group in groups}
    plan = upop.calibrate(model, batches(case), 0.5, loss=loss, stages=3, cost=cost)
    whole = sum(group.size for group in groups)
    assert abs(sum(len(kept) for kept in plan.values()) / whole - 0.5) <= 1 / whole * 3
    assert {group.name: group.size for group in upop.find_groups(model)} == {
        name: len(kept) for name, kept in plan.items()
    }
    upop.shrink(dense, plan)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (model, dense)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("asked", "stages"),
    [({"ratio": 0.2}, 1), ({"ratio": 0.5}, 3), ({"target": {"params": 0.9}}, 1), ({"target": {"params": 0.5}}, 7)],
    ids=str,
)
def test_the_more_goes_the_more_stages(asked: dict[str, Any], stages: int) -> None:
    model = VIT.build()
    plan = upop.calibrate(model, batches(VIT, 2), **asked, loss=loss, correct=False, verify=False)
    assert plan.settings["stages"] == stages


@both
def test_without_correction_it_is_the_cut_of_its_plan(case: Family) -> None:
    model, dense = case.build(), case.build()
    plan = upop.calibrate(model, batches(case), 0.4, loss=loss, stages=2, correct=False, rotate=False)
    upop.shrink(dense, plan)
    inputs = case.inputs()
    assert difference(outputs_of(model, inputs), outputs_of(dense, inputs)) < 1e-10


@both
def test_the_corrected_layer_is_the_nearest_to_the_old_one(case: Family) -> None:
    """The error of its outputs is at right angles to its inputs, so that no other weights come nearer."""
    model, dense = case.build(), case.build()
    group = next(group for group in upop.find_groups(dense) if group.kind == "mlp")
    reader = group.online[-1].tensor.removesuffix(".weight")
    batch = case.inputs(64)
    upop.calibrate(model, [batch], 0.5, loss=loss, stages=1, include=group.name, ridge=1e-14)
    _, wanted = reader_and_inputs(dense, batch, reader)
    inputs, found = reader_and_inputs(model, batch, reader)
    error, squares = wanted - found, wanted.square().sum(1)
    assert error.abs().max() > 1e-3
    error *= (squares.log().mean().exp() / squares).clamp_max(1).unsqueeze(1)  # none counts more for being large
    assert (inputs.t() @ error).abs().max() < 1e-6 * inputs.norm() * error.norm()


def test_the_loss_of_transformers_outputs_is_used() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    batch = {"input_ids": torch.randint(50, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    explicit = copy.deepcopy(model)
    plan = upop.calibrate(model, [batch], 0.5)
    given = upop.calibrate(explicit, [batch], 0.5, loss=lambda model, batch: model(**batch).loss)
    assert dict(plan) == dict(given)


def test_it_is_saved_with_its_plan(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    images = torch.randn(4, 3, 32, 32)
    upop.calibrate(model, [images], 0.5)
    upop.save(model, tmp_path / "model")
    inputs = {"x": images}
    assert difference(outputs_of(upop.load(tmp_path / "model"), inputs), outputs_of(model, inputs)) < 1e-6


@both
def test_family_members_stay_what_they_were_when_a_batch_fails(case: Family) -> None:
    model = case.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = 0

    def failing(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(model, batch) * (float("nan") if calls == 5 else 1)

    with pytest.raises(StepError, match="is not finite"):
        upop.calibrate(model, batches(case), 0.5, loss=failing, stages=3)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    upop.calibrate(model, batches(case), 0.5, loss=loss)


def test_modes_and_gradients_are_as_before() -> None:
    model = VIT.build()
    model.train()
    model.blocks[0].eval()
    upop.calibrate(model, batches(VIT), 0.3, loss=loss)
    assert model.training
    assert not model.blocks[0].training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "there was none"),
        ({"ratio": 1.0}, r"strictly between 0 and 1; found 1\.0"),
        ({"stages": 0}, "stages must be a whole number of at least 1; found 0"),
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"include": "nothing"}, "matches none of the"),
        ({"ratio": 0.999}, "cannot be reached"),
        ({"importance": "sined"}, "did you mean 'signed'"),
    ],
    ids=str,
)
def test_wrong_settings_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"batches": batches(VIT), "ratio": 0.5, "loss": loss, **changes}
    with pytest.raises(SettingError, match=message):
        upop.calibrate(VIT.build(), given.pop("batches"), given.pop("ratio"), **given)


def test_frozen_weights_are_cut_like_others_and_stay_frozen() -> None:
    frozen, trained = VIT.build().requires_grad_(False), VIT.build()
    for model in (frozen, trained):
        upop.calibrate(model, batches(VIT), 0.5, loss=loss)
    assert not any(each.requires_grad for each in frozen.parameters())
    torch.testing.assert_close(frozen.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_wrong_models_and_losses_say_what_is_wrong() -> None:
    model = VIT.build()
    with pytest.raises(StepError, match="scalar tensor with a gradient"):
        upop.calibrate(model, batches(VIT), 0.5, loss=lambda model, batch: model(**batch).detach().sum())
    pruner = upop.Pruner(model, 0.5, 4)
    with pytest.raises(LayoutError, match="still masked"):
        upop.calibrate(model, batches(VIT), 0.5, loss=loss)
    pruner.remove()
