"""Detects that another process of the run has ended, from broken connections."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed import DistBackendError, DistNetworkError

from upop.errors import LostProcessError

_BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Application timeout")


def lost_process(error: BaseException, kept: Callable[[], str] = str) -> LostProcessError | None:
    """Return a LostProcessError for an error about a broken connection to another process; None for others.

    Args:
        error: that ended a command or a run.
        kept: returns a sentence about the saved state of the run.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, LostProcessError):
        return None
    described = str(error)
    by_gloo = "gloo" in described and any(words in described for words in _BROKEN)
    if not by_gloo and not isinstance(error, DistBackendError | DistNetworkError):
        return None
    reason = (described.splitlines() or [type(error).__name__])[0].partition(". ")[0]
    return LostProcessError(
        f"Another process of this run has ended or fallen silent, and this one cannot go on without it: {reason}. The "
        "cause stands in that process's own message, and under torchrun under 'Root Cause' in the report of the "
        f"launcher that started it. {kept()}".rstrip()
    )
