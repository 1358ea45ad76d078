"""Groups that a user states: of modules that the reader cannot follow, proved like the others, in few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from upop.errors import LayoutError, SettingError


@torch.library.custom_op("upop_tests::attend", mutates_args=())
def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention that cannot be looked into; [batch, heads, tokens, dimensions]."""
    return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=queries.shape[1] != keys.shape[1])


@attend.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(queries)


@torch.library.custom_op("upop_tests::bend", mutates_args=())
def bend(inputs: Tensor) -> Tensor:
    """An activation that cannot be looked into."""
    return inputs.relu()


@bend.register_fake
def _(inputs: Tensor) -> Tensor:
    return torch.empty_like(inputs)


bend.register_autograd(
    lambda ctx, grad: grad * (ctx.saved_tensors[0] > 0),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Fused(nn.Module):
    """One layer for queries, keys and values, and a head's size that the module keeps."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        batch, tokens, _ = inputs.shape
        parts = self.qkv(inputs).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = attend(*(part.contiguous() for part in parts))
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


class Grouped(nn.Module):
    """Groups of heads that share keys and values, side by side in one layer."""

    def __init__(self, width: int = 32, heads: int = 8, groups: int = 4, size: int = 4) -> None:
        super().__init__()
        self.head_dim = size
        self.qkv = nn.Linear(width, (heads + 2 * groups) * size, bias=False)
        self.out = nn.Linear(heads * size, width)
        self.share = heads // groups

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.qkv(inputs)
        groups = rows.shape[-1] // (self.share + 2) // self.head_dim
        split = rows.split([groups * self.share * self.head_dim, groups * self.head_dim, groups * self.head_dim], -1)
        parts = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).contiguous() for part in split)
        result: Tensor = self.out(attend(*parts).transpose(1, 2).flatten(2))
        return result


class Gated(nn.Module):
    """A gate and what it gates, in one layer."""

    def __init__(self, width: int = 32, hidden: int = 24) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, inputs: Tensor) -> Tensor:
        gate, value = self.both(inputs).chunk(2, -1)
        result: Tensor = self.down(bend(gate) * value)
        return result


class Experts(nn.Module):
    """Weights of several experts in two tensors."""

    def __init__(self, width: int = 32, hidden: int = 12, experts: int = 3) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / 6)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("beth,ehw->btw", bend(torch.einsum("btw,ewh->beth", inputs, self.up)), self.down)


class Net(nn.Module):
    """Blocks of a residual stream."""

    def __init__(self, *blocks: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for make in blocks)
        self.head = nn.Linear(32, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs)
        result: Tensor = self.head(inputs)
        return result


INPUTS = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
FUSED = upop.GroupSpec(
    Fused, rows={"qkv": "3 heads dim"}, columns={"proj": "heads dim"}, cut="dim", sizes={"heads": "heads"}
)
GROUPED = upop.GroupSpec(
    Grouped,
    rows={"qkv": "groups 2 dim + groups dim + groups dim"},
    columns={"out": "groups 2 dim"},
    cut="groups",
    sizes={"dim": "head_dim"},
)
GATED = upop.GroupSpec(Gated, rows={"both": "2 hidden"}, columns={"down": "hidden"}, cut="hidden")
EXPERTS = upop.GroupSpec(
    Experts, rows={"up": "experts, _, hidden"}, columns={"down": "experts, hidden, _"}, cut="hidden", kind="mlp"
)


@pytest.mark.parametrize(
    ("block", "spec", "size", "channel"),
    [
        (Fused, FUSED, 8, "dimension"),
        (Grouped, GROUPED, 4, "group"),
        (Gated, GATED, 24, "neuron"),
        (Experts, EXPERTS, 12, "neuron"),
    ],
    ids=["fused", "grouped", "gated", "experts"],
)
def test_what_cannot_be_followed_is_stated_in_a_few_lines(
    block: type[nn.Module], spec: upop.GroupSpec, size: int, channel: str
) -> None:
    model = Net(block, block).eval()
    assert upop.find_prunable(model, INPUTS).groups == ()
    groups = upop.find_groups(model, INPUTS, [spec])
    assert [(group.name, group.size, group.channel) for group in groups] == [
        (f"blocks.{at}", size, channel) for at in (0, 1)
    ]
    upop.shrink(model, {"blocks.0": range(1, size, 2), "blocks.1": range(2)}, verify=INPUTS)
    assert [group.size for group in upop.find_groups(model)] == [size // 2, 2]


def test_numbers_that_a_module_keeps_are_set_again_whether_they_are_stated_or_not() -> None:
    stated = upop.GroupSpec(**{**vars(FUSED), "sets": {"head_dim": "dim"}})
    for spec in (FUSED, stated):
        model = Net(Fused).eval()
        upop.find_groups(model, INPUTS, [spec])
        upop.shrink(model, {"blocks.0": [1, 4, 6]}, verify=INPUTS)
        assert model.blocks[0].head_dim == 3


def test_a_search_a_plan_and_a_folder_hold_what_was_stated(tmp_path: Path) -> None:
    model = Net(Gated, Gated, Experts)
    pruner = upop.Pruner(model, 0.5, 4, example=INPUTS, groups=[GATED, EXPERTS])
    for step in range(4):
        torch.manual_seed(step)
        model(INPUTS + 0.1 * torch.randn_like(INPUTS)).square().mean().backward()
        pruner.step()
        model.zero_grad()
    plan = upop.Plan.from_json(pruner.plan().to_json())
    pruner.shrink(verify=INPUTS)
    assert {name: len(kept) for name, kept in plan.items()} == {
        group.name: group.size for group in upop.find_groups(model)
    }
    again = upop.load_into(Net(Gated, Gated, Experts), upop.save(model, tmp_path / "small"))
    with torch.no_grad():
        assert torch.equal(again(INPUTS), model.eval()(INPUTS))


def test_a_copy_is_cut_by_the_plan_and_saved(tmp_path: Path) -> None:
    model = Net(Gated, Gated).eval()
    twin = copy.deepcopy(model)
    groups = upop.find_groups(model, INPUTS, [GATED])
    plan = upop.Plan.of(groups, {"blocks.0": range(6), "blocks.1": range(3, 24)})
    upop.shrink(twin, plan, verify=INPUTS)
    again = upop.load(upop.save(copy.deepcopy(twin), tmp_path / "small"), Net(Gated, Gated))
    with torch.no_grad():
        assert torch.equal(again(INPUTS), twin(INPUTS))
    other = copy.deepcopy(model)
    pruner = upop.Pruner(model, 0.5, 2, example=INPUTS, groups=[GATED], correct=False)
    pruner.move_to(other)
    pruner.remove()


def test_calibration_takes_groups_too() -> None:
    model = Net(Gated, Gated).eval()
    plan = upop.calibrate(model, [INPUTS, INPUTS.flip(0)], 0.5, stages=2, example=INPUTS, groups=[GATED])
    assert sum(len(kept) for kept in plan.values()) == 24
    assert model.blocks[0].down.in_features == len(plan["blocks.0"])


def test_names_and_patterns_of_modules_do_as_well_and_groups_as_they_are() -> None:
    content = {key: value for key, value in vars(GATED).items() if key != "at"}
    one = upop.find_groups(Net(Gated, Gated), INPUTS, [upop.GroupSpec("blocks.1", **content)])
    assert [group.name for group in one] == ["blocks.1"]
    both = upop.find_groups(Net(Gated, Gated), INPUTS, [upop.GroupSpec("blocks.*", **content)])
    assert [group.name for group in both] == ["blocks.0", "blocks.1"]
    again = upop.find_groups(Net(Gated, Gated), INPUTS, both)
    assert again == both


def test_what_is_stated_stands_before_what_is_read() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 24), nn.Linear(24, 32)

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.down(self.up(inputs).relu())
            return result

    model = Net(Plain, Plain)
    assert [group.size for group in upop.find_groups(model, INPUTS)] == [24, 24]
    pairs = upop.GroupSpec("blocks.0", rows={"up": "pairs 2"}, columns={"down": "pairs 2"}, cut="pairs")
    assert [(group.name, group.size) for group in upop.find_groups(model, INPUTS, [pairs])] == [
        ("blocks.0", 12),
        ("blocks.1", 24),
    ]


def spec(**changes: Any) -> upop.GroupSpec:
    return upop.GroupSpec(**{**vars(FUSED), **changes})


@pytest.mark.parametrize(
    ("groups", "fragments"),
    [
        ([spec(rows={"qvk": "3 heads dim"})], ["blocks.0", "'qvk'", "did you mean 'qkv'"]),
        ([spec(rows={"qkv": "5 heads dim"})], ["blocks.0.qkv.weight has 96", "'5 heads dim'", "heads 4"]),
        ([spec(columns={"proj": "3 heads dim"})], ["blocks.0.proj.weight has 32", "dim 8", "makes 96"]),
        ([spec(sizes={})], ["does not determine the sizes of dim, heads", "sizes={'dim'"]),
        ([spec(sizes={"heads": "haeds"})], ["has no attribute 'haeds'"]),
        ([spec(sizes={"heads": 0})], ["heads should be a whole number of at least 1", "found 0"]),
        ([spec(cut="dims")], ["no pattern of rows has the word 'dims'"]),
        ([spec(rows={"qkv": "3 * heads dim"})], ["'3 * heads dim' is not a pattern", "found '*'"]),
        ([spec(sets={"heads": "dim"})], ["heads is 4", "makes 8"]),
        ([spec(sets={"head": "dim"})], ["has no attribute 'head'"]),
        ([spec(at="blocks.7")], ["of modules 'blocks.7'", "did you mean 'blocks.0'"]),
        ([spec(at=Gated)], ["of class Gated", "Net has none"]),
        ([FUSED, spec(at="blocks.0")], ["both cut blocks.0.qkv.weight along dimension 0"]),
        (["blocks.0"], ["takes a list of upop.GroupSpec", "found str"]),
    ],
)
def test_what_does_not_fit_is_said(groups: list[Any], fragments: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        upop.find_prunable(Net(Fused), INPUTS, groups)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"rows": {"qkv": "heads 3 dim"}}, {"columns": {"proj": "dim heads"}}, {"cut": "heads", "sizes": {"heads": 8}}],
)
def test_what_does_not_hold_is_refused_with_the_measured_difference(changes: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match=r"blocks\.0 cannot be cut.*: (the cut model differs|\w+Error)"):
        upop.find_prunable(Net(Fused), INPUTS, [spec(**changes)])


def test_a_group_is_printed_for_people() -> None:
    fused, gated = upop.find_groups(Net(Fused, Gated), INPUTS, [FUSED, GATED])
    lines = str(fused).splitlines()
    assert lines[0] == "blocks.0: attention (other), 8 dimensions of each of 4 heads"
    assert "producers    blocks.0.qkv.weight, dimension 0 as 12 x 8 x 1; queries times (kept / 8) ** 0.5" in lines[1]
    assert "consumers    blocks.0.proj.weight, dimension 1 as 4 x 8 x 1" in lines[3]
    assert "set again    blocks.0.head_dim = kept" in lines[4]
    assert lines[-1].startswith("  proved")
    assert str(gated).startswith("blocks.1: mlp (other), 24 neurons\n")
    assert repr(gated).startswith("Group(name='blocks.1', kind='mlp'")
