"""Explains errors that a limit of the system causes (disk, open files), with what is kept and what to do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from types import TracebackType

from upop.errors import RunFolderError, UPopError

_SPACE = "Free some space, or choose another --output-dir."
_FILES = "Raise the limit of open files (ulimit -n), or take fewer workers (--set num_workers=...)."
_ADVICE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: "Make the file system writable again, or choose another --output-dir.",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose another --output-dir.",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EIO: "Check the disk, or choose another --output-dir.",
    errno.ESTALE: "Check the network's file system, or choose another --output-dir.",
}
# Messages of libraries for the same limits: workers pass tensors by file descriptors, and may run out of them.
_WORDS = {
    "ancdata": errno.EMFILE,
    f"exit code {errno.EMFILE}": errno.EMFILE,
    **{os.strerror(number): number for number in _ADVICE},
}


def end_without_descriptors() -> None:
    """End this worker process, with an exit code of its own, once it runs out of file descriptors.

    Otherwise Python's thread that passes descriptors would retry forever while the main process waits for a batch.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            os._exit(errno.EMFILE)
        before(kind, error, trace)

    sys.excepthook = hook


def explained_limit(error: BaseException, kept: Callable[[], str]) -> UPopError | None:
    """Return a `RunFolderError` for an error about a limit of the system; None for any other.

    Args:
        error: the one that ended a run.
        kept: returns a sentence about what is kept of the run.
    """
    number = _number(error)
    if number is None or not isinstance(error, Exception):
        return None
    described = str(error).strip()
    if not isinstance(error, RunFolderError):
        name = getattr(error, "filename", None)
        described = f"{os.strerror(number)}{f': {name}' if name else ''}. {_ADVICE[number]}"
    elif "ulimit" in _ADVICE[number] and "ulimit" not in described:
        described = f"{described} {_ADVICE[number]}"
    try:
        left = kept()
    except OSError:  # still at the limit
        left = "Files written before are kept."
    return RunFolderError(f"{described} {left}".strip())


def _number(error: BaseException) -> int | None:
    """Return the errno of `_ADVICE` that caused an error; None if there is none."""
    seen: list[BaseException] = []
    while True:
        if isinstance(error, OSError) and error.errno in _ADVICE:
            return error.errno
        seen.append(error)
        before = error.__cause__ or error.__context__
        if before is None or any(before is other for other in seen):
            break
        error = before
    described = [str(each) for each in seen]
    return next((number for words, number in _WORDS.items() if any(words in text for text in described)), None)
