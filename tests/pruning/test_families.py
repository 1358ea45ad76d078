"""What must hold for every family: the same suite over the registry."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import upop
from pruning.families import (
    Family,
    binary,
    difference,
    finished_pruner,
    loss_of,
    masked_outputs,
    outputs_of,
    random_masks,
    scaled_parameters,
    still_pruner,
    uneven_plan,
)
from tiers import mostly_slow

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def trace_of(model: nn.Module) -> dict[str, Any]:
    """Return all that attaching could leave behind: names, classes, hooks, the parameter objects."""
    return {
        "keys": list(model.state_dict()),
        "buffers": [name for name, _ in model.named_buffers()],
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "unsaved": {name: sorted(module._non_persistent_buffers_set) for name, module in model.named_modules()},
        "hooks": {
            name: [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "modes": {name: module.training for name, module in model.named_modules()},
    }


def assert_metadata(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert type(module) is nn.Linear, name
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), name
            assert module.bias is None or module.bias.shape == module.weight.shape[:1], name
    for group in upop.find_groups(model):
        module = model.get_submodule(group.name)
        if hasattr(module, "qkv"):
            assert module.head_dim * module.num_heads == module.attn_dim == module.proj.in_features
            assert module.qkv.out_features == 3 * module.attn_dim
            assert module.scale == pytest.approx(module.head_dim**-0.5)
        elif hasattr(module, "query"):
            assert module.attention_head_size * module.num_attention_heads == module.all_head_size
            assert module.all_head_size == module.query.out_features == module.value.out_features
        elif hasattr(module, "q_proj"):
            assert module.head_dim * module.num_heads == module.q_proj.out_features == module.out_proj.in_features
            assert module.scale == pytest.approx(module.head_dim**-0.5)


def test_groups_come_in_forward_order_and_carry_every_axis(family: Family) -> None:
    model = family.build()
    groups = upop.find_groups(model)
    assert len({group.name for group in groups}) == len(groups)
    modules = [name for name, _ in model.named_modules()]
    assert [modules.index(group.name) for group in groups] == sorted(modules.index(group.name) for group in groups)
    assert {group.kind for group in groups} == {"attention", "mlp"}
    for group in groups:
        assert sum(not part.produces for part in group.slices) == 1
        for part in group.slices:
            assert model.get_parameter(part.tensor).shape[part.dim] == part.length(group.size)
    named = {name for name, module in model.named_modules() if hasattr(module, "qkv") or hasattr(module, "fc1")}
    named |= {
        name
        for name, _ in model.named_modules()
        if name.endswith((".self", ".self0", ".self1", ".self_attn", ".intermediate"))
    }
    assert {group.name for group in groups} == named


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("seed", mostly_slow(range(4), 0, 3))
def test_masked_equals_shrunk(family: Family, dtype: torch.dtype, tolerance: float, seed: int) -> None:
    model = family.build(dtype, seed).eval()
    inputs = family.inputs(3, dtype, seed)
    groups = upop.find_groups(model)
    plan = uneven_plan(groups, seed)
    before = outputs_of(model, inputs)
    expected = masked_outputs(model, groups, binary(groups, plan), inputs)
    keys, parameters = list(model.state_dict()), upop.count_parameters(model)
    assert upop.shrink(model, plan, verify=inputs) is model
    found = outputs_of(model, inputs)
    assert difference(found, expected) < tolerance
    assert difference(found, before) > 1e-3, "the plan removed nothing that matters, so the test shows nothing"
    assert list(model.state_dict()) == keys
    assert [group.size for group in upop.find_groups(model)] == [len(kept) for kept in plan.values()]
    assert_metadata(model)
    removed = sum(
        (group.size - len(plan[group.name]))
        * sum(part.outer * part.inner * _others(model, part) for part in group.slices)
        for group in groups
    )
    assert parameters - upop.count_parameters(model) == removed


def _others(model: nn.Module, part: Any) -> int:
    tensor = model.get_parameter(part.tensor)
    return tensor.numel() // tensor.shape[part.dim]


def test_one_channel_left_everywhere(family: Family) -> None:
    model = family.build().eval()
    groups = upop.find_groups(model)
    plan = {group.name: [number % group.size] for number, group in enumerate(groups)}
    expected = masked_outputs(model, groups, binary(groups, plan), family.inputs())
    upop.shrink(model, plan)
    assert difference(outputs_of(model, family.inputs()), expected) < 1e-10
    assert_metadata(model)


def test_keeping_all_changes_no_tensor(family: Family) -> None:
    model = family.build()
    before = dict(model.named_parameters())
    upop.shrink(model, {group.name: range(group.size) for group in upop.find_groups(model)}, verify=family.inputs())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_shrinking_twice_equals_masking_with_both(family: Family) -> None:
    model = family.build().eval()
    groups = upop.find_groups(model)
    first = uneven_plan(groups, 1)
    dense = copy.deepcopy(model)
    upop.shrink(model, first, verify=family.inputs())
    second = uneven_plan(upop.find_groups(model), 2)
    upop.shrink(model, second, verify=family.inputs())
    both = {name: [first[name][channel] for channel in kept] for name, kept in second.items()}
    expected = masked_outputs(dense, groups, binary(groups, both), family.inputs())
    assert difference(outputs_of(model, family.inputs()), expected) < 1e-10


def test_an_already_shrunken_model_can_be_compressed_again(family: Family) -> None:
    model = family.build()
    inputs = family.inputs()
    upop.shrink(model, {group.name: range(1, group.size) for group in upop.find_groups(model)}, verify=inputs)
    total = {group.name: group.size for group in upop.find_groups(model)}
    pruner = finished_pruner(model, inputs, 0.4)
    expected = outputs_of(model.eval(), inputs)
    pruner.shrink(verify=inputs)
    assert difference(outputs_of(model, inputs), expected) < 1e-10
    assert sum(group.size for group in upop.find_groups(model)) < sum(total.values())


@pytest.mark.parametrize("dtype", mostly_slow([torch.float64, torch.float32], torch.float32))
def test_attaching_changes_no_output_bit(family: Family, dtype: torch.dtype) -> None:
    model = family.build(dtype)
    inputs = family.inputs(2, dtype)
    before = outputs_of(model, inputs)
    pruner = upop.Pruner(model, 0.5, 10)
    assert torch.equal(outputs_of(model, inputs), before)
    pruner.remove()
    assert torch.equal(outputs_of(model, inputs), before)


@pytest.mark.parametrize("progress", ["stages", "soft"])
def test_removing_leaves_no_trace(family: Family, progress: Any) -> None:
    model = family.build()
    model.get_submodule(upop.find_groups(model)[0].name).eval()  # modes differ between modules
    before, outputs = trace_of(model), outputs_of(model, family.inputs())
    weights = copy.deepcopy(model.state_dict())
    pruner = upop.Pruner(model, 0.5, 3, 1, progress=progress)
    assert list(model.state_dict()) == before["keys"]
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before["parameters"]
    loss_of(model(**family.inputs())).backward()
    pruner.step()
    assert not torch.equal(outputs_of(model, family.inputs()), outputs)
    pruner.remove()
    pruner.remove()  # twice does no harm
    assert trace_of(model) == before
    if progress == "stages":  # what was corrected, if anything was, stays so
        model.load_state_dict(weights)
    assert torch.equal(outputs_of(model, family.inputs()), outputs)


def test_a_failure_while_attached_leaves_the_model_usable(family: Family) -> None:
    model = family.build()
    before, outputs = trace_of(model), outputs_of(model, family.inputs())
    pruner = upop.Pruner(model, 0.5, 3, 1)
    with pytest.raises((RuntimeError, TypeError, ValueError, AssertionError)):
        model(torch.zeros(1))
    pruner.remove()
    assert trace_of(model) == before
    assert torch.equal(outputs_of(model, family.inputs()), outputs)


def test_a_failing_constructor_leaves_no_trace(family: Family) -> None:
    model = family.build()
    last = upop.find_groups(model)[-1].name
    first = upop.Pruner(model, 0.5, 3, include=last)
    before = trace_of(model)
    with pytest.raises(upop.pruning.errors.LayoutError, match="masked already"):
        upop.Pruner(model, 0.5, 3)
    assert trace_of(model) == before
    first.remove()


def test_a_layer_with_a_forward_of_its_own_is_left_alone_or_proved(family: Family) -> None:
    model = family.build()
    last = upop.find_groups(model)[-1]
    layer = model.get_submodule(last.producers[0].tensor.rpartition(".")[0])

    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer.__class__ = Odd
    found = upop.pruning.find_prunable(model)
    groups = {group.name: group for group in found.groups}
    if last.name in groups:  # read off what the model computes, which is linear all the same
        assert groups[last.name].proved
    else:
        reason = "is a Odd, whose forward is not that of torch.nn.Linear"
        assert any(reason in part.reason for part in found.skipped)


def reference_gradients(
    model: nn.Module, groups: list[upop.Group], masks: dict[str, Tensor], inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return loss, weight gradients and mask gradients by autograd, with the masks as leaves."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    leaves = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
    loss = loss_of(functional_call(model, scaled_parameters(model, groups, leaves, weights), (), inputs))
    gradients = torch.autograd.grad(loss, [*weights.values(), *leaves.values()])
    return (
        loss.detach(),
        dict(zip(weights, gradients[: len(weights)], strict=True)),
        dict(zip(leaves, gradients[len(weights) :], strict=True)),
    )


def test_gradients_and_scores_are_autograds(family: Family) -> None:
    model = family.build().train()
    inputs, groups = family.inputs(3), upop.find_groups(model)
    masks = random_masks(groups)
    loss, weights, scores = reference_gradients(model, groups, masks, inputs)
    pruner = still_pruner(model, masks)
    found = loss_of(model(**inputs))
    found.backward()
    assert abs(float(found.detach() - loss)) < 1e-10 * float(loss.abs())
    for name, parameter in model.named_parameters():
        # What cancels in a sum is off by the size of its terms: by how much, the processor decides.
        noise = 1e-12 * max(1.0, float(weights[name].abs().max()))
        torch.testing.assert_close(
            parameter.grad, weights[name], rtol=1e-10, atol=noise, msg=lambda m, n=name: f"{n}: {m}"
        )
    pruner.step()
    for name, importance in pruner.scores.items():
        torch.testing.assert_close(importance, scores[name], rtol=1e-10, atol=1e-12, msg=name)
    pruner.step()  # scores add up and are never reset
    for name, importance in pruner.scores.items():
        torch.testing.assert_close(importance, 2 * scores[name], rtol=1e-10, atol=1e-12, msg=name)


def test_search_then_shrink_keeps_the_searched_function(family: Family) -> None:
    model = family.build(torch.float32)
    inputs = family.inputs(4, torch.float32)
    pruner = upop.Pruner(model, 0.6, 5, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model(**inputs)).backward()
        pruner.step()
        optimizer.step()
    assert pruner.finished
    assert all(bool(((mask == 0) | (mask == 1)).all()) for mask in pruner.masks.values())
    expected = outputs_of(model.eval(), inputs)
    plan = pruner.plan()
    assert pruner.shrink(verify=inputs) is model
    assert difference(outputs_of(model, inputs), expected) < 1e-5
    assert {group.name: group.size for group in upop.find_groups(model)} == {
        name: len(kept) for name, kept in plan.items()
    }
    assert_metadata(model)
    loss_of(model.train()(**inputs)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_deepcopy_of_a_masked_model_is_masked_on_its_own(family: Family) -> None:
    model = family.build()
    inputs = family.inputs()
    pruner = still_pruner(model, random_masks(upop.find_groups(model)))
    expected = outputs_of(model, inputs)
    twin = copy.deepcopy(model)
    pruner.remove()
    assert torch.equal(outputs_of(twin, inputs), expected)
    assert not torch.equal(outputs_of(model, inputs), expected)
    loss_of(twin(**inputs)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_verify_takes_every_form_of_inputs(family: Family) -> None:
    inputs = family.inputs()
    forms: list[Any] = [inputs, tuple(inputs.values()), list(inputs.values()), lambda model: model(**inputs)]
    if len(inputs) == 1:
        forms.append(next(iter(inputs.values())))
    for form in forms:
        model = family.build()
        upop.shrink(model, uneven_plan(upop.find_groups(model)), verify=form)
        assert model.training
