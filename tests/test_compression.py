"""`upop.Compression`: one object, the loop of README, and everything that a user holds stays what it is."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import upop
from pruning.families import FAMILIES, difference, loss_of, outputs_of
from tiers import mostly_slow, since
from upop.errors import LayoutError, SettingError, StepError
from upop.pruning.masks import Masks

VIT = next(family for family in FAMILIES if family.name == "vit-fused")
STEPS = 12


def batch(step: int) -> dict[str, Tensor]:
    return VIT.inputs(4, seed=step)


def trained(
    model: nn.Module, compression: upop.Compression, optimizer: Any, steps: range = range(STEPS)
) -> list[float]:
    """The loop of README; returns its losses."""
    losses = []
    for step in steps:
        loss = compression.loss(loss_of(model(**batch(step))))
        loss.backward()
        compression.step(optimizer)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def traces(model: nn.Module) -> list[str]:
    """What a compression might leave behind."""
    held = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    held += [name for name, _ in model.named_buffers() if "upop" in name]
    return held + [name for name, value in model.named_parameters() if value._post_accumulate_grad_hooks]


def test_the_loop_of_readme_keeps_every_object() -> None:
    model = VIT.build()
    average = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    parameters, dense = dict(model.named_parameters()), upop.count_parameters(model)
    compression = upop.Compression(model, ratio=0.5, steps=STEPS, averages=average)
    searching = []
    for step in range(STEPS):
        loss = compression.loss(loss_of(model(**batch(step))))
        loss.backward()
        compression.step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        searching.append(compression.searching)
    assert searching == [True] * 3 + [False] * 9  # a third of a short training
    assert compression.finish() is model
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert all(state["exp_avg"].shape == each.shape for each, state in optimizer.state.items())
    assert all(float(state["step"]) == STEPS for state in optimizer.state.values())
    assert upop.count_parameters(model) == upop.count_parameters(average.module) < 0.7 * dense
    assert traces(model) == []
    assert {name: len(kept) for name, kept in compression.plan().items()} == {
        group.name: group.size for group in upop.find_groups(model)
    }


def test_it_is_the_search_the_teacher_and_the_cut_by_hand() -> None:
    model, other = VIT.build(), VIT.build()
    compression = upop.Compression(model, 0.5, STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = trained(model, compression, optimizer)

    teaching = upop.distill(other, copy.deepcopy(other))
    pruner = upop.Pruner(other, 0.5, 4)
    second, expected = torch.optim.SGD(other.parameters(), lr=0.05), []
    for step in range(STEPS):
        loss = loss_of(other(**batch(step))) + teaching.loss()
        second.zero_grad()
        loss.backward()
        if not pruner.finished:
            pruner.step()
        second.step()
        if step == 3:
            pruner.shrink()
        expected.append(float(loss.detach()))
    assert losses == expected
    assert compression.plan() == pruner.plan()
    assert difference(outputs_of(model, batch(0)), outputs_of(other, batch(0))) == 0


@pytest.mark.parametrize("stopped", mostly_slow([2, 7], 7))
def test_a_resumed_training_ends_with_the_same_numbers(stopped: int) -> None:
    def begun() -> tuple[nn.Module, upop.Compression, Any]:
        model = VIT.build()
        return model, upop.Compression(model, 0.5, STEPS), torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, compression, optimizer = begun()
    trained(model, compression, optimizer, range(stopped))
    saved = copy.deepcopy((compression.state_dict(), model.state_dict(), optimizer.state_dict()))
    trained(model, compression, optimizer, range(stopped, STEPS))

    other, resumed, second = begun()
    resumed.load_state_dict(saved[0], second)
    weights = {name: value for name, value in saved[1].items() if "upop" not in name}
    other.load_state_dict(weights)
    second.load_state_dict(saved[2])
    trained(other, resumed, second, range(stopped, STEPS))
    assert resumed.steps_done == compression.steps_done == STEPS
    assert resumed.plan() == compression.plan()
    assert difference(outputs_of(other, batch(0)), outputs_of(model, batch(0))) == 0


def test_a_model_of_ones_own_resumes_in_the_middle_of_a_stage() -> None:
    """Both the state and the pass that the groups are read before are held, that one in its own precision."""

    def begun() -> tuple[nn.Module, upop.Compression, Any]:
        torch.manual_seed(0)
        model = Own()
        compression = upop.Compression(model, 0.5, 8, search_steps=4, interval=4, teacher=False)
        return model, compression, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model: nn.Module, compression: upop.Compression, optimizer: Any, steps: range) -> None:
        for step in steps:
            data = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(data).square().mean()
            compression.loss(loss).backward()
            compression.step(optimizer)
            optimizer.zero_grad()

    model, compression, optimizer = begun()
    train(model, compression, optimizer, range(2))
    saved = copy.deepcopy((compression.state_dict(), model.state_dict(), optimizer.state_dict()))
    held = saved[0]["pruner"]["seen"]["passes"]
    assert [each["precision"] for each in held] == [("cpu", torch.bfloat16)] * 2
    train(model, compression, optimizer, range(2, 8))
    other, resumed, second = begun()
    resumed.load_state_dict(saved[0], second)
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    train(other, resumed, second, range(2, 8))
    assert resumed.plan() == compression.plan()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:1 of 5 search steps had gradients that are not finite")
def test_a_loop_of_ones_own_throws_a_step_away_and_goes_on_with_a_copy() -> None:
    """The search takes as many steps as it is told; the copy is cut, and the first model is dense and free."""
    model = VIT.build()
    dense = upop.count_parameters(model)
    compression = upop.Compression(model, 0.5, STEPS, search_steps=5, correct=False)
    trained(model, compression, torch.optim.SGD(model.parameters(), lr=0.01), range(2))
    other = upop.unmask(copy.deepcopy(model))
    compression.move_to(other)
    assert traces(model) == []
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    trained(other, compression, optimizer, range(2, 4))
    compression.loss(loss_of(other(**batch(4)))).backward()
    compression.skip_step()
    assert compression.is_due
    compression.after_step([optimizer])
    assert not compression.is_due
    trained(other, compression, optimizer, range(5, STEPS))
    assert compression.pruner is not None
    assert compression.pruner.skipped_steps == 1
    assert upop.count_parameters(other) < upop.count_parameters(model) == dense
    with pytest.raises(SettingError, match="from 1 to steps=12"):
        upop.Compression(VIT.build(), 0.5, STEPS, search_steps=13)


def test_a_block_that_raises_leaves_nothing_behind() -> None:
    model = VIT.build()
    expected = outputs_of(model, batch(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ZeroDivisionError), upop.Compression(model, 0.5, 30, correct=False) as compression:
        trained(model, compression, optimizer, range(5))
        raise ZeroDivisionError
    assert traces(model) == []
    assert difference(outputs_of(model, batch(0)), expected) < 1e-14  # heads stay rotated, which only rounds
    with pytest.raises(StepError, match="came after finish"):
        compression.step(optimizer)


def test_a_block_that_ends_early_cuts_what_was_reached() -> None:
    model = VIT.build()
    dense = upop.count_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ended = pytest.warns(UserWarning, match="after 8 of 16 steps: it removed 25%.*50%")
    with ended, upop.Compression(model, 0.5, 90) as compression:  # sixteen steps search, in eight stages
        trained(model, compression, optimizer, range(8))
        half = compression.plan()
    assert traces(model) == []
    assert 0.7 * dense < upop.count_parameters(model) < 0.9 * dense
    assert compression.plan() == half
    assert all(state["exp_avg"].shape == each.shape for each, state in optimizer.state.items())
    optimizer.zero_grad()
    loss_of(model(**batch(8))).backward()
    optimizer.step()


def test_a_loop_that_leaves_the_search_out_is_told() -> None:
    model = VIT.build()
    dense = upop.count_parameters(model)
    with pytest.warns(UserWarning, match="no step.*compression.step"), upop.Compression(model, 0.5, 16, teacher=False):
        loss_of(model(**batch(0))).backward()
    assert traces(model) == []
    assert upop.count_parameters(model) == dense


def test_a_loop_that_leaves_the_teacher_out_is_told() -> None:
    model = VIT.build()
    compression = upop.Compression(model, 0.5, STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model(**batch(0))).backward()
    with pytest.raises(StepError, match=r"compression\.loss\(task_loss\)"):
        compression.step(optimizer)
    compression.close()
    without = upop.Compression(model, 0.5, STEPS, teacher=False)
    model.zero_grad()
    loss_of(model(**batch(0))).backward()
    without.step(optimizer)
    assert without.distillation is None and without.steps_done == 1


def test_settings_that_make_no_sense_are_refused() -> None:
    model: Any = VIT.build()
    for settings, described in (
        ({"search_share": 0}, "in \\(0, 1\\]"),
        ({"ratio": 2}, "strictly between"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(SettingError, match=described):
            upop.Compression(model, **{"ratio": 0.5, "steps": STEPS, **settings})
    with pytest.raises(SettingError, match="shares weights"):
        upop.Compression(model, 0.5, STEPS, teacher=model)
    assert traces(model) == []


class Own(nn.Module):
    """A model of a class of one's own, whose groups are read with the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        values = self.first(values)
        values = values + self.down(torch.relu(self.up(values)))
        return self.head(self.norm(values))  # type: ignore[no-any-return]


@pytest.mark.parametrize("converted", [False, True], ids=["as it is", "converted"])
def test_a_masked_model_trains_after_an_evaluation_in_inference_mode(converted: bool) -> None:
    """What is kept of masks is made there for the first time; memory of a thread, so a thread of its own looks."""

    def run() -> float:
        torch.manual_seed(0)
        model, values = Own(), torch.randn(40, 6)
        pruner = upop.Pruner(model, 0.5, 2, 1, example=values, correct=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            if step and converted:
                model.double()
            data = values.to(model.head.weight.dtype)
            with torch.inference_mode():
                model(data)
            model(data).square().mean().backward()
            pruner.step()
            optimizer.step()
            optimizer.zero_grad()
            with torch.inference_mode():
                model(data)
        model(data).square().mean().backward()
        return float(pruner.kept_share())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() < 0.6


def test_a_model_that_is_read_with_its_first_batch_has_a_teacher_at_once() -> None:
    torch.manual_seed(0)
    model, values = Own(), torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = upop.Compression(model, 0.5, 6)
    for _ in range(6):
        compression.loss(model(values).square().mean()).backward()
        assert compression.distillation is not None
        compression.step(optimizer)
        optimizer.zero_grad()
    assert model.up.out_features == 8
    assert upop.count_parameters(compression.finish()) < upop.count_parameters(Own())


def test_a_training_with_a_teacher_goes_on_within_a_stage_on_another_device() -> None:
    model = VIT.build()
    compression = upop.Compression(model, 0.5, 96)  # stages of two steps
    trained(model, compression, torch.optim.SGD(model.parameters(), lr=0.05), range(3))
    other = VIT.build()
    resumed = upop.Compression(other, 0.5, 96)
    other.to("meta")  # a device with other tensors, though without numbers
    resumed.load_state_dict(compression.state_dict())
    inputs = {name: value.to("meta") for name, value in batch(3).items()}
    other(**inputs)
    assert resumed.distillation is not None
    resumed.distillation.loss().backward()
    assert {each.device.type for each in resumed.distillation.teacher.parameters()} == {"meta"}
    assert all(each.grad.is_meta for each in other.blocks[0].parameters())
    compression.close()
    resumed.close()


def test_a_model_that_nobody_can_teach_goes_without() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
    with pytest.warns(UserWarning, match="without a teacher: .* teacher=False"):
        compression = upop.Compression(model, 0.5, 6)
    assert compression.distillation is None
    compression.close()
    with pytest.raises(LayoutError, match="residual stream"):
        upop.Compression(model, 0.5, 6, teacher=True)
    assert traces(model) == []


def test_scaled_gradients() -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = VIT.build(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        compression = upop.Compression(model, 0.5, 6)
        for step in range(6):
            loss = compression.loss(loss_of(model(**VIT.inputs(4, torch.float32, step))))
            scaler.scale(loss).backward()
            if step == 1:  # as for clipping
                scaler.unscale_(optimizer)
            compression.step(optimizer, scaler=scaler)
            optimizer.zero_grad()
        found.append((compression.plan(), outputs_of(model, VIT.inputs(2, torch.float32))))
    assert found[0][0] == found[1][0]
    assert difference(found[0][1], found[1][1]) < 1e-5


@since("torch", "2.15", "its compiler warns where it asks for autocast")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_compiled_models_go_on_compiled() -> None:
    torch.compiler.reset()
    model, plain = VIT.build(), VIT.build()
    compiled: Any = torch.compile(model, backend="eager")
    losses = []
    for net, inner in ((compiled, model), (plain, plain)):
        compression = upop.Compression(net, 0.5, 6)
        losses.append(trained(net, compression, torch.optim.SGD(inner.parameters(), lr=0.05), range(6)))
        compression.finish()
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.compiler.reset()


def test_accelerate_accumulates() -> None:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = VIT.build()
    own = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped, optimizer, loader = accelerator.prepare(model, own, DataLoader([batch(step) for step in range(12)], None))
    compression = upop.Compression(wrapped, 0.5, 6)
    for each in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(compression.loss(loss_of(wrapped(**each))))
            compression.step(optimizer)
            optimizer.zero_grad()
    assert compression.steps_done == 6 and not compression.searching
    assert all(state["exp_avg"].shape == each.shape for each, state in own.state.items())
    AcceleratorState._reset_state(True)


def test_masks_of_another_search_are_refused_at_once() -> None:
    model = VIT.build()
    masks = Masks(model, upop.find_groups(model))
    with warnings.catch_warnings(), pytest.raises(LayoutError, match="masked"):
        upop.Compression(model, 0.5, 6)
    masks.remove()
