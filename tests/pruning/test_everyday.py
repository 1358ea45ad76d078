"""More modules as people write them: caches, scans, functions that modules keep, one layer for several things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning import by_hand
from pruning.test_axes import EXAMPLE, HEADS, WIDTH, built
from pruning.test_hand_written import HIDDEN, SIZE, check
from upop.pruning.duplicates import duplicate


class Lambda(nn.Module):
    """Its forward is a function that it keeps, around its layers, as in minGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN), "act": nn.GELU(), "down": nn.Linear(HIDDEN, WIDTH)})
        layers = self.mlp
        self.run = lambda x, up=layers["up"]: layers["down"](layers["act"](up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Parallel(nn.Module):
    """One layer makes queries, keys, values and neurons, which are taken apart by their numbers; one takes them all."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH + HIDDEN), nn.Linear(WIDTH + HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        *kinds, hidden = self.into(x).split([WIDTH, WIDTH, WIDTH, HIDDEN], dim=-1)
        q, k, v = (each.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for each in kinds)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.out(torch.cat([attended, F.gelu(hidden)], -1))


class Cached(nn.Module):
    """Puts keys and values into buffers, and reads them there."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("keys", torch.zeros(4, 16, HEADS, SIZE))
        self.register_buffer("values", torch.zeros(4, 16, HEADS, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, SIZE).unbind(2)
        self.keys[:batch, :length], self.values[:batch, :length] = k, v
        held = (each[:batch, :length].transpose(1, 2) for each in (self.keys, self.values))
        return self.out(F.scaled_dot_product_attention(q.transpose(1, 2), *held).transpose(1, 2).reshape(x.shape))


class Scan(nn.Module):
    """A state space whose state begins at zero and is added up, as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.along = nn.Conv1d(HIDDEN, HIDDEN, 4, groups=HIDDEN, padding=3)
        self.described, self.step = nn.Linear(HIDDEN, 4 + 2 * 8), nn.Linear(4, HIDDEN)
        self.decay, self.past = nn.Parameter(torch.rand(HIDDEN, 8)), nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.into(x).chunk(2, -1)
        u = F.silu(self.along(u.mT)[..., : x.shape[1]].mT)
        step, read, write = self.described(u).split([4, 8, 8], -1)
        step = F.softplus(self.step(step))
        state, found = x.new_zeros(x.shape[0], u.shape[-1], 8), []
        for at in range(x.shape[1]):
            kept = torch.exp(-step[:, at, :, None] * self.decay.exp()) * state
            state = kept + (step * u)[:, at, :, None] * write[:, at, None]
            found.append((state * read[:, at, None]).sum(-1))
        return self.out((torch.stack(found, 1) + u * self.past) * F.silu(gate))


class Inside(nn.Module):
    """A residual stream of its own, inside the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = (
            nn.Linear(WIDTH, HIDDEN),
            nn.Linear(HIDDEN, HIDDEN),
            nn.Linear(HIDDEN, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        return self.down(hidden + F.relu(self.middle(hidden)))


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        (Lambda, {("mlp", "neuron"): 2}),
        (Parallel, {("attention", "dimension"): 2, ("mlp", "neuron"): 2}),
        (Cached, {("attention", "dimension"): 2}),
        (Scan, {("mlp", "neuron"): 2}),
        (Inside, {("mlp", "neuron"): 2}),
    ],
)
def test_modules(inner: Callable[[], nn.Module], found: dict[tuple[str, str], int]) -> None:
    check(inner, found)


def test_a_teacher_runs_its_own_layers() -> None:
    model = built(Lambda)
    before = model(EXAMPLE)
    teacher = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(teacher(EXAMPLE), before)


class Single(nn.Module):
    """Attends in float32 whatever the weights are, with a sum of large numbers that cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2).float() for each in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(x.dtype))


def test_rounding_is_that_of_the_lowest_precision_on_the_way() -> None:
    model = built(Single)
    groups = upop.find_prunable(model, EXAMPLE).groups
    assert [group.channel for group in groups] == ["dimension"] * 2
    upop.shrink(model, {group.name: range(3) for group in groups})


class Loop(nn.Module):
    """One forward for all blocks, in which the width is written as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        for qkv, out in zip(self.qkv, self.out, strict=True):
            parts = qkv(x).split(WIDTH, 2)
            q, k, v = (part.view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts)
            heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x = x + out(heads.reshape(batch, tokens, WIDTH))
        return x


def test_blocks_of_one_forward_are_cut_to_different_widths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    groups, _, _ = by_hand.check(Loop().double(), example, tmp_path, attentions=3, mlps=0)
    assert [group.channel for group in groups] == ["dimension"] * 3


class ParallelLoop(nn.Module):
    """Blocks of one forward, each of which takes attention and neurons apart by the numbers of `Parallel`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Parallel() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            *kinds, hidden = block.into(x).split([WIDTH, WIDTH, WIDTH, HIDDEN], dim=-1)
            q, k, v = (each.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for each in kinds)
            attended = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).reshape(x.shape)
            x = x + block.out(torch.cat([attended, F.gelu(hidden)], -1))
        return x


def test_blocks_that_one_forward_splits_alike_are_cut_in_one_kind_of_their_pieces() -> None:
    torch.manual_seed(0)
    model, example = ParallelLoop().eval(), torch.randn(2, 5, WIDTH)
    found = upop.find_prunable(model, example)
    assert [group.channel for group in found.groups] == ["dimension"] * 2
    assert [each.reason for each in found.skipped if "same sum" in each.reason], found.skipped
    upop.shrink(model, {group.name: range(SIZE - 1 - at) for at, group in enumerate(found.groups)}, verify=example)
    inner = [block.into.out_features for block in model.blocks]
    assert inner == [3 * HEADS * (SIZE - 1) + HIDDEN, 3 * HEADS * (SIZE - 2) + HIDDEN]


class TrainingAlone(nn.Module):
    """Runs in training mode alone, where it drops neurons and takes statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise NotImplementedError("training alone")
        return x + self.down(self.drop(F.relu(self.norm(self.up(x)))))


class Around(nn.Module):
    """Runs a part that runs in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TrainingAlone()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def cut_by_search(model: nn.Module, batch: Tensor) -> None:
    pruner = upop.Pruner(model, 0.5, 2, correct=False)
    for _ in range(2):
        model.train()(batch).square().mean().backward()
        pruner.step()
    pruner.shrink()
    assert all(module.training for module in model.modules())


def cut_by_batches(model: nn.Module, batch: Tensor) -> None:
    upop.calibrate(model, [batch] * 2, 0.5, loss=lambda model, batch: model(batch).square().mean(), correct=False)


@pytest.mark.parametrize("cut", [cut_by_search, cut_by_batches])
def test_what_runs_in_training_mode_alone_is_cut_without_its_dropout(cut: Callable[[nn.Module, Tensor], None]) -> None:
    torch.manual_seed(0)
    model, batch = Around(), torch.randn(16, WIDTH)
    found = upop.find_prunable(model, batch)
    assert [group.name for group in found.groups] == ["inner"], found.skipped
    cut(model, batch)
    inner = model.inner
    assert inner.up.out_features == inner.norm.num_features == inner.down.in_features < HIDDEN
    with pytest.raises(NotImplementedError):
        model.eval()(batch)


def test_models_of_one_class_have_their_own_modes() -> None:
    class Chosen(nn.Module):
        def __init__(self, mode: bool) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
            self.mode = mode

        def forward(self, batch: Tensor) -> Tensor:
            if self.training != self.mode:
                raise NotImplementedError("not in this mode")
            result: Tensor = self.inner(batch)
            return result

    for mode in (True, False):
        model = Chosen(mode)
        assert len(upop.find_prunable(model, torch.randn(16, WIDTH)).groups) == 1
