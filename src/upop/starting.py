"""Ctrl-C while a command loads its libraries, which takes seconds, ends it in a sentence and not in a traceback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
"""What a command that Ctrl-C ended exits with, as shells have it: 128 and the signal's number."""


def watch_start() -> None:
    """Have Ctrl-C end this process at once, until `end_watch`, if it runs `upop` or `python -m upop`.

    A process that only imports the package is left alone, and so is one where somebody else handles the signal.
    """
    main = threading.current_thread() is threading.main_thread() and multiprocessing.parent_process() is None
    if main and _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_watch() -> None:
    """Give the signal back: from here on an interrupt is an error, for there may be files to close."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    started = sys.argv[0] if sys.argv else ""
    # Python calls a module "-m" as long as it imports its packages, and by its file then.
    if started != "-m" and Path(started).name != "__main__.py":
        return Path(started).name in ("upop", "upop.exe")
    words = sys.orig_argv
    return "-m" in words and words[words.index("-m") + 1 :][:1] == ["upop"]


def _end(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"Interrupted (Ctrl-C) while upop was starting; nothing was begun.\n")
    os._exit(INTERRUPTED)
