"""Detects from broken connections that another process of the run has ended."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed import DistBackendError, DistNetworkError

from upop.errors import LostProcessError

_BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Application timeout")


def lost_process(error: BaseException, kept: Callable[[], str] = str) -> LostProcessError | None:
    """Return a LostProcessError for an error about a broken connection to another process; None for others.

    Args:
        error: the one that ended a command or a run.
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
        f"Another process of this run has ended or stopped responding, and this one cannot continue without it: "
        f"{reason}. See the error of that process; torchrun shows it under 'Root Cause'. {kept()}".rstrip()
    )
