"""What vision transformers do to their axes, each in a small module: what is handed out is cut as it is masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.test_axes import EXAMPLE, HEADS, WIDTH, built, difference

SIZE = WIDTH // HEADS


class JoinedBias(nn.Module):
    """Queries and values have a bias and keys have none, as in BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.one, self.other = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("none", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.one, self.none, self.other))
        parts = F.linear(x, self.both.weight, bias).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*parts.unbind(0))
        return self.out(found.transpose(1, 2).flatten(2))


class FewerKeys(nn.Module):
    """Keys of every other token, their number left open in a shape that names the width of the input, as in Twins."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        queries = self.queries(x).reshape(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
        both = self.both(x[:, ::2]).reshape(batch, -1, 2, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(queries, *both.unbind(0))
        return self.out(found.transpose(1, 2).reshape(batch, tokens, width))


class Latent(nn.Module):
    """One learnt token looks at all others, as the attention pools of SigLIP do."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.latent, self.fused = nn.Parameter(torch.rand(1, 1, WIDTH)), fused
        self.queries, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries(self.latent.expand(len(x), -1, -1)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        keys, values = self.both(x).reshape(*x.shape[:2], 2, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            found = F.scaled_dot_product_attention(queries, keys, values)
        else:
            found = (queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5).softmax(-1) @ values
        return self.out(found.transpose(1, 2).flatten(2))


class ByHead(nn.Module):
    """Queries, keys and values of a head lie side by side, as in LeViT, TinyViT and GPT-NeoX."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.both(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Pooled(nn.Module):
    """Queries are added to what attention gives, as in MViT: no residual stream, for no weight has summed over them."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), HEADS

    def forward(self, x: Tensor) -> Tensor:
        parts = self.both(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = parts[0] + F.scaled_dot_product_attention(*parts.unbind(0))
        return self.out(found.transpose(1, 2).flatten(2))


class Outlook(nn.Module):
    """Weights of a window's places are computed, not compared, as in VOLO: its heads go, with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.scores = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HEADS * 9)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        values = F.unfold(self.values(x).transpose(1, 2).unsqueeze(2), (1, 3), padding=(0, 1))
        values = values.unflatten(1, (HEADS, -1, 3)).permute(0, 1, 4, 3, 2)
        scores = self.scores(x).unflatten(-1, (HEADS, 3, 3)).transpose(1, 2).softmax(-1)
        found = (scores @ values).permute(0, 1, 4, 3, 2).flatten(1, 3)
        return self.out(F.fold(found, (1, x.shape[1]), (1, 3), padding=(0, 1)).squeeze(2).transpose(1, 2))


class Mixing(nn.Module):
    """An MLP that adds to each neuron what a convolution makes of its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.around = nn.Conv1d(40, 40, 3, padding=1, groups=40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(F.gelu(x + self.around(x.transpose(1, 2)).transpose(1, 2)))


class Parted(nn.Module):
    """Some heads' values go through one convolution, the others' through another, as in CoAt."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sizes = [WIDTH // HEADS, 2 * WIDTH // HEADS]
        self.around = nn.ModuleList(nn.Conv1d(size, size, 3, padding=1, groups=size) for size in self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.both(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        parts = values.transpose(-2, -1).flatten(1, 2).split(self.sizes, dim=1)
        near = torch.cat([conv(part) for conv, part in zip(self.around, parts, strict=True)], dim=1)
        near = near.unflatten(1, (HEADS, -1)).transpose(-2, -1)
        found = queries @ (keys.softmax(2).transpose(-2, -1) @ values) + queries * near
        return self.out(found.transpose(1, 2).flatten(2))


class Modulated(nn.Module):
    """Two axes of one size and a few gates come out of one layer, and a list says where each ends, as in FocalNet."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.sizes = nn.Linear(WIDTH, 2 * WIDTH + 2), [WIDTH, WIDTH, 2]
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        values, context, gates = self.all(x).split(self.sizes, dim=-1)
        context = F.gelu(context) * gates[..., :1] + context.mean(1, keepdim=True) * gates[..., 1:]
        return self.out(values * self.mix(context))


class AllInOne(nn.Module):
    """Neurons, queries, keys and values come out of one layer; one list of sizes ends all of them; heads are normed."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size, self.sizes = HEADS, SIZE, [40, WIDTH, WIDTH, WIDTH]
        self.all, self.out, self.down = nn.Linear(WIDTH, sum(self.sizes)), nn.Linear(WIDTH, WIDTH), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, *parts = self.all(x).split(self.sizes, dim=-1)
        queries, keys, values = (part.view(*x.shape[:2], self.heads, self.size).transpose(1, 2) for part in parts)
        queries, keys = F.layer_norm(queries, (self.size,)), F.layer_norm(keys, (self.size,))
        found = F.scaled_dot_product_attention(queries, keys, values)
        return self.out(found.transpose(1, 2).flatten(2)) + self.down(F.gelu(hidden))


@pytest.mark.parametrize("inner", [Modulated, AllInOne])
def test_groups_side_by_side_in_one_layer_are_cut_with_each_other_and_without(inner: Callable[[], nn.Module]) -> None:
    model = built(inner)
    groups = upop.find_prunable(model, EXAMPLE).groups
    assert len(groups) == 4
    assert all(difference(model, chosen, 0) < 1e-9 for chosen in (groups, *([group] for group in groups)))


@pytest.mark.parametrize(
    ("inner", "channel", "count"),
    [
        (Parted, "dimension", 2),
        (Pooled, "head", 2),
        (Outlook, "head", 2),
        (Mixing, "neuron", 2),
        (ByHead, "dimension", 2),
        (JoinedBias, "dimension", 2),
        (FewerKeys, "dimension", 2),
        (lambda: Latent(True), "dimension", 2),
        (lambda: Latent(False), "dimension", 2),
    ],
)
def test_what_is_found(inner: Callable[[], nn.Module], channel: str, count: int) -> None:
    model = built(inner)
    groups = upop.find_prunable(model, EXAMPLE).groups
    assert [group.channel for group in groups] == [channel] * count
    assert all(difference(model, groups, seed) < 1e-9 for seed in range(3))


class Placed(nn.Module):
    """Places are added to what was computed without a weight: what comes of it is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.rand(7, 6))
        self.queries, self.keys, self.values = (nn.Linear(6, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flip(1) + self.places
        queries, keys, values = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.queries, self.keys, self.values)
        )
        found = (queries @ keys.transpose(-2, -1) * SIZE**-0.5).softmax(-1) @ values
        return self.out(found.transpose(1, 2).flatten(2)) + x


def test_what_is_computed_from_the_input_is_no_weight() -> None:
    torch.manual_seed(0)
    model = Placed().double().eval()
    groups = upop.find_prunable(model, EXAMPLE).groups
    assert [(group.kind, group.channel) for group in groups] == [("attention", "dimension")]
    assert difference(model, groups, 0) < 1e-9


class Raised(nn.Module):
    """Its activation is not 0 at 0, as StarReLU of MetaFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.shift = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square() + self.shift)


def test_what_is_not_zero_where_its_channels_are_is_named() -> None:
    find_prunable = upop.find_prunable(built(Raised), EXAMPLE)
    reasons = {skipped.name: skipped.reason for skipped in find_prunable.skipped}
    assert not find_prunable.groups
    assert "add is not 0 where its channels are 0" in reasons["parts.0"]
    assert __file__ in reasons["parts.1"]


class Grouped(nn.Module):
    """A convolution in groups between two layers, as in Visformer: neurons lie in groups, and both could go."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 1)
        self.between = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=4), nn.BatchNorm2d(24))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.between(F.gelu(self.up(x)))))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_of_nested_axes_one_is_cut_and_the_layers_say_their_channels(kept: int) -> None:
    torch.manual_seed(0)
    model, example = Grouped().double().eval(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    [group] = upop.find_groups(model, example)
    upop.shrink(model, {group.name: range(kept)}, verify=example)
    assert [again.size for again in upop.find_groups(model)] == [kept]
    between, norm = model.between
    assert (between.in_channels, between.out_channels, between.groups) == (6 * kept, 6 * kept, kept)
    assert norm.num_features == 6 * kept
