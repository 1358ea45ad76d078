"""Commands under torchrun: errors name their rank, and torchrun reports the cause of a failure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

# Longer than torchrun needs to notice a process that died.
_GRACE_SECONDS = 5


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def place() -> str:
    """Return the rank in words: " (rank 1 of 8)"; "" for a single process."""
    world = os.environ.get("WORLD_SIZE", "1")
    return f" (rank {os.environ.get('RANK', '0')} of {world})" if world != "1" else ""


def recorded(command: Callable[[], object]) -> object:
    """Run a command and return its result.

    Under torchrun, an error is written to the file from which torchrun reports the cause. A successful command destroys
    the process group, whose threads might otherwise abort the exiting process.

    Raises:
        LostProcessError: another process has ended, and this one cannot continue; it is not reported as the cause.
    """
    if not under_torchrun():
        return command()
    from torch.distributed.elastic.multiprocessing.errors import record

    from upop.errors import LostProcessError
    from upop.runs.lost import lost_process

    def guarded() -> object:
        try:
            return command()
        except RuntimeError as error:
            lost = error if isinstance(error, LostProcessError) else lost_process(error)
            if lost is None:
                raise
            return lost

    found = record(guarded)()
    if isinstance(found, LostProcessError):
        raise found
    _leave_group()
    return found


def wait_for_launcher() -> None:
    """Wait until torchrun has noticed the process that died, so that it reports the first one."""
    if under_torchrun():
        time.sleep(_GRACE_SECONDS)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
