"""Identifies processes, to tell whether the process that wrote a temporary file has ended."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Self

import psutil
from pydantic import BaseModel, ConfigDict

_ENDED = "ZX"  # states of a process that has ended, but was not reaped yet


class ProcessId(BaseModel):
    """A process, unique across machines and restarts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str
    boot: str
    """Boot id of the machine; empty if the system has none."""
    namespace: str
    """PID namespace: containers have their own."""
    pid: int
    started: str

    @classmethod
    def current(cls) -> Self:
        """Return the current process."""
        pid = os.getpid()
        return cls(**_machine(), pid=pid, started=_started(pid) or "")

    def has_ended(self) -> bool:
        """Whether the process has certainly ended; False if this machine cannot know."""
        here = _machine()
        if self.host != here["host"]:
            return False
        if self.boot != here["boot"]:
            return True  # the machine was restarted
        if self.namespace != here["namespace"]:
            return False
        started = _started(self.pid)
        return started is None or (bool(self.started) and started != self.started)

    def described(self) -> str:
        """Return a description for messages."""
        return f"process {self.pid} on {self.host}"


def _machine() -> dict[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        boot = namespace = ""
    return {"host": platform.node(), "boot": boot, "namespace": namespace}


def _started(pid: int) -> str | None:
    """Return the start time of a process in kernel ticks; "" if unknown, None if there is no process."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "" if not Path("/proc/self/stat").exists() and psutil.pid_exists(pid) else None
    except OSError:  # it ended while it was asked about, or is hidden
        return "" if psutil.pid_exists(pid) else None
    return None if state in _ENDED else fields[18]
