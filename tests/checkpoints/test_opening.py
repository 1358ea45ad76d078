"""`open_checkpoint`: what lies at a path, in one order of asking, and the same model by every way that takes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import upop
from upop.checkpoints import open_checkpoint, save_official
from upop.checkpoints.convert import read_model
from upop.checkpoints.libraries.timm_models import hub_config
from upop.checkpoints.loading import load_named
from upop.errors import CheckpointError, SettingError

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {"img_size": [32, 32], "depth": 1}


def dense() -> Any:
    return timm.create_model(NAME, num_classes=5, **SIZES).eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    """A model of timm, and where it lies: in a folder of ours, of timm, and in a published file."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("opening"), dense()
    upop.save(model, folder / "ours")
    (folder / "timm").mkdir()
    save_file(model.state_dict(), folder / "timm" / "model.safetensors")
    (folder / "timm" / "config.json").write_text(json.dumps(hub_config(model, NAME, SIZES)))
    save_official("classification", upop.load_official("classification", folder / "timm"), folder / "published.pth")
    return model, {name: folder / name for name in ("ours", "timm", "published.pth")}


@pytest.mark.parametrize(
    ("name", "kind", "library"),
    [("ours", "upop", "timm"), ("timm", "timm", "timm"), ("published.pth", "state_dict", "state_dict")],
)
def test_every_format_says_what_it_is_and_gives_the_same_model(
    places: tuple[Any, dict[str, Path]], name: str, kind: str, library: str
) -> None:
    model, held = places
    checkpoint = open_checkpoint(held[name])
    assert (checkpoint.kind, checkpoint.library, checkpoint.plan) == (kind, library, None)
    assert open_checkpoint(checkpoint) is checkpoint
    assert checkpoint.state.keys() == checkpoint.meta_state().keys() == model.state_dict().keys()
    assert checkpoint.config.get("architecture") == (None if kind == "state_dict" else NAME)
    images = torch.randn(2, 3, 32, 32)
    for again in (upop.load(held[name]), read_model(checkpoint), upop.load_official("classification", held[name])):
        torch.testing.assert_close(again.eval()(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_dense_model_is_filled_from_a_folder_of_its_library(places: tuple[Any, dict[str, Path]]) -> None:
    model, held = places
    filled, images = upop.load_into(dense(), held["timm"]), torch.randn(1, 3, 32, 32)
    assert torch.equal(filled(images), model(images))
    with pytest.raises(CheckpointError, match=r"file of tensors.*upop\.load_official"):
        upop.load_into(dense(), held["published.pth"])


def test_a_plan_is_read_with_the_checkpoint(tmp_path: Path) -> None:
    model = dense()
    upop.shrink(model, {"blocks.0.mlp": range(10)})
    plan = open_checkpoint(upop.save(model, tmp_path / "cut")).plan
    assert plan is not None and plan.kept["blocks.0.mlp"] == tuple(range(10))


def test_a_path_is_exported(places: tuple[Any, dict[str, Path]], tmp_path: Path) -> None:
    upop.export(places[1]["ours"], tmp_path / "out", "torch-export")
    assert (tmp_path / "out" / "model.pt2").is_file()
    with pytest.raises(SettingError, match="export"):
        upop.export(5, tmp_path / "other")  # type: ignore[arg-type]


def test_a_file_of_weights_stands_for_its_folder(places: tuple[Any, dict[str, Path]], tmp_path: Path) -> None:
    """Shapes tell neither how many heads there are nor how attention is scaled: read by them, outputs would differ."""
    model = upop.load_official("classification", places[1]["ours"])
    group = next(group for group in upop.find_groups(model) if group.channel == "dimension")
    upop.shrink(model, {group.name: range(group.size // 2)})
    weights, images = upop.save(model, tmp_path / "cut") / "model.safetensors", torch.randn(2, 3, 32, 32)
    assert open_checkpoint(weights).kind == "upop" and open_checkpoint(weights).path == tmp_path / "cut"
    for again in (upop.load(weights), upop.load_official("classification", weights), read_model(weights)):
        assert torch.equal(again(images), model.eval()(images))
    other = (tmp_path / "cut" / "other.safetensors").write_bytes(weights.read_bytes())
    assert other and open_checkpoint(tmp_path / "cut" / "other.safetensors").kind == "state_dict"


@pytest.mark.parametrize("name", ["ours", "timm"])
def test_weights_that_are_not_in_their_folder_are_refused_alike(
    places: tuple[Any, dict[str, Path]], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    shutil.copytree(places[1][name], folder)
    file = folder / "model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    for read in (upop.load, read_model, lambda path: upop.load_into(dense(), path)):
        with pytest.raises(CheckpointError, match=r"holds no model\.safetensors.*pickles.*pytorch_model|lacks 'model"):
            read(folder)
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    for read in (upop.load, read_model, lambda path: upop.load_into(dense(), path)):
        with pytest.raises(CheckpointError, match=r"is a link to .*Copy.*folder"):
            read(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "The path is empty"),
        ("n" * 300, "too long|neither a file"),
        ("{ours}/upop.json", "holds no weights. Give the folder that it lies in"),
    ],
)
def test_what_names_no_checkpoint_is_refused_by_commands_too(
    places: tuple[Any, dict[str, Path]], name: str, message: str
) -> None:
    path = name.format(ours=places[1]["ours"])
    for read in (upop.load, load_named, read_model):
        with pytest.raises(CheckpointError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "nothing was found there"),
        (".", r"the folder holds no upop\.json, .*or .*best, which a run of ours left there"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "best").mkdir()
    for read in (open_checkpoint, upop.load, lambda path: upop.export(path, tmp_path / "out", "torch-export")):
        with pytest.raises(CheckpointError, match=rf"is no checkpoint: {message}"):
            read(tmp_path / name)


def test_a_description_of_far_more_than_the_weights_is_refused_before_memory_is_taken(
    places: tuple[Any, dict[str, Path]], tmp_path: Path
) -> None:
    config = hub_config(places[0], NAME, {**SIZES, "embed_dim": 3 * 2**18})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((places[1]["timm"] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not fit"):
        upop.load(tmp_path)
