"""SIGTERM, which a cluster sends before it takes a machine away: the run saves where it stands, and ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from upop.errors import PreemptedError

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
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

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
