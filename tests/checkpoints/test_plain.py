"""Models that were cut alike in all layers load in their libraries where there is no upop, and compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

import upop
from pruning.families import randomise
from pruning.registry.transformers_models import TRANSFORMERS
from tiers import since

MODELS = {each.name: each for each in TRANSFORMERS}
QUICK = ("phi3", "bert", "vit")
SLOW = ("llama", "qwen2", "qwen3", "mistral", "gemma", "clip", "siglip", "blip", "deit", "dinov2", "llava")
FIELDS = {
    "phi3": ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    "clip": ("text_config.intermediate_size", "vision_config.intermediate_size"),
    "vit": ("head_dim", "intermediate_size"),
    "llava": ("text_config.num_key_value_heads", "text_config.intermediate_size", "vision_config.intermediate_size"),
}
LOADS = """
import gc, json, sys
gc.disable()  # imports are a fifth faster
sys.modules["upop"] = None  # importing it fails
import torch, transformers
for folder in sys.argv[1:]:
    inputs = torch.load(folder + "/inputs.pt")
    kind = getattr(transformers, json.load(open(folder + "/model/config.json"))["architectures"][0])
    assert type(transformers.AutoConfig.from_pretrained(folder + "/model")) is kind.config_class
    model = kind.from_pretrained(folder + "/model").eval()
    with torch.no_grad():
        found = [value for value in model(**inputs).to_tuple() if isinstance(value, torch.Tensor)]
    torch.save(found, folder + "/found.pt")
assert not any(name.startswith("upop.") for name in sys.modules)
"""


def cut_uniformly(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a tiny model of a library, half of all groups cut that uniform="tower" searches, and inputs for it."""
    model = MODELS[name].build(torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="uniform='tower' leaves")
        pruner = upop.Pruner(model, 0.1, 4, uniform="tower")
    groups = pruner.groups
    pruner.remove()
    draws = torch.Generator().manual_seed(0)  # which half is another one in every layer
    upop.shrink(model, {group.name: torch.randperm(group.size, generator=draws)[: group.size // 2] for group in groups})
    return model, MODELS[name].batch(model, torch.float32)


def outputs(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [value for value in model(**inputs).to_tuple() if isinstance(value, Tensor)]


def field(config: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        config = config[part]
    return config


def without_upop(folders: list[Path]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADS, *map(str, folders)], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]


@since("transformers", "5.23", "its ViT has no head_dim")
@pytest.mark.parametrize("names", [QUICK, *(pytest.param((name,), marks=pytest.mark.slow) for name in SLOW)])
def test_transformers_loads_it_without_upop(names: tuple[str, ...], tmp_path: Path) -> None:
    expected, folders = [], []
    for name in names:
        dense = MODELS[name].build(torch.float32).config.to_dict()
        model, inputs = cut_uniformly(name)
        folder = tmp_path / name
        upop.save(model, folder / "model")
        torch.save(inputs, folder / "inputs.pt")
        written = json.loads((folder / "model" / "config.json").read_text())
        assert "quantization_config" not in written
        for path in FIELDS.get(name, ()):
            assert field(written, path) < (field(dense, path) if path != "head_dim" else 8), path
        expected.append(outputs(model, inputs))
        folders.append(folder)
    without_upop(folders)
    for folder, wanted in zip(folders, expected, strict=True):
        found = torch.load(folder / "found.pt")
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@since("transformers", "5.23", "its modules have other names")
def test_upop_loads_a_plain_folder_and_fills_the_dense_model_from_it(tmp_path: Path) -> None:
    model, inputs = cut_uniformly("vit")
    upop.save(model, tmp_path / "model")
    described = (tmp_path / "model" / "README.md").read_text()
    assert "| transformers, without upop | yes |" in described
    assert "import upop  #" not in described
    loaded = upop.load(tmp_path / "model")
    dense = upop.load_into(MODELS["vit"].build(torch.float32), tmp_path / "model")
    for other in (loaded, dense):
        for one, found in zip(outputs(model, inputs), outputs(other, inputs), strict=True):
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)
    assert [group.size for group in upop.find_groups(loaded)] == [group.size for group in upop.find_groups(model)]
    again: Any = upop.shrink(loaded, {"layers.0.mlp": range(5)})  # it may be cut again, and then is no plain one
    assert again.config.quantization_config["kept"] == {"layers.0.mlp": (5, again.config.intermediate_size)}


@since("transformers", "5.23", "its modules have other names")
def test_a_configuration_that_is_shared_with_other_models_stays_as_it_is() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    one, other = (transformers.ViTModel(config).eval() for _ in range(2))
    randomise(one)
    upop.shrink(one, {f"layers.{layer}.mlp": range(layer, 24 + layer) for layer in range(2)})
    assert (one.config.intermediate_size, other.config.intermediate_size) == (24, 48)
    assert all(module.config is one.config for module in one.modules() if hasattr(module, "config"))
    assert not hasattr(one.config, "quantization_config")


@since("transformers", "5.23", "its modules have other names")
def test_what_differs_by_layer_gets_a_record_as_before(tmp_path: Path) -> None:
    model: Any = MODELS["vit"].build(torch.float32)
    upop.shrink(model, {"layers.0.mlp": range(20), "layers.1.mlp": range(24)})
    assert model.config.intermediate_size == 48
    assert model.config.quantization_config["kept"] == {"layers.0.mlp": (20, 48), "layers.1.mlp": (24, 48)}
    upop.save(model, tmp_path / "model")
    described = (tmp_path / "model" / "README.md").read_text()
    assert "| transformers, without upop | after an export | `upop export FOLDER --to padded --out OUT`" in described
    assert "import upop  # lets transformers read" in described


@since("timm", "1.0.31", "it unpickles safetensors of a local-dir")
def test_timm_builds_it_from_its_folder(tmp_path: Path) -> None:
    made = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    model: Any = timm.create_model("vit_tiny_patch16_224", **made).eval()
    randomise(model)
    upop.shrink(model, {f"blocks.{layer}.mlp": range(layer, 41 + layer) for layer in range(2)})
    upop.save(model, tmp_path / "model")
    plain: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert plain.blocks[0].mlp.fc1.out_features == 41
    for other in (plain, upop.load(tmp_path / "model")):
        torch.testing.assert_close(other(images), model(images))
    upop.shrink(model, {"blocks.0.mlp": range(40)})
    upop.save(model, tmp_path / "uneven")
    assert not (tmp_path / "uneven" / "config.json").exists()
