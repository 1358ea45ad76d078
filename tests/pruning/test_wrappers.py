"""Models under wrappers: they are cut under the names that Pruner takes, or what is in the way is named."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upop
from pruning.by_hand import called, difference, silenced, uneven
from pruning.wrapped import BARRED, WHOLE, Convolutional, Lazy, Net, net, of_one_process, with_mlp
from tiers import mostly_slow
from upop.errors import LayoutError

pytestmark = pytest.mark.filterwarnings("ignore")  # of wrappers that are on their way out


def given() -> Tensor:
    return torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))


def check_cut(
    model: nn.Module, example: Tensor, tolerance: float = 1e-5, copies: tuple[Any, Any] | None = None
) -> None:
    """Cut a copy; what it computes is what one with rows set to zero by hand does."""
    groups = list(upop.find_prunable(model, example).groups)
    plan = uneven(groups, 0)
    masked, cut = copies or (copy.deepcopy(model), copy.deepcopy(model))
    silenced(upop.pruning.masks.unwrapped(masked), groups, plan)
    assert upop.shrink(cut, upop.Plan.of(groups, plan)) is cut
    assert difference(called(masked.eval(), example), called(cut.eval(), example)) <= tolerance


@pytest.mark.parametrize("name", mostly_slow(WHOLE, "compiled block", "holds a lock", "inference mode"))
def test_a_wrapped_model_is_cut(name: str) -> None:
    model = WHOLE[name]()
    kinds = [group.kind for group in upop.find_prunable(model, given()).groups]
    assert sorted(kinds) == ["attention"] * 2 + ["mlp"] * (1 if name == "one module twice" else 2)
    check_cut(
        model,
        given(),
        copies=(WHOLE[name](), WHOLE[name]()) if name in ("holds a lock", "a forward around its module") else None,
    )


@pytest.mark.parametrize("name", mostly_slow(BARRED, "torch.nn.utils.prune", "weight norm", "TorchScript"))
def test_what_is_in_the_way_is_named(name: str) -> None:
    build, reason = BARRED[name]
    model = build()
    found = upop.find_prunable(model, given())
    assert any(reason in each.reason for each in found.skipped), found.skipped
    assert len(found.groups) < 4
    if found.groups and name != "hooks of Accelerate":
        check_cut(model, given(), copies=(build(), build()))


@pytest.mark.parametrize("state", ["attached", "scaled", "merged"])
def test_adapters_are_no_mlps(state: str) -> None:
    from pruning.wrapped import adapted

    model = adapted(state)
    groups = upop.find_prunable(model, given()).groups
    assert all("lora" not in group.name for group in groups)
    check_cut(model, given())


def test_lazy_layers_are_to_be_called_first() -> None:
    with pytest.raises(LayoutError, match="lazy layer"):
        upop.find_prunable(with_mlp(Lazy()), given())


def test_a_part_in_torchscript_stays_whole_in_a_search() -> None:
    model = BARRED["TorchScript"][0]()
    pruner = upop.Pruner(model, 0.4, 2, 1, example=given())
    for _ in range(2):
        model(given()).square().mean().backward()
        pruner.step()
    pruner.shrink(verify=given())
    assert model.blocks[0].mlp.fc1.weight.shape == (48, 24)


def test_torchscript_as_a_whole_is_refused() -> None:
    with pytest.raises(LayoutError, match="TorchScript"):
        upop.find_prunable(torch.jit.trace(net().eval(), given()), given())


def test_weights_of_inference_mode_are_not_trained() -> None:
    model = WHOLE["inference mode"]()
    with pytest.raises(LayoutError, match="inference_mode"):
        upop.Pruner(model, 0.5, 2, 1, example=given())
    assert upop.Pruner(copy.deepcopy(model), 0.5, 2, 1, example=given()).groups


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_models_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    check_cut(net().to(dtype), given().to(dtype), tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_and_the_order_in_memory(training: bool) -> None:
    model = Convolutional().to(memory_format=torch.channels_last).train(training)
    pixels = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    running = copy.deepcopy(model.norms[0].state_dict())
    assert sorted(group.kind for group in upop.find_prunable(model, pixels).groups) == ["attention", "mlp", "mlp"]
    assert model.training is training
    assert all(torch.equal(value, running[name]) for name, value in model.norms[0].state_dict().items())
    check_cut(model, pixels)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[None]:
    """One process that is a group of its own."""
    of_one_process(tmp_path)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process")
def test_a_model_under_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(net())
    assert len(upop.find_prunable(model, given()).groups) == 4
    check_cut(model, given(), copies=(nn.parallel.DistributedDataParallel(net()), net()))


@pytest.mark.usefixtures("process")
def test_a_model_that_fully_shard_was_called_on() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = net(), init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kinds = [type(module) for module in model.modules()]
    pruner = upop.Pruner(model, 0.5, 2, 1, example=given())
    assert len(pruner.groups) == 4
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(given()).square().mean().backward()
        pruner.step()
        optimizer.step()
    assert len(kinds) == len(list(model.modules()))
    whole = upop.full_copy(model)
    pruner.move_to(whole)
    pruner.shrink(verify=given())
    assert upop.count_parameters(whole) < upop.count_parameters(Net())


def test_a_forward_around_the_method_of_its_module_is_read_as_that_of_the_copy() -> None:
    """As `model.forward = torch.compile(model.forward)` leaves it."""
    model = net()
    inner = model.forward
    model.forward = lambda x: inner(x)  # type: ignore[method-assign]
    assert upop.find_prunable(model, given()).groups == upop.find_prunable(net(), given()).groups != ()
