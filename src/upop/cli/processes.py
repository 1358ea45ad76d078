"""Commands under torchrun: an error says which process it is of, and torchrun learns the cause of a run's end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from upop.errors import TrainingError

# Longer than torchrun takes to notice a process that died, so that the first one to die is the one that it names.
_GRACE_SECONDS = 5


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def place() -> str:
    """Return which of several processes this is, in words: " (rank 1 of 8)"; nothing where there is one."""
    world = os.environ.get("WORLD_SIZE", "1")
    return f" (rank {os.environ.get('RANK', '0')} of {world})" if under_torchrun() and world != "1" else ""


def recorded(command: Callable[[], object]) -> object:
    """Run a command and return what it returns.

    Under torchrun, an error goes into the file from which torchrun tells the cause.

    A command that has succeeded leaves the group of processes, whose threads may else abort a process that exits.

    Raises:
        TrainingError: another process has ended, so that this one cannot go on; that is not the cause.
    """
    if not under_torchrun():
        return command()
    from torch.distributed.elastic.multiprocessing.errors import record

    def guarded() -> object:
        try:
            return command()
        except RuntimeError as error:
            if not _is_of_another(error):
                raise
            return error

    found = record(guarded)()
    if not isinstance(found, RuntimeError):
        _leave_group()
        return found
    time.sleep(_GRACE_SECONDS)
    raise TrainingError(
        "Another process of this run has ended or fallen silent, and this one cannot go on without it: "
        f"{str(found).splitlines()[0].partition('. ')[0]}. The cause stands in that process's own message and under "
        "'Root Cause' in the report of the torchrun that started it."
    ) from found


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _is_of_another(error: RuntimeError) -> bool:
    """Whether an error says that the connection to another process broke."""
    from torch.distributed import DistBackendError, DistNetworkError

    broken = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Application timeout")
    return isinstance(error, DistBackendError | DistNetworkError) or (
        "gloo" in str(error) and any(words in str(error) for words in broken)
    )
