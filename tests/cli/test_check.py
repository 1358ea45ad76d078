"""`upop check` finds what is missing or damaged before a run is started, and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import runs
from upop.cli.app import app
from upop.published_data import published_data
from upop.recipes import read_recipes
from upop.settings import read_settings
from upop.tasks import find_task

runner = CliRunner()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A file with one recipe, of captioning at a tiny size, and all that it needs."""
    config = runs.make_task("caption", tmp_path)
    row = {
        "name": "tiny",
        "task": "caption",
        "script": "compress_caption.py",
        "config": str(config),
        "pretrained": str(tmp_path / "dense"),
        "ratio": 0.5,
        "epochs": 2,
        "output_dir": str(tmp_path / "out"),
        "compressed": "small.pth",
    }
    file = tmp_path / "recipes.yaml"
    file.write_text(yaml.safe_dump([row]))
    return file


def findings(recipe: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and what was found of every part."""
    asked = ["check", "tiny", "--recipes", str(recipe), "--json", *arguments]
    done = runner.invoke(app, asked, catch_exceptions=False)
    return done.exit_code, {each["part"]: each for each in json.loads(done.stdout)["findings"]}


def images(recipe: Path) -> list[Path]:
    return sorted(path for path in (recipe.parent / "data").rglob("*") if path.suffix in (".png", ".jpeg", ".jpg"))


def test_what_is_whole_is_right(recipe: Path) -> None:
    code, found = findings(recipe, "--any-count", "--decode", "5")
    assert code == 0
    assert set(found) == {"checkpoint", "tokenizer", "train", "val", "test"}
    assert all(each["state"] == "right" for each in found.values())
    assert "BlipCaption" in found["checkpoint"]["message"]
    assert "5 of them decoded" in found["train"]["message"]


def test_another_number_of_samples_than_published_is_wrong(recipe: Path) -> None:
    code, found = findings(recipe)
    assert code == 1
    assert "the published data has 566,747 (Karpathy" in found["train"]["message"]
    assert found["checkpoint"]["state"] == "right"


def test_damaged_missing_and_empty_files_are_named(recipe: Path) -> None:
    first, second, third = images(recipe)[:3]
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-40])
    code, found = findings(recipe, "--any-count", "--decode", "all")
    message = " ".join(each["message"] for each in found.values())
    assert code == 1
    assert f"1 empty: {first}" in message
    assert f"1 unreadable: {second}" in message
    third.unlink()
    code, found = findings(recipe, "--any-count")
    assert code == 1
    assert any(third.name in each["message"] and each["state"] == "wrong" for each in found.values())


def test_a_checkpoint_that_is_none_is_told_and_the_rest_is_looked_at(recipe: Path, tmp_path: Path) -> None:
    code, found = findings(recipe, "--any-count", "--pretrained", str(tmp_path / "nothing.pth"))
    assert code == 1
    assert found["checkpoint"]["state"] == "wrong"
    assert "nothing.pth" in found["checkpoint"]["message"]
    assert found["train"]["state"] == "right"


def test_the_table_is_for_people_and_a_wrong_number_is_refused(recipe: Path) -> None:
    shown = runner.invoke(app, ["check", "tiny", "--recipes", str(recipe), "--any-count"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "What tiny needs" in shown.stdout
    refused = runner.invoke(app, ["check", "tiny", "--recipes", str(recipe), "--decode", "many"])
    assert "--decode" in str(refused.exception) and "'many'" in str(refused.exception)


def test_every_published_run_has_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    for recipe in read_recipes().values():
        settings = read_settings(find_task(recipe.task).settings, recipe.config, recipe.overrides)
        assert published_data(recipe.task, settings).train > 20000
