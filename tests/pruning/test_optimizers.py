"""A cut leaves every parameter the object that it was, and cuts what an optimizer keeps of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upop
from pruning.by_hand import uneven
from pruning.families import FAMILIES, loss_of
from pruning.test_verify import Net, batch, misplaced
from upop.pruning.errors import VerificationError
from upop.pruning.groups import tensor_of
from upop.pruning.masks import Masks
from upop.pruning.optimizers import cut_optimizer
from upop.pruning.shrink import cut
from upop.pruning.slicing import Slicing, slicings

VIT = next(family for family in FAMILIES if family.name == "vit-fused")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
}


class Attention(nn.Module):
    """Attention whose scale follows the size of its heads: queries are multiplied where it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return mixed


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    inputs = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model(inputs).square().mean().backward()
    optimizer.step()


def halves(
    kind: type[nn.Module], name: str
) -> tuple[nn.Module, Any, nn.Module, torch.optim.Optimizer, dict[str, Slicing]]:
    """Return a masked model and its optimizer after some steps, and both cut, with what the cut left."""
    torch.manual_seed(0)
    model = kind().double()
    groups = upop.find_groups(model, torch.randn(2, 5, 16, dtype=torch.float64))
    plan = uneven(groups, 1)
    masks = Masks(model, groups)
    masks.set({group.name: torch.isin(torch.arange(group.size), torch.tensor(plan[group.name])) for group in groups})
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(3):
        train(model, optimizer, seed)
    other, going = copy.deepcopy((model, optimizer))
    masks.remove()
    lefts = slicings(model, groups, plan)
    held = dict(model.named_parameters())
    cut(model, groups, plan)
    assert all(parameter is held[key] for key, parameter in model.named_parameters())
    cut_optimizer(optimizer, {tensor_of(model, key): left for key, left in lefts.items()})
    return other, going, model, optimizer, lefts


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_after_the_cut_are_those_of_the_masked_model(name: str) -> None:
    masked, going, model, optimizer, lefts = halves(Net, name)
    assert lefts
    for seed in range(3, 6):
        train(masked, going, seed)
        train(model, optimizer, seed)
    for key, parameter in model.named_parameters():
        whole = masked.get_parameter(key)
        expected = lefts[key].of(whole, 0) if key in lefts else whole
        torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-12)


def test_averages_of_queries_follow_the_scale_that_is_folded_into_them() -> None:
    masked, going, model, optimizer, lefts = halves(Attention, "adamw")
    assert lefts["q.weight"].scaled
    train(masked, going, 3)
    train(model, optimizer, 3)
    for key in ("q.weight", "q.bias", "k.weight", "v.weight"):
        for name, degree in (("exp_avg", -1), ("exp_avg_sq", -2), ("max_exp_avg_sq", -2)):
            expected = lefts[key].of(going.state[masked.get_parameter(key)][name], degree)
            torch.testing.assert_close(optimizer.state[model.get_parameter(key)][name], expected)


def test_gradients_are_cut_with_the_weights_and_a_loss_that_is_still_held_does_no_harm() -> None:
    torch.manual_seed(0)
    model = Net()
    groups = upop.find_groups(model, batch())
    seen: list[torch.Size] = []
    weight = model.get_parameter("blocks.0.up.weight")
    weight.register_post_accumulate_grad_hook(lambda each: seen.append(each.shape))
    loss = model(batch()).square().mean()
    loss.backward()
    assert weight.grad is not None
    before = weight.grad.clone()
    upop.shrink(model, {group.name: range(0, group.size, 2) for group in groups})
    assert weight is model.get_parameter("blocks.0.up.weight")
    assert torch.equal(weight.grad, before[::2])
    model.zero_grad(set_to_none=False)
    again = model(batch()).square().mean()  # the graph of the first loss is alive, with the shapes of its parameters
    again.backward()
    assert float(loss.detach()) != float(again.detach())
    assert seen == [before.shape, weight.shape]


def test_what_cannot_be_cut_begins_anew_with_a_warning() -> None:
    torch.manual_seed(0)
    model = Net()
    groups = upop.find_groups(model, batch())
    optimizer = torch.optim.Adafactor(model.parameters(), 1e-2)
    model(batch()).square().mean().backward()
    optimizer.step()
    plan = {group.name: range(0, group.size, 2) for group in groups}
    cuts = {tensor_of(model, name): left for name, left in slicings(model, groups, plan).items()}
    upop.shrink(model, plan)
    with pytest.warns(UserWarning, match="keeps for 4 weights"):
        cut_optimizer(optimizer, cuts)
    weight, bias = (model.get_parameter(f"blocks.0.up.{name}") for name in ("weight", "bias"))
    assert weight not in optimizer.state
    assert optimizer.state[bias]["variance"].shape == bias.shape
    optimizer.zero_grad()
    model(batch()).square().mean().backward()
    optimizer.step()
    assert optimizer.state[weight]["row_var"].shape == (len(weight), 1)


class Mastered(torch.optim.Optimizer):
    """SGD with momentum that writes its own copies of the weights over them, as mixed precision does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(weight=parameter.clone(), momentum_buffer=torch.zeros_like(parameter))
            state["momentum_buffer"].mul_(0.9).add_(parameter.grad)
            parameter.copy_(state["weight"].sub_(state["momentum_buffer"], alpha=0.05))


class Wrapping(torch.optim.Optimizer):
    """An optimizer that holds another one, and keeps nothing itself."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(parameters, 0.05, momentum=0.9)

    def step(self, closure: Any = None) -> Any:
        self.base.step()


@pytest.mark.parametrize("kind", [Mastered, Wrapping])
def test_copies_of_weights_and_optimizers_inside_of_others_follow_search_and_cut(kind: Any) -> None:
    """Corrections of weights reach the copies too, and the scale that is folded into queries."""
    found = []
    for make in (lambda each: torch.optim.SGD(each, 0.05, momentum=0.9), kind):
        model = VIT.build()
        optimizer = make(model.parameters())
        compression = upop.Compression(model, 0.5, 9, search_steps=6, interval=2, teacher=False)
        for step in range(9):
            compression.loss(loss_of(model(**VIT.inputs(40, seed=step)))).backward()
            compression.step(optimizer)
            optimizer.zero_grad()
        assert compression.pruner is not None and min(compression.pruner.corrections.values()) < 1
        found.append((compression.plan(), model))
    (plan, model), (other_plan, other) = found
    assert plan == other_plan
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)


def test_a_cut_that_is_taken_back_leaves_parameters_and_gradients_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Net()
    groups = upop.find_groups(model, batch())
    model(batch()).square().mean().backward()
    held = {name: (each, each.detach().clone(), each.grad) for name, each in model.named_parameters()}
    misplaced(monkeypatch)
    with pytest.raises(VerificationError):
        upop.shrink(model, {group.name: [0] for group in groups})
    for name, (parameter, numbers, gradient) in held.items():
        assert model.get_parameter(name) is parameter
        assert torch.equal(parameter, numbers)
        assert parameter.grad is gradient
