"""What stands around a search: averages and copies of its model, several devices, an early end, other derivatives."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import upop
from pruning.test_verify import HIDDEN, Net, batch
from upop.pruning.errors import LayoutError, StepError
from upop.pruning.masks import Masks


class Placed(Net):
    """A model with a buffer, as positions are."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(5))


def take(pruner: upop.Pruner, steps: int, model: nn.Module | None = None) -> None:
    for _ in range(steps):
        pruner.model.zero_grad()
        (model or pruner.model)(batch()).square().mean().backward()
        pruner.step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_average_of_the_weights_is_cut_by_the_plan(when: str) -> None:
    model = Placed()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)) if when == "before" else None
    pruner = upop.Pruner(model, 0.5, 4, 1, example=batch())
    take(pruner, 2)
    average = average or AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        take(pruner, 1)
        optimizer.step()
        average.update_parameters(model)
    plan = pruner.plan()
    pruner.shrink()
    upop.shrink(average.module, plan)
    shapes = {name: each.shape for name, each in model.named_parameters()}
    assert {name: each.shape for name, each in average.module.named_parameters()} == shapes
    assert torch.equal(average.module.positions, torch.arange(5))
    assert {type(each) for each in average.module.modules()} == {type(each) for each in model.modules()}


def test_a_copy_has_masks_of_its_own_and_may_be_searched() -> None:
    model = Net()
    pruner = upop.Pruner(model, 0.5, 4, 1, example=batch())
    take(pruner, 2)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch()), model(batch()))
    before = twin(batch())
    take(pruner, 2)
    assert torch.equal(twin(batch()), before)
    with pytest.raises(LayoutError, match="another Pruner holds"):
        upop.Pruner(model, 0.5, 4, example=batch())
    other = upop.Pruner(twin, 0.25, 1, example=batch())
    assert other.kept_share() == 1.0
    take(other, 1)
    other.shrink()
    pruner.shrink()


def test_masks_move_with_the_model_and_are_nothing_that_is_saved() -> None:
    model = Net()
    before = set(model.state_dict()), [name for name, _ in model.named_buffers()]
    pruner = upop.Pruner(model, 0.5, 2, 1, example=batch(), correct=False)
    take(pruner, 1)
    assert (set(model.state_dict()), [name for name, _ in model.named_buffers()]) == before
    with torch.no_grad():
        single = model(batch())
    model.double()
    torch.testing.assert_close(model(batch(dtype=torch.float64)).float(), single)
    model.float()
    take(pruner, 1)
    assert pruner.shrink()(batch()).shape == single.shape


def test_a_search_in_stages_may_end_early() -> None:
    model = Net()
    pruner = upop.Pruner(model, 0.5, 8, 2, example=batch())
    take(pruner, 3)
    plan = pruner.plan()
    assert 0 < sum(len(kept) for kept in plan.values()) < sum(plan.sizes.values())
    assert plan.settings["steps_done"] == 3
    expected = model(batch())
    with pytest.warns(UserWarning, match="after 3 of 8 steps"):
        pruner.shrink()
    torch.testing.assert_close(model(batch()), expected)
    assert model.blocks[0].up.out_features == len(plan[next(iter(plan))])
    with pytest.raises(StepError, match="masks were removed"):
        pruner.step()


def test_a_search_that_ends_before_its_first_stage_cuts_nothing() -> None:
    model = Net()
    pruner = upop.Pruner(model, 0.5, 8, 4, example=batch())
    take(pruner, 1)
    with pytest.warns(UserWarning, match="removed 0% of the cost"):
        pruner.shrink()
    assert model.blocks[0].up.out_features == HIDDEN
    assert {type(each) for each in model.modules()} == {type(each) for each in Net().modules()}


def test_a_soft_search_has_no_plan_before_its_end() -> None:
    pruner = upop.Pruner(Net(), 0.5, 4, 1, progress="soft", example=batch())
    take(pruner, 3)
    with pytest.raises(StepError, match="only 3 of 4"):
        pruner.plan()
    take(pruner, 1)
    assert pruner.plan()


def test_nothing_is_scored_and_no_gradient_is_held_once_the_search_has_ended() -> None:
    model = Net()
    pruner = upop.Pruner(model, 0.5, 2, 1, example=batch())
    take(pruner, 2)
    weight = model.blocks[0].up.weight
    assert not weight._post_accumulate_grad_hooks
    model.zero_grad()
    model(batch()).square().mean().backward()
    held = weakref.ref(weight.grad)
    model.zero_grad()
    gc.collect()
    assert held() is None
    pruner.move_to(model)  # what is masked anew is not scored either
    assert not weight._post_accumulate_grad_hooks


def test_a_copy_that_is_refused_leaves_the_search_with_the_old_one() -> None:
    model, other = Net(), Net()
    pruner = upop.Pruner(model, 0.5, 2, 1, example=batch())
    taken = upop.Pruner(other, 0.5, 2, 1, example=batch())
    take(pruner, 1)
    expected = model(batch())
    with pytest.raises(LayoutError, match="another Pruner holds"):
        pruner.move_to(other)
    assert torch.equal(model(batch()), expected)
    take(pruner, 1)
    taken.remove()
    pruner.move_to(other)
    pruner.shrink()
    assert other.blocks[0].up.out_features < HIDDEN == model.blocks[0].up.out_features


def test_a_search_goes_on_within_a_stage_on_another_device() -> None:
    pruner = upop.Pruner(Net(), 0.5, 8, 4, example=batch())
    take(pruner, 2)
    state = pruner.state_dict()
    assert state["seen"]["passes"]
    model = Net()
    other = upop.Pruner(model, 0.5, 8, 4, example=batch())
    model.to("meta")  # a device with other tensors, though without numbers
    other.load_state_dict(state)
    found = list(other._moments.portions(model, other.groups, True))
    assert [name for _, seen in found for name in seen] == [group.name for group in other.groups]
    assert {rows.device.type for _, seen in found for each in seen.values() for rows in each.tensors()} == {"meta"}
    model(batch().to("meta")).square().mean().backward()
    other.step()


def test_a_model_that_is_spread_over_devices_is_scored() -> None:
    model = Net()
    pruner = upop.Pruner(model, 0.5, 4, 2, correct=False, example=batch())
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without numbers, on devices that need not be there
        for block, device in zip(model.blocks, ("cpu", "cuda"), strict=True):
            for module in block.modules():
                for name, old in module.named_parameters(recurse=False):
                    moved = nn.Parameter(torch.empty(old.shape, device=device))
                    moved.grad = torch.empty_like(moved)
                    module._parameters[name] = moved
        pruner.step()
        assert {each.device.type for each in pruner.scores.values()} == {"cpu", "cuda"}


def masked(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a masked model, and the same one whose rows are set to what the masks make of them."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    plain = copy.deepcopy(model)
    groups = upop.find_groups(model, batch(dtype=dtype))
    masks = Masks(model, groups)
    model._masks_of_test = masks  # type: ignore[assignment]
    values = {group.name: torch.rand(group.size, dtype=dtype) for group in groups}
    masks.set(values)
    with torch.no_grad():
        for block, value in zip(plain.blocks, values.values(), strict=True):
            block.up.weight *= value.to(dtype).unsqueeze(1)
            block.up.bias *= value.to(dtype)
    return model, plain


@pytest.mark.parametrize("rows", [1, 100])
def test_masked_layers_have_second_derivatives(rows: int) -> None:
    model, plain = masked()
    found = []
    for each in (model, plain):
        inputs = batch(dtype=torch.float64).repeat(rows, 1, 1).requires_grad_()
        (first,) = torch.autograd.grad(each(inputs).square().sum(), inputs, create_graph=True)
        first.square().sum().backward()  # a penalty on the gradient
        assert inputs.grad is not None
        found.append([inputs.grad, each.blocks[0].down.weight.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own formulas, on their first use
def test_masked_layers_are_transformed_by_torch_func() -> None:
    model, plain = masked()
    inputs = batch(dtype=torch.float64)

    def loss(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.mse_loss(functional_call(module, parameters, (x.unsqueeze(0),)), x.unsqueeze(0))

    each, tangent = [], []
    for module in (model, plain):
        parameters = {name: value.detach() for name, value in module.named_parameters()}
        each.append(vmap(grad(lambda p, x, m=module: loss(m, p, x)), (None, 0))(parameters, inputs))
        tangent.append(jvp(lambda x, m=module: m(x), (inputs,), (torch.ones_like(inputs),))[1])
    torch.testing.assert_close(each[0]["blocks.0.down.weight"], each[1]["blocks.0.down.weight"])
    torch.testing.assert_close(*tangent)


def test_a_search_takes_no_harm_from_gradients_per_sample() -> None:
    model = Net()
    pruner = upop.Pruner(model, 0.5, 2, 1, example=batch())
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    each = vmap(grad(lambda p, x: functional_call(model, p, (x.unsqueeze(0),)).square().mean()), (None, 0))
    for _ in range(2):
        assert len(each(parameters, batch())["blocks.0.down.weight"]) == len(batch())
        take(pruner, 1)
    pruner.shrink()
