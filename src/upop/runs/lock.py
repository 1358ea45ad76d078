"""One run at a time in a folder: a file names the process that writes there; the system's lock on it ends with that."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upop.errors import RunFolderError

try:
    import fcntl
except ImportError:  # Windows; the names of the processes tell then
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
_FORMAT = 1
_BEAT_SECONDS = 5.0
_WATCH_SECONDS = 30.0
_BUSY = (errno.EAGAIN, errno.EACCES)
_held: set[FolderLock] = set()


class FolderLock:
    """Holds a folder for this process, from its making until `release`; one that was killed holds nothing.

    `run.lock` says which process of which machine writes there. Its lock belongs to the system, so that it ends with
    the process. Machines that share the folder may not share locks: the holder touches the file every few seconds, and
    another machine watches it for a while before it takes over.

    Args:
        folder: to hold; it must be there.
        notify: is called with a line about a lock that is watched, or taken over from a process that has ended.

    Raises:
        RunFolderError: another run holds the folder, or the file cannot be written or is not ours.
    """

    def __init__(self, folder: Path, notify: Callable[[str], None]) -> None:
        self._path, self._notify = folder / NAME, notify
        self._descriptor: int | None = None
        self._ended = threading.Event()
        try:
            self._take(folder)
        except OSError as error:
            self._close()
            if isinstance(error, RunFolderError):
                raise
            raise RunFolderError(
                f"{self._path}, which tells other runs that the folder is in use, cannot be written: "
                f"{error.strerror or error}. Choose another --output-dir."
            ) from error
        except BaseException:
            self._close()
            raise
        _held.add(self)
        threading.Thread(target=self._beat, name="upop-lock", daemon=True).start()

    def release(self) -> None:
        """Give the folder back."""
        if self not in _held:
            return
        self._ended.set()
        # Removed while it is still held: who opened it before finds that it is not the file of that name any more.
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        self._close()

    def _take(self, folder: Path) -> None:
        while True:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CREAT | _NO_LINK, 0o666)
            locked = self._lock(folder)
            if self._is_current():
                break
            self._close()
        holder = self._holder()
        if holder and holder["host"] != socket.gethostname():
            self._watch(folder, holder)
        elif holder and not locked and _lives(holder):
            raise _in_use(folder, holder)
        if holder:
            self._notify(f"the run of {_described(holder)}, which had not given {folder} back, has ended")
        mine = {"upop": _FORMAT, "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
        mine["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        # Written by another descriptor, closed at once: one that is open for writing would keep the file system from
        # being made read-only.
        writing = os.open(self._path, os.O_WRONLY | os.O_TRUNC | _NO_LINK)
        try:
            os.write(writing, json.dumps(mine).encode())
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(writing)

    def _lock(self, folder: Path) -> bool:
        """Return whether the system's lock was got; False where the file system has none."""
        assert self._descriptor is not None
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                raise _in_use(folder, self._holder()) from None
            if error.errno != errno.EBADF:
                return False
            # NFS locks files alone that are open for writing.
            self._close()
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as again:
                if again.errno in _BUSY:
                    raise _in_use(folder, self._holder()) from None
                return False
        return True

    def _is_current(self) -> bool:
        """Whether the open file is still the one of that name."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat(follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _holder(self) -> dict[str, Any]:
        """Return what the file says; {} where it is empty, as one that was killed early leaves it."""
        assert self._descriptor is not None
        text = os.pread(self._descriptor, 4096, 0)
        if not text.strip():
            return {}
        try:
            holder = json.loads(text)
            if holder["upop"] != _FORMAT:
                raise ValueError(holder["upop"])
            return {"host": str(holder["host"]), "pid": int(holder["pid"]), **holder}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunFolderError(
                f"{self._path} is not a lock of this upop, and is left alone. Choose another --output-dir, or remove "
                "the file if nothing writes to the folder."
            ) from error

    def _watch(self, folder: Path, holder: dict[str, Any]) -> None:
        """Raise RunFolderError as soon as the holder, on another machine, shows a sign of life."""
        self._notify(f"{folder} is held by {_described(holder)}; waiting {_WATCH_SECONDS:.0f} s for a sign of life")
        first, until = self._touched(), time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < until:
            time.sleep(min(0.5, _BEAT_SECONDS / 4))
            if self._touched() != first:
                raise _in_use(folder, holder)

    def _touched(self) -> int:
        # Opened anew, which makes a network's file system ask its server.
        looked = os.open(self._path, os.O_RDONLY | _NO_LINK)
        try:
            return os.fstat(looked).st_mtime_ns
        finally:
            os.close(looked)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError, TypeError):  # read-only by now, or given back this moment
                os.utime(self._path, follow_symlinks=False)

    def _close(self) -> None:
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def _leave_to_parent() -> None:
    """In a process that was split off: close what it got along, or the locks would outlive the one that holds them."""
    for lock in list(_held):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _in_use(folder: Path, holder: dict[str, Any]) -> RunFolderError:
    return RunFolderError(
        f"Another run writes to {folder}: {_described(holder) if holder else 'a process that has just begun'}. Wait "
        f"until "
        "it has ended, or choose another --output-dir."
    )


def _described(holder: dict[str, Any]) -> str:
    since = f", since {holder['since']}" if isinstance(holder.get("since"), str) else ""
    described = f"process {holder['pid']} on {holder['host']}{since}"
    return "".join(character if character.isprintable() else "?" for character in described)


def _lives(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine runs that has the holder's number and began when that did."""
    born = _born(holder["pid"])
    return born is not None and born == holder.get("born", born)


def _born(process: int) -> str | None:
    """Return when a process of this machine began, in its words; "" where that is unknown, None if there is none."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it is another user's
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""
