"""Patterns of the models of libraries, in modules of one's own: groups are found, and cut right."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.test_axes import EXAMPLE, HEADS, WIDTH, built, difference, turned


def check(inner: Callable[[], nn.Module], channels: list[str]) -> nn.Module:
    """Check that the groups of two such parts have these channels, and that each is cut right."""
    model = built(inner)
    groups = upop.find_prunable(model, EXAMPLE).groups
    assert [group.channel for group in groups] == channels
    assert len({group.name for group in groups}) == len(groups)
    assert max(difference(model, groups, seed) for seed in range(2)) < 1e-9
    return model


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Latents(nn.Module):
    """Learned tokens attend to the input, as in pools, Q-Formers and decoders of DETR."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(1, 3, WIDTH)), nn.LayerNorm(WIDTH)
        self.queries, self.keys, self.values, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.pool = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        latents = self.norm(self.latents.expand(len(x), -1, -1))
        if self.pool is not None:
            return self.pool(latents, x, x)[0].mean(1, keepdim=True)  # type: ignore[no-any-return]
        queries, keys, values = heads_of(self.queries(latents)), heads_of(self.keys(x)), heads_of(self.values(x))
        found = (queries @ keys.transpose(-2, -1) * 0.3).softmax(-1) @ values
        return self.out(found.transpose(1, 2).flatten(2)).mean(1, keepdim=True)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Learned tokens attend to each other before they have seen anything."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.first, self.second = nn.Parameter(torch.randn(3, WIDTH)), Latents(False), Latents(False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.latents[None].expand(len(x), -1, -1)
        tokens = tokens + self.first(tokens)
        return self.second(torch.cat([tokens, x], 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("pool", [False, True])
def test_learned_tokens_attend(pool: bool) -> None:
    check(lambda: Latents(pool), ["dimension"] * 2)


def test_learned_tokens_attend_to_each_other() -> None:
    check(Decoder, ["dimension"] * 4)


class Fused(nn.Module):
    """Queries of groups of heads, their keys and values in one layer, sliced by sizes of a config; rotary turns."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.size, self.groups, self.config = way, 4, 2, SimpleNamespace(heads=6)
        self.both, self.out = nn.Linear(WIDTH, 40 if way == "groups" else 32), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made, last = self.both(x), self.config.heads * self.size
        if self.way == "groups":
            middle = last + self.groups * self.size
            parts = [made[..., :last], made[..., last:middle], made[..., middle:]]
            queries, keys, values = (each.unflatten(-1, (-1, self.size)).transpose(1, 2) for each in parts)
        else:  # one head of keys and values for all
            heads = made.unflatten(-1, (-1, self.size)).transpose(1, 2)
            queries, keys, values = heads[:, :-2], heads[:, [-2]], heads[:, [-1]]
        queries, keys = turned(queries), turned(keys)
        keys, values = (each.repeat_interleave(queries.shape[1] // each.shape[1], 1) for each in (keys, values))
        found = F.scaled_dot_product_attention(queries, keys, values)
        return self.out(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_groups_of_heads_in_one_layer() -> None:
    check(lambda: Fused("groups"), ["group"] * 2)


def test_queries_that_share_one_head_of_keys_and_values_are_not_silenced_by_zeros() -> None:
    found = upop.find_prunable(built(lambda: Fused("one")), EXAMPLE)
    assert not found.groups
    assert any("is not 0 where its channels are 0" in part.reason for part in found.skipped)


class OverHeads(nn.Module):
    """Normalises queries over all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries(x)
        queries = queries * torch.rsqrt(queries.square().mean(-1, keepdim=True) + 1e-6)
        found = F.scaled_dot_product_attention(heads_of(queries), heads_of(self.keys(x)), heads_of(self.values(x)))
        return self.out(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_what_forbids_a_cut_is_named_with_its_line() -> None:
    found = upop.find_prunable(built(OverHeads), EXAMPLE)
    assert not found.groups
    reason = next(part.reason for part in found.skipped if part.name.startswith("parts.0"))
    assert re.search(r"mean is taken over it \(mean in .*test_library_ways\.py:\d+\)", reason)


@lru_cache
def places(count: int) -> Tensor:
    return torch.linspace(-1, 1, count, dtype=torch.float64)


class Placed(nn.Module):
    """Adds a table that a function keeps for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x + places(x.shape[1])[:, None])))  # type: ignore[no-any-return]


def test_what_functions_keep_has_numbers_after_reading() -> None:
    places.cache_clear()
    model = check(Placed, ["neuron"] * 2)
    assert torch.isfinite(model(EXAMPLE)).all()
    assert torch.equal(places(EXAMPLE.shape[1]), torch.linspace(-1, 1, EXAMPLE.shape[1], dtype=torch.float64))


class Single(nn.Module):
    """Computes in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        least = torch.full((), torch.finfo(hidden.dtype).min, dtype=torch.float32)
        return self.down(torch.relu(torch.max(hidden, least)))  # type: ignore[no-any-return]


def test_a_forward_that_computes_in_float32_alone() -> None:
    groups = upop.find_prunable(built(Single).float(), EXAMPLE.float()).groups
    assert [group.channel for group in groups] == ["neuron"] * 2


class Experts(nn.Module):
    """Experts whose weights lie in one tensor; each token goes through the two that a router chooses."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.router = way, nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, 32, WIDTH) / 5)
        self.down = nn.Parameter(torch.randn(4, WIDTH, 16) / 4)

    def gated(self, hidden: Tensor) -> Tensor:
        if self.way == "in turn":
            return F.silu(hidden[..., ::2]) * hidden[..., 1::2]
        gate, up = hidden.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).topk(2)
        if self.way == "chosen":  # a product for every token with its own weights
            hidden = self.gated(
                torch.bmm(self.up[chosen.flatten()], tokens.repeat_interleave(2, 0)[:, :, None])[..., 0]
            )
            found = torch.bmm(self.down[chosen.flatten()], hidden[:, :, None])[..., 0].unflatten(0, (-1, 2))
            return (found * shares[:, :, None]).sum(1).view_as(x)
        if self.way == "all":
            hidden = self.gated(torch.einsum("th,eih->tei", tokens, self.up))
            found = torch.einsum("tei,ehi->teh", hidden, self.down)
            return (found * torch.zeros_like(found[..., 0]).scatter(1, chosen, shares)[..., None]).sum(1).view_as(x)
        found = torch.zeros_like(tokens)
        for expert in (F.one_hot(chosen, 4).sum((0, 1)) > 0).nonzero()[:, 0]:
            at, place = torch.where(chosen == expert)
            made = F.linear(self.gated(F.linear(tokens[at], self.up[expert])), self.down[expert])
            found.index_add_(0, at, made * shares[at, place, None])
        return found.view_as(x)


class Halves(nn.Module):
    """A gated MLP whose two halves are made by one layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.down = way, nn.Linear(40, WIDTH)
        self.both = nn.Linear(WIDTH, 80) if way != "tanh" else nn.Identity()
        self.gate, self.up = (nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40)) if way == "tanh" else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None and self.up is not None:  # as T5 writes GELU
            gate = self.gate(x)
            return self.down(0.5 * gate * (1 + torch.tanh(gate + 0.04 * gate**3)) * self.up(x))  # type: ignore[no-any-return]
        if self.way == "glu":
            return self.down(F.glu(self.both(x)))  # type: ignore[no-any-return]
        one, other = self.both(x).chunk(2, -1)
        return self.down(F.silu(one) * other)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("way", "silent"), [("glu", 1), ("chunk", 0)])
def test_the_half_that_only_gates_is_silent(way: str, silent: int) -> None:
    model = check(lambda: Halves(way), ["neuron"] * 2)
    assert [part.silent for part in upop.find_prunable(model, EXAMPLE).groups[0].producers] == [(silent,)] * 2


def test_a_layer_that_only_gates_is_no_producer() -> None:
    model = check(lambda: Halves("tanh"), ["neuron"] * 2)
    assert {part.tensor for part in upop.find_prunable(model, EXAMPLE).groups[0].producers} == {
        "parts.0.up.weight",
        "parts.0.up.bias",
    }


class Grouped(Experts):
    """Experts in one product, whose kernel takes float32 alone, and sizes in multiples of 16 bytes alone."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = F.one_hot(chosen, 4).sum(0).cumsum(0).int()
        hidden = torch._grouped_mm(tokens[order], self.up.transpose(1, 2), offs=ends)
        found = torch._grouped_mm(self.gated(hidden), self.down.transpose(1, 2), offs=ends)
        return (torch.zeros_like(tokens).index_add(0, order, found) * shares[:, None]).view_as(x)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this version of torch has no kernel for it on a CPU")
def test_experts_in_one_product() -> None:
    groups = upop.find_prunable(built(lambda: Grouped("halves")).float(), EXAMPLE.float()).groups
    assert [(group.channel, group.size) for group in groups] == [("neuron", 16)] * 2
    model = built(lambda: Grouped("halves")).float()
    upop.shrink(model, upop.Plan.of(list(groups), {group.name: range(8) for group in groups}), verify=EXAMPLE.float())
    assert [part.down.shape[2] for part in model.parts] == [8, 8]


@pytest.mark.parametrize("way", ["loop", "in turn", "chosen", "all"])
def test_experts_in_one_tensor(way: str) -> None:
    model = check(lambda: Experts(way), ["neuron"] * 2)
    up, down = upop.find_prunable(model, EXAMPLE).groups[0].slices
    assert (up.tensor, down.tensor) == ("parts.0.up", "parts.0.down")
    assert up.silent == (() if way == "in turn" else (0,))  # what only gates is neither masked nor scored


def test_experts_are_pruned_while_training() -> None:
    model = built(lambda: Experts("loop")).train()
    pruner = upop.Pruner(model, ratio=0.4, steps=6, example=EXAMPLE)
    for _ in range(6):
        model(EXAMPLE).square().mean().backward()
        pruner.step()
        model.zero_grad()
    pruner.shrink(verify=EXAMPLE)
    kept = [part.up.shape[1] // 2 for part in model.parts]
    assert sum(kept) == 2 * 16 - round(0.4 * 32)
    assert [part.down.shape[2] for part in model.parts] == kept


class Padded(nn.Module):
    """torch's encoder as it is by default, with sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(tokens, src_key_padding_mask=padding)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_fused_kernels_of_torch_see_masks() -> None:
    torch.manual_seed(0)
    model, tokens, padding = Padded().eval(), torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    groups = [group for group in upop.find_groups(model) if group.kind == "mlp"]
    assert len(groups) == 2
    upop.shrink(model, {group.name: range(16) for group in groups}, verify=(tokens, padding))
    assert model.encoder.layers[0].linear1.out_features == 16


class Offset(nn.Module):
    """What is gated is not 0 where its rows are, as in the experts of gpt-oss."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * 24) if fused else None
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.gate(x), self.up(x)) if self.both is None else self.both(x).chunk(2, -1)
        return self.down((up + 1) * F.silu(gate))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fused", [False, True])
def test_a_gate_of_what_is_not_0_without_it_is_masked_too(fused: bool) -> None:
    check(lambda: Offset(fused), ["neuron", "neuron"])


class Named(nn.Module):
    """Its forward names the width of its tokens, so that it takes on a class when it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        queries, keys, values = self.qkv(x).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(queries, keys, values)
        return self.out(found.transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]


def test_a_model_that_was_cut_is_read_and_cut_once_more() -> None:
    model = check(Named, ["dimension", "dimension"])
    for _ in range(2):
        groups = upop.find_prunable(model, EXAMPLE).groups
        assert len(groups) == 2
        upop.shrink(model, {group.name: range(1, group.size) for group in groups}, verify=EXAMPLE)
