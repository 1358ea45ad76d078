"""Ends a command with one sentence, not a traceback, on Ctrl-C while it imports its libraries."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells: 128 plus the signal number."""


def watch_start() -> None:
    """Let Ctrl-C end this process at once, until `end_watch`, if it runs `upop` or `python -m upop`.

    Nothing changes in processes that only import the package, or that handle the signal themselves.
    """
    main = threading.current_thread() is threading.main_thread() and multiprocessing.parent_process() is None
    if main and _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_watch() -> None:
    """Restore the default handler: from here on an interrupt is an exception, since there may be files to close."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def starting() -> Iterator[None]:
    """Let Ctrl-C end this process at once within the block, in which a command imports its libraries."""
    watch_start()
    try:
        yield
    finally:
        end_watch()


def _is_command() -> bool:
    started = sys.argv[0] if sys.argv else ""
    # sys.argv[0] is "-m" while Python imports the packages of a module, and its file afterwards.
    if started != "-m" and Path(started).name != "__main__.py":
        return Path(started).name in ("upop", "upop.exe")
    words = sys.orig_argv
    return "-m" in words and words[words.index("-m") + 1 :][:1] == ["upop"]


def _end(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"Interrupted (Ctrl-C) while upop was starting; nothing was begun.\n")
    os._exit(INTERRUPTED)
