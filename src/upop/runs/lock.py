"""A lock file that allows one run at a time in a directory; the system releases it when the process ends."""

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
except ImportError:  # Windows, where the process id in the file decides
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
_FORMAT = 1
_BEAT_SECONDS = 5.0
_WATCH_SECONDS = 30.0
_BUSY = (errno.EAGAIN, errno.EACCES)
_held: set[FolderLock] = set()


class FolderLock:
    """Locks a directory for this process, until `release` or the end of the process.

    `run.lock` names the process and machine of the holder, and carries a lock of the system. Machines that share a
    directory may not share locks. So the holder touches the file every few seconds, and another machine watches it for
    a while before it takes over.

    Args:
        folder: an existing directory.
        notify: called with a line while a lock is watched, or when it is taken over from a process that has ended.

    Raises:
        RunFolderError: another run holds the directory, or the file cannot be written or is not upop's.
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
                f"The lock {self._path}, which keeps other runs out of the directory, cannot be written: "
                f"{error.strerror or error}. Choose another --output-dir."
            ) from error
        except BaseException:
            self._close()
            raise
        _held.add(self)
        threading.Thread(target=self._beat, name="upop-lock", daemon=True).start()

    def release(self) -> None:
        """Release the directory."""
        if self not in _held:
            return
        self._ended.set()
        # Removed while still locked: a process that has opened it sees that another file has its name by now.
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
        elif holder and not locked and _is_running(holder):
            raise _in_use(folder, holder)
        if holder:
            self._notify(f"taking over {folder} from {_described(holder)}, which has ended")
        mine = {"upop": _FORMAT, "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
        mine["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        # A second descriptor, closed at once: a file open for writing would block a remount as read-only.
        writing = os.open(self._path, os.O_WRONLY | os.O_TRUNC | _NO_LINK)
        try:
            os.write(writing, json.dumps(mine).encode())
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(writing)

    def _lock(self, folder: Path) -> bool:
        """Take the system's lock; False if the file system has no locks."""
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
            # NFS locks only files that are open for writing.
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
        """Return the content of the file; {} if it is empty, as a process that was killed early leaves it."""
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
                f"{self._path} is not a lock of this version of upop. Choose another --output-dir, or remove the file "
                "if no run writes to the directory."
            ) from error

    def _watch(self, folder: Path, holder: dict[str, Any]) -> None:
        """Raise a `RunFolderError` as soon as the holder, on another machine, touches the file."""
        self._notify(f"{folder} is locked by {_described(holder)}; waiting {_WATCH_SECONDS:.0f} s for a sign of life")
        first, until = self._touched(), time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < until:
            time.sleep(min(0.5, _BEAT_SECONDS / 4))
            if self._touched() != first:
                raise _in_use(folder, holder)

    def _touched(self) -> int:
        # Opening the file again makes a network file system ask its server.
        descriptor = os.open(self._path, os.O_RDONLY | _NO_LINK)
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError, TypeError):  # read-only, or released at this moment
                os.utime(self._path, follow_symlinks=False)

    def _close(self) -> None:
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def _leave_to_parent() -> None:
    """Close inherited descriptors in a forked process; otherwise the locks would outlive their holder."""
    for lock in list(_held):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _in_use(folder: Path, holder: dict[str, Any]) -> RunFolderError:
    return RunFolderError(
        f"Another run writes to {folder}: {_described(holder) if holder else 'a process that has just started'}. Wait "
        "until it has ended, or choose another --output-dir."
    )


def _described(holder: dict[str, Any]) -> str:
    since = f", since {holder['since']}" if isinstance(holder.get("since"), str) else ""
    described = f"process {holder['pid']} on {holder['host']}{since}"
    return "".join(character if character.isprintable() else "?" for character in described)


def _is_running(holder: dict[str, Any]) -> bool:
    """Whether this machine runs a process with the holder's id and start time."""
    born = _born(holder["pid"])
    return born is not None and born == holder.get("born", born)


def _born(process: int) -> str | None:
    """Return boot id and start time of a process of this machine; "" if unknown, None if there is no such process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # of another user
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""
