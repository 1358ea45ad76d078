"""Modules as people write them by hand: what they are cut along, and that the cut computes what masking does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.test_axes import EXAMPLE, HEADS, WIDTH, built, difference

SIZE = WIDTH // HEADS
HIDDEN = 40


class Attention(nn.Module):
    """Four layers, and heads by view; what differs is in `attend`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.more()

    def more(self) -> None: ...

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*(self.split(f(x)) for f in (self.q, self.k, self.v))).transpose(1, 2).flatten(2))


class OneHead(nn.Module):
    """One of the heads of Karpathy's first GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, SIZE, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        keys = self.key(x)
        scores = self.query(x) @ keys.transpose(-2, -1) * keys.shape[-1] ** -0.5
        later = self.get_buffer("tril")[: x.shape[1], : x.shape[1]] == 0
        return scores.masked_fill(later, float("-inf")).softmax(-1) @ self.value(x)


class HeadsInAList(nn.Module):
    """Heads that are modules, whose outputs are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.proj = nn.ModuleList(OneHead() for _ in range(HEADS)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class WeightsByHead(nn.Module):
    """Weights of three dimensions and products by einsum, as in flax."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, HEADS, SIZE) * WIDTH**-0.5) for _ in range(3))
        self.out = nn.Parameter(torch.randn(HEADS, SIZE, WIDTH) * WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btm,mhd->bthd", x, weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bqhd,hdm->bqm", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), self.out)


class Complex(Attention):
    """Rotary positions by complex numbers, as in Llama's own code; two heads of keys and values would do as well."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.outer(
            torch.arange(q.shape[2], dtype=q.dtype), 0.5 ** torch.arange(q.shape[-1] // 2, dtype=q.dtype)
        )
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (
            torch.view_as_real(torch.view_as_complex(each.reshape(*each.shape[:-1], -1, 2)) * turn).flatten(3)
            for each in (q, k)
        )
        return F.scaled_dot_product_attention(q, k, v)


class Talking(Attention):
    """Heads that are mixed before and after the softmax."""

    def more(self) -> None:
        self.before, self.after = nn.Parameter(torch.randn(HEADS, HEADS)), nn.Conv2d(HEADS, HEADS, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhij,hg->bgij", q @ k.mT * q.shape[-1] ** -0.5, self.before)
        return self.after(scores.softmax(-1)) @ v


class Sinks(Attention):
    """One logit per head that takes what no key deserves."""

    def more(self) -> None:
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        sinks = self.sinks.view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], -1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


class NormedByHead(Attention):
    """A norm over every head of what comes out."""

    def more(self) -> None:
        self.norm = nn.GroupNorm(HEADS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
        joined = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.norm(joined.flatten(0, 1)).view_as(joined))


class Positions(Attention):
    """Content and positions side by side in every head: the scale follows the size of both."""

    def more(self) -> None:
        self.at_q, self.at_k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (
            torch.cat([self.split(a(x)), self.split(b(x))], -1) for a, b in ((self.q, self.at_q), (self.k, self.at_k))
        )
        return self.out(self.attend(q, k, self.split(self.v(x))).transpose(1, 2).flatten(2))


class OverChannels(nn.Module):
    """One head over all channels, channels first, values on the left: autoencoders for diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x.transpose(1, 2)) for layer in (self.q, self.k, self.v))
        scores = torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5
        return self.out(torch.bmm(v, scores.softmax(2).transpose(1, 2))).transpose(1, 2)


class Beside(nn.Module):
    """Attention and MLP out of one layer, and into one layer, with the sizes in a tuple."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.sizes, self.joined = (WIDTH, WIDTH, WIDTH, HIDDEN), joined
        self.first = nn.Linear(WIDTH, 3 * WIDTH + HIDDEN, bias=False)
        self.last = (
            nn.Linear(WIDTH + HIDDEN, WIDTH)
            if joined
            else nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(HIDDEN, WIDTH)])
        )

    def forward(self, x: Tensor) -> Tensor:
        *parts, hidden = self.first(x).split(self.sizes, dim=-1)
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in parts)
        found, hidden = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), F.gelu(hidden)
        if self.joined:
            return self.last(torch.cat([found, hidden], -1))
        one, other = self.last
        return one(found) + other(hidden)


class OneOfEveryGroup(nn.Module):
    """Queries of a group of heads and their one key and value in one layer, group by group, widened by expand."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.size = 2, 4
        self.first, self.last = nn.Linear(WIDTH, 2 * 5 * 4), nn.Linear(2 * 3 * 4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        made = self.first(x).view(batch, tokens, self.groups, 5, self.size).permute(0, 2, 3, 1, 4)
        q, k, v = made.split((3, 1, 1), dim=2)
        k, v = (each.expand(batch, self.groups, 3, tokens, self.size) for each in (k, v))
        q, k, v = (each.reshape(batch, -1, tokens, self.size) for each in (q, k, v))
        return self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Flexible(Attention):
    """Flex attention, with a score that follows the distance."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        def nearer(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + (i - j) * 0.1

        return flex_attention(q, k, v, score_mod=nearer)


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        (HeadsInAList, {("attention", "dimension"): 2 * HEADS}),
        (WeightsByHead, {("attention", "dimension"): 2}),
        (Complex, {("attention", "head"): 2}),
        (Talking, {("attention", "dimension"): 2}),
        (Sinks, {("attention", "dimension"): 2}),
        (NormedByHead, {("attention", "head"): 2}),
        (Positions, {("attention", "head"): 2}),
        (OverChannels, {("attention", "dimension"): 2}),
        (OneOfEveryGroup, {("attention", "head"): 2}),
        (lambda: Beside(True), {("attention", "dimension"): 2, ("mlp", "neuron"): 2}),
        (lambda: Beside(False), {("attention", "dimension"): 2, ("mlp", "neuron"): 2}),
    ],
)
def test_attentions(inner: Callable[[], nn.Module], found: dict[tuple[str, str], int]) -> None:
    check(inner, found)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention() -> None:
    check(Flexible, {("attention", "dimension"): 2})


def check(inner: Callable[[], nn.Module], expected: dict[tuple[str, str], int]) -> None:
    model = built(inner)
    groups = upop.find_prunable(model, EXAMPLE).groups
    found = [(group.kind, group.channel) for group in groups]
    assert {each: found.count(each) for each in found} == expected
    assert len({group.name for group in groups}) == len(groups)
    assert all(difference(model, groups, seed) < 1e-9 for seed in range(2))


class Windows(nn.Module):
    """Attention in windows: what is not cut, and what is, are given the same shape with one number left open."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def before(self, x: Tensor) -> Tensor:
        return x[:, :6].reshape(len(x), 3, 2, WIDTH).reshape(-1, 2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.before(x)
        batch, tokens, width = windows.shape
        qkv = self.qkv(windows).reshape(batch, tokens, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        found = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        found = self.out(found.transpose(1, 2).reshape(-1, tokens, width))
        return F.pad(found.reshape(len(x), -1, WIDTH), (0, 0, 0, 7))[:, :7]


class Strided(nn.Module):
    """Each token attends to itself and the two before it, windows that lie in one another in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def windows(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 2, 0)).contiguous()
        batch, token, channel = padded.stride()
        return padded.as_strided((*x.shape[:2], 3, x.shape[2]), (batch, token, token, channel))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries(x).unflatten(-1, (HEADS, 1, -1))
        keys, values = (
            self.windows(each(x)).unflatten(-1, (HEADS, -1)).transpose(2, 3) for each in (self.keys, self.values)
        )
        found = (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1) @ values
        return self.out(found.flatten(2))


class Folded(Windows):
    """What is not cut has as many dimensions as a tensor that is, and is as long as one of which two are kept."""

    def before(self, x: Tensor) -> Tensor:
        return x[:, :2].mT.reshape(len(x), 4, 6, 2).reshape(-1, 2, WIDTH)


@pytest.mark.parametrize(
    ("inner", "channel", "size"), [(Windows, "dimension", SIZE), (Folded, "head", HEADS), (Strided, "dimension", SIZE)]
)
def test_what_is_not_cut_is_not_taken_for_what_is_at_any_size(
    inner: Callable[[], nn.Module], channel: str, size: int
) -> None:
    model = built(inner)
    groups = upop.find_prunable(model, EXAMPLE).groups
    assert [(group.channel, group.size) for group in groups] == [(channel, size)] * 2
    for kept in range(1, size):
        cut = copy.deepcopy(model)
        upop.shrink(cut, upop.Plan.of(list(groups), {group.name: range(kept) for group in groups}), verify=EXAMPLE)
    exported = torch.export.export(cut, (EXAMPLE,)).module()
    assert torch.allclose(exported(EXAMPLE), cut(EXAMPLE))


class Cosine(Attention):
    """Queries and keys of length 1, of which no scale shows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (10 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v


@pytest.mark.parametrize("inner", [Attention, Cosine])
def test_dimensions_go_where_the_example_shows_what_queries_do(inner: Callable[[], nn.Module]) -> None:
    model = built(inner)
    assert [group.channel for group in upop.find_prunable(model, EXAMPLE).groups] == ["dimension"] * 2
    one_token = upop.find_prunable(built(inner), EXAMPLE[:, :1]).groups
    assert all(group.channel != "dimension" for group in one_token)


class Turns(nn.Module):
    """Learned angles, one for every pair of dimensions of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(HEADS, SIZE // 2))

    def forward(self, tokens: int) -> Tensor:
        turned = torch.arange(tokens, dtype=self.angles.dtype)[None, :, None] * self.angles[:, None]
        return turned.repeat_interleave(2, -1)


class Turned(Attention):
    """Pairs turned by learned angles; the scale is a number kept, which only one of two ways to compute it takes."""

    fused = True

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.turns, self.head_dim, self.scale = turns, SIZE, SIZE**-0.5

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], HEADS, self.head_dim).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = self.turns(q.shape[2])
        q, k = (
            each * angles.cos() + torch.stack([-each[..., 1::2], each[..., ::2]], -1).flatten(-2) * angles.sin()
            for each in (q, k)
        )
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q * self.scale @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("shared", [True, False])
def test_a_kept_scale_follows_pairs_whichever_way_an_attention_is_computed(shared: bool) -> None:
    turns = Turns()
    model = built(lambda: Turned(turns if shared else Turns()))
    groups = upop.find_prunable(model, EXAMPLE).groups
    assert [(group.channel, group.size) for group in groups] == [("dimension", SIZE // 2)] * (1 if shared else 2)
    for part in model.get_submodule("parts"):
        part.fused = False
    assert all(difference(model, groups, seed) < 1e-9 for seed in range(2))


@pytest.mark.parametrize("joined", [True, False])
def test_groups_that_share_layers_are_masked_saved_and_loaded(joined: bool, tmp_path: Path) -> None:
    model = built(lambda: Beside(joined)).train()
    pruner = upop.Pruner(model, ratio=0.4, steps=2, example=EXAMPLE)
    for _ in range(2):
        model(EXAMPLE).square().mean().backward()
        pruner.step()
        model.zero_grad()
    pruner.shrink(verify=EXAMPLE)
    again = upop.load_into(built(lambda: Beside(joined), seed=3), upop.save(model, tmp_path / "model"))
    assert torch.equal(again(EXAMPLE), model.eval()(EXAMPLE))


class Neurons(nn.Module):
    """Two layers, and what is between them."""

    def __init__(self, up: int = HIDDEN) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, up), nn.Linear(HIDDEN, WIDTH)
        self.more()

    def more(self) -> None: ...

    def inside(self, x: Tensor, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inside(x, self.up(x)))


class Interleaved(Neurons):
    """Gates and values beside each other, row by row."""

    def __init__(self) -> None:
        super().__init__(2 * HIDDEN)

    def inside(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.silu(hidden[..., ::2]) * (hidden[..., 1::2] + 1)


class OverTokens(Neurons):
    """Half of the neurons gate the others by what a layer over the tokens makes of them."""

    def __init__(self) -> None:
        super().__init__(2 * HIDDEN)

    def more(self) -> None:
        self.tokens = nn.Conv1d(7, 7, 1)

    def inside(self, x: Tensor, hidden: Tensor) -> Tensor:
        one, other = F.gelu(hidden).chunk(2, -1)
        return one * self.tokens(other)


class Modulated(Neurons):
    """Scaled and shifted by another layer, as FiLM does."""

    def more(self) -> None:
        self.film = nn.Linear(WIDTH, 2 * HIDDEN)

    def inside(self, x: Tensor, hidden: Tensor) -> Tensor:
        scale, shift = self.film(x.mean(1, keepdim=True)).chunk(2, -1)
        return F.gelu(hidden * (1 + scale) + shift)


class Routed(nn.Module):
    """Experts that see the tokens that a gate sends them: how many, numbers say."""

    def __init__(self, add: str) -> None:
        super().__init__()
        self.add, self.gate = add, nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        shares, chosen = self.gate(flat).softmax(-1).topk(2)
        found = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            made = expert(flat[tokens]) * shares[tokens, place, None]
            if self.add == "index_add":
                found.index_add_(0, tokens, made)
            else:
                found[tokens] += made
        return found.view_as(x)


@pytest.mark.parametrize(
    ("inner", "count"),
    [
        (Interleaved, 2),
        (OverTokens, 2),
        (Modulated, 2),
        (lambda: Routed("index_add"), 6),
        (lambda: Routed("index_put"), 6),
    ],
)
def test_mlps(inner: Callable[[], nn.Module], count: int) -> None:
    check(inner, {("mlp", "neuron"): count})


class Particular(Neurons):
    """Insists on its width, without a word."""

    def inside(self, x: Tensor, hidden: Tensor) -> Tensor:
        assert hidden.shape[-1] == HIDDEN
        return F.relu(hidden)


def test_an_assertion_is_a_reason() -> None:
    found = upop.find_prunable(built(Particular), EXAMPLE)
    assert not found.groups
    assert any("AssertionError" in part.reason and "test_hand_written.py" in part.reason for part in found.skipped)
