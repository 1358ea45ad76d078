"""Run a function in several processes that know of each other as under torchrun, without importing anything anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["runs", "upop.cli.app", "transformers.models.blip.modeling_blip_text"])


def _run(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_together(function: Callable[..., None], *arguments: Any, processes: int = 2, seconds: float = 240) -> None:
    """Call a function of a module with the same arguments in several processes on the CPU; all must succeed."""
    shared: dict[str, Any] = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = []
    try:
        for rank in range(processes):
            environment = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
            given = {name: str(value) for name, value in environment.items()}
            started.append(FORKS.Process(target=_run, args=(function, arguments, given)))
            started[-1].start()
        for process in started:
            process.join(seconds)
            assert process.exitcode == 0
    finally:
        for process in started:
            process.kill()
