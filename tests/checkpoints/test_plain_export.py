"""Cut models whose layers differ, written for programs without upop: padded with zeros, and as nemotron-nas."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import upop
from pruning.families import randomise
from tiers import since
from upop.checkpoints.export.plain_models import write_plain
from upop.cli.app import app, main
from upop.errors import RunFolderError, SettingError

WORDS = torch.tensor([[1, 5, 9, 3, 7], [2, 7, 4, 8, 6]])
KEPT = {"model.layers.0.self_attn": [2], "model.layers.1.self_attn": [0, 1, 3], "model.layers.2.self_attn": [1, 3]}


def llama(**kept: Any) -> LlamaForCausalLM:
    """Return a decoder of 8 heads in 4 groups, whose layers keep 1, 3 and 2 groups, and 200, 300 and 400 neurons."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=500,
        vocab_size=20,
        max_position_embeddings=32,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    randomise(model)
    neurons = {f"model.layers.{layer}.mlp": range(layer, 200 + 101 * layer) for layer in range(3)}
    upop.shrink(model, {**KEPT, **neurons, **kept})
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=WORDS).logits
    return found


@since("transformers", "5.23", "its Llama takes numbers of heads that do not divide the width")
def test_padded_decoder_loads_as_an_ordinary_one(tmp_path: Path) -> None:
    model = llama()
    described = write_plain(model, tmp_path / "padded", "padded")
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    # Three groups are six heads, which do not divide a width of 64: the next that do are all four.
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (4, 400)
    assert "quantization_config" not in config
    assert not (tmp_path / "padded" / "upop.json").exists()
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "padded").eval()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    assert f"{sum(each.numel() for each in plain.parameters()):,} parameters" in described
    assert "of the reduction is left" in described
    assert "from_pretrained" in (tmp_path / "padded" / "README.md").read_text()


@since("transformers", "5.23", "its modules have other names")
def test_padding_within_heads_keeps_what_softmax_divides_by(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model: Any = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
    randomise(model)
    upop.shrink(model, {"layers.0.attention": [0, 3, 5], "layers.1.attention": range(6), "layers.1.mlp": range(30)})
    described = write_plain(model, tmp_path / "padded", "padded")
    plain = ViTModel.from_pretrained(tmp_path / "padded").eval()
    assert plain.config.head_dim == 6
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(images)[0], model(images)[0], rtol=1e-4, atol=1e-5)
    assert "no number" not in described


@since("timm", "1.0.31", "it unpickles safetensors of a local-dir")
def test_padded_timm_model_is_built_by_timm(tmp_path: Path) -> None:
    made = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    model: Any = timm.create_model("vit_tiny_patch16_224", **made).eval()
    randomise(model)
    upop.shrink(model, {"blocks.0.mlp": range(41), "blocks.1.mlp": range(5, 30), "blocks.1.attn": range(5)})
    upop.save(model, tmp_path / "cut")
    app(["export", str(tmp_path / "cut"), "--to", "padded", "--out", str(tmp_path / "plain")], standalone_mode=False)
    plain: Any = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert plain.blocks[1].mlp.fc1.out_features == 41
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)


def equal_network(folder: Path) -> Any:
    """Build what config.json describes, layer by layer, of Llama's layers, and read its weights."""
    described = json.loads((folder / "config.json").read_text())
    assert (described["architectures"], described["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    names = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "rope_theta")
    shared = {
        name: described[name] for name in (*names, "attention_bias", "max_position_embeddings", "tie_word_embeddings")
    }

    def config(block: dict[str, Any]) -> LlamaConfig:
        width = int(2 * block["ffn"]["ffn_mult"] * described["hidden_size"] / 3)
        groups, rest = divmod(described["num_attention_heads"], block["attention"]["n_heads_in_group"])
        assert not rest
        assert not block["attention"]["no_op"]
        assert not block["ffn"]["no_op"]
        made = LlamaConfig(**shared, num_key_value_heads=groups, intermediate_size=-(-width // 256) * 256)
        made._attn_implementation = "eager"
        return made

    blocks = described["block_configs"]
    model: Any = LlamaForCausalLM(config(blocks[0])).eval()
    for layer, block in enumerate(blocks):
        model.model.layers[layer] = LlamaDecoderLayer(config(block), layer).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def test_nemotron_nas_is_read_into_an_equal_network(tmp_path: Path) -> None:
    model = llama()
    upop.save(model, tmp_path / "cut")
    app(
        ["export", str(tmp_path / "cut"), "--to", "nemotron-nas", "--out", str(tmp_path / "deci")],
        standalone_mode=False,
    )
    torch.testing.assert_close(logits(equal_network(tmp_path / "deci")), logits(model), rtol=1e-4, atol=1e-5)
    described = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert [block["attention"]["n_heads_in_group"] for block in described["block_configs"]] == [8, 2, 4]
    assert described["per_layer_config"] == {
        "0": {"num_key_value_heads": 1, "intermediate_size": 256},
        "1": {"num_key_value_heads": 4, "intermediate_size": 512},
        "2": {"num_key_value_heads": 2, "intermediate_size": 512},
    }
    held = load_file(tmp_path / "deci" / "model.safetensors")
    assert held["model.layers.0.self_attn.k_proj.weight"].shape == (8, 64)  # keys and values stay cut
    assert "vLLM" in (tmp_path / "deci" / "README.md").read_text()


def test_nemotron_nas_takes_a_plain_folder_with_fewer_heads_and_neurons(tmp_path: Path) -> None:
    alike = {f"model.layers.{layer}.mlp": range(300) for layer in range(3)}
    model = llama(**{f"model.layers.{layer}.self_attn": [layer, 3] for layer in range(3)}, **alike)
    upop.save(model, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_attention_heads"] == 4
    write_plain(model, tmp_path / "deci", "nemotron-nas")
    described = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert (described["num_attention_heads"], described["num_key_value_heads"]) == (8, 2)
    torch.testing.assert_close(logits(equal_network(tmp_path / "deci")), logits(model), rtol=1e-4, atol=1e-5)


def test_branches_that_went_whole_are_no_ops_of_nemotron_nas(tmp_path: Path) -> None:
    model = llama(**{"model.layers.0.self_attn": [], "model.layers.2.mlp": []})
    write_plain(model, tmp_path / "deci", "nemotron-nas")
    blocks = json.loads((tmp_path / "deci" / "config.json").read_text())["block_configs"]
    assert [(block["attention"]["no_op"], block["ffn"]["no_op"]) for block in blocks] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    held = load_file(tmp_path / "deci" / "model.safetensors")
    assert not any(name.startswith(("model.layers.0.self_attn", "model.layers.0.input_layernorm")) for name in held)
    assert not any(name.startswith(("model.layers.2.mlp", "model.layers.2.post_attention")) for name in held)


def test_the_configuration_beside_it_is_read_by_names(tmp_path: Path) -> None:
    write_plain(llama(), tmp_path / "deci", "nemotron-nas")
    place = tmp_path / "deci" / "configuration_decilm.py"
    spec = importlib.util.spec_from_file_location("configuration_decilm", place)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.DeciLMConfig.from_dict(json.loads((tmp_path / "deci" / "config.json").read_text()))
    assert config.block_configs[1].attention.n_heads_in_group == 2
    assert not config.block_configs[0].ffn.no_op
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
    assert json.loads(config.to_json_string())["block_configs"][0]["ffn"]["ffn_mult"] > 0


def test_what_a_form_cannot_take_is_refused_with_what_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    bert = BertModel(BertConfig(**sizes, vocab_size=20)).eval()
    with pytest.raises(SettingError, match=r"BertModel.*--to padded"):
        write_plain(bert, tmp_path / "out", "nemotron-nas")
    qwen = Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=20, num_key_value_heads=2, head_dim=8)).eval()
    with pytest.raises(SettingError, match=r"a Qwen3ForCausalLM is none: it has model\.layers\.0\.self_attn\.q_norm"):
        write_plain(qwen, tmp_path / "out", "nemotron-nas")
    with pytest.raises(SettingError, match=r"neither transformers nor timm.*--to onnx"):
        write_plain(torch.nn.Linear(2, 2), tmp_path / "out", "padded")
    with pytest.raises(SettingError, match=r"'paded' is not known \(did you mean 'padded'.*use upop\.export"):
        write_plain(bert, tmp_path / "out", "paded")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(RunFolderError, match=r"thesis\.txt"):
        write_plain(bert, tmp_path / "mine", "padded")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    upop.save(bert, tmp_path / "bert")
    monkeypatch.setattr("upop.checkpoints.loading.load_named", pytest.fail)  # the weights are not read for a refusal
    refused = {
        "--to nemotron-nas": "a BertModel is none: it has embeddings.LayerNorm.bias, for example. .*--to padded",
        "--to padded --cache": "--cache is for graphs",
        "--to torch-export --quantize int8": "is for onnx and openvino",
        "--quantize int4": "'int4' is not known; there is int8",
    }
    for words, why in refused.items():
        monkeypatch.setattr(
            "sys.argv", ["upop", "export", str(tmp_path / "bert"), *words.split(), "--out", str(tmp_path / "out")]
        )
        with pytest.raises(SystemExit, match="1"):
            main()
        assert re.search(why, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("to", ["padded", "nemotron-nas"])
def test_a_tokenizer_goes_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    upop.save(llama(), tmp_path / "cut")
    for name in ("tokenizer.json", "chat_template.jinja", "diary.txt"):
        (tmp_path / "cut" / name).write_text(name)
    before = (tmp_path / "cut" / "generation_config.json").read_bytes()
    monkeypatch.setattr("sys.argv", ["upop", "export", str(tmp_path / "cut"), "--to", to, "--out", str(tmp_path / to)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    assert (tmp_path / to / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / to / "chat_template.jinja").exists()
    assert (tmp_path / to / "generation_config.json").exists()
    assert not (tmp_path / to / "diary.txt").exists()
    assert (tmp_path / "cut" / "generation_config.json").read_bytes() == before
    write_plain(llama(), tmp_path / to, "padded")  # what was copied is upop's, and is replaced with the rest
    assert not (tmp_path / to / "tokenizer.json").exists()
