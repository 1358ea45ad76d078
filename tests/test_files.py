"""Folders take the place of others whole, or not at all."""

from pathlib import Path

import pytest

from upop.errors import RunFolderError
from upop.files import replacing_folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_that_cannot_be_replaced_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr("upop.files._exchange", lambda *_: False)  # as where the file system cannot swap two folders
    with (
        pytest.raises(RunFolderError, match="model cannot be written: Permission denied"),
        replacing_folder(folder) as new,
    ):
        (new / "file").write_text("new")
    assert names(tmp_path) == ["model", "model/old"]


def test_an_empty_folder_is_filled_and_the_last_entry_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "data"
    folder.mkdir()
    before, order, rename = folder.stat().st_ino, [], Path.rename

    def watch(path: Path, target: Path) -> Path:
        order.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watch)
    with replacing_folder(folder, last="b") as new:
        for name in "abcdefgh":
            (new / name).write_text(name)
    assert sorted(order) == list("abcdefgh")
    assert order[-1] == "b"
    assert names(tmp_path) == ["data", *(f"data/{name}" for name in "abcdefgh")]
    assert folder.stat().st_ino == before


def test_the_new_folder_can_be_read_by_others(tmp_path: Path):
    plain = tmp_path / "plain"
    plain.mkdir()
    with replacing_folder(tmp_path / "made"):
        pass
    assert (tmp_path / "made").stat().st_mode == plain.stat().st_mode
