"""Writes files and folders atomically, and never replaces files of others.

They are written to a private folder with a random name, and then renamed. `upop.ownership` decides what may be
replaced.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upop.errors import RunFolderError, UPopError
from upop.ownership import (
    ARCHIVE,
    MARKER,
    PART,
    Kind,
    State,
    contents,
    has_fields,
    identity_of,
    marker_of,
    read_marker,
    real_folder,
    refuse_foreign_file,
    refuse_foreign_folder,
    state_of,
)
from upop.processes import ProcessId
from upop.reading import read_object

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_HERE, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # AT_FDCWD, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux
_NOT_SO = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # this file system has no such rename
_OWNER = "owner.json"
_PROBE_BYTES = 2**20
_SPACE = "Free some space or choose another place."
_ADVICE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose another place.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "Raise the system's limit of open files.",
}


def is_file(path: Path) -> bool:
    """Whether there is a file of this name; False for impossible names."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def replacing_file(path: Path, replace: bool | Callable[[Path], bool] = False) -> Iterator[Path]:
    """Yield a path to write to; that file replaces `path` when the block ends without an error.

    Args:
        path: the file; its folder must exist.
        replace: whether to replace an existing file: True if the caller knows that it is upop's or the user asks for
            it; a function decides by its content.

    Raises:
        RunFolderError: the existing file may not be replaced, or writing failed for lack of a folder, permission or
            space. An existing file remains.
    """
    before = refuse_foreign_file(path, replace)
    with _explained(path, kept=before is not None), _part(path.parent, path.name) as held:
        part = held / f"{ARCHIVE}{path.suffix}"
        yield part
        _settle(part, held)
        if before is None:
            _rename_new(part, path)
        else:
            _swap_file(part, path, before)


@contextmanager
def replacing_folder(
    folder: Path, kind: Kind | None = None, *, overwrite: bool = False, last: str = ""
) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces `folder` when the block ends without an error.

    An existing empty `folder` is filled rather than replaced, since it may be a mount point or the working directory;
    the file named `last` is then moved last.

    Args:
        folder: the folder to write; a link to a folder is followed and kept.
        kind: the kind of folder. A marker then lists what upop wrote, and `folder` is replaced if it is of this kind
            and holds nothing else. None writes no marker and replaces nothing.
        overwrite: whether to replace a folder of upop of another kind, or with changed files.
        last: name of an entry.

    Raises:
        RunFolderError: `folder` holds files of others, or writing failed. The existing content remains.
    """
    place = real_folder(folder)
    if place.is_dir():
        remove_parts(place)
    before = refuse_foreign_folder(place, kind, overwrite=overwrite)
    in_place = before is not None and not before
    parent = place if in_place else place.parent
    with _explained(folder, kept=bool(before)):
        parent.mkdir(parents=True, exist_ok=True)
        remove_parts(parent)
        with _part(parent, place.name) as held:
            fresh = held / "new"
            fresh.mkdir()
            yield fresh
            if kind is not None:
                (fresh / MARKER).write_text(marker_of(fresh, kind).text(), encoding="utf-8")
            for path in fresh.rglob("*"):
                _settle(path, held)
            if in_place:
                _move_in(fresh, place, last)
            elif before is None:
                _rename_new(fresh, place)
            else:
                _swap_folder(fresh, place, before)


def check_folder(folder: Path, kind: Kind, *, overwrite: bool = False) -> None:
    """Refuse a folder that `replacing_folder` may not replace, before any work.

    Raises:
        RunFolderError: `folder` holds files of others; the message says which.
    """
    refuse_foreign_folder(real_folder(folder), kind, overwrite=overwrite)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, if missing.

    Raises:
        RunFolderError: it cannot be created.
    """
    with _explained(folder, kept=False):
        folder.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str, replace: bool | Callable[[Path], bool] = False) -> None:
    """Write a text file in UTF-8, and create its folder. See `replacing_file`.

    Raises:
        RunFolderError: it cannot be written, or would replace a file that may not be replaced.
    """
    make_folder(path.parent)
    with replacing_file(path, replace) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of measurements, and create its folder. An older file with the same fields is replaced.

    Raises:
        RunFolderError: there is another file of that name, or it cannot be written.
    """
    write_text(path, json.dumps(content, indent=1) + "\n", has_fields(content))


def write_table(path: Path, text: str) -> None:
    """Write a Markdown table, and create its folder. An older table with the same columns is replaced.

    Raises:
        RunFolderError: there is another file of that name, or it cannot be written.
    """
    columns = text.encode().partition(b"\n")[0]
    write_text(path, text, lambda older: older.read_bytes().partition(b"\n")[0] == columns)


def rewrite_text(folder: Path, name: str, text: str) -> None:
    """Rewrite a text file in a folder that `replacing_folder` wrote.

    Raises:
        RunFolderError: the file is not upop's, was changed, or cannot be written.
    """
    marker, found = read_marker(folder), contents(folder)
    if name in (*found.foreign, *found.changed):
        raise RunFolderError(f"{folder / name} was not written by upop, and is unchanged. Move it away.")
    write_text(folder / name, text, replace=True)
    if marker is not None:
        fresh = marker_of(folder, marker.kind).files[name]
        described = marker.model_copy(update={"files": {**marker.files, name: fresh}})
        write_text(folder / MARKER, described.text(), replace=True)


def remove_folder(folder: Path, kind: Kind) -> None:
    """Remove a folder that `replacing_folder` wrote, if there is one.

    Raises:
        RunFolderError: it holds what upop did not write.
    """
    if (before := refuse_foreign_folder(folder, kind)) is None:
        return
    with _explained(folder, kept=True), _part(folder.parent, folder.name) as held:
        folder.rename(held / "old")
        if state_of(held / "old") != before:
            _rename_new(held / "old", folder)
            raise RunFolderError(f"{folder} was changed during its removal, and was restored. Try again.")
        (held / "old").rename(held / "new")  # removed after the block, and not restored


def remove_parts(folder: Path) -> None:
    """Remove the remains of killed processes of this user in this folder.

    Content that they had moved aside is restored.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if PART.fullmatch(entry.name)]
    except OSError:  # there is none, or it is not readable
        return
    for held in (folder / name for name in names):
        owner = _owner(held)
        if owner is not None and ProcessId.model_validate(owner["process"]).has_ended():
            _discard(held, folder / str(owner["target"]))


@contextmanager
def _part(parent: Path, target: str) -> Iterator[Path]:
    """Yield a new private folder in `parent` for the content of `target`; it is removed after the block."""
    held = Path(tempfile.mkdtemp(prefix=".upop-", suffix=".part", dir=parent))
    maker = os.getpid()
    try:
        owner = {"target": target, "process": ProcessId.current().model_dump()}
        (held / _OWNER).write_text(json.dumps(owner), encoding="utf-8")
        yield held
    finally:
        if os.getpid() == maker:  # not a forked process
            _discard(held, parent / target)


def _owner(held: Path) -> dict[str, Any] | None:
    """Return the owner record of a temporary folder; None unless this user made it for a plain name."""
    try:
        found = os.lstat(held)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return None
        owner = read_object(held / _OWNER, RunFolderError, "")
        ProcessId.model_validate(owner["process"])
        return owner if Path(owner["target"]).name == owner["target"] else None
    except (OSError, ValueError, KeyError, TypeError):  # RunFolderError is an OSError
        return None


def _discard(held: Path, target: Path) -> None:
    """Remove a temporary folder; content moved aside from `target` is restored unless it was replaced."""
    old = held / "old"
    if old.is_dir():
        try:
            if not target.exists():
                _rename_new(old, target)
            elif contents(old).foreign:
                return  # it appeared meanwhile: files of others are never removed
        except OSError:
            return
    for inside in (old, held / "new"):
        shutil.rmtree(inside, ignore_errors=True)
    # One by one, for a process that may open no more files cannot list a folder; last the one that tells whose it is.
    try:
        for path in (held / f"{ARCHIVE}{target.suffix}", held / _OWNER):
            path.unlink(missing_ok=True)
        held.rmdir()
    except OSError:  # a writer left more, or nothing can be removed here
        shutil.rmtree(held, ignore_errors=True)


def _settle(path: Path, held: Path) -> None:
    """Set default permissions for a file or folder, and flush it to the disk.

    A rename before the flush might leave an empty file after a power cut.
    """
    found = os.lstat(path)
    if stat.S_ISDIR(found.st_mode):
        wanted = (held / "new").stat().st_mode
    elif stat.S_ISREG(found.st_mode):
        wanted = (held / _OWNER).stat().st_mode  # an ordinary new file: its permissions are those of the umask
    else:
        return
    if (found.st_mode ^ wanted) & 0o777:
        path.chmod(stat.S_IMODE(found.st_mode) & ~0o777 | wanted & 0o777)
    if stat.S_ISREG(found.st_mode):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _swap_file(part: Path, path: Path, before: tuple[int, int, int]) -> None:
    if not _exchange(part, path):
        if identity_of(path) != before:
            raise _changed(path)
        part.replace(path)
    elif identity_of(part) != before:
        _exchange(part, path)
        raise _changed(path)


def _swap_folder(fresh: Path, folder: Path, before: State) -> None:
    aside = fresh.with_name("old")
    fresh.rename(aside)  # a part's "old" is removed with more care than its "new"
    if _exchange(aside, folder):
        if state_of(aside) != before:
            _exchange(aside, folder)
            raise _changed(folder)
        return
    aside.rename(fresh)
    folder.rename(aside)
    try:
        if state_of(aside) != before:
            raise _changed(folder)
        fresh.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise


def _move_in(fresh: Path, folder: Path, last: str) -> None:
    """Move all entries into a folder that was empty; the marker, which tells whose they are, comes first."""
    moved = []
    try:
        for path in sorted(fresh.iterdir(), key=lambda path: (path.name == last, path.name != MARKER)):
            _rename_new(path, folder / path.name)
            moved.append(path.name)
    except BaseException:
        for name in reversed(moved):
            _rename_new(folder / name, fresh / name)
        raise


def _changed(path: Path) -> RunFolderError:
    return RunFolderError(
        f"{path} was changed by another process while upop wrote it, and was left as it is. Try again."
    )


def _rename_new(source: Path, target: Path) -> None:
    """Give a file or a folder a name that nothing has.

    Raises:
        FileExistsError: something has it.
    """
    if (failed := _renameat2(source, target, _NO_REPLACE)) is None:
        return
    if failed not in _NOT_SO:
        raise OSError(failed, os.strerror(failed), str(target))
    if source.is_dir() or source.is_symlink():
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)  # which fails if there is a file, or a folder with something in it
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.rename(target)
    else:
        source.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; return False if the file system cannot."""
    return _renameat2(one, other, _EXCHANGE) is None


def _renameat2(source: Path, target: Path, flag: int) -> int | None:
    """Rename as Linux can; return the number of the error, None if there was none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return errno.ENOSYS
    done = rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flag)
    return None if done == 0 else ctypes.get_errno()


@contextmanager
def _explained(path: Path, *, kept: bool) -> Iterator[None]:
    """Turn errors for lack of space or permission into ones that say what could not be written and what remains."""
    try:
        yield
    except UPopError:
        raise
    except Exception as error:
        found = _of_the_system(error, path.parent)
        if found is None:
            raise
        left = "What was there before is kept." if kept else "Nothing of it was left behind."
        todo = _ADVICE.get(found.errno or 0, "Choose another place.")
        reason = found.strerror or str(found)
        raise RunFolderError(f"{path} cannot be written: {reason}. {left} {todo}") from error


def _of_the_system(error: Exception, folder: Path) -> OSError | None:
    """Return the system error behind an error of a writer, or None."""
    if isinstance(error, OSError):
        return error
    # torch, safetensors and others have errors of their own for what the system told them, mostly without its words.
    described = " ".join(str(error).split())
    by_writer = (
        type(error).__name__ == "SafetensorError" or "inline_container" in described or "PytorchStream" in described
    )
    if not by_writer and not isinstance(error, RuntimeError):
        return None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as found:
        return found
    if resource is not None and by_writer:
        largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if largest != resource.RLIM_INFINITY:
            return OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}, or the disk is full")
    return OSError(errno.ENOSPC, described) if by_writer else None
