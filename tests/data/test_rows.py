"""Rows of all file formats and kinds, and what is said of wrong ones."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from upop.data.rows import Rows, read_rows
from upop.data.turns import IMAGE, Turn
from upop.errors import BadImageError, DataError, SettingError
from upop.tasks.row_settings import RowSettings, rows_for


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def lines(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def packed(path: Path, **files: bytes) -> Path:
    """Write a shard; the names of files are given with "_" for the dot."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.replace("_", "."))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def shard(folder: Path) -> Path:
    files: dict[str, bytes] = {}
    for number in range(2):
        files[f"{number:04}_png"] = (folder / f"{number}.png").read_bytes()
        files[f"{number:04}_json"] = json.dumps({"about": f"shape {number}"}).encode()
    return packed(folder / "shard.tar", **files)


ASKED = {"from": "human", "value": "<image>\nWhich colour?"}
SAID = {"from": "gpt", "value": "red"}


def test_conversations_of_llava(folder: Path) -> None:
    row = {"image": "1.png", "conversations": [ASKED, SAID]}
    alone = {"conversations": [{"from": "human", "value": "Hello"}, SAID]}
    with_image, without = read_rows(lines(folder, row, alone))
    assert with_image.turns == (Turn("user", (IMAGE, "Which colour?")), Turn("assistant", ("red",)))
    assert [image.getpixel((0, 0)) for image in with_image.open_images()] == [(1, 0, 0)]
    assert without.images == () and without.turns[0].text == "Hello"
    (folder / "rows.json").write_text(json.dumps([row, alone]))
    assert [each.turns for each in read_rows(folder / "rows.json")] == [with_image.turns, without.turns]


def test_messages_with_images_inside(folder: Path) -> None:
    held = base64.b64encode((folder / "2.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{held}"}},
        {"type": "image"},
        {"type": "text", "text": "Same?"},
    ]
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]
    row = {"messages": [*said, {"role": "assistant", "content": "no"}], "images": ["1.png"]}
    (found,) = read_rows(lines(folder, row))
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant"]
    assert found.turns[1].parts == (IMAGE, IMAGE, "Same?")
    assert [image.getpixel((0, 0))[0] for image in found.open_images()] == [2, 1]


def test_conversations_in_texts_and_columns_of_shards(folder: Path) -> None:
    said = json.dumps([{"role": "user", "content": "<image>Same?"}, {"role": "assistant", "content": "no"}])
    (found,) = read_rows(lines(folder, {"messages": said, "image": "1.png"}))
    assert found.turns == (Turn("user", (IMAGE, "Same?")), Turn("assistant", ("no",)))
    (found,) = read_rows(lines(folder, {"messages": said, "images": '["1.png"]'}))
    assert found.open_images()[0].getpixel((0, 0)) == (1, 0, 0)
    inner = {"jpg": "0.png", "json": {"question": "Which?", "answer": "a"}}
    assert read_rows(lines(folder, inner))[0].answers == ("a",)


def test_an_image_stands_for_the_video_that_it_is_of(folder: Path) -> None:
    (found,) = read_rows(lines(folder, {"image": "0.png", "caption": "a", "video": "clip 7"}))
    assert found.captions == ("a",) and len(found.images) == 1


def test_a_shard_of_videos_is_refused(folder: Path) -> None:
    said = json.dumps({"conversations": [ASKED, SAID]}).encode()
    packed(folder / "videos.tar", **{"0_mp4": b"film", "0_json": said})
    for streaming in (False, True):
        with pytest.raises(DataError, match="row 0: it has a video, and images alone are read"):
            read_rows(folder / "videos.tar", streaming=streaming, limit=1)


def test_images_without_marks_stand_first(folder: Path) -> None:
    said = [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "no"}]
    (found,) = read_rows(lines(folder, {"messages": said, "image": ["1.png", "0.png"]}))
    assert found.turns[0].parts == (IMAGE, IMAGE, "Same?")
    assert [image.getpixel((0, 0))[0] for image in found.open_images()] == [1, 0]


def test_questions_captions_labels_and_texts(folder: Path) -> None:
    (asked,) = read_rows(lines(folder, {"image": "0.png", "question": "Which?", "answers": ["a", "b", "b"]}))
    assert (asked.question, asked.answers, asked.answer) == ("Which?", ("a", "b", "b"), "b")
    squad = {"question": "Which?", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}}
    assert read_rows(lines(folder, squad))[0].answers == ("a",)
    vqa = {"question": "Which?", "answers": [{"answer": "a", "answer_confidence": "yes"}, {"answer": 3}]}
    assert read_rows(lines(folder, vqa))[0].answers == ("a", "3")
    assert read_rows(lines(folder, {"image": "0.png", "captions": ["a", "b"]}))[0].captions == ("a", "b")
    labelled = read_rows(lines(folder, {"image": "0.png", "label": "dog"}, {"image": "1.png", "label": "cat"}))
    assert labelled.names == ("cat", "dog") and [row.label for row in labelled] == [1, 0]
    again = read_rows(lines(folder, {"image": "0.png", "label": "dog"}), classes=labelled.names)
    assert again[0].label == 1
    assert read_rows(lines(folder, {"text": "alone"}), kinds=("text",))[0].text == "alone"


def test_formats_of_datasets(folder: Path) -> None:
    import datasets

    (folder / "rows.csv").write_text("file,what\n0.png,a\n1.png,b\n")
    described = {"image": "file", "label": "what"}
    assert [row.label for row in read_rows(folder / "rows.csv", columns=described)] == [0, 1]
    held = [{"bytes": (folder / "2.png").read_bytes(), "path": None}]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    datasets.Dataset.from_list([{"images": held, "caption": "c"}], features=features).to_parquet(folder / "r.parquet")
    (found,) = read_rows(str(folder / "*.parquet"))
    assert found.captions == ("c",) and found.open_images()[0].getpixel((0, 0)) == (2, 0, 0)
    for streaming in (False, True):
        rows = read_rows(shard(folder), columns={"caption": "json.about"}, streaming=streaming, limit=1)
        assert [row.captions for row in rows] == [("shape 0",)] and rows[0].open_images()[0].size == (8, 8)
    (folder / "files.csv").write_text("image,question,answer\n0.png,q,a\n1.png,q,b\n")
    streamed = read_rows(folder / "files.csv", streaming=True, limit=5)
    assert [row.open_images()[0].size for row in streamed] == [(8, 8), (8, 8)]
    for name in ("cat", "dog"):
        (folder / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "set" / name / "0.png")
    listed = read_rows(folder / "set")
    assert listed.names == ("cat", "dog") and [row.label for row in listed] == [0, 1]


WRONG: list[tuple[list[Any], dict[str, Any], str]] = [
    ([{"image": "0.png", "label": 1}], {"kinds": ("caption",)}, "image + caption (lacks caption)"),
    ([{"image": "0.png", "reply": "a", "question": "b"}], {"columns": {"answer": "repl"}}, "did you mean 'reply'"),
    ([{"image": "9.png", "caption": "a"}], {}, "rows.jsonl, line 1: the image '9.png' does not exist"),
    ([{"image": "0.png", "caption": "a"}, {"caption": "a"}], {}, "line 2: the column 'image' holds no image"),
    ([{"question": "a", "answer": "b"}, {"question": "a", "answer": ""}], {}, "line 2: the column 'answer' holds no"),
    ([{"messages": [{"role": "user", "content": "a"}]}], {}, "line 1: the column 'messages' has no answer"),
    ([{"messages": [{"role": "usr", "content": "a"}]}], {}, "'usr' in turn 0 (did you mean 'user'?)"),
    ([{"conversations": [ASKED, SAID]}], {}, "has 1 <image> marks, but the row has 0 images"),
    ([{"text": "a"}, "{"], {"kinds": ("text",)}, "rows.jsonl, line 2 is not JSON"),
    ([{"text": "a"}, "", 3], {"kinds": ("text",)}, "rows.jsonl, line 3: a row must be an object"),
    ([{"image": "https://a.b/c.png", "caption": "a"}], {}, "is a URL"),
    ([{"image": "../0.png", "caption": "a"}], {}, "lies outside of the image root"),
    ([{"image": "0.png", "label": "cat"}], {"classes": ("bat", "dog")}, "did you mean 'bat'"),
    ([{"image": "0.png", "label": 2}, {"image": "1.png", "label": -1}], {}, "line 2: the column 'label' holds -1"),
    ([{"image": "0.png", "label": "cat"}, {"image": "1.png", "label": -1}], {}, "line 2: the column 'label' holds -1"),
    ([{"video": "a.mp4", "conversations": [ASKED, SAID]}], {}, "line 1: it has a video, and images alone"),
    ([{"Video": "a.mp4", "conversations": [ASKED, SAID]}], {}, "line 1: it has a video, and images alone"),
    ([{"json": {"video": "a.mp4", "conversations": [ASKED, SAID]}}], {}, "line 1: it has a video, and images alone"),
    ([{"messages": "hello"}], {}, "must be a list of turns"),
    ([], {}, "holds no rows"),
]


@pytest.mark.parametrize(("rows", "options", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_wrong_rows_are_named(folder: Path, rows: list[Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        read_rows(lines(folder, *rows), **options)
    assert said in str(error.value) and "rows.jsonl" in str(error.value)


def test_wrong_names_are_answered(folder: Path) -> None:
    lines(folder, {"text": "a"})
    with pytest.raises(DataError, match=r"does not exist \(did you mean 'rows.jsonl'\?\)"):
        read_rows(folder / "row.jsonl")
    with pytest.raises(DataError, match="owner/nothing cannot be read as a data set"):
        read_rows("owner/nothing")
    with pytest.raises(SettingError, match=r"'lable' is not a role of a column here \(did you mean 'label'"):
        read_rows(folder / "rows.jsonl", columns={"lable": "text"})
    with pytest.raises(SettingError, match="needs the number of rows to read"):
        read_rows("owner/nothing", streaming=True)
    (folder / "0.png").write_bytes(b"none")
    with pytest.raises(BadImageError, match=r"rows.jsonl, line 1: the image .*0.png cannot be read"):
        read_rows(lines(folder, {"image": "0.png", "label": "a"}))[0].open_images()


def test_settings_name_the_rows(folder: Path) -> None:
    file = str(lines(folder, *({"text": str(number)} for number in range(40))))

    def texts(split: str, **settings: Any) -> list[str]:
        found: Rows = rows_for(RowSettings(**settings), split, ("text",))
        return [row.text for row in found]

    train, val = texts("train", data=file, hold_out=0.1), texts("val", data=file, hold_out=0.1)
    assert len(train) == 36 and len(val) == 4 and sorted(train + val, key=int) == [str(each) for each in range(40)]
    assert len(texts("train", data=file, hold_out=0)) == len(texts("train", data=file, val_data=file)) == 40
    assert texts("train", data=file, rows=2, hold_out=0) == ["0", "1"]
    assert RowSettings(data=file).held_out == ("val",)
    evaluated = RowSettings(data=file).as_evaluated()
    assert evaluated.held_out == ("test",) and len(rows_for(evaluated, "test", ("text",))) == 40
    with pytest.raises(SettingError, match="No rows to train on are given"):
        texts("train")
    with pytest.raises(ValueError, match=r"'imag' is not a role of a column \(did you mean 'image'"):
        RowSettings(data=file, columns={"imag": "x"})
