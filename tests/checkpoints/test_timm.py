"""timm's models: `upop.load` builds them by name, and only where that gives the very same model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import upop
from pruning.families import randomise, uneven_plan
from tiers import since
from upop.errors import CheckpointError

TINY = {"img_size": 32, "depth": 2, "num_classes": 5}
WIDTH = {"embed_dim": 48, "num_heads": 3}


def compressed(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **settings).eval()
    randomise(model)
    return upop.shrink(model, uneven_plan(upop.find_groups(model), 2), verify=torch.randn(1, 3, 32, 32))


slow = partial(pytest.param, marks=pytest.mark.slow)
newer = partial(pytest.param, marks=since("timm", "1.0.31", "its modules do not say how they were built"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", TINY),
        slow("vit_tiny_patch16_224", {**TINY, **WIDTH, "mlp_ratio": 6.0, "drop_path_rate": 0.1}),
        ("vit_tiny_patch16_224", {**TINY, "global_pool": "avg", "class_token": False, "patch_size": 8}),
        newer("vit_tiny_patch16_224", {**TINY, "init_values": 0.1, "reg_tokens": 2, "dynamic_img_size": True}),
        slow("deit_tiny_distilled_patch16_224", TINY),
        slow("deit3_small_patch16_224", {**TINY, **WIDTH}),
        slow("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 1, "num_classes": 0, **WIDTH}),
        newer("test_convnext", {"num_classes": 5}),  # MLPs of convolutions
    ],
)
def test_it_comes_back_by_name(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = compressed(name, **settings), torch.randn(2, 3, 32, 32)
    folder = upop.save(model, tmp_path / "out")
    again: Any = upop.load(folder)
    by_hand = upop.load_into(timm.create_model(name, **settings), folder)
    with torch.no_grad():
        assert torch.equal(again(inputs), model(inputs))
        assert torch.equal(by_hand(inputs), model(inputs))
    if "drop_path_rate" in settings:
        assert again.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    # What it was cut to is known too, so it can be saved again.
    saved = json.loads((upop.save(again, tmp_path / "again") / "upop.json").read_text())
    assert saved["plan"] == json.loads((folder / "upop.json").read_text())["plan"]


@pytest.mark.slow
def test_a_model_that_has_a_module_under_several_names(tmp_path: Path) -> None:
    model = timm.create_model("coat_tiny", num_classes=5)
    upop.shrink(model, uneven_plan(upop.find_groups(model), 2))
    assert model.parallel_blocks[0].mlp4 is model.parallel_blocks[0].mlp2
    again: Any = upop.load(upop.save(model, tmp_path / "out"))
    assert again.parallel_blocks[0].mlp4 is again.parallel_blocks[0].mlp2
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_where_a_name_does_not_say_all_the_dense_model_is_asked_for(tmp_path: Path) -> None:
    model = compressed("vit_tiny_patch16_224", act_layer=nn.ReLU, **TINY)
    folder = upop.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"cannot build by name.*upop\.load_into"):
        upop.load(folder)
    dense = timm.create_model("vit_tiny_patch16_224", act_layer=nn.ReLU, **TINY)
    inputs = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(upop.load_into(dense, folder)(inputs), model(inputs))


def test_an_edited_model_is_not_built_by_name(tmp_path: Path) -> None:
    model: Any = compressed("vit_tiny_patch16_224", **TINY)
    model.norm.eps = 0.1
    with pytest.raises(CheckpointError, match="cannot build by name"):
        upop.load(upop.save(model, tmp_path / "out"))


def _edited(folder: Path, **changes: Any) -> Path:
    description = json.loads((folder / "upop.json").read_text())
    description["timm"].update(changes)
    (folder / "upop.json").write_text(json.dumps(description))
    return folder


def test_bad_descriptions_are_named(tmp_path: Path) -> None:
    folder = upop.save(compressed("vit_tiny_patch16_224", **TINY), tmp_path / "out")
    with pytest.raises(CheckpointError, match="did you mean 'vit_tiny_patch16_224'"):
        upop.load(_edited(folder, architecture="vit_tinny_patch16_224"))
    name = "vit_tiny_patch16_224"
    with pytest.raises(CheckpointError, match="checkpoint_path='x'"):
        upop.load(_edited(folder, architecture=name, arguments={"checkpoint_path": "x"}))
    with pytest.raises(CheckpointError, match="timm cannot build"):
        upop.load(_edited(folder, architecture=name, arguments={"num_heads": 7}))
    with pytest.raises(CheckpointError, match="does not fit"):
        upop.load(_edited(folder, architecture=name, arguments={"img_size": [32, 32], "depth": 3}))


def test_compiled_models_are_saved_as_what_they_wrap(tmp_path: Path) -> None:
    model = compressed("vit_tiny_patch16_224", **TINY)
    folder = upop.save(torch.compile(model, backend="eager"), tmp_path / "out")
    assert upop.load(folder).state_dict().keys() == model.state_dict().keys()


def test_heads_that_every_block_lost_come_back(tmp_path: Path) -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    upop.shrink(model, {f"blocks.{block}.attn": [0, 3 - block] for block in range(2)})
    folder, images = upop.save(model, tmp_path / "small"), torch.randn(1, 3, 16, 16)
    path = folder / "upop.json"
    arguments = json.loads(path.read_text())["timm"]["arguments"]
    assert arguments["num_heads"] == 4
    for written in (4, 2):  # 2 are left; upop wrote so before
        _edited(folder, arguments={**arguments, "num_heads": written})
        assert torch.equal(upop.load(folder)(images), model(images))
