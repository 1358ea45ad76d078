"""What is verified, on which inputs, and how much of a difference is rounding."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.families import VIT
from upop.pruning.errors import LayoutError, StepError, VerificationError
from upop.pruning.groups import tensor_of

SURGERY = importlib.import_module("upop.pruning.shrink")
WIDTH, HIDDEN = 16, 48


class Block(nn.Module):
    """A residual MLP with a gate."""

    def __init__(self, gate: float = 1.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.gate = nn.Parameter(torch.full((WIDTH,), gate))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A class of one's own, whose mask may be left out."""

    def __init__(self, gate: float = 1.0, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(gate) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if mask is None else x * mask


def batch(size: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, 5, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def searched(model: nn.Module, *args: Any, steps: int = 2, **settings: Any) -> upop.Pruner:
    pruner = upop.Pruner(model, 0.4, steps, 1, **settings)
    for _ in range(steps):
        model.zero_grad()
        model(*args).square().mean().backward()
        pruner.step()
    return pruner


def misplaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one layer lose other columns than it should: a wrong cut."""
    right = SURGERY._cut_tensor

    def wrong(model: nn.Module, name: str, groups: Any, plan: Any, *how: bool) -> Any:
        if name in ("blocks.0.down.weight", "inner.blocks.0.mlp.fc2.weight"):
            shifted = {group.name: [(channel + 1) % group.size for channel in plan[group.name]] for group in groups}
            return right(model, name, groups, shifted, *how)
        return right(model, name, groups, plan, *how)

    monkeypatch.setattr(SURGERY, "_cut_tensor", wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_cut_is_refused_by_default(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    pruner = searched(model, batch(dtype=dtype))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes, masks = {type(module) for module in model.modules()}, pruner.masks
    with monkeypatch.context() as patched:
        misplaced(patched)
        with pytest.raises(VerificationError, match="differs by"):
            pruner.shrink()
    assert {type(module) for module in model.modules()} == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    pruner.shrink()
    assert model.blocks[0].up.out_features < HIDDEN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_copy_in_float64_rounding_is_measured(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(SURGERY, "MOST_COPIED", 0)
    model = Net().to(dtype)
    pruner = searched(model, batch(dtype=dtype))
    with monkeypatch.context() as patched:
        misplaced(patched)
        with pytest.raises(VerificationError, match="rounding explains"):
            pruner.shrink()
    pruner.shrink()


class Rough(nn.Module):
    """Its outputs turn fast with what comes before them, so that float32 keeps few of their digits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = VIT.build(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(300 * self.inner(x))


IMAGES = VIT.inputs(8, dtype=torch.float32)["x"]


def rough() -> tuple[nn.Module, dict[str, list[int]]]:
    model, draw = Rough(), random.Random(0)
    groups = upop.find_prunable(model, IMAGES).groups
    assert len(groups) == 4
    return model, {group.name: sorted(draw.sample(range(group.size), group.size // 2)) for group in groups}


@pytest.mark.parametrize("copied", [True, False])
def test_rounding_beyond_any_fixed_tolerance_passes(monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    if not copied:
        monkeypatch.setattr(SURGERY, "MOST_COPIED", 0)
    model, plan = rough()
    with torch.no_grad():
        masked = rough()[0]
        for group in upop.find_groups(masked):
            keep = torch.zeros(group.size)
            keep[plan[group.name]] = 1
            for part in group.producers:
                tensor = tensor_of(masked, part.tensor)
                tensor.mul_(part.expand(keep).view(-1, *[1] * (tensor.dim() - 1)))
        expected = masked.eval()(IMAGES)
        found = upop.shrink(model, plan).eval()(IMAGES)
    assert (found - expected).abs().max() > 1e-5 * expected.abs().max()


@pytest.mark.parametrize("copied", [True, False])
def test_a_wrong_cut_of_a_model_with_much_rounding_is_refused(monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    if not copied:
        monkeypatch.setattr(SURGERY, "MOST_COPIED", 0)
    model, plan = rough()
    misplaced(monkeypatch)
    with pytest.raises(VerificationError):
        upop.shrink(model, plan)


class Insisting(Net):
    """Runs with masks; a cut of it cannot be run, once `insists` is set."""

    insists = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen = self.blocks[0].up(x)  # what it keeps has the sizes of the call
        if self.insists:
            self.seen.view(-1, HIDDEN)
        return super().forward(x, mask)


def test_what_a_forward_raises_after_a_cut_is_told_and_undone() -> None:
    model, plan = Net(), {"blocks.0": range(20)}
    upop.find_prunable(model, batch())
    model.__class__ = Insisting
    model.insists = True
    weights = dict(model.named_parameters())
    with pytest.raises(VerificationError, match=r"masks.*\(RuntimeError") as described:
        upop.shrink(model, plan, verify=batch())
    assert isinstance(described.value.__cause__, RuntimeError)
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert "seen" not in vars(model)
    assert model(batch()).shape == batch().shape


def test_inputs_that_do_not_run_are_told_before_anything_is_cut() -> None:
    model = Net()
    upop.find_prunable(model, batch())
    with pytest.raises(VerificationError, match="not run on the inputs"):
        upop.shrink(model, {"blocks.0": range(20)}, verify=torch.randn(2, 5, WIDTH + 1))
    assert model.blocks[0].up.out_features == HIDDEN


def test_false_is_what_one_must_write_to_cut_without_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = Net(), {"blocks.0": range(20)}
    upop.find_prunable(model, batch())
    misplaced(monkeypatch)
    with pytest.raises(VerificationError):
        upop.shrink(model, plan)
    upop.shrink(model, plan, verify=False)
    assert model.blocks[0].up.out_features == 20


def test_calibrate_verifies_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    upop.find_prunable(model, batch())
    weights = dict(model.named_parameters())
    with monkeypatch.context() as patched:
        misplaced(patched)
        with pytest.raises(VerificationError):
            upop.calibrate(model, [batch()], 0.4, stages=2)
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    upop.calibrate(model, [batch(), batch(4)], 0.4, stages=2, loss=lambda net, each: net(each, mask=each).mean())
    assert model.blocks[0].up.out_features < HIDDEN


# -- the first batch ---------------------------------------------------------------------------------------------------


def test_groups_of_ones_own_class_are_read_with_the_first_batch() -> None:
    model = Net()
    pruner = upop.Pruner(model, 0.4, 2, 1, correct=False)
    asked = (lambda: pruner.groups, lambda: pruner.costs, pruner.step, pruner.plan, pruner.shrink, pruner.state_dict)
    for needs in asked:
        with pytest.raises(StepError, match=r"first call .* not been called .* example="):
            needs()
    model(batch(), mask=torch.ones(WIDTH))
    assert {group.name for group in pruner.groups} == {"blocks.0", "blocks.1"}
    assert not model._forward_pre_hooks
    for _ in range(2):
        model(batch()).mean().backward()
        pruner.step()
    pruner.shrink()


def test_the_batch_tells_of_ways_that_made_up_inputs_do_not_take() -> None:
    class Watched(Net):
        """With a mask, the hidden activations of its first block leave it."""

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            outputs = super().forward(x, mask)
            return outputs if mask is None else (outputs, self.blocks[0].up(x))

    model = Watched(depth=3)
    assert len(upop.find_prunable(model).groups) == 3  # by made-up inputs, without a mask
    pruner = upop.Pruner(model, 0.4, 2, 1)
    model(batch(), torch.ones(WIDTH))
    assert {group.name for group in pruner.groups} == {"blocks.1", "blocks.2"}


def test_a_search_that_waits_is_resumed_with_the_first_batch() -> None:
    model = Net()
    pruner = searched(model, batch(), steps=1)
    state, weights = pruner.state_dict(), model.state_dict()
    other = Net()
    other.load_state_dict(weights)
    resumed = upop.Pruner(other, 0.4, 1, 1)
    resumed.load_state_dict(state)
    assert resumed.finished
    other(batch())
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in resumed.masks.items())
    resumed.shrink()


def test_a_pruner_that_is_removed_before_any_batch_leaves_nothing() -> None:
    model = Net()
    upop.Pruner(model, 0.4, 2).remove()
    assert not model._forward_pre_hooks
    model(batch())
    assert {type(module) for module in model.modules()} == {type(module) for module in Net().modules()}


def test_what_cannot_be_read_is_told_at_the_first_batch() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Plain()
    upop.Pruner(model, 0.4, 2)
    with pytest.raises(LayoutError, match="No prunable group"):
        model(batch())


def test_a_batch_with_sentences_and_tables_is_kept_in_part() -> None:
    class Telling(Net):
        """Takes as many sentences as samples, and a table that is no batch."""

        def forward(self, x: Tensor, words: list[str], table: Tensor) -> Tensor:
            assert len(words) == len(x)
            return super().forward(x) + table.sum()

    model = Telling()
    inputs = batch(6), [f"sentence {number}" for number in range(6)], torch.ones(6)
    searched(model, *inputs).shrink()
    assert model.blocks[0].up.out_features < HIDDEN


# -- models that do something of their own -----------------------------------------------------------------------------


class Drawing(Net):
    """Draws random numbers in evaluation mode, by torch or by Python."""

    way = "torch"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        outputs = super().forward(x, mask)
        return F.dropout(outputs, 0.5, training=True) if self.way == "torch" else outputs * random.random()


@pytest.mark.parametrize("way", ["torch", "python"])
def test_random_numbers_are_the_same_for_both_models(way: str) -> None:
    model = Drawing()
    model.way = way
    upop.find_prunable(Net(), batch())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    upop.shrink(model, {"blocks.0": range(20)}, verify=batch()) if way == "torch" else searched(model, batch()).shrink()
    if way == "torch":
        assert torch.equal(torch.get_rng_state(), state)
    assert model.blocks[0].up.out_features < HIDDEN


def test_very_large_outputs_and_masks_of_the_smallest_number_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scores(Net):
        """Logits, of which some are impossible."""

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            outputs = super().forward(x, mask).clone()
            outputs[..., 0], outputs[..., 1] = torch.finfo(outputs.dtype).min, -torch.inf
            return outputs

    model, plan = Scores(), {"blocks.0": range(20)}
    upop.find_prunable(model, batch())
    with monkeypatch.context() as patched:
        misplaced(patched)
        with pytest.raises(VerificationError):
            upop.shrink(model, plan)
    upop.shrink(model, plan)


def test_buffers_are_left_as_they_were() -> None:
    class Counting(Net):
        """Counts its calls."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.calls += 1
            return super().forward(x, mask)

    model = Counting()
    pruner = searched(model, batch())
    calls = float(model.calls)
    pruner.shrink()
    assert float(model.calls) == calls


def zeros() -> Iterator[tuple[str, nn.Module]]:
    yield "gates", Net(gate=0.0)
    projections = Net()
    for block in projections.blocks:
        nn.init.zeros_(block.down.weight)
        nn.init.zeros_(block.down.bias)
    yield "projections", projections


@pytest.mark.parametrize(("name", "model"), list(zeros()), ids=[name for name, _ in zeros()])
def test_zeros_of_an_initialisation_hide_nothing_from_the_proof(name: str, model: nn.Module) -> None:
    class Peeking(nn.Module):
        """Sums the hidden activations in their order, behind what is zero at first."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = model, nn.Linear(WIDTH, WIDTH)
            nn.init.zeros_(self.last.weight)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.net.blocks[0].up(x)
            order = torch.linspace(0, 1, hidden.shape[-1])
            return self.net(x) + self.last(x * (hidden * order.to(hidden)).sum(-1, keepdim=True))

    peeking = Peeking()
    groups = {group.name: group for group in upop.find_prunable(peeking, batch()).groups}
    assert list(groups) == ["net.blocks.1"], name  # the other one is peeked at
    upop.shrink(peeking, {"net.blocks.1": range(20)})


def test_a_plan_is_verified_on_another_model_of_the_class() -> None:
    model = VIT.build()
    plan = searched(model, VIT.inputs()["x"]).plan()
    upop.shrink(VIT.build(), plan)
