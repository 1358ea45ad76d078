"""What the system refuses a run, by a limit of its own: said in our words, with what is kept and what to do."""

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
# What libraries make of it: workers hand tensors over by descriptors, and get none when there are too many.
_WORDS = {
    "ancdata": errno.EMFILE,
    f"exit code {errno.EMFILE}": errno.EMFILE,
    **{os.strerror(number): number for number in _ADVICE},
}


def end_without_descriptors() -> None:
    """Have this process, which makes batches, end when it gets no more descriptors; its exit code says so.

    Python's thread that hands descriptors over would print the error and try again, without end, while the main process
    waits for a batch.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            os._exit(errno.EMFILE)
        before(kind, error, trace)

    sys.excepthook = hook


def explained_limit(error: BaseException, kept: Callable[[], str]) -> UPopError | None:
    """Return the error of ours for one that is about a limit of the system; None for any other.

    Args:
        error: that ended a run.
        kept: gives a sentence about what is kept of the run.
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
    except OSError:  # the limit is still there
        left = "What was written before stays."
    return RunFolderError(f"{described} {left}".strip())


def _number(error: BaseException) -> int | None:
    """Return the number of the system's error that is behind an error; None if there is none, or another."""
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
