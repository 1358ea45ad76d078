"""Folders of earlier versions load with the outputs that they had, and those of today need no reader."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import upop
from checkpoints.older import MODELS, Tower, first_of
from tiers import mostly_slow
from upop.errors import CheckpointError

FOLDERS = Path(__file__).parent / "data" / "older"
OWN = {"torch_encoder", "tower_5_5"}  # which upop cannot build
NAMES = sorted(path.name for path in FOLDERS.iterdir() if path.is_dir())


def recorded(name: str) -> tuple[dict[str, Tensor], Tensor]:
    tensors = load_file(FOLDERS / f"{name}.safetensors")
    return {key.removeprefix("in."): value for key, value in tensors.items() if key != "out"}, tensors["out"]


def loaded(folder: Path, name: str) -> nn.Module:
    return upop.load_into(MODELS[name][0](), folder) if name in OWN else upop.load(folder)


def assert_same(model: nn.Module, name: str) -> None:
    inputs, expected = recorded(name)
    with torch.no_grad():
        torch.testing.assert_close(first_of(model(**inputs)), expected, rtol=1e-5, atol=1e-5)


def test_there_are_folders_of_every_kind() -> None:
    assert set(NAMES) == set(MODELS)


@pytest.mark.parametrize("name", mostly_slow(NAMES, *(name for name in NAMES if name != "blip_nlvr")))
def test_an_older_folder_loads_and_is_written_anew(name: str, tmp_path: Path) -> None:
    model = loaded(FOLDERS / name, name)
    assert_same(model, name)
    groups = {group.name: group.size for group in upop.find_groups(model)}
    again = upop.save(model, tmp_path / "again")
    content = json.loads((again / "upop.json").read_text())
    assert set(content["groups"]) == set(groups) == set(content["layout"])
    assert {
        group: len(described["kept"]) for group, described in content["plan"]["groups"].items()
    }.items() <= groups.items()
    assert_same(loaded(again, name), name)


@pytest.mark.parametrize("name", ["bert", "llama", "timm_vit", "classifier"])
def test_folders_of_the_first_version_say_less(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDERS / name, tmp_path / name)
    content = json.loads((folder / "upop.json").read_text())
    kept = {"format", "model", "class", "config", "plan", *(("timm",) if name == "timm_vit" else ())}
    less = {key: value for key, value in content.items() if key in kept}
    if name in ("bert", "llama"):
        less["transformers"] = True
    (folder / "upop.json").write_text(json.dumps(less))
    assert_same(upop.load(folder), name)


@pytest.mark.parametrize("name", ["vit_5_5", "dinov2_5_5", "clip_5_5", "llama"])
def test_transformers_loads_older_folders_by_itself(name: str) -> None:
    kind: Any = type(MODELS[name][0]())
    assert_same(kind.from_pretrained(FOLDERS / name).eval(), name)
    if name == "vit_5_5":
        base = transformers.ViTModel.from_pretrained(FOLDERS / name, add_pooling_layer=False)
        sizes = {group.name: group.size for group in upop.find_groups(base)}
        assert sizes["layers.0.attention"] == 4 and sizes["layers.0.mlp"] == 24


def test_a_plan_of_renamed_modules_is_carried_under_their_names_of_today() -> None:
    model = upop.load(FOLDERS / "vit_5_5")
    content = json.loads((FOLDERS / "vit_5_5" / "upop.json").read_text())
    assert "vit.encoder.layer.0.attention.attention" in content["plan"]["units"]
    plan: Any = model.upop_plan
    assert set(plan.kept) <= {group.name for group in upop.find_groups(model)}
    assert "vit.layers.0.attention" in plan.kept


def test_renamed_modules_inside_a_model_of_ones_own() -> None:
    tower = upop.load_into(Tower(), FOLDERS / "tower_5_5")
    assert_same(tower, "tower_5_5")
    assert "body.layers.1.mlp" in {group.name for group in upop.find_groups(tower)}


@pytest.fixture
def _no_reader(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a reader was asked")

    def forbid() -> None:
        monkeypatch.setattr("upop.pruning.axes.read", refused)

    return forbid


@pytest.mark.parametrize("name", mostly_slow(NAMES, *(name for name in NAMES if name != "blip_nlvr")))
def test_folders_of_today_load_without_a_reader(name: str, tmp_path: Path, _no_reader: Callable[[], None]) -> None:
    folder = upop.save(loaded(FOLDERS / name, name), tmp_path / "again")
    _no_reader()
    assert_same(loaded(folder, name), name)
    if name in ("bert", "vit_5_5", "clip_5_5", "llama"):
        kind: Any = type(MODELS[name][0]())
        assert_same(kind.from_pretrained(folder).eval(), name)


def test_a_plan_cuts_without_a_reader(_no_reader: Callable[[], None]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3).eval()
    groups = upop.find_groups(model)
    text = upop.Plan.of(groups, {group.name: range(0, group.size, 2) for group in groups}).to_json()
    other, inputs = copy.deepcopy(model), torch.randn(1, 3, 32, 32)
    _no_reader()
    upop.shrink(other, upop.Plan.from_json(text), verify=inputs)
    assert other.blocks[0].mlp.fc1.out_features == 384


GROUP = "blocks.0.mlp"


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"size": 0}, "size should be a whole number"),
        ({"size": 10**30}, "size should be a whole number"),
        ({"size": True}, "size should be a whole number"),
        ({"kind": "embedding"}, "kind should be one of"),
        ({"slices": []}, "slices should be a list"),
        ({"slices": [{"tensor": "blocks.0.mlp.fc1.weight", "outer": 10**9}]}, "outer should be a whole number"),
        ({"slices": [{"tensor": "blocks.0.mlp.fc1.weight", "gaps": [1]}]}, "gaps around them"),
        ({"slices": [{"tensor": "blocks.0.mlp.fc1.weight", "dim": 7}]}, "dim should be a whole number"),
        ({"slices": [{"tensor": "blocks.0.mlp.fc1.weight", "power": "x"}]}, "power"),
        ({"slices": [{"tensor": "blocks.0.mlp.fc1.weight", "run": "x"}]}, "has no 'run'"),
        ({"attributes": [{"module": GROUP, "name": "__class__"}]}, "is no name of a number"),
        ({"attributes": [{"module": GROUP, "name": "forward"}]}, "is no name of a number"),
        ({"attributes": [{"module": GROUP, "name": "_parameters[fc1]"}]}, "is no name of a number"),
        ({"attributes": [{"module": GROUP, "name": "act"}]}, "keeps no number under 'act'"),
        ({"attributes": [{"module": GROUP, "name": "cut_widths[view.x.1.2]"}]}, "is no name of a number"),
        ({"attributes": [{"module": "os", "name": "size"}]}, "no module 'os'"),
        ({"swaps": [{"module": GROUP, "how": "subprocess.Popen"}]}, "is no class that a module takes on"),
        ({"swaps": [{"module": GROUP, "how": "widths"}]}, "is to be told the width"),
    ],
)
def test_groups_in_a_folder_lead_nowhere_else(change: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=16, embed_dim=16, num_heads=2, num_classes=3)
    folder = upop.save(model.eval(), tmp_path / "model")
    content = json.loads((folder / "upop.json").read_text())
    content["groups"][GROUP].update(change)
    (folder / "upop.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=fragment):
        upop.load(folder)
