"""Files and folders that appear whole or not at all: written beside, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upop.errors import RunFolderError

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def is_file(path: Path) -> bool:
    """Whether there is a file of that name; False also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Raises:
        RunFolderError: it cannot be written, for want of a folder, of permission or of space.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        _to_disk(beside)
        beside.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path, *, last: str = "") -> Iterator[Path]:
    """Give an empty folder to fill; it takes the place of `folder` when the block ends without an error.

    An empty `folder` that is there already is filled and not replaced, because it may be a mount point or the
    working directory; the entry named `last` then comes last.

    Raises:
        RunFolderError: writing failed; an older `folder` is still there, whole.
    """
    holder: Path | None = None
    try:
        in_place = folder.is_dir() and not any(folder.iterdir())
        parent = folder if in_place else folder.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
        fresh = holder / "new"  # a folder of its own, for mkdtemp makes private folders
        fresh.mkdir()
        yield fresh
        for path in fresh.rglob("*"):
            _to_disk(path)
        if in_place:
            for path in sorted(fresh.iterdir(), key=lambda path: path.name == last):
                path.rename(folder / path.name)
        else:
            _take_place(fresh, folder, aside=holder / "old")
    except BaseException as error:
        # safetensors reports a full disk as an error of its own, not as an OSError.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _unwritable(folder, error) from error
        raise
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


def _take_place(fresh: Path, folder: Path, *, aside: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    if _exchange(fresh, folder):
        return
    folder.rename(aside)
    try:
        fresh.rename(folder)
    except OSError:
        aside.rename(folder)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step of the file system, so that no moment has neither; False where it cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _to_disk(path: Path) -> None:
    """Wait until what was written is on the disk: a name that is changed first outlives a power cut, and is empty."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed while it wrote files or folders somewhere in `folder` left beside them."""
    for path in list(folder.rglob(".*")):
        if path.name.endswith(".part") and path.is_file():
            path.unlink(missing_ok=True)
        elif path.is_dir() and (path / "new").is_dir() | (path / "old").is_dir():
            shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8.

    Raises:
        RunFolderError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    with replacing_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _unwritable(path: Path, error: BaseException) -> RunFolderError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RunFolderError(f"{path} cannot be written: {reason}. Free some space or choose another place.")
