"""Layers of which nothing is left go where the configuration counts layers: plain libraries load what is saved."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTModel,
)

import upop
from pruning.families import randomise

WORDS = torch.arange(2, 10).view(2, 4)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 30, "bos_token_id": 0, "eos_token_id": 1}


def llama(**settings: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2, intermediate_size=24, **settings))


def qwen() -> nn.Module:
    return Qwen2ForCausalLM(
        Qwen2Config(**TEXT, num_key_value_heads=2, intermediate_size=24, use_sliding_window=True, max_window_layers=2)
    )


def opt() -> nn.Module:
    sizes = {"word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(**TEXT, **sizes))


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**SIZES, intermediate_size=24, image_size=32, patch_size=16))


def bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES, vocab_size=30, intermediate_size=24))


def in_timm() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=4, num_heads=3)


def outputs(model: Any) -> Tensor:
    images = any(parameter.dim() == 4 for parameter in model.parameters())
    with torch.no_grad():
        found = model(IMAGES if images else WORDS)
    return found if isinstance(found, Tensor) else found[0]


def without(model: nn.Module, *gone: int) -> nn.Module:
    """Cut all groups of some layers to nothing."""
    model.eval()
    randomise(model)
    groups = upop.find_groups(model)
    places = [next(part for part in group.name.split(".") if part.isdigit()) for group in groups]
    upop.shrink(model, {group.name: [] for group, at in zip(groups, places, strict=True) if int(at) in gone})
    return model


@pytest.mark.parametrize(
    ("build", "gone"),
    [
        (llama, (0, 2)),
        (vit, (0, 1, 3)),
        pytest.param(qwen, (1, 3), marks=pytest.mark.slow),
        pytest.param(opt, (1, 2), marks=pytest.mark.slow),
    ],
)
def test_transformers_loads_fewer_layers_by_itself(build: Any, gone: tuple[int, ...], tmp_path: Path) -> None:
    model = without(build(), *gone)
    expected = outputs(model)
    upop.save(model, tmp_path / "saved")
    assert len({id(each) for each in model.parameters()}) == len(list(model.parameters()))
    torch.testing.assert_close(outputs(model), expected)  # it was left as it was
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 - len(gone)
    assert "quantization_config" not in config
    assert len(config.get("layer_types") or range(4 - len(gone))) == 4 - len(gone)
    kind = AutoModelForCausalLM if "CausalLM" in type(model).__name__ else AutoModel
    plain = kind.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(outputs(plain), expected, rtol=1e-4, atol=1e-4)
    again = upop.load(tmp_path / "saved")
    torch.testing.assert_close(outputs(again), expected, rtol=1e-4, atol=1e-4)
    if kind is AutoModelForCausalLM:
        given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
        assert torch.equal(plain.generate(WORDS, **given), model.generate(WORDS, **given))


@pytest.mark.parametrize("gone", [(0, 1), pytest.param((2,), marks=pytest.mark.slow)])
def test_timm_builds_fewer_layers_by_itself(gone: tuple[int, ...], tmp_path: Path) -> None:
    model = without(in_timm(), *gone)
    upop.save(model, tmp_path / "saved")
    plain = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert len(plain.blocks) == 4 - len(gone)
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(upop.load(tmp_path / "saved")), outputs(plain))


def test_layers_that_are_left_may_be_of_any_size(tmp_path: Path) -> None:
    model = llama().eval()
    randomise(model)
    upop.shrink(
        model,
        {
            "model.layers.1.self_attn": [],
            "model.layers.1.mlp": [],
            "model.layers.2.mlp": range(5),
            "model.layers.3.self_attn": [],
        },
    )
    upop.save(model, tmp_path / "saved")
    again = upop.load(tmp_path / "saved")
    assert {group.name: group.size for group in upop.find_groups(again)} == {
        "model.layers.0.self_attn": 2,
        "model.layers.0.mlp": 24,
        "model.layers.1.self_attn": 2,
        "model.layers.1.mlp": 5,
        "model.layers.2.self_attn": 0,
        "model.layers.2.mlp": 24,
    }
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "saved" / "upop.json").read_text())["plan"]["groups"]
    assert written["model.layers.1.mlp"] == {"size": 24, "kept": list(range(5))}
    assert not any(".3." in name for name in written)


def test_a_layer_whose_heads_cannot_go_is_none_of_which_nothing_is_left(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 2}, num_key_value_heads=1)).eval()
    upop.shrink(model, {"model.layers.1.mlp": [], "model.residual": range(10)})
    upop.save(model, tmp_path / "saved")  # a warning is an error here
    again = upop.load(tmp_path / "saved")
    assert upop.count_parameters(again) == upop.count_parameters(model)
    torch.testing.assert_close(outputs(again), outputs(model))


@pytest.mark.parametrize(
    ("build", "gone", "why"),
    [
        (bert, (1,), "a norm follows them"),
        (lambda: llama(attention_bias=True, tie_word_embeddings=True), (0,), "without them"),
    ],
)
def test_layers_that_have_to_stay_are_saved_as_they_are(
    build: Any, gone: tuple[int, ...], why: str, tmp_path: Path
) -> None:
    model = without(build(), *gone)
    with pytest.warns(UserWarning, match=f"Layers.*stay in the file: .*{why}"):
        upop.save(model, tmp_path / "saved")
    assert torch.equal(outputs(upop.load(tmp_path / "saved")), outputs(model))


@pytest.mark.parametrize("build", [llama, pytest.param(in_timm, marks=pytest.mark.slow)])
def test_a_uniform_search_with_depth_leaves_an_ordinary_model(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    randomise(model)
    batch = {"input_ids": WORDS, "labels": WORDS} if build is llama else IMAGES
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="uniform='tower' leaves")
        plan = upop.calibrate(model, [batch] * 2, 0.8, stages=2, uniform="tower", depth=True, correct=False)
    layers = [[kept for name, kept in plan.items() if f".{at}." in name] for at in range(4)]
    gone = [not any(kept) for kept in layers]
    assert 0 < sum(gone) < 4
    assert all(all(kept) for kept, went in zip(layers, gone, strict=True) if not went)  # layers go, branches do not
    assert len({tuple(map(len, kept)) for kept, went in zip(layers, gone, strict=True) if not went}) == 1
    upop.save(model, tmp_path / "saved")
    if build is llama:
        plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    else:
        plain = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    torch.testing.assert_close(outputs(plain.eval()), outputs(model), rtol=1e-4, atol=1e-4)
