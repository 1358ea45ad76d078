"""Every annotation file that is wrong ends in a DataError that names the file, and the sample where there is one."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from malformed import annotations as table
from upop.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in table.IMAGES:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def refused(kind: str, file: Path) -> str:
    """Read the file; return what the DataError says, which must be printable and name the file."""
    with pytest.raises(DataError) as caught:
        table.KINDS[kind].read(file, file.parent)
    text = str(caught.value)
    text.encode()
    assert file.name in text
    assert len(text) < 1000 + 2 * 5000  # a path may be long
    return text


@pytest.mark.parametrize("kind", table.KINDS)
def test_valid_files_are_read(folder: Path, kind: str) -> None:
    file = folder / "file.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(table.KINDS[kind].content).encode())  # a byte order mark is no harm
    assert len(table.KINDS[kind].read(file, folder)) in (1, 2)


@pytest.mark.parametrize("kind", table.KINDS)
@pytest.mark.parametrize("what", table.RAW)
def test_other_content(folder: Path, kind: str, what: str) -> None:
    file = folder / "file.json"
    file.write_bytes(table.RAW[what](json.dumps(table.KINDS[kind].content)))
    refused(kind, file)


@pytest.mark.parametrize("kind", table.KINDS)
@pytest.mark.parametrize("what", table.PLACES)
def test_no_file_there(folder: Path, kind: str, what: str) -> None:
    file = folder / "file.json"
    if what == "folder":
        file.mkdir()
    elif what == "dangling link":
        file.symlink_to(folder / "nowhere.json")
    elif what == "link to itself":
        file.symlink_to(file)
    refused(kind, file)


@pytest.mark.parametrize("row", table.FIELDS)
def test_wrong_field(folder: Path, row: str) -> None:
    found = table.FIELDS[row]
    file = folder / "file.json"
    content = found.content()
    file.write_text(json.dumps(content))
    text = refused(found.kind, file)
    assert f"sample {len(content) - 1}" in text
    assert found.field in text or found.field == "image" or "image" in text


@pytest.mark.parametrize("row", table.TRUTHS)
def test_wrong_ground_truth(folder: Path, row: str) -> None:
    file = folder / "file.json"
    file.write_text(json.dumps(table.TRUTHS[row]))
    text = refused("ground truth", file)
    assert "annotations" in text or "sample 1" in text


@pytest.mark.parametrize("row", table.ANSWERS)
def test_wrong_answer_list(folder: Path, row: str) -> None:
    file = folder / "file.json"
    file.write_text(json.dumps(table.ANSWERS[row]))
    refused("answers", file)


def test_a_key_there_twice_is_refused(folder: Path) -> None:
    file = folder / "file.json"
    file.write_text('[{"sentence": "a", "label": "True", "label": "False", "images": ["a_1.png", "b_2.png"]}]')
    assert "'label' twice" in refused("nlvr", file)


def test_extra_fields_paths_from_the_root_and_above_are_no_mistake(folder: Path) -> None:
    file = folder / "file.json"
    sample = {"image": str(folder / "a_1.png"), "caption": "a dog", "image_id": "x", "more": {"deep": [1]}}
    file.write_text(json.dumps([sample, {**sample, "image": f"../{folder.name}/b_2.png"}]))
    samples = table.KINDS["caption train"].read(file, folder)
    assert [samples[number]["image"].shape for number in range(2)] == [(3, 8, 8)] * 2


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.just("a_1.png"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_field_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    """Also of a sample that is read: what comes out of it is what went in."""
    kind = data.draw(st.sampled_from([name for name, row in table.KINDS.items() if row.paths or row.lists]))
    content = json.loads(json.dumps(table.KINDS[kind].content))
    field = data.draw(st.sampled_from(sorted(content[0])))
    content[1][field] = data.draw(JSON)
    file = folder / "file.json"
    file.write_text(json.dumps(content))
    try:
        samples = table.KINDS[kind].read(file, folder)
    except DataError as error:
        assert "sample 1" in str(error)
    else:
        assert len(samples) == 2
        assert samples[1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_text_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(table.KINDS)))
    text = bytearray(json.dumps(table.KINDS[kind].content).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([c.encode() for c in string.punctuation])
        )
    file = folder / "file.json"
    file.write_bytes(text)
    read: Any = None
    try:
        read = table.KINDS[kind].read(file, folder)
    except DataError as error:
        assert "file.json" in str(error)
    else:
        assert len(read) > 0
