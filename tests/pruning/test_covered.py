"""Coverage: every weight matrix is in a group, skipped for a reason, or outside, and it is said how much that
is.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import upop
from pruning.test_stated import GATED, Gated, Net
from upop.cli.app import app

WORDS = torch.tensor([[1, 5, 9, 3], [2, 7, 4, 8]])
IMAGES = torch.randn(2, 3, 32, 32)
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 4)
    )


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2, enable_nested_tensor=False)


class One(nn.Module):
    """A single block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.head(inputs + self.down(self.up(inputs).relu()))
        return result


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "vit": (vit, IMAGES),
    "swin": (swin, IMAGES),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=16)), {"input_ids": WORDS}),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=16)),
        {"input_ids": WORDS},
    ),
    "encoder": (encoder, torch.randn(2, 5, 32)),
    "opaque": (lambda: Net(Gated, Gated), torch.randn(2, 6, 32)),
    "one": (One, torch.randn(2, 6, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_in_one_place(name: str) -> None:
    build, inputs = MODELS[name]
    model = build().eval()
    found = upop.find_prunable(model, inputs)
    covered = found.coverage
    named = dict(model.named_parameters())
    assert set(covered.where) == set(named)
    assert sum(share.parameters for share in covered.shares.values()) == upop.count_parameters(model)
    assert sum(share.macs or 0 for share in covered.shares.values()) == upop.count_macs(model, inputs)
    cut = {part.tensor for group in found.groups for part in group.slices}
    for tensor, place in covered.where.items():
        assert place == "groups" or tensor not in cut
        if named[tensor].dim() > 1:
            assert (place == "groups") == (tensor in cut)
            assert (place == "skipped") == (tensor in covered.reasons)
    assert all(covered.reasons.values())


def test_what_the_shares_are() -> None:
    covered = upop.find_prunable(vit(), IMAGES).coverage
    assert covered.of_blocks == 1 and not covered.reasons
    assert covered.where["head.weight"] == covered.where["patch_embed.proj.weight"] == "outside"
    assert covered.where["blocks.1.norm1.weight"] == "outside"
    assert covered.where["blocks.1.attn.qkv.bias"] == "groups"
    lines = str(covered).splitlines()
    assert [line.split()[0] for line in lines] == ["groups", "skipped", "outside"]
    assert lines[1].split()[1:3] == ["0.0", "%"]
    opaque = upop.find_prunable(Net(Gated, Gated), torch.randn(2, 6, 32)).coverage
    assert opaque.of_blocks == 0
    assert "upop_tests::bend" in opaque.reasons["blocks.0.both.weight"]
    assert opaque.where["head.weight"] == "outside"


def test_a_search_over_little_of_a_model_warns_once_and_says_why() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.opaque, self.plain = Gated(32, 64), One()

        def forward(self, inputs: Tensor) -> Tensor:
            up, down = self.plain.up, self.plain.down
            result: Tensor = inputs + self.opaque(inputs) + down(up(inputs).relu())
            return result

    model = Net(Half, Half)
    inputs = torch.randn(2, 6, 32)
    with pytest.warns(UserWarning, match=r"\d+ % of the parameters.*blocks.*upop_tests::bend.*GroupSpec") as described:
        upop.Pruner(model, 0.3, 2, example=inputs).remove()
    assert len(described) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upop.Pruner(model, 0.3, 2, example=inputs, groups=[GATED]).remove()


def test_the_command_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["inspect", "vit_tiny_patch16_224", "--set", "depth=1", "--set", "img_size=32"]
    for arguments in (call, [*call, "--json"]):
        with pytest.raises(SystemExit) as ended:
            app(arguments)
        assert ended.value.code == 0
    shown, _, written = capsys.readouterr().out.partition("\n{")
    assert "Coverage" in shown and "skipped, with a reason" in shown
    content = json.loads("{" + written)
    shares = content["coverage"]["shares"]
    assert sum(share["parameters"] for share in shares.values()) == content["parameters"]
    assert sum(share["macs"] for share in shares.values()) == content["macs"]
    assert [group["name"] for group in content["groups"]] == ["blocks.0.attn", "blocks.0.mlp"]
    assert content["coverage"]["of_blocks"] == 1 and content["coverage"]["reasons"] == {}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # peft asks transformers in an older way
def test_low_rank_factors_are_no_mlps() -> None:
    from peft import LoraConfig, get_peft_model

    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=16))
    model = get_peft_model(base, LoraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"]))
    found = upop.find_prunable(model, {"input_ids": WORDS})
    assert [group.kind for group in found.groups] == ["attention", "mlp"] * 2
    reasons = {part.name: part.reason for part in found.skipped}
    assert "low-rank" in reasons["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"]
    assert not any("lora_A" in part.tensor for group in found.groups for part in group.slices if part.produces)
