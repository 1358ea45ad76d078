"""Every file of settings or recipes that is wrong ends in a SettingError that names it and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from malformed import configs as table
from upop.errors import SettingError, UPopError
from upop.settings import RunSettings, read_settings
from upop.tasks import TASKS, find_task
from upop.yaml_files import parse_yaml

NLVR = find_task("nlvr").settings


def refused(kind: type[RunSettings], file: Path, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(SettingError) as caught:
        read_settings(kind, file, overrides or {})
    text = str(caught.value)
    text.encode()
    assert str(file) in text
    assert len(text) < 1000
    return text


@pytest.mark.parametrize("what", table.RAW)
def test_files_that_are_none(tmp_path: Path, what: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(table.RAW[what])
    refused(NLVR, file)


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("nowhere")
    (tmp_path / "nlvr.yaml").write_text("p: 0.5\n")
    assert "did you mean 'nlvr.yaml'" in refused(NLVR, tmp_path / "nlvrr.yaml")
    assert "folder" in refused(NLVR, tmp_path / "folder.yaml")
    refused(NLVR, tmp_path / "link.yaml")
    refused(NLVR, tmp_path / "no" / "folder.yaml")
    with pytest.raises(SettingError):
        read_settings(NLVR, tmp_path / "null\0byte.yaml", {})
    with pytest.raises(SettingError):
        read_settings(NLVR, tmp_path / ("long" * 2000), {})


@pytest.mark.parametrize("what", table.SETTINGS)
def test_settings_that_cannot_be_used(tmp_path: Path, what: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{table.SETTINGS[what]}\n")
    text = refused(NLVR, file)
    key = str(next(iter(yaml.safe_load(table.SETTINGS[what]))))
    assert key.strip() in text or "min_lr" in text


@pytest.mark.parametrize("what", table.OF_TASKS)
def test_settings_of_tasks_that_cannot_be_used(tmp_path: Path, what: str) -> None:
    task, text = table.OF_TASKS[what]
    file = tmp_path / "run.yaml"
    file.write_text(f"{text}\n")
    described = refused(find_task(task).settings, file)
    assert any(str(key) in described for key in yaml.safe_load(text))


@pytest.mark.parametrize("what", table.MODELS)
def test_models_that_cannot_be_built(tmp_path: Path, what: str) -> None:
    task = find_task("nlvr")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"image_size": 32, "model": {**table.MODELS[what], "vocab_size": 8}}))
    with pytest.raises(UPopError) as caught:
        task.build(read_settings(task.settings, file, {"tokenizer": _tokenizer(tmp_path)}))
    assert any(name in str(caught.value) for name in table.MODELS[what])


def _tokenizer(folder: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (folder / "words").mkdir(exist_ok=True)
    (folder / "words" / "vocab.txt").write_text("\n".join(words))
    return str(folder / "words")


@pytest.mark.parametrize("what", table.RECIPES)
def test_recipes_that_cannot_be_run(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from upop.cli.app import app, main

    file = tmp_path / "recipes.yaml"
    file.write_text(table.RECIPES[what])
    monkeypatch.setattr("sys.argv", ["upop", "run", "a", "--dry-run", "--recipes", str(file)])
    with pytest.raises(SystemExit) as ended:
        main(app)
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "Error: SettingError" in printed.err
    assert "Traceback" not in printed.err


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_value_of_any_setting_is_used_or_refused(data: st.DataObject) -> None:
    check_value(data)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_many_values_of_settings_are_used_or_refused(data: st.DataObject) -> None:
    check_value(data)


def check_value(data: st.DataObject) -> None:
    """What is used is what was given, and comes back from the file that a run writes down."""
    kind = find_task(data.draw(st.sampled_from(sorted(TASKS)))).settings
    name = data.draw(st.sampled_from(sorted(kind.model_fields)))
    given = data.draw(VALUES)
    try:
        found = read_settings(kind, None, {name: given})
    except SettingError as error:
        assert name in str(error)
        return
    if name != "model":  # its values are read where the model is built
        assert kind(**parse_yaml(found.to_yaml())) == found
    value = getattr(found, name)
    if isinstance(given, int | float) and not isinstance(given, bool) and isinstance(value, int | float):
        assert value == given


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab:-{}[]&*!|>'\"#%@`, \n\t\0é?<", max_size=40) | st.text(max_size=30))
def test_any_text_is_read_as_yaml_reads_it_or_refused(text: str) -> None:
    try:
        found = parse_yaml(text)
    except ValueError:
        return
    assert found == yaml.safe_load(text) or found != found
