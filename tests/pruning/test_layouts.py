"""What is read off a forward and what is left alone: rules that the registry of architectures does not reach."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import upop
from pruning.families import VIT, randomise, uneven_plan
from upop.pruning.errors import LayoutError

ATTENTION = "blocks.0.attn"


@pytest.fixture(autouse=True)
def classes_of_a_known_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the classes of this file read as those of a library are, by their modules and forwards."""
    monkeypatch.setattr("upop.pruning.layouts.is_of_ones_own", lambda _model: False)


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


def reasons(model: nn.Module) -> dict[str, str]:
    return {part.name: part.reason for part in upop.survey(model).skipped}


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


class Sometimes(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if x.mean() > 0:
            hidden = self.norm(hidden)
        return self.fc2(hidden)


class Looped(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        for _ in range(2):
            x = self.fc2(hidden)
            hidden = self.gate(x)
        return x


class PastTheLayer(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.linear(x, self.fc1.weight) + self.fc1(x))


class TwoReaders(Block):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden) + self.other(hidden)


@pytest.mark.parametrize("kind", [Plain, Gated, Clamped])
def test_mlps_that_can_be_followed(kind: type[Block]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    (unit,) = upop.find_units(model)
    assert (unit.kind, unit.size, unit.entry) == ("mlp", 12, "neuron")
    # The linear half is masked; a gate goes along.
    assert {part.tensor for part in unit.producers} == {"fc1.weight", "fc1.bias"}
    upop.shrink(model, {unit.name: [0, 3, 4, 11]}, verify=torch.randn(3, 8, dtype=torch.float64))
    assert model.fc1.out_features == model.fc2.in_features == 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Normed, "norm (LayerNorm)"),
        (Moved, "its activation moves 0"),
        (Kept, "it is what the module returns"),
        (Shifted, "it is used in"),
        (Sometimes, "norm (LayerNorm)"),
        (Looped, "it is made in a loop"),
        (PastTheLayer, "its weight is read directly"),
        (TwoReaders, "its hidden axis cannot be followed"),
    ],
)
def test_mlps_that_cannot(kind: type[Block], reason: str) -> None:
    kind.__name__ = f"{kind.__name__}Mlp"
    model = nn.Sequential(kind())
    assert reason in reasons(model)["0"]
    with pytest.raises(LayoutError, match="Looked at 1 places"):
        upop.find_units(model)


class Learned(nn.Module):
    """An activation like those of MetaFormer, which learn where they put 0; at first they leave it there."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1)) if learned else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x.relu() ** 2 + self.shift


Learned.__module__ = "timm.models"  # only known libraries are trusted


class PlainMlp(Plain):
    pass


def test_activations_that_may_come_to_move_0_are_not_trusted() -> None:
    model = PlainMlp()
    model.act = Learned(learned=True)  # type: ignore[assignment]
    assert "its activation moves 0" in reasons(nn.Sequential(model))["0"]
    model.act = Learned(learned=False)  # type: ignore[assignment]
    assert len(upop.find_units(nn.Sequential(model))) == 1


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


class AcrossDimensions(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, self.head_dim).permute(0, 2, 3, 1)
        k = self.k_proj(x).view(b, n, self.num_heads, self.head_dim).permute(0, 2, 3, 1)
        v = self.v_proj(x).view(b, n, self.num_heads, self.head_dim).permute(0, 2, 3, 1)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.permute(0, 3, 1, 2).reshape(b, n, -1))


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


class DimensionsFirst(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.head_dim, self.num_heads).transpose(1, 3)
        k = self.k_proj(x).view(b, n, self.head_dim, self.num_heads).transpose(1, 3)
        v = self.v_proj(x).view(b, n, self.head_dim, self.num_heads).transpose(1, 3)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 3).reshape(b, n, -1))


@pytest.mark.parametrize("kind", [Straight, OfItsInput, OfItsParent])
def test_attention_that_can_be_followed(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    (unit,) = upop.find_units(model)
    assert (unit.entry, unit.size, unit.heads) == ("dimension", 4, 2)
    inputs = torch.randn(2, 5, 8, dtype=torch.float64)
    upop.shrink(model, {unit.name: [1, 2, 3]}, verify=inputs)
    assert model.head_dim == 3
    assert isinstance(model, kind)  # a subclass, where the library's own forward insists on the width
    twin = copy.deepcopy(model)
    upop.shrink(model, {unit.name: [0]}, verify=inputs)
    assert not torch.equal(twin(inputs), model(inputs))


def test_models_with_heads_of_another_width_are_copied_and_pickled() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, embed_dim=24, depths=(2,), num_heads=(3,), window_size=4
    ).eval()
    upop.shrink(model, uneven_plan(upop.find_units(model)))
    assert type(model.layers[0].blocks[0].attn) is not timm.models.swin_transformer_v2.WindowAttention
    inputs = torch.randn(1, 3, 32, 32)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again.layers[0].blocks[0].attn) is type(model.layers[0].blocks[0].attn)
        with torch.no_grad():
            assert torch.equal(again(inputs), model(inputs))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AcrossDimensions, "touches its dimensions"),
        (WithAGate, "touches its dimensions"),
        (ScaledByDimension, "touches its dimensions"),
        (ScaledByHead, "touches its dimensions"),
        (OddFunction, "torch.cumsum()"),
        (DimensionsFirst, "dimensions before heads"),
    ],
)
def test_attention_that_cannot(kind: type[Attention], reason: str) -> None:
    assert reason in reasons(nn.Sequential(kind()))["0"]


def test_key_value_groups_go_with_the_queries_that_share_them() -> None:
    model = llama()
    units = [unit for unit in upop.find_units(model) if unit.kind == "attention"]
    assert [(unit.entry, unit.size) for unit in units] == [("group", 4), ("group", 4)]
    plan = {units[0].name: [1, 3], units[1].name: [2]}
    upop.shrink(model, plan, verify=WORDS)
    upop.shrink(model, {units[0].name: [0]}, verify=WORDS)  # and again
    attention = model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (8, 4)
    assert attention.num_key_value_groups == 2


def test_scores_of_groups_and_gates_are_autograds() -> None:
    model = llama().train()
    pruner = upop.Pruner(model, 0.5, 4, 1, score="signed")
    model(**WORDS).last_hidden_state.square().sum().backward()
    pruner.step()
    (unit, *_) = upop.find_units(model)
    expected = sum(
        (tensor.grad * tensor).sum(1).view(4, -1).sum(1)
        for tensor in (
            model.get_submodule(f"layers.0.self_attn.{name}").weight for name in ("q_proj", "k_proj", "v_proj")
        )
    )
    torch.testing.assert_close(pruner.scores[unit.name], expected.detach())
    pruner.remove()


def wrapped(layer: nn.Linear) -> nn.Module:
    """Put a layer into the shape that adapters have."""
    around = nn.Module()
    around.base_layer, around.lora_A = layer, nn.ModuleDict()
    around.in_features, around.out_features = layer.in_features, layer.out_features
    return around


def as_integers(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return layer


def by_name(layer: nn.Linear) -> nn.Module:
    layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    return layer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrapped, "is wrapped by an adapter"),
        (as_integers, "is quantized (Linear); prune before quantizing"),
        (by_name, "is quantized (Linear4bit)"),
        (torch.nn.utils.parametrizations.weight_norm, "is parametrized; remove the parametrization first"),
    ],
)
def test_layers_that_stand_for_others_are_left_alone(change: Callable[[nn.Module], nn.Module], reason: str) -> None:
    model = vit()
    model.blocks[0].attn.proj = change(model.blocks[0].attn.proj)
    model.blocks[0].mlp.fc2 = change(model.blocks[0].mlp.fc2)
    found = reasons(model)
    assert reason in found[ATTENTION]
    assert reason in found["blocks.0.mlp"]
    with pytest.raises(LayoutError, match="No prunable unit"):
        upop.find_units(model)


def test_layers_that_are_no_linear_ones_are_named() -> None:
    model = llama()
    model.layers[0].self_attn.k_proj = nn.Bilinear(2, 2, 2)  # as packed weights of a quantizing library would be
    assert reasons(model)["layers.0.self_attn"] == "k_proj is a Bilinear, which is no linear layer"


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
    upop.shrink(model, uneven_plan(upop.find_units(model), 2), verify=inputs)
    assert [unit.name for unit in upop.find_units(model)] == [unit.name for unit in upop.find_units(before)]
    assert type(model.blocks[0].mlp.fc1) is ByHand
    pruner = upop.Pruner(before, 0.4, 1)
    before(inputs).square().mean().backward()
    pruner.step()
    pruner.shrink(verify=inputs)


@pytest.mark.parametrize("kind", [Doubled, WithMore])
def test_linear_layers_of_another_class_that_compute_more(kind: type[nn.Linear]) -> None:
    model = vit()
    model.blocks[0].mlp.fc1 = kind(24, 96)
    assert f"is a {kind.__name__}, whose forward is not that of torch.nn.Linear" in reasons(model)["blocks.0.mlp"]


def test_a_forward_put_in_place_of_the_layers_own() -> None:
    model = vit()
    layer = model.blocks[0].mlp.fc1
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2
    assert "whose forward is not that of torch.nn.Linear" in reasons(model)["blocks.0.mlp"]


def test_a_module_under_two_names_is_cut_once() -> None:
    model = vit()
    model.blocks.append(model.blocks[0])
    units = upop.find_units(model)
    assert [unit.name for unit in units] == [ATTENTION, "blocks.0.mlp"]
    upop.shrink(model, uneven_plan(units), verify=torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert model.blocks[1] is model.blocks[0]


def test_models_without_weights_cannot_be_searched_but_cut() -> None:
    with torch.device("meta"):
        model = timm.models.vision_transformer.VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1)
    with pytest.raises(LayoutError, match=r"meta device.*Load its weights first"):
        upop.Pruner(model, 0.5, 2)
    upop.shrink(model, {"blocks.0.mlp": [0, 1]})
    assert model.blocks[0].mlp.fc1.weight.shape == (2, 24)


def test_learned_angles_leave_the_heads_alone() -> None:
    model = timm.create_model(
        "vit_small_patch16_rope_mixed_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3
    )
    assert "head by head" in reasons(model)[ATTENTION]


def test_units_come_in_the_order_of_the_forward() -> None:
    names = [unit.name for unit in upop.find_units(llama())]
    assert names == [f"layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp")]
    assert [unit.name for unit in upop.find_units(VIT.build())][:2] == [ATTENTION, "blocks.0.mlp"]
