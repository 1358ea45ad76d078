"""SIGTERM, which a cluster sends before it takes a machine away: the run saves where it stands, and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from upop.errors import PreemptedError

_UNTOLD, _SAVING, _ENDED = range(3)
_PATIENCE_SECONDS = 5
# What the main process does about a signal that its workers, which got it too, see; they share the memory.
_doing = torch.full((), _ENDED, dtype=torch.uint8).share_memory_()
_MESSAGE = "The run was asked to end (SIGTERM). "


class Preemption:
    """Answers SIGTERM while it is entered: by `PreemptedError`, at once, or after the step within `deferred`.

    Attributes:
        asked: whether the signal came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False
        self._before: Any = None

    def __enter__(self) -> Self:
        """Take the signal over; only a main thread can."""
        _doing.fill_(_UNTOLD)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signal back; what a library made of a `PreemptedError` that went through it becomes one again."""
        _doing.fill_(_ENDED)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self.asked and isinstance(error, Exception) and not isinstance(error, PreemptedError):
            inner = error.__cause__ or error.__context__
            if isinstance(inner, PreemptedError):
                raise inner from error

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the signal within the block, which asks for it between steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.asked:
            self.leave()

    def leave(self, saved: str = "") -> None:
        """Raise `PreemptedError`, with what was saved, in words."""
        raise PreemptedError(
            _MESSAGE
            + (saved or "What was saved before is there; the work since then is done again.")
            + " The same command with --resume auto goes on."
        )

    def _answer(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True
        if not self._deferred:
            self.leave()
        _doing.fill_(_SAVING)


def prepare_worker(worker: int) -> None:
    """Have a process that makes batches outlive signals that reach all processes of a run: it may be needed to save.

    Ctrl-C is the main process's, which ends its workers. SIGTERM ends a worker unless the main one got it too and is
    taking its last step.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _answer_in_worker)


def _answer_in_worker(number: int, frame: FrameType | None) -> None:
    del frame
    # The main process answers between two operations, and one of them may take a while.
    for _ in range(10 * _PATIENCE_SECONDS):
        if int(_doing) == _SAVING:
            return
        if int(_doing) == _ENDED:
            os._exit(0)  # the main process has no more use for it
        time.sleep(0.1)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
