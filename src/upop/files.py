"""Files and folders that appear whole or not at all: written beside, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upop.errors import RunFolderError


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Raises:
        RunFolderError: it cannot be written, for want of a folder, of permission or of space.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`; it takes the place of `folder` when the block ends without an error.

    Raises:
        RunFolderError: writing failed; an older `folder` is still there, whole.
    """
    fresh: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        fresh.chmod(0o755)  # mkdtemp makes private folders
        yield fresh
        old = fresh.with_name(f"{fresh.name}.old")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        # safetensors reports a full disk as an error of its own, not as an OSError.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _unwritable(folder, error) from error
        raise


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
