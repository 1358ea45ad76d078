"""Several processes that know of each other: a function or a script without importing anything anew, or by torchrun."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["without_garbage", "runs", "upop.cli.app", "transformers.models.blip.modeling_blip_text", "unburdened"]
)


def _run(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def _run_script(script: str, words: Sequence[str]) -> None:
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def _run_code(code: str, words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})


def start_code(code: str, *words: object) -> Any:
    """Start code in a process of its own, as `python -c` does, without importing anything anew."""
    process = FORKS.Process(target=_run_code, args=(code, [*map(str, words)]))
    process.start()
    return process


def run_code(code: str, *words: object) -> int:
    """Run code in a process of its own to its end; return its exit code, which is negative for a signal."""
    process = start_code(code, *words)
    process.join()
    exitcode: int = process.exitcode
    return exitcode


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_together(function: Callable[..., None], *arguments: Any, processes: int = 2, **environment: str) -> None:
    """Call a function of a module with the same arguments in several processes on the CPU; all must succeed."""
    shared: dict[str, Any] = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, **environment}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = []
    try:
        for rank in range(processes):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
            given = {name: str(value) for name, value in own.items()}
            started.append(FORKS.Process(target=_run, args=(function, arguments, given)))
            started[-1].start()
        for process in started:
            process.join(300)
            assert process.exitcode == 0
    finally:
        for process in started:
            process.kill()


def run_script(script: Path, *words: str | Path, processes: int = 2, **environment: str) -> None:
    """Run a script as torchrun does, in several processes on the CPU, without a launcher's and their imports."""
    run_together(
        _run_script, str(script), [*map(str, words)], processes=processes, TORCHELASTIC_RUN_ID="test", **environment
    )


def torchrun(
    script: Path, *words: str | Path, how: tuple[str, ...] = ("--standalone", "--nproc_per_node=2"), **environment: str
) -> subprocess.Popen[str]:
    """Start a script under torchrun, on the CPU and on a port that is free."""
    # The launcher of torch 2.14 and later takes --p for an option of its own, unless -- goes before the script.
    command = [sys.executable, "-m", "torch.distributed.run", *how, "--", str(script), *map(str, words)]
    # By itself the launcher starts processes again with the addresses of those that died still in its store.
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    together = {**os.environ, **fresh, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(command, env=together, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(started: subprocess.Popen[str]) -> str:
    """Wait for a command that must succeed; return what it told."""
    try:
        described = started.communicate(timeout=300)[0]
    finally:
        started.kill()  # one that hangs; nothing happens to one that has ended
    assert started.returncode == 0, described
    return described
