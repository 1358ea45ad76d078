"""Groups that are read off what a model computes: whatever is handed out, masking it and cutting it give the same."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upop
from upop.errors import LayoutError, PlanError
from upop.pruning.groups import Group, tensor_of

WIDTH, HEADS = 24, 3


class Residual(nn.Module):
    """Two pre-norm blocks around what is tested, and a head."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.parts = nn.ModuleList(inner() for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return self.head(x.mean(1))


def built(inner: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Residual(inner).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


EXAMPLE = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def difference(model: nn.Module, groups: Sequence[Group], seed: int) -> float:
    """Cut a copy at random; return how far it is from one whose rows are zero, relative to the largest output.

    Rows are set to zero here, not by the library.
    """
    if not groups:
        return 0.0
    draw = random.Random(seed)
    plan = {
        group.name: sorted(draw.sample(range(group.size), draw.randint(1, max(1, group.size - 1)))) for group in groups
    }
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for group in groups:
            keep = torch.zeros(group.size, dtype=torch.float64)
            keep[plan[group.name]] = 1
            for part in group.producers:
                tensor = tensor_of(masked, part.tensor)
                shape = [-1 if dim == part.dim else 1 for dim in range(tensor.dim())]
                tensor.mul_(part.expand(keep).view(shape))
        expected = masked(EXAMPLE)
        upop.shrink(cut, upop.Plan.of(list(groups), plan))
        found = cut(EXAMPLE)
    return float((expected - found).abs().max() / expected.abs().max())


# -- every combination of ways to write an attention or an MLP --


class Written(nn.Module):
    """An attention, written in one of many ways."""

    def __init__(self, way: dict[str, Any]) -> None:
        super().__init__()
        self.way, self.n, self.size = way, HEADS, WIDTH // HEADS
        keys = self.size if way["groups"] == "one" else WIDTH
        if way["layers"] == "fused":
            self.first = nn.Linear(WIDTH, 3 * WIDTH, bias=way["bias"])
        elif way["layers"] == "queries apart":
            self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=way["bias"]), nn.Linear(WIDTH, 2 * WIDTH)
        else:
            self.first = nn.Linear(WIDTH, WIDTH, bias=way["bias"])
            self.second, self.third = nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH if way["gate"] == "values" else HEADS) if way["gate"] != "none" else None
        self.norm = nn.LayerNorm(self.size) if way["norm"] == "layer norm" else None
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1)) if way["scale"] == "per head" else None
        self.scale = self.size**-0.5

    def kinds(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.way["layers"] == "fused":
            made, order = self.first(x), self.way["order"]
            if self.way["split"] == "view":
                shape = (*x.shape[:2], self.n, -1, 3) if self.way["last"] else (*x.shape[:2], 3, self.n, self.size)
                parts = list(made.view(shape).unbind(-1 if self.way["last"] else 2))
            elif self.way["split"] == "slice":
                parts = [made[..., at * WIDTH : (at + 1) * WIDTH] for at in range(3)]
            else:
                parts = list(made.chunk(3, -1))
            return parts[order[0]], parts[order[1]], parts[order[2]]
        if self.way["layers"] == "queries apart":
            keys, values = self.second(x).chunk(2, dim=-1)
            return self.first(x), keys, values
        return self.first(x), self.second(x), self.third(x)

    def heads(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return x.transpose(1, 2)
        if x.shape[-1] == self.size and self.way["groups"] == "one":
            return x.unsqueeze(1)
        if self.way["view"] == "unflatten":
            return x.unflatten(-1, (self.n, -1)).transpose(1, 2)
        if self.way["view"] == "number":
            return in_heads(x)
        if self.way["view"] == "slices":
            parts = [x[..., at * self.size : (at + 1) * self.size] for at in range(self.n)]
            return torch.stack(parts, 1)
        if self.way["view"] == "einops":
            return rearrange(x, "b t (h d) -> b h t d", h=self.n)
        if self.way["view"] == "sizes":
            return x.reshape(x.shape[0], x.shape[1], self.n, self.size).permute(0, 2, 1, 3)
        return x.view(x.shape[0], x.shape[1], self.n, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = map(self.heads, self.kinds(x))
        if self.way["cache"]:  # keys and values come in two pieces
            before, after = map(self.kinds, x.split([3, x.shape[1] - 3], 1))
            keys, values = (
                torch.cat([self.heads(old), self.heads(new)], -2)
                for old, new in zip(before[1:], after[1:], strict=True)
            )
        if self.norm is not None:
            queries, keys = self.norm(queries), self.norm(keys)
        elif self.way["norm"] == "normalize":
            queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
        elif self.way["norm"] == "rotary":
            queries, keys = turned(queries), turned(keys)
        if self.way["scale"] == "sdpa" and self.way["groups"] == "all":
            found = F.scaled_dot_product_attention(queries, keys, values, self.mask(x, HEADS))
        else:
            quarter = queries.shape[-1] ** -0.25 if self.way["scale"] == "both" else 1.0
            scores = torch.einsum("bhid,bhjd->bhij", queries * quarter, (keys * quarter).expand_as(queries))
            scores = {
                "kept": lambda: scores * self.scale,
                "size": lambda: scores / math.sqrt(queries.shape[-1]),
                "one over": lambda: scores / queries.shape[-1],
                "per head": lambda: scores * self.temperature,
                "both": lambda: scores,
            }.get(self.way["scale"], lambda: scores * 0.3)()
            mask = self.mask(x, HEADS)
            found = (scores if mask is None else scores + mask).softmax(-1) @ values
        if self.gate is not None and self.way["gate"] == "heads":
            found = found * self.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)
        joined = found.transpose(1, 2)
        joined = joined.reshape(x.shape) if self.way["join"] == "input" else joined.flatten(2)
        if self.gate is not None and self.way["gate"] == "values":
            joined = joined * F.silu(self.gate(x))
        return self.last(joined)

    def mask(self, x: Tensor, heads: int) -> Tensor | None:
        """Return what is added to scores, [heads or 1, queries, keys]."""
        places = torch.arange(x.shape[1])
        apart = places[:, None] - places
        if self.way["mask"] == "causal":
            return torch.zeros(apart.shape, dtype=x.dtype).masked_fill(apart < 0, -1e9)
        if self.way["mask"] == "window":
            return torch.zeros(apart.shape, dtype=x.dtype).masked_fill(apart.abs() > 2, -1e9)
        if self.way["mask"] == "slopes":
            return -apart.abs() * 0.5 ** torch.arange(heads, dtype=x.dtype)[:, None, None]
        return None


def in_heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 0.5 ** torch.arange(half, dtype=x.dtype)
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()], -1)


WAYS = st.fixed_dictionaries(
    {
        "layers": st.sampled_from(["fused", "queries apart", "three"]),
        "order": st.permutations([0, 1, 2]),
        "split": st.sampled_from(["view", "slice", "chunk"]),
        "last": st.booleans(),
        "view": st.sampled_from(["unflatten", "sizes", "rest", "number", "slices", "einops"]),
        "groups": st.sampled_from(["all", "one"]),
        "norm": st.sampled_from(["none", "none", "layer norm", "normalize", "rotary"]),
        "scale": st.sampled_from(["sdpa", "kept", "size", "one over", "per head", "number", "both"]),
        "mask": st.sampled_from(["none", "causal", "window", "slopes"]),
        "gate": st.sampled_from(["none", "none", "values", "heads"]),
        "cache": st.booleans(),
        "join": st.sampled_from(["input", "flatten"]),
        "bias": st.booleans(),
    }
)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(way=WAYS)
def test_whatever_way_an_attention_is_written(way: dict[str, Any]) -> None:
    check_ways(way)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(way=WAYS)
def test_many_ways_to_write_an_attention(way: dict[str, Any]) -> None:
    check_ways(way)


def check_ways(way: dict[str, Any]) -> None:
    model = built(lambda: Written(way))
    for seed in range(2):
        assert difference(model, upop.find_prunable(model, EXAMPLE).groups, seed) < 1e-9, way


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "squared": lambda x: F.relu(x).square(),
    "quick": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "plus one": lambda x: F.elu(x) + 1,
    "roll": lambda x: torch.roll(F.relu(x), 1, -1),
    "softmax": lambda x: x.softmax(-1),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
}


class Neurons(nn.Module):
    """An MLP, written in one of many ways."""

    def __init__(self, way: dict[str, Any]) -> None:
        super().__init__()
        self.way = way
        wide = 40 * (2 if way["gate"] in ("halves", "pairs") else 1)
        self.layers = nn.ModuleDict({"up": nn.Linear(WIDTH, wide)})
        if way["gate"] in ("layer", "film"):
            self.layers["gate"] = nn.Linear(WIDTH, 40)
        if way["deep"] != "no":
            self.layers["middle"] = nn.Linear(40, 40)
        self.norm = nn.BatchNorm1d(40) if way["norm"] == "batch" else None
        self.along = nn.Conv1d(40, 40, 3, padding=1, groups=40) if way["norm"] == "depthwise" else None
        self.gain = nn.Parameter(torch.rand(40)) if way["norm"] == "gain" else None
        self.down = nn.Parameter(torch.randn(WIDTH, 40) / 6)
        self.back = nn.Parameter(torch.rand(WIDTH))

    def last(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.down, self.back) if self.way["whole"] else hidden @ self.down.t()

    def gated(self, x: Tensor, hidden: Tensor) -> Tensor:
        activation, gate = ACTIVATIONS[self.way["activation"]], self.way["gate"]
        if gate == "halves":
            one, other = hidden.chunk(2, -1) if self.way["chunk"] else (hidden[..., :40], hidden[..., 40:])
            return activation(one) * other
        if gate == "pairs":
            one, other = hidden.unflatten(-1, (40, 2)).unbind(-1)
            return activation(one) * other
        if gate == "layer":
            return activation(self.layers["gate"](x)) * hidden
        if gate == "film":
            return activation(hidden) * (1 + self.layers["gate"](x.mean(1, keepdim=True)))
        return activation(hidden)

    def summed(self, hidden: Tensor) -> Tensor:
        """Return running means over the tokens, from zero on."""
        state, found = hidden.new_zeros(hidden.shape[0], hidden.shape[-1]), []
        for at in range(hidden.shape[1]):
            state = 0.5 * state + hidden[:, at]
            found.append(state)
        return torch.stack(found, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gated(x, self.layers["up"](x))
        if self.norm is not None:
            hidden = self.norm(hidden.mT).mT
        if self.along is not None:
            hidden = self.along(hidden.mT).mT
        hidden = hidden if self.gain is None else hidden * self.gain
        if self.way["deep"] != "no":
            more = F.relu(self.layers["middle"](hidden))
            hidden = hidden + more if self.way["deep"] == "added" else more
        return self.last(self.summed(hidden) if self.way["scan"] else hidden)


MLP_WAYS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "gate": st.sampled_from(["none", "halves", "pairs", "layer", "film"]),
        "chunk": st.booleans(),
        "deep": st.sampled_from(["no", "yes", "added"]),
        "norm": st.sampled_from(["none", "batch", "depthwise", "gain"]),
        "scan": st.booleans(),
        "whole": st.booleans(),
    }
)


PLAIN = {"activation": "gelu", "gate": "none", "deep": "no", "norm": "none", "scan": False, "whole": True}


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(way=MLP_WAYS)
def test_whatever_way_an_mlp_is_written(way: dict[str, Any]) -> None:
    check_mlp(way)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(way=MLP_WAYS)
def test_many_ways_to_write_an_mlp(way: dict[str, Any]) -> None:
    check_mlp(way)


def check_mlp(way: dict[str, Any]) -> None:
    model = built(lambda: Neurons(way))
    for seed in range(2):
        assert difference(model, upop.find_prunable(model, EXAMPLE).groups, seed) < 1e-9, way


# -- ways that have to be found ---------------------------------------------------------------------------------------


class SplitByWidth(nn.Module):
    """Takes the width of its heads from its input, as GPTs in many repositories do."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n_head, self.n_embd = HEADS, WIDTH

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.size()
        queries, keys, values = (
            part.view(batch, tokens, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.both(x).split(self.n_embd, dim=2)
        )
        found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.out(found.transpose(1, 2).contiguous().view(batch, tokens, width))


class Louder(nn.MultiheadAttention):
    """torch's own, with something before and something after."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, batch_first=True)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tanh(super().forward(x, x, x * self.gain, need_weights=False)[0])


class Experts(nn.Module):
    """Two MLPs, mixed by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        return sum(shares[..., at : at + 1] * expert(x) for at, expert in enumerate(self.experts))  # type: ignore[return-value]


class Pointwise(nn.Module):
    """An MLP of convolutions, one of them over the neighbours of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(WIDTH, 40, 1), nn.Conv1d(40, WIDTH, 1)
        self.around = nn.Conv1d(40, 40, 3, padding=1, groups=40)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.around(F.gelu(self.up(x.transpose(1, 2)))))).transpose(1, 2)


class HeadsInTurn(nn.Module):
    """Attends head by head: each takes its dimensions from all, and puts what it finds in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.size = nn.Linear(WIDTH, WIDTH), WIDTH // HEADS

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (layer(x) for layer in self.three)
        found = torch.zeros_like(values)
        for start in range(0, WIDTH, self.size):
            one, two, three = (each[:, :, start : start + self.size] for each in (queries, keys, values))
            found[:, :, start : start + self.size] = F.scaled_dot_product_attention(one, two, three)
        return self.out(found)


class NormedHeads(nn.Module):
    """Norms over heads, whose number stands in a function: whole heads go."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH // HEADS)
        self.register_buffer("turns", torch.arange(7.0)[:, None] * 0.3 ** torch.arange(WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (in_heads(layer(x)) for layer in self.three)
        queries, keys = (self.norm(each) * self.turns[: x.shape[1]].cos() for each in (queries, keys))
        return self.out(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(*x.shape[:2], -1))


class ComparedHeads(nn.Module):
    """Tokens attend more to those that are alike in the keys of all heads at once: whole heads are contracted, too."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (in_heads(layer(x)) for layer in self.three)
        whole = keys.transpose(1, 2).flatten(2)
        alike = (whole @ whole.transpose(1, 2))[:, None]
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=alike)
        return self.out(found.transpose(1, 2).reshape(*x.shape[:2], -1))


class Crossed(nn.Module):
    """Every neuron is a product of one of each half, in torch's bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.down = nn.Linear(WIDTH, 9), nn.Linear(WIDTH, 10), nn.Bilinear(9, 10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.one(x)), F.relu(self.other(x)))


class Around(nn.Module):
    """Keys and values of the neighbours of each token, by Tensor.unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (in_heads(layer(x)) for layer in self.three)
        keys, values = (F.pad(each, (0, 0, 1, 1)).unfold(2, 3, 1) for each in (keys, values))
        scores = torch.einsum("bhid,bhidw->bhiw", queries, keys) * queries.shape[-1] ** -0.5
        return self.out(torch.einsum("bhiw,bhidw->bhid", scores.softmax(-1), values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("inner", "channel", "count"),
    [
        (HeadsInTurn, "dimension", 2),
        (NormedHeads, "head", 2),
        (ComparedHeads, "head", 2),
        (Crossed, "neuron", 4),
        (Around, "dimension", 2),
        (SplitByWidth, "dimension", 2),
        (Louder, "dimension", 2),
        (Experts, "neuron", 4),
        (Pointwise, "neuron", 2),
        (lambda: Neurons({**PLAIN, "deep": "yes"}), "neuron", 4),
        (lambda: Neurons({**PLAIN, "deep": "added"}), "neuron", 2),
    ],
)
def test_what_is_found(inner: Callable[[], nn.Module], channel: str, count: int) -> None:
    model = built(inner)
    groups = upop.find_prunable(model, EXAMPLE).groups
    assert [group.channel for group in groups] == [channel] * count
    assert len({group.name for group in groups}) == count
    assert all(difference(model, groups, seed) < 1e-9 for seed in range(3))


class Kept(nn.Module):
    """Something else uses what is inside."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.up, self.down, self.use = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), use

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        if self.use == "sorted":
            hidden = hidden.sort(-1).values
        if self.use == "table":
            hidden = hidden * torch.linspace(0, 1, 40, dtype=x.dtype)
        if self.use == "kept":
            self.last = hidden
        if self.use == "norm":
            hidden = F.layer_norm(hidden, (40,))
        return self.down(hidden)


@pytest.mark.parametrize("use", ["sorted", "table", "norm", "kept"])
def test_what_is_left_alone_says_why(use: str) -> None:
    found = upop.find_prunable(built(lambda: Kept(use)), EXAMPLE)
    assert not found.groups
    assert any(part.name.startswith("parts.0") and part.reason for part in found.skipped)


def test_reading_changes_nothing() -> None:
    model = built(SplitByWidth)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    upop.find_prunable(model, EXAMPLE)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert kinds == [type(module) for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_example_that_does_not_run_is_refused() -> None:
    with pytest.raises(LayoutError, match="run with the example"):
        upop.find_prunable(built(SplitByWidth), torch.randn(2, 7, 5, dtype=torch.float64))


def test_the_pruner_takes_an_example() -> None:
    model = built(SplitByWidth).train()
    pruner = upop.Pruner(model, ratio=0.4, steps=8, example=EXAMPLE)
    for _ in range(8):
        model(EXAMPLE).square().mean().backward()
        pruner.step()
        model.zero_grad()
    assert pruner.shrink(verify=EXAMPLE) is model
    assert upop.count_parameters(model) < upop.count_parameters(built(SplitByWidth))


def test_a_cut_model_is_loaded_by_the_slices_of_its_plan(tmp_path: Path) -> None:
    model = built(SplitByWidth)
    upop.shrink(
        model,
        {group.name: range(0, group.size, 2) for group in upop.find_prunable(model, EXAMPLE).groups},
        verify=EXAMPLE,
    )
    upop.save(model, tmp_path / "model")
    again = upop.load_into(built(SplitByWidth, seed=3), tmp_path / "model")
    assert torch.equal(model(EXAMPLE), again(EXAMPLE))


def test_a_copy_is_cut_by_the_plan_alone() -> None:
    model, average = built(SplitByWidth), built(SplitByWidth)
    groups = upop.find_prunable(model, EXAMPLE).groups
    plan = upop.Plan.from_json(upop.Plan.of(list(groups), {group.name: [0, 2] for group in groups}).to_json())
    assert torch.equal(upop.shrink(model, plan)(EXAMPLE), upop.shrink(average, plan)(EXAMPLE))


def test_slices_that_do_not_fit_are_refused() -> None:
    model = built(SplitByWidth)
    plan = upop.Plan.of(list(upop.find_prunable(model, EXAMPLE).groups), {"parts.0": [0, 2]})
    with pytest.raises(PlanError, match=r"(does|do) not fit"):
        upop.shrink(built(Experts), plan)


def test_a_forward_that_names_a_width_compiles_exports_and_travels() -> None:
    model = built(SplitByWidth)
    upop.shrink(model, {group.name: range(5) for group in upop.find_prunable(model, EXAMPLE).groups}, verify=EXAMPLE)
    expected = model(EXAMPLE)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(EXAMPLE), expected)
    exported = torch.export.export(model, (EXAMPLE,)).module()
    assert torch.allclose(exported(EXAMPLE), expected)


def test_a_model_of_ones_own_needs_no_example_where_one_can_be_made() -> None:
    assert [group.channel for group in upop.find_groups(built(SplitByWidth))] == ["dimension", "dimension"]
