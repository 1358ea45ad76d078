"""Saving and loading: the same function comes back, nothing is pickled, and damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import upop
from upop.errors import CheckpointError, RunFolderError, SettingError
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.ownership import MARKER

SIZES = {"image_size": 32, "vision_width": 24, "vision_depth": 2, "vision_heads": 2, "vision_mlp": 40}
TEXT = {"text_width": 32, "text_depth": 2, "text_heads": 4, "text_mlp": 56, "vocab_size": 90, "max_positions": 20}


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def blip() -> nn.Module:
    return randomised(BlipNlvr(NlvrConfig(**SIZES, **TEXT, merge_from=1)))


def blip_inputs() -> dict[str, torch.Tensor]:
    return {
        "images": torch.randn(4, 3, 32, 32),
        "input_ids": torch.randint(1, 90, (2, 7)),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
    }


def uneven(model: nn.Module) -> upop.Plan:
    groups = upop.find_groups(model)
    kept = {group.name: range(0, group.size, 2 + place % 3) for place, group in enumerate(groups) if place % 4}
    return upop.Plan.of(groups, kept)


def test_compressed_blip_comes_back(tmp_path: Path) -> None:
    model, inputs = blip(), blip_inputs()
    plan = uneven(model)
    upop.shrink(model, plan, verify=inputs)
    again = upop.load(upop.save(model, tmp_path / "small", plan))
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(**inputs), model(**inputs))
    assert all(
        part.weight.shape == (part.out_features, part.in_features)
        for part in again.modules()
        if type(part) is nn.Linear
    )
    assert json.loads((tmp_path / "small" / "upop.json").read_text())["plan"]["groups"]
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        MARKER,
        "README.md",
        "model.safetensors",
        "upop.json",
    ]


def test_a_plan_is_not_needed_to_load(tmp_path: Path) -> None:
    model, inputs = blip(), blip_inputs()
    upop.shrink(model, uneven(model))
    with torch.no_grad():
        assert torch.equal(upop.load(upop.save(model, tmp_path / "small"))(**inputs), model(**inputs))


def test_a_model_in_place_of_its_plan_is_refused(tmp_path: Path) -> None:
    model: Any = nn.Linear(2, 2)
    with pytest.raises(SettingError, match="found a Linear"):
        upop.save(model, tmp_path / "model", model)
    assert not (tmp_path / "model").exists()


def test_other_models_come_back_into_their_dense_form(tmp_path: Path) -> None:
    def dense(**sizes: int) -> nn.Module:
        settings = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
        return VisionTransformer(**{**settings, **sizes})

    model, inputs = randomised(dense()), torch.randn(2, 3, 32, 32)
    plan = uneven(model)
    upop.shrink(model, plan, verify=inputs)
    upop.save(model, tmp_path / "vit")
    again = dense()
    assert upop.load_into(again, tmp_path / "vit") is again
    with torch.no_grad():
        assert torch.equal(again(inputs), model(inputs))
        assert torch.equal(upop.load(tmp_path / "vit", dense())(inputs), model(inputs))
    with pytest.raises(CheckpointError, match=r"Build.*dense model.*upop\.load_into"):
        upop.load(tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"does not fit(.|\n)*holds a timm\..*VisionTransformer"):
        upop.load_into(dense(depth=3), tmp_path / "vit")


def test_saving_again_replaces(tmp_path: Path) -> None:
    folder = upop.save(blip(), tmp_path / "model")
    first = (folder / "model.safetensors").read_bytes()
    upop.save(blip().double(), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert (folder / "model.safetensors").read_bytes() != first


TIED = {
    **SIZES,
    "text_width": 24,
    "text_depth": 1,
    "text_heads": 2,
    "text_mlp": 32,
    "vocab_size": 60,
    "max_positions": 9,
}


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = randomised(BlipCaption(CaptionConfig(**TIED)))  # several of its tensors have two names
    folders = [upop.save(model, tmp_path / str(turn)) for turn in range(8)]
    for name in ("model.safetensors", "upop.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    with safe_open(folders[0] / "model.safetensors", framework="pt") as file:
        notes = file.metadata()
        assert len(notes) > 1
        assert list(notes) != list(file.keys())
    again: Any = upop.load(folders[0])
    for name, same in notes.items():
        assert again.state_dict()[name].data_ptr() == again.state_dict()[same].data_ptr()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_layers_that_were_dropped_after_a_cut(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=4
    ).eval()
    upop.shrink(model, {group.name: range(group.size // 2) for group in upop.find_groups(model)})
    model.blocks = model.blocks[:2]
    with pytest.warns(UserWarning, match=r"groups that it lacks.*blocks\.2\.attn.*saved without"):
        folder = upop.save(model, tmp_path / "small")
    again: Any = upop.load(folder)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    assert {name.rpartition(".")[0] for name in again.upop_plan} == {"blocks.0", "blocks.1"}
    # Cut once more, what is left of the plan is told of the dense model.
    upop.shrink(again, {"blocks.1.mlp": [1, 3]})
    described = json.loads((upop.save(again, tmp_path / "smaller") / "upop.json").read_text())
    assert described["plan"]["groups"]["blocks.1.mlp"] == {"size": 96, "kept": [1, 3]}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_a_backbone_of_timm_is_filled(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "out_indices": (0, 1)}
        return timm.create_model(name, features_only=True, **sizes).eval()  # type: ignore[no-any-return]

    model, image = build(), torch.randn(1, 3, 32, 32)
    upop.shrink(model, {group.name: range(group.size // 2) for group in upop.find_groups(model)})
    folder = upop.save(model, tmp_path / "backbone")
    with pytest.raises(CheckpointError, match=r"upop\.load_into"):
        upop.load(folder)
    again = upop.load_into(build(), folder)
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(model(image), again(image), strict=True))


def test_a_failed_save_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = upop.save(blip(), tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("upop.checkpoints.files.weights.save_file", full_disk)
    with pytest.raises(RunFolderError, match="No space left"):
        upop.save(blip(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


HARM: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "upop.json").unlink(), r"holds no upop\.json"),
    (lambda folder: (folder / "upop.json").write_text("{"), r"upop\.json cannot be read"),
    (
        lambda folder: (folder / "upop.json").write_text(
            '{"format": 9, "model": 0, "class": 0, "config": 0, "plan": 0}'
        ),
        "format 9",
    ),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 40), "no readable safetensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), r"holds no model\.safetensors"),
]


@pytest.mark.parametrize(("harm", "message"), HARM, ids=[message for _, message in HARM])
def test_damage_is_named(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    folder = upop.save(blip(), tmp_path / "model")
    harm(folder)
    with pytest.raises(CheckpointError, match=message):
        upop.load(folder)
