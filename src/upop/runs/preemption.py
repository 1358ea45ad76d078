"""Handles SIGTERM, which clusters send before they reclaim a machine, and Ctrl-C: the run saves its state and ends."""

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
from upop.runs.limits import end_without_descriptors

_RUNNING, _ANSWERING, _ENDED = range(3)
_PATIENCE_SECONDS = 5
# State of the main process, in memory shared with its workers, which receive the same signals.
_state = torch.full((), _ENDED, dtype=torch.uint8).share_memory_()
_TERMINATED = "The run was asked to end (SIGTERM). "
_INTERRUPTED = "The run was interrupted (Ctrl-C). "


class _AskedToEnd(BaseException):
    """Raised by the signal handler; a BaseException, so that libraries do not catch it."""


class Preemption:
    """A context manager that turns SIGTERM into `PreemptedError`: at once, or after the step within `deferred`.

    Ctrl-C becomes `KeyboardInterrupt` in the same way, in a run of one process (torchrun ends several) without another
    handler. A second Ctrl-C does not wait for the step.

    Args:
        auto: whether a restarted run resumes by itself, so that messages recommend no flag.

    Attributes:
        asked: whether a signal has arrived.
    """

    def __init__(self, auto: bool = False) -> None:
        self.asked = False
        self._auto = auto
        self._deferred = False
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the signal handlers, if this is the main thread."""
        _state.fill_(_RUNNING)
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._answer)
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            if alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._answer_ctrl_c)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the signal handlers; raise `PreemptedError` after SIGTERM, also if a library wrapped the error.

        A `KeyboardInterrupt` without a message gets one.
        """
        _state.fill_(_ENDED)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is not None:
            raised = (error, error.__cause__, error.__context__)
            silent = any(isinstance(part, KeyboardInterrupt) and not part.args for part in raised)
            self._interrupted |= silent
            if silent or any(isinstance(part, _AskedToEnd) for part in raised):
                self.leave()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals within the block, which must check `asked` between steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.asked:
            self.leave()

    def leave(self, saved: str = "") -> None:
        """Raise `PreemptedError`, or `KeyboardInterrupt` after Ctrl-C; `saved` says what was saved."""
        message = saved or "Earlier checkpoints are kept; the work since then is lost."
        message += f" The same command {'' if self._auto else 'with --resume auto '}continues the run."
        if self._interrupted:
            raise KeyboardInterrupt(_INTERRUPTED + message)
        raise PreemptedError(_TERMINATED + message)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True
        _state.fill_(_ANSWERING)
        if not self._deferred:
            raise _AskedToEnd

    def _answer_ctrl_c(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        again, self.asked, self._interrupted = self._interrupted, True, True
        if again or not self._deferred:
            raise KeyboardInterrupt


def prepare_worker(worker: int) -> None:
    """Keep a worker of a loader alive on signals that reach all processes of a run: the last step may need its batch.

    The main process handles Ctrl-C and ends its workers. SIGTERM ends a worker only if the main process did not get it
    too.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _answer_in_worker)
    end_without_descriptors()


def _answer_in_worker(number: int, frame: FrameType | None) -> None:
    del frame
    # The main process handles the signal between two operations, and one may take a while.
    for _ in range(10 * _PATIENCE_SECONDS):
        if int(_state) == _ANSWERING:
            return
        if int(_state) == _ENDED:
            os._exit(0)  # the main process no longer needs this worker
        time.sleep(0.1)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
