"""`upop convert` and `upop inspect` as a person types them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers

import upop
from checkpoints.test_transformers import blip, compressed, llama, vit
from parity.cases import all_recorded
from pruning.families import NLVR
from tiers import mostly_slow
from upop.checkpoints import save_official

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(upop_command: Command) -> Command:
    """What `upop ...` answers."""
    return upop_command


@pytest.mark.slow
def test_a_published_file_becomes_all_forms(command: Command, tmp_path: Path) -> None:
    recorded = next(part for part in all_recorded() if part.task == "clip")
    heads = [f"--set={name}={value}" for name, value in recorded.case.sizes(recorded.config).items()]
    code, text = command("convert", recorded.folder / "compressed.pth", tmp_path / "ours", *heads)
    assert code == 0, text
    assert "ClipRetrieval" in text
    code, text = command("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "hugging-face")
    assert code == 0, text
    assert "import upop" in text
    code, text = command("convert", tmp_path / "theirs", tmp_path / "x.pth")
    assert code == 0, text
    first = upop.load(tmp_path / "ours").state_dict()
    again = upop.load_official("clip", tmp_path / "x.pth", **recorded.case.sizes(recorded.config))
    same = [name for name in first if not re.search(r"_m\.|queue", name)]
    assert all(torch.equal(first[name], again.state_dict()[name]) for name in same)
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "theirs")) is transformers.CLIPModel


def test_mistakes_of_conversion_are_told(command: Command, tmp_path: Path) -> None:
    upop.save(NLVR.build(torch.float32), tmp_path / "nlvr")
    mistakes: list[tuple[list[Any], str]] = [
        (["convert", tmp_path / "nlvr", tmp_path / "x", "--to", "hugging-face"], "no class for a BlipNlvr"),
        (["convert", tmp_path / "gone", tmp_path / "x"], "nothing was found there"),
        (
            ["convert", tmp_path / "nlvr" / "upop.json", tmp_path / "x"],
            "holds no weights. Give the folder that it lies in",
        ),
        (["inspect", "deit_smal_patch16_224"], "did you mean 'deit_small_patch16_224'"),
        (["inspect", "nothing", "--ratio", "1.5"], "strictly between 0 and 1"),  # before a model is read
        (["inspect", "nothing", "--ratio", "0.5", "--round-to", "0"], "round_to must be a whole number"),
    ]
    for words, said in mistakes:
        code, text = command(*words)
        assert code == 1, text
        assert said in text
        assert "Traceback" not in text
    assert not (tmp_path / "x").exists()


def test_a_name_of_timm_with_a_budget(command: Command) -> None:
    code, text = command("inspect", "deit_small_patch16_224", "--ratio", "0.5")
    assert code == 0, text
    model = timm.create_model("deit_small_patch16_224")
    assert "64 -> 32" in text and "1536 -> 768" in text
    assert f"{upop.count_parameters(model) / 1e6:.1f} -> " in text
    assert "4.60 -> 2.3" in text
    assert "224 x 224" in text


def test_a_model_of_ours_by_modality(command: Command, tmp_path: Path) -> None:
    model = NLVR.build(torch.float32)
    upop.shrink(model, {"visual_encoder.blocks.1.mlp": range(7)})
    code, text = command("inspect", upop.save(model, tmp_path / "nlvr"))
    assert code == 0, text
    assert "BlipNlvr" in text and "Cross-attention 2" in text
    assert "7 to 40 of 40" in text
    assert all(modality in text for modality in ("vision", "text", "shared"))
    code, text = command(
        "inspect", save_official("nlvr", model, tmp_path / "x.pth"), "--set", "vision_heads=3", "--set=vision_mlp=40"
    )
    assert code == 0, text
    assert "7 to 40 of 40" in text


@pytest.mark.parametrize(
    ("build", "said"),
    mostly_slow(
        [(vit, "16 x 16"), (llama, "20 tokens"), (blip, "one text of 20 tokens")],
        (vit, "16 x 16"),
        (llama, "20 tokens"),
    ),
)
def test_models_of_transformers(command: Command, tmp_path: Path, build: Callable[[], Any], said: str) -> None:
    build().save_pretrained(tmp_path)
    code, text = command("inspect", tmp_path, "--p", "0.5")
    assert code == 0, text
    assert type(build()).__name__ in text
    assert said in text
    assert "Llama" in text or "vision" in text


def test_a_compressed_model_of_transformers_says_what_it_keeps(command: Command, tmp_path: Path) -> None:
    model, _ = compressed("vit")
    sizes = [group.size for group in upop.find_groups(model) if group.kind == "mlp"]
    model.save_pretrained(tmp_path)
    code, text = command("inspect", tmp_path)
    assert code == 0, text
    assert f"{min(sizes)} to {max(sizes)} of 40" in text


@pytest.mark.slow
def test_a_model_of_open_clip(command: Command, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip.model")
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
    text = {"context_length": 7, "vocab_size": 99, "width": 24, "heads": 3, "layers": 2}
    model = open_clip.CLIP(16, vision, text)
    upop.shrink(model, {"visual.transformer.resblocks.0.mlp": range(5)})
    code, printed = command("inspect", upop.save(model, tmp_path / "clip"), "--ratio", "0.5")
    assert code == 0, printed
    assert "5 to 96 of 96" in printed and "one image of 32 x 32 pixels and one text of 7 tokens" in printed


def test_a_model_that_cannot_be_pruned_is_shown_all_the_same(command: Command) -> None:
    code, text = command("inspect", "repvgg_a0", "--ratio", "0.5")
    assert code == 0, text
    assert "No part of it" in text and "9.11" in text
    assert "preview" not in text
    assert "Prunable groups" not in text
