"""Plans as text, searches that stop and go on, and steps whose gradients are no numbers."""

from __future__ import annotations

import copy
import io
import itertools
import json
import warnings
from typing import Any

import pytest
import torch

import upop
from pruning.families import BY_NAME, NLVR, VIT, Family, finished_pruner, loss_of, outputs_of, uneven_plan
from tiers import mostly_slow
from upop.pruning.errors import PlanError, SettingError

STEPS = 6


def train(
    model: torch.nn.Module,
    pruner: upop.Pruner,
    optimizer: torch.optim.Optimizer,
    steps: range,
    case: Family = NLVR,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model(**case.inputs(2, seed=step))).backward()
        pruner.step()
        optimizer.step()


@pytest.mark.parametrize(
    ("stop", "cost", "case"),
    mostly_slow(
        itertools.product([1, 3, 5], ["params", "reference"], [NLVR, BY_NAME["vqa"]]),
        (3, "params", NLVR),
        (3, "reference", NLVR),
    ),
)
def test_a_resumed_search_ends_in_the_same_bits(stop: int, cost: str, case: Family) -> None:
    whole = case.build()
    expected = upop.Pruner(whole, 0.5, STEPS, 2, cost=cost)
    train(whole, expected, torch.optim.SGD(whole.parameters(), lr=1e-2), range(STEPS), case)

    first = case.build()
    pruner = upop.Pruner(first, 0.5, STEPS, 2, cost=cost)
    train(first, pruner, torch.optim.SGD(first.parameters(), lr=1e-2), range(stop), case)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "search": pruner.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = case.build(seed=5)
    second.load_state_dict(saved["model"])
    resumed = upop.Pruner(second, 0.5, STEPS, 2, cost=cost)
    resumed.load_state_dict(saved["search"])
    assert resumed.steps_done == stop
    assert bool(saved["search"]["seen"]["passes"]) == (cost == "params")  # stops are amid stages
    assert resumed.current_ratio == pruner.current_ratio
    assert resumed.threshold == pruner.threshold
    assert torch.equal(outputs_of(second, case.inputs()), outputs_of(first, case.inputs()))
    train(second, resumed, torch.optim.SGD(second.parameters(), lr=1e-2), range(stop, STEPS), case)
    assert resumed.plan() == expected.plan()
    for name, importance in expected.scores.items():
        assert torch.equal(resumed.scores[name], importance)
        assert torch.equal(resumed.masks[name], expected.masks[name])
    assert torch.equal(outputs_of(second, case.inputs()), outputs_of(whole, case.inputs()))


def test_a_saved_state_does_not_change_as_the_search_goes_on() -> None:
    model = NLVR.build()
    pruner = upop.Pruner(model, 0.5, STEPS, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train(model, pruner, optimizer, range(1))
    state = pruner.state_dict()
    scores, masks = copy.deepcopy(state["scores"]), copy.deepcopy(state["masks"])
    pruner.scores["text_encoder.encoder.layer.0.intermediate"].zero_()  # what is given out is a copy
    train(model, pruner, optimizer, range(1, 3))
    assert all(torch.equal(state["scores"][name], importance) for name, importance in scores.items())
    assert all(torch.equal(state["masks"][name], mask) for name, mask in masks.items())
    assert any(not torch.equal(pruner.masks[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.4},
        {"steps": 7},
        {"interval": 3},
        {"round_to": 2},
        {"cost": "reference"},
        {"progress": "soft"},
        {"importance": "squared"},
        {"correct": False},
    ],
)
def test_a_state_of_other_settings_is_refused(settings: dict[str, Any]) -> None:
    mine: dict[str, Any] = {"ratio": 0.5, "steps": STEPS, "interval": 2}
    state = upop.Pruner(VIT.build(), **mine).state_dict()
    with pytest.raises(SettingError, match=next(iter(settings))):
        upop.Pruner(VIT.build(), **{**mine, **settings}).load_state_dict(state)


def test_a_state_of_another_model_is_refused() -> None:
    state = upop.Pruner(VIT.build(), 0.5, STEPS).state_dict()
    with pytest.raises(SettingError, match="other groups"):
        upop.Pruner(NLVR.build(), 0.5, STEPS).load_state_dict(state)
    with pytest.raises(SettingError, match="other groups"):
        upop.Pruner(VIT.build(), 0.5, STEPS, include="*.mlp").load_state_dict(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_adds_nothing(value: float) -> None:
    model, inputs = VIT.build(), VIT.inputs()
    pruner = upop.Pruner(model, 0.5, 4, 10, update_first_step=False)

    def step(spoilt: bool) -> None:
        model.zero_grad()
        loss_of(model(**inputs)).backward()
        if spoilt:
            model.blocks[1].mlp.fc1.weight.grad[3, 2] = value
        pruner.step()

    step(False)
    before = pruner.scores
    step(True)
    assert pruner.skipped_steps == 1
    assert pruner.steps_done == 2
    assert all(torch.equal(importance, before[name]) for name, importance in pruner.scores.items())
    step(False)
    for name, importance in pruner.scores.items():
        torch.testing.assert_close(importance, 2 * before[name], rtol=1e-12, atol=0)
    with pytest.warns(UserWarning, match="1 of 4 search steps.*finite") as caught:
        step(False)
    assert caught[0].filename == __file__  # it points at the training loop
    pruner.shrink(verify=inputs)


def test_skipped_steps_pass_and_are_counted() -> None:
    model, inputs = VIT.build(), VIT.inputs()
    pruner = upop.Pruner(model, 0.5, 3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.skip()
        assert pruner.steps_done == pruner.skipped_steps == 1
        assert not any(importance.any() for importance in pruner.scores.values())
        for _ in range(2):
            model.zero_grad()
            loss_of(model(**inputs)).backward()
            pruner.step()
    assert pruner.skipped_steps == 1
    pruner.shrink(verify=inputs)


def test_a_plan_survives_json() -> None:
    pruner = finished_pruner(NLVR.build(), NLVR.inputs(), round_to=2)
    plan = pruner.plan()
    again = upop.Plan.from_json(plan.to_json())
    assert again == plan
    assert dict(again) == dict(plan)
    assert list(again) == [group.name for group in pruner.groups]
    how = {"importance": "absolute", "progress": "stages", "reached": plan.settings["reached"]}
    assert again.settings == {"ratio": 0.5, "steps": 2, "interval": 1, "cost": "params", "round_to": 2, **how}
    assert json.loads(plan.to_json())["version"] == 2
    given = finished_pruner(VIT.build(), VIT.inputs(), cost=lambda group: 1.0).plan()
    assert upop.Plan.from_json(given.to_json()).settings["cost"] == "given"


def test_a_plan_cuts_a_fresh_copy_to_the_same_model() -> None:
    model, inputs = NLVR.build(), NLVR.inputs()
    pruner = finished_pruner(model, inputs, correct=False, rotate=False)
    plan = upop.Plan.from_json(pruner.plan().to_json())
    pruner.shrink(verify=inputs)
    fresh = upop.shrink(NLVR.build(), plan, verify=inputs)
    assert torch.equal(outputs_of(fresh.eval(), inputs), outputs_of(model.eval(), inputs))


GOOD = {"version": 2, "settings": {}, "groups": {"blocks.0.mlp": {"size": 48, "kept": [0, 3]}}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "3",
        "null",
        '"plan"',
        "{}",
        '{"version": 1}',
        '{"version": 1, "groups": []}',
        '{"version": 1, "groups": {"a": 3}}',
        '{"version": 1, "groups": {"a": {"size": 4}}}',
        '{"version": 1, "groups": {"a": {"size": "x", "kept": [0]}}}',
        '{"version": 1, "groups": {"a": {"size": 4, "kept": 2}}}',
        '{"version": 1, "groups": {"a": {"size": 4, "kept": [null]}}}',
        '{"version": 1, "groups": {"a": {"size": 4, "kept": [1.5]}}}',
        '{"version": 1, "groups": {"a": {"size": Infinity, "kept": [1]}}}',
        '{"version": 1, "settings": 3, "groups": {"a": {"size": 4, "kept": [1]}}}',
        json.dumps(GOOD)[:-9],
    ],
)
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError, match=r"Expected a plan as Plan\.to_json writes it, found"):
        upop.Plan.from_json(text)


@pytest.mark.parametrize("version", [3, 0, "1", True, [1], None])
def test_a_plan_of_another_version(version: Any) -> None:
    with pytest.raises(PlanError, match=r"version .*reads 1 to 2"):
        upop.Plan.from_json(json.dumps({**GOOD, "version": version}))


def test_a_plan_that_does_not_fit_lists_all_that_is_wrong() -> None:
    model = VIT.build()
    before = dict(model.named_parameters())
    groups = {
        "blocks.0.attn": {"size": 8, "kept": [1, 1]},
        "blocks.0.mpl": {"size": 48, "kept": [0]},
        "blocks.0.mlp": {"size": 40, "kept": [0]},
        "blocks.1.attn": {"size": 8, "kept": [0, 8]},
        "blocks.1.mlp": {"size": 48, "kept": [3, 2]},
    }
    plan = upop.Plan.from_json(json.dumps({"version": 2, "groups": groups}))
    with pytest.raises(PlanError) as caught:
        upop.shrink(model, plan)
    for fragment in (
        "does not fit VisionTransformer",
        "blocks.0.attn: indices must be ascending, without repeats",
        "blocks.0.mpl: no such group (did you mean 'blocks.0.mlp'?)",
        "blocks.0.mlp: the plan is for 40 channels, the model has 48",
        "blocks.1.attn: indices must lie in 0..7, found 0..8",
        "blocks.1.mlp: indices must be ascending",
    ):
        assert fragment in str(caught.value)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"blocks.0.atn": [0]}, "names 'blocks.0.atn'.*did you mean 'blocks.0.attn'"),
        ({"blocks.0.attn": [1, 1]}, "without repeats"),
        ({"blocks.0.attn": [-1, 2]}, r"must lie in 0\.\.7, found -1"),
        ({"blocks.0.attn": [99]}, r"must lie in 0\.\.7"),
        ({"blocks.0.attn": torch.tensor([True] * 4 + [False] * 4)}, "without repeats"),
    ],
)
def test_own_indices_that_do_not_fit(kept: dict[str, Any], message: str) -> None:
    model = VIT.build()
    with pytest.raises(PlanError, match=message):
        upop.shrink(model, kept)


def test_own_indices_in_any_form() -> None:
    sizes = []
    for kept in ([5, 0, 3], (0, 3, 5), {3, 5, 0}, torch.tensor([0, 3, 5]), range(3), iter([1, 2, 3])):
        model = upop.shrink(VIT.build(), {"blocks.1.attn": kept}, verify=VIT.inputs())
        sizes.append([group.size for group in upop.find_groups(model)])
    assert sizes == [[8, 48, 3, 48]] * 6


def test_a_plan_is_tied_to_the_sizes_it_was_made_for() -> None:
    model = VIT.build()
    plan = upop.Plan.of(upop.find_groups(model), uneven_plan(upop.find_groups(model)))
    upop.shrink(model, plan)
    with pytest.raises(PlanError, match="the model has"):
        upop.shrink(model, plan)
