"""CrossGET's published command, from generated images to recalls: training, evaluation, checkpoints, counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import upop
from upop.checkpoints import save_official
from upop.checkpoints.names.clip import to_openai
from upop.demo.write import write_shapes
from upop.errors import CheckpointError
from upop.models.crossget import CrossGetClip, CrossGetConfig, published_macs
from upop.runs.inputs import resolved
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.retrieval_clip import clip_tokenizer
from upop.tasks.retrieval_crossget import CrossGetSettings, CrossGetTask

VISION = {"patch_size": 8, "vision_width": 32, "vision_depth": 2, "vision_heads": 2, "vision_mlp": 64}
TEXT = {"text_width": 32, "text_depth": 2, "text_heads": 2, "text_mlp": 64, "max_positions": 64}
MODEL = {**VISION, **TEXT, "embed_dim": 16}
TASK = CrossGetTask()
Script = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crossget")
    data = write_shapes("retrieval-flickr", folder / "data", seed=3, size=24, image_size=32)
    given = {"pretrained": None, "image_size": 32, "model": MODEL, "max_epoch": 1, "batch_size_train": 12}
    return runs.write_settings(folder / "crossget.yaml", data.settings, **given)


def settings_of(config: Path, **overrides: Any) -> CrossGetSettings:
    return read_settings(CrossGetSettings, config, overrides)


def model_of(config: Path, **given: Any) -> CrossGetClip:
    torch.manual_seed(0)
    words = len(clip_tokenizer(settings_of(config).tokenizer))
    return CrossGetClip(CrossGetConfig(**{**MODEL, "image_size": 32, "vocab_size": words, **given})).eval()


@pytest.fixture(scope="module")
def dense(config: Path) -> Path:
    """A plain CLIP in the published layout, which training starts from."""
    path = config.with_name("dense.pth")
    torch.save({"model": to_openai(model_of(config, cross=False, rv=0).state_dict())}, path)
    return path


@pytest.mark.parametrize(
    ("cross", "rv", "rl", "logged"),
    [(False, 0, 0, "20.567"), (True, 16, 0, "12.036"), (True, 0, 6, "19.275"), (True, 16, 6, "10.612")],
)
def test_multiply_adds_are_those_of_the_published_logs(cross: bool, rv: int, rl: int, logged: str) -> None:
    assert f"{published_macs(CrossGetConfig(cross=cross, rv=rv, rl=rl)) / 1e9:.3f}" == logged


def test_the_published_command_trains_from_a_plain_clip_and_evaluates_what_it_wrote(
    config: Path, dense: Path, tmp_path: Path, root_script: Script
) -> None:
    common = ("--config", config, "--reduce", "ours", "--rv", 3, "--rl", 0, "--set", "examples=0")
    trained = (*common, "--pretrained", dense, "--output_dir", tmp_path / "run", "--epoch", 1, "--lr", 1e-3)
    code, said = root_script("train_retrieval_clip.py", *trained)
    assert code == 0, said
    model = upop.load(tmp_path / "run" / "best")
    assert isinstance(model, CrossGetClip)
    assert (model.config.rv, model.config.rl) == (3, 0)
    assert model.vision_model.encoder.cross_image.abs().sum() > 0
    assert [found.source.shape[1] for found in model.encode_image(torch.randn(1, 3, 32, 32)).flow.matches] == [3, 3]
    path = save_official("crossget", model, tmp_path / "ours.pth")
    evaluated = ("--evaluate", "--pretrained", path, "--output_dir", tmp_path / "again")
    heads = ("--set", f"model={json.dumps(MODEL)}")
    code, said = root_script("train_retrieval_clip.py", *common, *evaluated, *heads)
    assert code == 0, said
    (results,) = (json.loads(file.read_text()) for file in (tmp_path / "again").rglob("results.json"))
    first = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["models"][0]["metrics"]["test"] == first["models"][0]["metrics"]["test"]


def test_a_folder_says_how_many_tokens_its_model_removes(config: Path, tmp_path: Path) -> None:
    path = upop.save(model_of(config, rv=3, rl=1), tmp_path / "model")
    found, _ = resolved(find_task("retrieval-crossget"), settings_of(config, pretrained=str(path)), path)
    assert (found.rv, found.rl) == (3, 1)
    given, _ = resolved(TASK, settings_of(config, pretrained=str(path), rv=2), path)
    assert (given.rv, given.rl) == (2, 1)


def test_a_checkpoint_without_cross_tokens_is_refused_unless_tokens_stay(config: Path, dense: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no cross tokens.*--reduce none"):
        TASK.load(dense, settings_of(config))
    plain = TASK.load(dense, settings_of(config, reduce="none"))
    assert isinstance(plain, CrossGetClip)
    assert not plain.config.cross
    started, lacking = TASK.start(dense, settings_of(config))
    assert not lacking
    assert isinstance(started, CrossGetClip)
    assert started.config.rv == 16
    path = save_official("crossget", started, dense.with_name("ours.pth"), overwrite=True)
    with pytest.raises(CheckpointError, match=r"has cross tokens.*--reduce ours"):
        TASK.load(path, settings_of(config, reduce="none"))


def test_a_text_of_a_short_batch_is_encoded_like_one_of_a_long_batch(config: Path) -> None:
    model = model_of(config, rl=4, merge_padding=True)
    last = model.config.vocab_size - 1
    ids = torch.tensor([[last - 1, 7, 8, 9, last]])
    with torch.no_grad():
        alone = model.encode_text(ids).features
        padded = model.encode_text(torch.nn.functional.pad(ids, (0, 20))).features
    assert torch.equal(alone, padded)
