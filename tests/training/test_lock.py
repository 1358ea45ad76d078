"""Two runs in one folder: the second is refused, whoever holds it; a process that is gone holds nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import runs
from together import FORKS
from upop.errors import RunFolderError
from upop.runs import lock
from upop.runs.lock import FolderLock
from upop.runs.verbs import train


def _hold(folder: Path, ready: Any) -> None:
    """Hold a folder for good; so does, if it is let to, a process that was split off."""
    FolderLock(folder, print)
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True).start()
    ready.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process, which holds the folder."""
    ready = FORKS.Event()
    process = FORKS.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_run_in_a_folder_that_another_one_writes_to_is_refused(holder: Any, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    config = runs.make_task("nlvr", tmp_path / "task")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for resume in ("no", "auto"):
        with pytest.raises(RunFolderError, match=rf"Another run writes to .*process {holder.pid} on .*, since \d{{4}}"):
            train(*runs.nlvr(config, output_dir=tmp_path, resume=resume))
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_killed_process_holds_nothing_though_those_that_it_split_off_live(holder: Any, tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    said: list[str] = []
    taken = FolderLock(tmp_path, said.append)
    assert len(said) == 1
    assert f"process {holder.pid} on " in said[0]
    taken.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_given_back_once(tmp_path: Path) -> None:
    first = FolderLock(tmp_path, print)
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path, print)
    first.release()
    second = FolderLock(tmp_path, print)
    first.release()
    with pytest.raises(RunFolderError, match="Another run"):
        FolderLock(tmp_path, print)
    second.release()
    assert not list(tmp_path.iterdir())


def _of_another_machine(folder: Path) -> Path:
    path = folder / lock.NAME
    path.write_text(json.dumps({"upop": 1, "host": "elsewhere", "pid": os.getpid(), "born": "long ago"}))
    return path


def test_another_machine_that_shows_no_life_is_succeeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 0.2)
    _of_another_machine(tmp_path)
    said: list[str] = []
    FolderLock(tmp_path, said.append).release()
    assert "elsewhere" in said[0] and "waiting" in said[0]
    assert "elsewhere" in said[1] and "has ended" in said[1]


def test_another_machine_that_shows_life_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _of_another_machine(tmp_path)
    threading.Timer(0.3, lambda: os.utime(path, (1, 1))).start()
    with pytest.raises(RunFolderError, match=r"Another run writes to .* on elsewhere"):
        FolderLock(tmp_path, print)
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_holder_shows_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.05)
    held = FolderLock(tmp_path, print)
    os.utime(tmp_path / lock.NAME, (1, 1))
    until = time.monotonic() + 10
    while (tmp_path / lock.NAME).stat().st_mtime < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / lock.NAME).stat().st_mtime > 2
    held.release()


def test_file_systems_without_locks_go_by_the_process_and_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_descriptor: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    held = FolderLock(tmp_path, print)
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path, print)
    path = tmp_path / lock.NAME
    reused = {**json.loads(path.read_text()), "born": "in another life"}  # the number is another process's by now
    held.release()
    path.write_text(json.dumps(reused))
    said: list[str] = []
    FolderLock(tmp_path, said.append).release()
    assert "has ended" in said[0]


@pytest.mark.parametrize("content", [b"my own notes", b'{"upop": 99}', b"[1]", b"\xff\xfe"])
def test_a_file_of_that_name_that_is_no_lock_stays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / lock.NAME).write_bytes(content)
    with pytest.raises(RunFolderError, match=r"lock.*version"):
        FolderLock(tmp_path, print)
    assert (tmp_path / lock.NAME).read_bytes() == content


def test_a_link_of_that_name_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.write_text("")
    (tmp_path / lock.NAME).symlink_to(other)
    with pytest.raises(RunFolderError, match="cannot be written"):
        FolderLock(tmp_path, print)
    assert other.read_text() == ""
