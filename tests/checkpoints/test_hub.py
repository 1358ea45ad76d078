"""Names of the hub become folders; what is a path stays one, and what is neither is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import upop
from checkpoints.test_transformers import blip, images, vit
from upop.checkpoints.files.hub import local_path
from upop.errors import CheckpointError

CALLS = list[tuple[str, bool]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CALLS:
    """A hub that has "me/blip" and "me/vit" to fetch; the calls: name, and whether only the cache was asked."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blip().save_pretrained(tmp_path / "hub" / "me" / "blip")
    vit().save_pretrained(tmp_path / "hub" / "me" / "vit")
    calls: CALLS = []

    def download(name: str, *, local_files_only: bool, **_options: Any) -> str:
        calls.append((name, local_files_only))
        folder = tmp_path / "hub" / name
        if local_files_only or not folder.is_dir():
            raise OSError("404 Client Error: no such repository\nmore lines")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_a_name_is_fetched_once_the_cache_does_not_have_it(hub: CALLS, tmp_path: Path) -> None:
    assert local_path("me/vit") == tmp_path / "hub" / "me" / "vit"
    assert hub == [("me/vit", True), ("me/vit", False)]
    model: Any = upop.load("me/vit")
    assert type(model) is transformers.ViTForImageClassification


@pytest.mark.parametrize("name", ["x.pth", "pretrained/model.pth", "/a/b", "./a", "a/b/c", "folder", "here/b"])
def test_paths_are_not_asked_for_on_the_hub(name: str, hub: CALLS, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert local_path(name) == Path(name)
    assert not hub


def test_what_the_hub_does_not_give_is_named(hub: CALLS) -> None:
    with pytest.raises(CheckpointError, match=r"^me/gone .*404 Client Error: no"):
        upop.load("me/gone")


def test_a_published_model_of_the_hub_starts_a_task(hub: CALLS) -> None:
    model: Any = upop.load_official("caption", "me/blip")
    theirs: Any = transformers.BlipForConditionalGeneration.from_pretrained("hub/me/blip")
    with torch.no_grad():
        states = model.visual_encoder(images())
        expected = theirs.vision_model(pixel_values=images()).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        CheckpointError, match="BlipForConditionalGeneration, which is a model for 'caption', not for 'vqa'"
    ):
        upop.load_official("vqa", "me/blip")
