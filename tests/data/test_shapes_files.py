"""The generated pairs on disk: same bytes, prefix law, no repeats, and all or nothing."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from upop.demo import Summary, write_shapes
from upop.demo.layout import held_out
from upop.errors import DataError, SettingError


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(summary: Summary, split: str) -> list[dict]:
    return json.loads((summary.annotation / f"nlvr_{split}.json").read_text())


def pairs(summary: Summary, split: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys(tuple(record["images"]) for record in records(summary, split)))


def test_the_same_arguments_give_the_same_bytes(generated: Summary, tmp_path: Path):
    again = write_shapes("nlvr", tmp_path / "again", seed=7, size=600)
    assert again.written
    assert digests(again.folder) == digests(generated.folder)


def test_another_seed_gives_other_records(generated: Summary, tmp_path: Path):
    other = write_shapes("nlvr", tmp_path / "other", seed=8, size=8)
    for split in ("train", "dev", "test"):
        assert records(other, split) != records(generated, split)[: len(records(other, split))]


def test_a_smaller_set_is_the_beginning_of_a_larger_one(generated: Summary, tmp_path: Path):
    small = write_shapes("nlvr", tmp_path / "small", seed=7, size=21)
    assert small.records == {"train": 21, "dev": 200, "test": 200} == {k: len(records(small, k)) for k in small.records}
    assert records(small, "train") == records(generated, "train")[:21]
    files, larger = digests(small.folder), digests(generated.folder)
    for name in files:
        if name.startswith(("images", "tokenizer")) or name.endswith(("dev.json", "test.json")):
            assert files[name] == larger[name]


@pytest.mark.parametrize(("size", "expected"), [(1, 200), (2000, 200), (4321, 432), (10_000, 1000), (86_373, 1000)])
def test_held_out_splits_are_a_tenth_within_bounds(size: int, expected: int):
    assert held_out(size, 200) == expected


def test_records_are_in_the_published_form(generated: Summary):
    for split, count in generated.records.items():
        found = records(generated, split)
        assert len(found) == count
        for record in found:
            assert list(record) == ["sentence", "label", "images"]
            assert record["label"] in ("True", "False")
            assert len(record["sentence"].split()) <= 14
            assert all((generated.image_root / image).is_file() for image in record["images"])
    assert sum(path.is_file() for path in generated.image_root.rglob("*")) == generated.images


def test_each_pair_has_four_different_sentences_two_of_them_true(generated: Summary):
    for split in generated.records:
        by_pair: dict[tuple[str, str], list[dict]] = {}
        for record in records(generated, split):
            by_pair.setdefault(tuple(record["images"]), []).append(record)
        for group in by_pair.values():
            assert Counter(record["label"] for record in group) == {"True": 2, "False": 2}
            assert len({record["sentence"] for record in group}) == 4


def test_no_pair_of_images_comes_up_twice(generated: Summary):
    seen = set()
    for split in generated.records:
        for pair in pairs(generated, split):
            pixels = frozenset(Image.open(generated.image_root / image).tobytes() for image in pair)
            assert pixels not in seen
            seen.add(pixels)


def test_size_and_format_of_the_images(tmp_path: Path):
    summary = write_shapes("nlvr", tmp_path / "set", seed=1, size=4, image_size=48, image_format="jpeg")
    with Image.open(summary.image_root / pairs(summary, "train")[0][0]) as image:
        assert (image.size, image.mode, image.format) == ((48, 48), "RGB", "JPEG")


def test_progress_ends_at_the_number_of_images(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    summary = write_shapes("nlvr", tmp_path / "set", seed=1, size=10, progress=lambda *call: calls.append(call))
    assert calls[-1] == (summary.images, summary.images)
    assert calls == sorted(set(calls))


def test_a_set_that_is_there_is_left_as_it_is(generated: Summary):
    before = digests(generated.folder)
    again = write_shapes("nlvr", generated.folder, seed=7, size=600)
    assert not again.written
    assert (again.records, again.images) == (generated.records, generated.images)
    assert digests(generated.folder) == before


def test_another_generated_set_is_not_overwritten(generated: Summary):
    before = digests(generated.folder)
    with pytest.raises(DataError, match="seed 7, not 9; size 600, not 601"):
        write_shapes("nlvr", generated.folder, seed=9, size=601)
    assert digests(generated.folder) == before


def test_a_folder_with_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty \(it holds thesis\.txt\)"):
        write_shapes("nlvr", tmp_path, seed=1, size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("manifest", ["", "[]", "{", '"text"', "{}"])
def test_a_broken_manifest_is_refused(tmp_path: Path, manifest: str):
    (tmp_path / "shapes.json").write_text(manifest)
    with pytest.raises(DataError, match=r"(cannot be read|holds another generated set)"):
        write_shapes("nlvr", tmp_path, seed=1, size=4)


def test_an_empty_folder_is_filled_in_place(tmp_path: Path):
    out = tmp_path / "empty"
    out.mkdir()
    inode = out.stat().st_ino
    write_shapes("nlvr", out, seed=1, size=4)
    assert out.stat().st_ino == inode
    assert sorted(path.name for path in out.iterdir()) == ["annotation", "images", "shapes.json", "tokenizer"]


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, exists: bool):
    out = tmp_path / "set"
    if exists:
        out.mkdir()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes("nlvr", out, seed=1, size=4, progress=interrupt)
    assert list(tmp_path.rglob("*")) == ([out] if exists else [])


def test_a_full_disk_is_a_data_error_that_names_the_folder(tmp_path: Path):
    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"not written: .*set cannot be written: No space left"):
        write_shapes("nlvr", tmp_path / "set", seed=1, size=4, progress=full)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_a_folder_is_a_data_error(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "inside"):
        with pytest.raises(DataError, match="file"):
            write_shapes("nlvr", out, seed=1, size=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "at least 1, not 0"),
        ({"size": -5}, "at least 1, not -5"),
        ({"image_size": 4}, "16 to 2048 pixels, not 4"),
        ({"image_format": "gif"}, "'png' or 'jpeg', not 'gif'"),
        ({"seed": "x"}, "whole number, not 'x'"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict, message: str):
    with pytest.raises(SettingError, match=message):
        write_shapes("nlvr", tmp_path / "set", **{"seed": 1, "size": 4, **wrong})
    assert list(tmp_path.iterdir()) == []
