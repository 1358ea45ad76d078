"""Every published run can be listed, explained and started, and is what its published command asks for."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from upop.cli import published, published_deit, published_segmenter
from upop.cli.app import app
from upop.errors import SettingError
from upop.recipes import Recipe, find_recipe, read_recipes
from upop.settings import RunSettings, read_settings
from upop.tasks import find_task

ROOT = Path(__file__).parents[2]
ALL = list(read_recipes(ROOT / "configs" / "recipes.yaml").values())
COMMANDS = {"compress_deit.py": published_deit, "compress_segmenter.py": published_segmenter}
"""Where the published scripts with other flags are."""
runner = CliRunner()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_list_names_every_recipe() -> None:
    shown = runner.invoke(app, ["recipes"], env={"COLUMNS": "200"}).output
    assert all(recipe.name in shown for recipe in ALL)


def resolved(recipe: Recipe) -> RunSettings:
    return read_settings(find_task(recipe.task).settings, recipe.config, recipe.overrides, published=True)


def asked_for(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, RunSettings]:
    """The verb, task and settings that a published command line leads to."""
    words = shlex.split(command)
    place = next(number for number, word in enumerate(words) if word.endswith(".py"))
    for variable in words[: words.index("python")]:
        monkeypatch.setenv(*variable.split("=", 1))
    monkeypatch.setenv("WORLD_SIZE", next(word for word in words if "nproc_per_node" in word).rpartition("=")[2])
    module = COMMANDS.get(words[place], published)
    found: list[tuple[str, str, RunSettings]] = []
    for verb in ("compress", "evaluate_checkpoint"):
        monkeypatch.setattr(module, verb, lambda task, settings, verb=verb: found.append((verb, task.name, settings)))
    monkeypatch.setattr(module, "main", lambda typer_app: runner.invoke(typer_app, words[place + 1 :]))
    spec = importlib.util.spec_from_file_location("__main__", ROOT / words[place])
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert found, f"{command} did not start"
    return found[0]


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_a_recipe_is_what_its_published_commands_ask_for(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_for(recipe.command, monkeypatch) == ("compress", recipe.task, resolved(recipe))
    verb, task, settings = asked_for(recipe.evaluation, monkeypatch)
    assert (verb, task) == ("evaluate_checkpoint", recipe.task)
    assert settings.pretrained == str(recipe.output_dir / recipe.compressed)


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_a_dry_run_says_everything_and_does_nothing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("upop.runs.verbs.compress", lambda *_: pytest.fail("it started"))
    asked = ["run", recipe.name, "--dry-run", "--output-dir", str(tmp_path / "out")]
    result = runner.invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert recipe.command in result.output
    assert f"search for {recipe.searched} epochs" in result.output
    assert f"max_epoch: {recipe.retraining}" in result.output
    assert "missing" in result.output
    assert not (tmp_path / "out").exists()


def test_run_starts_what_the_recipe_says_and_flags_beat_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[str, RunSettings]] = []
    monkeypatch.setattr("upop.runs.verbs.compress", lambda task, settings: started.append((task.name, settings)))
    result = runner.invoke(app, ["run", "nlvr2-3x", "--output-dir", str(tmp_path), "--set", "num_workers=1"])
    assert result.exit_code == 0, result.output
    (task, settings) = started[0]
    assert task == "nlvr"
    assert (settings.ratio, settings.max_epoch, settings.searching_epochs) == (0.667, 20, 20)
    assert (settings.output_dir, settings.num_workers) == (tmp_path, 1)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("reference", "search for 15 epochs at a constant learning rate, masking 50 % of the cost; cut; retrain"),
        ("upop", "search in the first 10 % of 30 epochs, masking 50 % of the cost in stages; cut; train on"),
        ("magnitude", "cut by weight magnitude, 50 % of the cost; retrain for 30 epochs"),
    ],
)
def test_a_dry_run_tells_what_the_method_does(method: str, says: str) -> None:
    result = runner.invoke(app, ["run", "nlvr2-2x", "--dry-run", "--method", method])
    assert result.exit_code == 0, result.output
    assert says in result.output
    assert f"method: {method}" in result.output


def test_a_target_takes_the_place_of_the_published_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[RunSettings] = []
    monkeypatch.setattr("upop.runs.verbs.compress", lambda _, settings: started.append(settings))
    words = ["run", "nlvr2-2x", "--target", "params=0.6"]
    result = runner.invoke(app, [*words, "--method", "upop"])
    assert result.exit_code == 0, result.output
    assert started[0].budget == {"target": "params=0.6"}
    shown = runner.invoke(app, [*words, "--method", "upop", "--dry-run"]).output
    assert "masking down to params=0.6 in stages" in shown and len(started) == 1


@pytest.mark.parametrize("module", [published_deit, published_segmenter], ids=["deit", "segmenter"])
def test_published_commands_have_a_dry_run_too(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compress", lambda *_: pytest.fail("it started"))
    monkeypatch.setenv("DATASET", "datasets/vision")
    result = runner.invoke(module.app, ["--dry-run"])
    assert result.exit_code == 0, result.output
    assert "Settings as resolved" in result.output and "masking" in result.output


def test_rows_with_the_published_names_are_read(tmp_path: Path) -> None:
    today = find_recipe("ade20k-p0.1")
    row = today.model_dump(mode="json", exclude={"ratio", "epochs"}) | {"p": 0.1, "epoch": 64}
    (tmp_path / "recipes.yaml").write_text(yaml.safe_dump([row, row | {"name": "even", "search_epochs": None}]))
    read = read_recipes(tmp_path / "recipes.yaml")
    assert read["ade20k-p0.1"] == today
    assert (read["even"].searched, read["even"].retraining) == (64, 64)


def test_epochs_of_a_command_are_all_and_keep_the_published_share(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[RunSettings] = []
    monkeypatch.setattr("upop.runs.verbs.compress", lambda _, settings: started.append(settings))
    for words in (["nlvr2-2x", "--set", "epochs=10"], ["ade20k-p0.1", "--set", "epochs=10"]):
        result = runner.invoke(app, ["run", *words])
        assert result.exit_code == 0, result.output
    assert [(s.searching_epochs, s.retraining_epochs, s.all_epochs) for s in started] == [(5, 5, 10), (2, 8, 10)]


@pytest.mark.parametrize("task", ["nlvr", "classification", "segmentation"])
def test_published_commands_do_what_was_published_and_take_the_better_method(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = next(recipe for recipe in ALL if recipe.task == task)
    settings = asked_for(recipe.command, monkeypatch)[2]
    assert (settings.method, settings.cost, settings.distill_weight) == ("reference", "reference", 0.0)
    kind = find_task(recipe.task).settings
    for method in ("upop", "magnitude"):
        settings = asked_for(f"{recipe.command} --method {method}", monkeypatch)[2]
        assert settings == read_settings(kind, recipe.config, {**recipe.overrides, "method": method})
        assert settings.cost == "params"


def test_a_config_file_may_choose_the_method_of_a_published_run(tmp_path: Path) -> None:
    kind = find_task("nlvr").settings
    for text, expected in (("method: upop", ("upop", "params")), ("cost: params", ("reference", "params"))):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        settings = read_settings(kind, file, {}, published=True)
        assert (settings.method, settings.cost) == expected
    assert read_settings(kind, None, {}).method == "upop"
    file.write_text("correct: false")
    with pytest.raises(SettingError, match=r"reference.*correct.* or set method: upop"):
        read_settings(kind, file, {}, published=True)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(SettingError, match="did you mean 'nlvr2-2x'"):
        find_recipe("nlvr-2x")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: 1", "must hold a list"),
        ("- name: [", "is not YAML"),
        (yaml.safe_dump([ALL[0].model_dump(mode="json") | {"ratio": 2}]), "recipe 0: ratio"),
        (yaml.safe_dump([ALL[0].model_dump(mode="json")] * 2), "two recipes are called"),
    ],
)
def test_damaged_recipes_say_what_is_wrong(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipes.yaml"
    path.write_text(content)
    with pytest.raises(SettingError, match=says):
        read_recipes(path)


def test_recipes_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"recipes\.yaml cannot be read: there is none"):
        read_recipes(tmp_path / "recipes.yaml")
