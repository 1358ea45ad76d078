"""What `find_prunable` gives and what it leaves alone: blocks written by hand, layers that stand for others, whole
models.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

import upop
from pruning.families import VIT, randomise, uneven_plan
from upop.checkpoints.fitting.carried import set_preparation
from upop.pruning.errors import LayoutError

ATTENTION = "blocks.0.attn"


def vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=5, **settings
    )
    randomise(model)
    return model.double().eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 40}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=50))
    randomise(model)
    return model.double().eval()


WORDS = {"input_ids": torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))}


TOKENS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SEQUENCES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reasons(model: nn.Module, example: Any = None) -> dict[str, str]:
    return {part.name: part.reason for part in upop.find_prunable(model, example).skipped}


class Block(nn.Module):
    """An MLP whose forward is given as a function of the module and its input."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gate = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.act = nn.GELU()
        self.limit = 3.0


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.dropout(self.act(self.fc1(x)), 0.1, self.training))


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        hidden = gate * self.fc1(x)
        if hidden.dtype == torch.float16:
            hidden = hidden.to(torch.float32)
        return self.fc2(hidden)


class Clamped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.gate(x)) * self.fc1(x).clamp(min=-self.limit, max=self.limit))


class Normed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))))


class Moved(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.sigmoid(self.fc1(x)))


class Kept(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden), hidden


class Shifted(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) + 1)


class PastTheLayer(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(F.linear(x, self.fc1.weight) + self.fc1(x)))


class TwoReaders(Block):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden) + self.other(hidden)


@pytest.mark.parametrize("kind", [Plain, Gated, Clamped, PastTheLayer, TwoReaders])
def test_mlps_that_can_be_followed(kind: type[Block]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    (group,) = upop.find_groups(model, TOKENS)
    assert (group.kind, group.size, group.channel) == ("mlp", 12, "neuron")
    upop.shrink(model, {group.name: [0, 3, 4, 11]}, verify=TOKENS)
    assert model.fc1.out_features == model.fc2.in_features == 4


def test_the_linear_half_of_a_gated_mlp_is_masked() -> None:
    (group,) = upop.find_groups(Gated().double().eval(), TOKENS)
    assert {part.tensor for part in group.producers} == {"fc1.weight", "fc1.bias"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Normed, "it is normalised over"),
        (Moved, "sigmoid is not 0 where its channels are 0"),
        (Kept, "it leaves the model"),
        (Shifted, "add is not 0 where its channels are 0"),
    ],
)
def test_mlps_that_cannot(kind: type[Block], reason: str) -> None:
    model = kind().double().eval()
    assert reason in reasons(model, TOKENS)["fc1"]
    with pytest.raises(LayoutError, match="2 parts were skipped"):
        upop.find_groups(model, TOKENS)


class Learned(nn.Module):
    """An activation like those of MetaFormer, which learn where they put 0; at first they leave it there."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1)) if learned else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x.relu() ** 2 + self.shift


def test_activations_that_may_come_to_move_0_are_not_trusted() -> None:
    model = Plain().eval()
    model.act = Learned(learned=True)  # type: ignore[assignment]
    assert "add is not 0 where its channels are 0" in reasons(model, TOKENS.float())["fc1"]
    model.act = Learned(learned=False)  # type: ignore[assignment]
    assert len(upop.find_groups(model, TOKENS.float())) == 1


class Attention(nn.Module):
    """An attention of two heads, whose forward is left to its subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        self.gate = nn.Linear(8, 8)
        self.scales = nn.Parameter(torch.rand(4))
        self.mix = nn.Linear(2, 2)

    def heads(self, x: Tensor) -> list[Tensor]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return [layer(x).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for layer in layers]


class Straight(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).reshape(b, n, -1))


class OfItsInput(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, c // self.num_heads).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.num_heads, c // self.num_heads).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_heads, c // self.num_heads).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * self.head_dim**-0.5
        return x + self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class OfItsParent(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[1], 8)).reshape(x.shape)


class WithAGate(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.out_proj(attended * torch.sigmoid(self.gate(x)))


class ScaledByDimension(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) * self.scales
        k = self.k_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class ScaledByHead(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) * self.mix.bias[:, None, None]
        k = self.k_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class OddFunction(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = torch.cumsum(self.q_proj(x), -1).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("kind", [Straight, OfItsInput, OfItsParent, WithAGate, ScaledByDimension, ScaledByHead])
def test_attention_that_can_be_followed(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    (group,) = upop.find_groups(model, SEQUENCES)
    assert (group.channel, group.size, group.heads) == ("dimension", 4, 2)
    upop.shrink(model, {group.name: [1, 2, 3]}, verify=SEQUENCES)
    assert model.q_proj.out_features == 6
    assert isinstance(model, kind)  # a subclass, where the forward insists on the width
    twin = copy.deepcopy(model)
    upop.shrink(model, {group.name: [0]}, verify=SEQUENCES)
    assert not torch.equal(twin(SEQUENCES), model(SEQUENCES))


def test_attention_that_cannot() -> None:
    found = upop.find_prunable(OddFunction().double().eval(), SEQUENCES)
    assert not found.groups
    assert any(part.name == "q_proj" and "cumsum is taken over it" in part.reason for part in found.skipped)


def test_key_value_groups_go_with_the_queries_that_share_them() -> None:
    model = llama()
    groups = [group for group in upop.find_groups(model) if group.kind == "attention"]
    assert [(group.channel, group.size) for group in groups] == [("group", 4), ("group", 4)]
    plan = {groups[0].name: [1, 3], groups[1].name: [2]}
    upop.shrink(model, plan, verify=WORDS)
    upop.shrink(model, {groups[0].name: [0]}, verify=WORDS)  # and again
    attention = model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (8, 4)
    assert attention.num_key_value_groups == 2


def test_scores_of_groups_and_gates_are_autograds() -> None:
    model = llama().train()
    pruner = upop.Pruner(model, 0.5, 4, 1, importance="signed")
    model(**WORDS).last_hidden_state.square().sum().backward()
    pruner.step()
    (group, *_) = upop.find_groups(model)
    expected = sum(
        (tensor.grad * tensor).sum(1).view(4, -1).sum(1)
        for tensor in (
            model.get_submodule(f"layers.0.self_attn.{name}").weight for name in ("q_proj", "k_proj", "v_proj")
        )
    )
    torch.testing.assert_close(pruner.scores[group.name], expected.detach())
    pruner.remove()


def as_integers(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (as_integers, "has quantised weights; prune the model before it is quantised"),
        (torch.nn.utils.parametrizations.weight_norm, "is parametrized"),
    ],
)
def test_layers_that_stand_for_others_are_left_alone(change: Callable[[nn.Module], nn.Module], reason: str) -> None:
    model = vit()
    model.blocks[0].attn.proj = change(model.blocks[0].attn.proj)
    model.blocks[0].mlp.fc2 = change(model.blocks[0].mlp.fc2)
    found = reasons(model)
    assert reason in found[f"{ATTENTION}.proj"]
    assert reason in found["blocks.0.mlp.fc2"]
    with pytest.raises(LayoutError, match="No prunable group"):
        upop.find_groups(model)


def test_models_that_cannot_be_run_say_why() -> None:
    model = llama()
    model.layers[0].self_attn.k_proj = nn.Bilinear(2, 2, 2)
    with pytest.raises(LayoutError, match=r"missing 1 required positional argument"):
        upop.find_prunable(model)


class ByHand(nn.Linear):
    """What torch's own computes, written out, as Falcon's layers are."""

    def forward(self, x: Tensor) -> Tensor:
        found = x @ self.weight.T
        return found if self.bias is None else found + self.bias


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WithMore(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.more = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.more


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_of_another_class_that_compute_the_same(bias: bool) -> None:
    model = vit()
    for block in model.blocks:
        block.mlp.fc1, block.mlp.fc2 = ByHand(24, 40, bias), ByHand(40, 24, bias)
        block.attn.qkv = ByHand(24, 72, bias)
    model.double()
    before = copy.deepcopy(model)
    inputs = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    upop.shrink(model, uneven_plan(upop.find_groups(model), 2), verify=inputs)
    assert [group.name for group in upop.find_groups(model)] == [group.name for group in upop.find_groups(before)]
    assert type(model.blocks[0].mlp.fc1) is ByHand
    pruner = upop.Pruner(before, 0.4, 1)
    before(inputs).square().mean().backward()
    pruner.step()
    pruner.shrink(verify=inputs)


@pytest.mark.parametrize("kind", [Doubled, WithMore])
def test_linear_layers_of_another_class_that_compute_more(kind: type[nn.Linear]) -> None:
    model = vit()
    model.blocks[0].mlp.fc1 = kind(24, 96).double()
    groups = upop.find_groups(model)
    assert [group.name for group in groups] == [ATTENTION, "blocks.0.mlp"]
    upop.shrink(model, uneven_plan(groups), verify=torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_a_forward_put_in_place_of_the_layers_own() -> None:
    model = vit()
    layer = model.blocks[0].mlp.fc1
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2
    groups = upop.find_groups(model)
    assert [group.name for group in groups] == [ATTENTION, "blocks.0.mlp"]
    upop.shrink(model, uneven_plan(groups), verify=torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_a_module_under_two_names_is_cut_once(tmp_path: Path) -> None:
    def build() -> Any:
        model = vit()
        model.blocks.append(model.blocks[0])
        return model

    model = build()
    groups = upop.find_groups(model)
    assert [group.name for group in groups] == [ATTENTION, "blocks.0.mlp"]
    upop.shrink(model, uneven_plan(groups), verify=torch.randn(2, 3, 16, 16, dtype=torch.float64))
    again = upop.load_into(build(), upop.save(model, tmp_path / "out"))
    for loaded in (model, again):
        assert loaded.blocks[1] is loaded.blocks[0]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_models_without_weights_cannot_be_searched_but_cut() -> None:
    with torch.device("meta"):
        model = timm.models.vision_transformer.VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1)
    with pytest.raises(LayoutError, match=r"meta device.*Load its weights first"):
        upop.Pruner(model, 0.5, 2)
    upop.shrink(model, {"blocks.0.mlp": [0, 1]})
    assert model.blocks[0].mlp.fc1.weight.shape == (2, 24)


def test_groups_come_in_the_order_of_the_forward() -> None:
    names = [group.name for group in upop.find_groups(llama())]
    assert names == [f"layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp")]
    assert [group.name for group in upop.find_groups(VIT.build())][:2] == [ATTENTION, "blocks.0.mlp"]


def test_survey_changes_nothing() -> None:
    torch.manual_seed(0)
    model = vit(norm_layer=nn.LayerNorm, drop_path_rate=0.1, attn_drop_rate=0.1).train()
    model.patch_embed.norm = nn.BatchNorm1d(4).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    kept = [dict(vars(module)) for module in model.modules()]
    state = torch.get_rng_state()
    upop.find_prunable(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [dict(vars(module)) for module in model.modules()] == kept
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Drawn(nn.Module):
    """Draws from Python's and NumPy's generators; its constrained layer changes a buffer when its weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.beside = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        moved = 1 + random.random() + float(numpy.random.rand())
        result: Tensor = x + moved * self.down(self.up(x).relu()) + self.beside(x)
        return result


def test_other_generators_and_computed_weights_stay_as_they_are() -> None:
    model = Drawn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    python, drawn = random.getstate(), numpy.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    found = upop.find_prunable(model, torch.randn(2, 5, 8))
    assert [group.name for group in found.groups] == ["up"] and found.coverage.of_blocks < 1
    assert random.getstate() == python
    assert (numpy.random.get_state()[1] == drawn).all()  # type: ignore[index, union-attr]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_differ_in_their_weights_alone_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = upop.find_groups(vit(qkv_bias=False))
    shares = upop.find_prunable(vit(qkv_bias=False)).coverage
    read = []
    monkeypatch.setattr("upop.pruning.axes.read", lambda *_: read.append(1) or ([], []))
    again = vit(qkv_bias=False)
    randomise(again, 1)
    assert upop.find_groups(again) == first
    for precision in (torch.float32, torch.bfloat16):  # groups are proved in float64, whatever the weights are in
        other = vit(qkv_bias=False).to(precision)
        set_preparation(other, {"image_size": 16})  # a note that no forward reads
        assert upop.find_groups(other) == first
        assert upop.find_prunable(other).coverage == shares
    assert not read
    hooked, mixed = vit(qkv_bias=False), vit(qkv_bias=False)
    hooked.blocks[0].mlp.register_forward_hook(lambda *_: None)
    mixed.blocks[0].mlp.bfloat16()
    for other in (vit(qkv_bias=True), hooked, mixed):
        upop.find_prunable(other)
    assert len(read) == 3


def test_groups_of_dropped_layers_are_dropped_with_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    groups = upop.find_groups(model)
    upop.shrink(model, {group.name: range(group.size // 2) for group in groups})  # as many heads as dimensions, now
    model.blocks = model.blocks[:2]
    left = upop.find_prunable(model)
    assert [(group.name, group.size, group.heads) for group in left.groups] == [
        (group.name, group.size // 2, group.heads) for group in groups[:4]
    ]
    assert sum(share.parameters for share in left.coverage.shares.values()) == upop.count_parameters(model)
    with pytest.warns(UserWarning, match=r"Were layers dropped"):
        folder = upop.save(model, tmp_path / "cut")
    again = upop.load(folder).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_layers_that_are_dropped_from_the_middle_leave_a_file_that_loads(tmp_path: Path) -> None:
    """What follows a dropped layer has the names of others: of a layer that was empty, or that was not cut."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
    images = torch.randn(1, 3, 32, 32)
    for kept, dropped in (({0: 6, 1: 0, 2: 6, 3: 6}, 1), ({2: 6}, 0)):
        model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
        cut = {group.name: int(group.name.split(".")[1]) for group in upop.find_groups(model)}
        upop.shrink(model, {name: range(kept[layer]) for name, layer in cut.items() if layer in kept})
        del model.blocks[dropped]
        with pytest.warns(UserWarning, match=r"Were layers dropped"):
            folder = upop.save(model, tmp_path / f"without {dropped}")
        again = upop.load(folder)
        with torch.no_grad():
            assert torch.equal(again(images), model(images))


def test_a_copy_with_as_many_heads_as_dimensions_is_saved_as_what_was_cut(tmp_path: Path) -> None:
    """Read anew, its heads could be what was cut; the plan that it carries says that it was dimensions."""
    tower = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = CLIPTextModel(CLIPTextConfig(**tower, num_attention_heads=4, max_position_embeddings=16)).eval()
    upop.shrink(model, {group.name: range(group.size // 2) for group in upop.find_groups(model)})
    again = upop.load(upop.save(copy.deepcopy(model), tmp_path / "copy"))
    ids = torch.randint(64, (1, 5))
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


def test_a_copy_of_a_model_without_a_branch_is_saved_as_the_model_is(tmp_path: Path) -> None:
    """An average of weights is such a copy; nothing that could be read is left of the branch."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    upop.shrink(model, {"blocks.0.mlp": (), "blocks.1.attn": range(5)})
    again = upop.load(upop.save(copy.deepcopy(model), tmp_path / "copy"))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
