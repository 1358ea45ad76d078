"""Heads rotated to their principal axes: outputs stay, and dimensions that carry nothing go first."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.families import BY_NAME, FAMILIES, VIT, Family, difference, loss_of, outputs_of
from tiers import mostly_slow
from upop.errors import SettingError

WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    """Self-attention, in which `shared` heads of queries have one head of keys and values.

    Keys and values have the given rank in every head, in a random basis; None leaves them at full rank.
    """

    def __init__(self, shared: int = 1, *, rank: int | None = None) -> None:
        super().__init__()
        self.heads, self.kept, self.size = HEADS * shared, HEADS, 8
        self.query = nn.Linear(WIDTH, self.heads * self.size)
        self.key, self.value = (nn.Linear(WIDTH, self.kept * self.size) for _ in range(2))
        self.out = nn.Linear(self.heads * self.size, WIDTH)
        for layer in (self.key, self.value) if rank else ():
            weight = torch.randn(HEADS, self.size, rank) @ torch.randn(HEADS, rank, WIDTH) / math.sqrt(WIDTH)
            layer.weight.data, layer.bias.data = weight.flatten(0, 1), torch.zeros(HEADS * self.size)

    def forward(self, x: Tensor) -> Tensor:
        size = self.query.out_features // self.heads
        queries, keys, values = (
            layer(x).unflatten(-1, (-1, size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        keys, values = (each.repeat_interleave(self.heads // self.kept, 1) for each in (keys, values))
        return self.out(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(**options), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.gelu(self.up(x)))


def tokens(seed: int = 0, count: int = 6) -> Tensor:
    return torch.randn(count, 7, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return loss_of(model(batch))


def rotated(model: nn.Module, batch: Any, **settings: Any) -> upop.Pruner:
    """Take the first of many steps of a search, which rotates."""
    pruner = upop.Pruner(model, 0.3, 100, **settings)
    outputs = model(**batch) if isinstance(batch, dict) else model(batch)
    loss_of(outputs).backward()
    pruner.step()
    return pruner


def attention_weights(model: nn.Module) -> dict[str, Tensor]:
    names = {part.tensor for group in upop.find_groups(model) if group.kind == "attention" for part in group.slices}
    return {name: value.clone() for name, value in model.named_parameters() if name in names}


@pytest.mark.parametrize("case", mostly_slow(FAMILIES, VIT, BY_NAME["vit-fused"]), ids=lambda case: case.name)
def test_the_first_step_changes_weights_and_no_output(case: Family) -> None:
    model = case.build().eval()
    before, expected = attention_weights(model), outputs_of(model, case.inputs())
    rotated(model, case.inputs(4, seed=1))
    moved = [name for name, value in attention_weights(model).items() if not torch.allclose(value, before[name])]
    assert {name.rpartition(".")[0] for name in moved} == {name.rpartition(".")[0] for name in before}
    assert difference(expected, outputs_of(model, case.inputs())) < 1e-9


def test_dimensions_that_carry_nothing_are_found_in_any_basis() -> None:
    """Keys and values of three directions out of eight: five dimensions of every head are free, once they are seen."""
    lost = {}
    for rotate in (True, False):
        torch.manual_seed(0)
        model = Block(rank=3).double()
        inputs = tokens().double()
        dense = model(inputs).detach()
        plan = upop.calibrate(
            model, [inputs], 5 / 8, loss=loss, include="attention", correct=False, example=inputs, rotate=rotate
        )
        assert len(plan["attention"]) == 3
        lost[rotate] = difference(model(inputs).detach(), dense)
    assert lost[True] < 1e-5 < 1e-2 < lost[False]


def test_principal_axes_are_uncorrelated_and_sorted() -> None:
    torch.manual_seed(0)
    model = Block().double()
    inputs = tokens(count=20).double()
    rotated(model, inputs, example=inputs)
    with torch.no_grad():
        queries, keys = (
            layer(inputs).flatten(0, 1).unflatten(1, (HEADS, -1)).transpose(0, 1)
            for layer in (model.attention.query, model.attention.key)
        )
    keys = keys - keys.mean(1, keepdim=True)
    moments = [each.mT @ each / each.shape[1] for each in (queries, keys)]
    strengths = [each.diagonal(dim1=1, dim2=2) for each in moments]
    for moment, strength in zip(moments, strengths, strict=True):
        assert torch.allclose(moment, torch.diag_embed(strength), atol=1e-9 * float(strength.max()))
    assert torch.allclose(*strengths)
    assert bool((strengths[0].diff(dim=1) <= 0).all())


@pytest.mark.parametrize("shared", [1, 2])
def test_gradients_are_those_of_the_rotated_weights(shared: int) -> None:
    torch.manual_seed(0)
    model = Block(shared=shared).double()
    inputs = tokens().double()
    rotated(model, inputs, example=inputs)
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    loss_of(model(inputs)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, atol=1e-9), name


def test_queries_and_keys_stay_where_more_than_attention_reads_them() -> None:
    """Merging tokens compares their keys, so that a rotation of keys would merge others; values are still rotated."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).double().eval()
    upop.merge_tokens(model, vision=4)
    inputs = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    before, expected = attention_weights(model)["blocks.0.attn.qkv.weight"], model(inputs).detach()
    rotated(model, inputs)
    after = attention_weights(model)["blocks.0.attn.qkv.weight"]
    same = [torch.equal(*pair) for pair in zip(before.chunk(3), after.chunk(3), strict=True)]
    assert same == [True, True, False]
    assert difference(expected, model(inputs).detach()) < 1e-9


def test_averages_are_rotated_alike() -> None:
    torch.manual_seed(0)
    model = Block().double()
    inputs = tokens().double()
    average = copy.deepcopy(model)
    for parameter in average.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    expected = average(inputs).detach()
    compression = upop.Compression(model, 0.3, 100, averages=average, teacher=False, example=inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    compression.loss(loss(model, inputs)).backward()
    compression.step(optimizer)
    assert torch.allclose(average(inputs), expected)
    assert difference(average.attention.key.weight.detach(), model.attention.key.weight.detach()) < 0.3
    compression.close()


def test_moments_of_an_optimizer_are_rotated_like_gradients() -> None:
    """The product of weights and gradients does not depend on the basis, nor do the squares that Adam keeps vanish."""
    torch.manual_seed(0)
    model = Block().double()
    inputs = tokens().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for seed in range(3):
        loss(model, tokens(seed).double()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def products() -> dict[str, Tensor]:
        return {
            name: (optimizer.state[each]["exp_avg"] * each.detach()).unflatten(0, (HEADS, -1)).sum((1, 2))
            for name, each in model.attention.named_parameters()
            if name in ("query.weight", "key.weight", "value.weight")
        }

    expected, old = products(), copy.deepcopy(optimizer.state[model.attention.value.weight])
    with upop.Compression(model, 0.3, 100, teacher=False, example=inputs) as compression:
        compression.loss(loss(model, inputs)).backward()
        compression.before_step([optimizer])
        for name, product in products().items():
            assert torch.allclose(product, expected[name])
        new = optimizer.state[model.attention.value.weight]
        assert not torch.allclose(new["exp_avg_sq"], old["exp_avg_sq"])
        assert bool((new["exp_avg_sq"] >= 0).all())
        compression.close()


def test_it_can_be_left_out_and_the_published_search_leaves_it_out() -> None:
    for settings in ({"rotate": False}, {"progress": "soft"}):
        model = VIT.build()
        before = attention_weights(model)
        pruner = rotated(model, VIT.inputs(), **settings)
        assert all(torch.equal(value, before[name]) for name, value in attention_weights(model).items())
        assert not pruner.rotate
    with pytest.raises(SettingError, match="rotate"):
        upop.Pruner(VIT.build(), 0.3, 10, progress="soft", rotate=True)


def test_weights_in_half_precision_stay() -> None:
    """They would be rounded once more."""
    model = VIT.build(torch.bfloat16)
    before = attention_weights(model)
    rotated(model, VIT.inputs(dtype=torch.bfloat16))
    assert all(torch.equal(value, before[name]) for name, value in attention_weights(model).items())


def test_a_failed_cut_gives_the_weights_back() -> None:
    model = VIT.build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(upop.errors.VerificationError):
        upop.calibrate(model, [VIT.inputs(seed=1)], 0.3, loss=lambda m, b: loss_of(m(**b)), verify={"nothing": 1})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
