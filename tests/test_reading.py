"""Files that others may have written are read within bounds, and what is wrong with them is said in one sentence."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upop.data.caption import read_ground_truth
from upop.data.samples import read_samples
from upop.data.vqa import read_answer_list
from upop.errors import CheckpointError, DataError
from upop.reading import DEEPEST, LONGEST_NUMBER, parse_json, read_bytes, read_json, read_lines, read_object, read_text
from upop.yaml_files import parse_yaml

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_json_says_what_python_wrote(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[NaN]", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("[1e999]", "1e999 is too large"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' twice"),
        ("[" * 100_000, "levels deep"),
        ("[" * (DEEPEST + 1) + "[]" + "]" * (DEEPEST + 1), "levels deep"),
        ('{"a":' * (DEEPEST + 1) + "{}" + "}" * (DEEPEST + 1), "levels deep"),
        ("9" * (LONGEST_NUMBER + 1), "digits"),
        ("9" * 10_000, "digits"),
    ],
)
def test_json_beyond_the_bounds_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_json_within_the_bounds_is_read() -> None:
    text = "[" * DEEPEST + "9" * LONGEST_NUMBER + "]" * DEEPEST
    assert json.dumps(parse_json(text)) == text
    assert parse_json("[NaN, Infinity]", nan=True)[1] == float("inf")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n" * 2, "there twice"),
        ("- a\n" * 90_000, "more than"),
        pytest.param("[" + "1," * 120_000 + "]", "values", marks=pytest.mark.slow),
        ("- &a [" + "1," * 1000 + "]\n" + "- *a\n" * 100, "values"),
        ("[" * 3000, "deep"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "deep"),
        ("a: 1" + ":59" * 1000, "digits"),
        ("a: 0x" + "f" * 1000, "digits"),
        ("a: &a [*a]", "a part of"),
        ("a: !!python/name:os.system ''", "could not determine a constructor"),
    ],
)
def test_yaml_beyond_the_bounds_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_pipe, "a named pipe, not a file|No such device"),
        (_socket, "a socket, not a file|No such device"),
        (lambda path: path.mkdir(), "a folder, not a file|Is a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_bytes(b"\xff\xfe[\x00]\x00"), "UTF-16; save it as UTF-8"),
        (lambda path: path.write_bytes(b'["\xe9"]'), "byte 2 is no UTF-8"),
        (lambda path: path.write_bytes(b"[1"), "Expecting ',' delimiter: line 1 column 3"),
    ],
)
def test_what_is_no_json_file_is_told_by_name(
    tmp_path: Path, make: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("x.json")
    make(path)
    with pytest.raises(CheckpointError, match=f"^x.json cannot be read: .*({said}).*. Fetch it again.$"):
        read_json(path, CheckpointError, "Fetch it again.")


@pytest.mark.parametrize("read", [read_samples, read_ground_truth, read_answer_list])
def test_readers_of_annotations_wait_for_nobody(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "list.json"
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"list\.json .*cannot be read: .*named pipe"):
        read(path)


def test_lines_of_json_are_told_to_be_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('{"image": "a.png"}\n{"image": "b.png"}\n')
    with pytest.raises(DataError, match=r"Extra data: line 2 .*lines into"):
        read_samples(tmp_path / "list.json")


def test_only_as_much_is_read_as_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_text(path, 4)


def test_a_mark_of_the_encoding_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "a.json", CheckpointError, "") == {"a": 1}
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"b\.json must hold a JSON object, and holds a list"):
        read_object(tmp_path / "b.json", CheckpointError, "")


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": NaN}\n\n{"a"\n\xff\n[2]\r\n' + b"1" * 2**21 + b'\n"\xe2\x80\xa8"\n{"a": ')
    kinds = [type(row).__name__ for row in read_lines(path)]
    assert kinds == ["dict", "JSONDecodeError", "UnicodeDecodeError", "list", "ValueError", "str", "JSONDecodeError"]
