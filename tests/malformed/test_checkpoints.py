"""Every checkpoint that is damaged, hostile or another model's ends in an error that names it; nothing in it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import upop
from malformed import checkpoints as table
from upop.checkpoints import WEIGHTS, load_official, read_weights, save_official
from upop.errors import CheckpointError, SettingError, UPopError
from upop.models.nlvr import BlipNlvr, NlvrConfig

SIZES = {"vision_heads": 2, "text_heads": 2, "vision_mlp": 16, "text_mlp": 16}
CONFIG = NlvrConfig(
    image_size=32,
    patch_size=16,
    vision_width=8,
    vision_depth=2,
    text_width=8,
    text_depth=2,
    merge_from=1,
    vocab_size=11,
    max_positions=8,
    **SIZES,
)


def make() -> nn.Module:
    torch.manual_seed(0)
    return BlipNlvr(CONFIG).eval()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> table.State:
    """Of a published checkpoint."""
    return read_weights(save_official("nlvr", make(), tmp_path_factory.mktemp("official") / "model.pth"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a compressed model."""
    model = make()
    groups = upop.find_groups(model)
    plan = upop.Plan.of(groups, {group.name: range(1, group.size, 2) for group in groups})
    return upop.save(upop.shrink(model, plan), tmp_path_factory.mktemp("folder") / "best")


def refused(load: Callable[[], object], path: Path) -> str:
    with pytest.raises((CheckpointError, SettingError)) as caught:
        load()
    text = str(caught.value)
    text.encode()
    assert str(path) in text
    assert len(text) < 4000
    return text


def official(path: Path) -> nn.Module:
    return load_official("nlvr", path, **SIZES)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", table.FILES)
def test_files_that_hold_no_weights(here: Path, state: table.State, what: str) -> None:
    path = here / "model.pth"
    path.write_bytes(table.FILES[what](state))
    refused(lambda: official(path), path)
    refused(lambda: read_weights(path), path) if what != "keys are numbers" else read_weights(path)
    assert not (here / table.RUN).exists()


@pytest.mark.parametrize("what", table.STATES)
def test_weights_that_do_not_fit(here: Path, state: table.State, what: str) -> None:
    path = here / "model.pth"
    torch.save({"model": table.STATES[what](state)}, path)
    refused(lambda: official(path), path)


@pytest.mark.parametrize("what", table.SAFETENSORS)
def test_safetensors_that_are_damaged(here: Path, compressed: Path, what: str) -> None:
    folder = shutil.copytree(compressed, here / "best")
    whole = read_weights(folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes(table.SAFETENSORS[what](whole))
    refused(lambda: upop.load(folder), folder)


def test_a_folder_without_weights(here: Path, compressed: Path) -> None:
    folder = shutil.copytree(compressed, here / "best")
    (folder / WEIGHTS).unlink()
    refused(lambda: upop.load(folder), folder)
    (folder / WEIGHTS).mkdir()
    refused(lambda: upop.load(folder), folder)
    refused(lambda: upop.load(here / "nowhere"), here / "nowhere")
    refused(lambda: upop.load(folder / "upop.json"), folder / "upop.json")


def test_places_of_published_files_that_hold_none(here: Path) -> None:
    (here / "folder.pth").mkdir()
    (here / "link.pth").symlink_to("nowhere")
    for name in ("folder.pth", "link.pth", "nowhere.pth"):
        refused(lambda name=name: official(here / name), here / name)  # type: ignore[misc]
    with pytest.raises(UPopError):
        official(here / "null\0byte.pth")
    with pytest.raises(UPopError):
        official(here / ("long" * 2000))


@pytest.mark.parametrize("what", table.DESCRIPTIONS)
def test_descriptions_that_do_not_fit(here: Path, compressed: Path, what: str) -> None:
    folder = shutil.copytree(compressed, here / "best")
    description = json.loads((folder / "upop.json").read_text())
    (folder / "upop.json").write_text(json.dumps(table.DESCRIPTIONS[what](description)))
    refused(lambda: upop.load(folder), folder)


@pytest.mark.parametrize("what", table.DESCRIPTION_FILES)
def test_descriptions_that_are_none(here: Path, compressed: Path, what: str) -> None:
    folder = shutil.copytree(compressed, here / "best")
    (folder / "upop.json").write_bytes(table.DESCRIPTION_FILES[what])
    refused(lambda: upop.load(folder), folder)


def test_half_precision_is_no_damage(here: Path, state: table.State) -> None:
    path = here / "model.pth"
    torch.save({"model": {name: v.half() if v.is_floating_point() else v for name, v in state.items()}}, path)
    images, words = torch.zeros(2, 3, 32, 32), torch.ones(1, 4, dtype=torch.long)
    inputs = {"images": images, "input_ids": words, "attention_mask": torch.ones_like(words)}
    with torch.no_grad():
        torch.testing.assert_close(official(path)(**inputs), make()(**inputs), atol=1e-2, rtol=1e-2)


def same(model: nn.Module, other: nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(value, theirs[name]) for name, value in mine.items())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_description_is_refused_or_changes_nothing(
    tmp_path: Path, compressed: Path, data: st.DataObject
) -> None:
    check_description(tmp_path, compressed, data)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_values_in_a_description_are_refused_or_change_nothing(
    tmp_path: Path, compressed: Path, data: st.DataObject
) -> None:
    check_description(tmp_path, compressed, data)


def check_description(tmp_path: Path, compressed: Path, data: st.DataObject) -> None:
    """Nothing that decides what is computed: the weights are those that were saved, in every case."""
    folder = tmp_path / "best"
    if not folder.exists():
        shutil.copytree(compressed, folder)
    description: Any = json.loads((compressed / "upop.json").read_text())
    found, name = description, data.draw(st.sampled_from(sorted(description)))
    while isinstance(found[name], dict) and found[name] and data.draw(st.booleans()):
        found, name = found[name], data.draw(st.sampled_from(sorted(found[name])))
    found[name] = data.draw(JSON)
    (folder / "upop.json").write_text(json.dumps(description))
    try:
        model = upop.load(folder)
    except (CheckpointError, SettingError) as error:
        assert str(folder) in str(error)
    else:
        assert same(model, upop.load(compressed))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_changes_no_shape(
    tmp_path: Path, compressed: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "best"
    if not folder.exists():
        shutil.copytree(compressed, folder)
    content = bytearray((compressed / WEIGHTS).read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(bytes(content))
    try:
        model = upop.load(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:
        wanted = upop.load(compressed).state_dict()
        assert {name: value.shape for name, value in model.state_dict().items()} == {
            name: value.shape for name, value in wanted.items()
        }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_published_file_is_refused_or_leaves_a_model(
    tmp_path: Path, state: table.State, data: st.DataObject
) -> None:
    path = tmp_path / "model.pth"
    content = bytearray(table.saved({"model": state}))
    first = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[first:]
    else:
        content[first : first + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(bytes(content))
    try:
        model = official(path)
    except (CheckpointError, SettingError) as error:
        assert str(path) in str(error)
    else:
        assert all(torch.isfinite(value).all() for value in model.parameters())
