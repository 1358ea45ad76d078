"""A hundred kills at random moments, over all tasks: what is resumed ends with the bytes of what nobody disturbed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from together import FORKS
from upop.errors import PreemptedError
from upop.runs.verbs import compress, train
from upop.settings import read_settings
from upop.tasks import find_task

KILLS = 5
"""Of each run."""
SEED = 9
VERBS: dict[str, tuple[str, dict[str, Any]]] = {
    "compress": ("compress", {}),
    "as published": ("compress", {"method": "reference"}),
    "train": ("train", {}),
}


def _run(verb: str, task: str, config: Path, settings: dict[str, Any], described: Path) -> None:
    """Run a verb in a process of its own, as a command does: one that was asked to end says so by its code."""
    file = os.open(described, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    found = find_task(task)
    try:
        {"compress": compress, "train": train}[verb](found, read_settings(found.settings, config, settings))
    except PreemptedError:
        sys.exit(PreemptedError.exit_code)


@dataclass
class Killed:
    """A run that is killed, again and again, and starts anew where it had ended.

    Attributes:
        verb: that is run.
        task: its name.
        config: file of settings.
        settings: that beat it.
        draw: all chance.
        sent: number of each signal that ended a process.
    """

    verb: str
    task: str
    config: Path
    settings: dict[str, Any]
    draw: random.Random
    sent: dict[int, int] = field(default_factory=lambda: {signal.SIGKILL: 0, signal.SIGTERM: 0})

    def start(self, folder: Path) -> Any:
        """Start the run, or what is left of it, in a process."""
        given = {"output_dir": folder, "resume": "auto", "checkpoint_minutes": 0, **self.settings}
        arguments = (self.verb, self.task, self.config, given, folder.with_suffix(".txt"))
        process = FORKS.Process(target=_run, args=arguments)
        process.start()
        return process

    def finish(self, folder: Path) -> float:
        """Run to the end; return how long it took."""
        start = time.monotonic()
        process = self.start(folder)
        process.join()
        assert process.exitcode == 0, folder.with_suffix(".txt").read_text()[-4000:]
        return time.monotonic() - start

    def kill(self, folder: Path, within: float) -> bool:
        """Start, and kill within so many seconds; return whether it was still running."""
        process = self.start(folder)
        process.join(self.draw.uniform(0, within))
        if not process.is_alive():
            assert process.exitcode == 0, folder.with_suffix(".txt").read_text()[-4000:]
            return False
        number = signal.SIGTERM if self.draw.random() < 0.25 else signal.SIGKILL
        os.kill(process.pid, number)
        process.join()
        # A process that is asked to end before the run has begun does as any; one may end just before the signal.
        asked = (PreemptedError.exit_code,) if number == signal.SIGTERM else ()
        assert process.exitcode in (-number, 0, *asked)
        self.sent[number] += process.exitcode != 0
        return process.exitcode != 0


def outcome(folder: Path) -> dict[str, Any]:
    """What a run leaves, but for times: digests of the weights, and what the files of text say."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("best*/model.safetensors", "last*/model.safetensors", "plan.json", "scores.safetensors")
        for path in folder.glob(pattern)
    }
    found["rows"] = [{key: value for key, value in row.items() if key != "seconds"} for row in runs.rows(folder)]
    models = json.loads((folder / "results.json").read_text())["models"]
    found["results"] = [(model["name"], model["metrics"], model["parameters"]) for model in models]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", VERBS)
@pytest.mark.parametrize("task", sorted(runs.TINY))
def test_kills_at_random_moments_change_no_byte(task: str, how: str, tmp_path: Path) -> None:
    verb, settings = VERBS[how]
    config = runs.make_task(task, tmp_path, augment=True, **settings)
    run = Killed(verb, task, config, {}, random.Random(f"{SEED} {task} {how}"))
    seconds = run.finish(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    assert "best/model.safetensors" in expected
    number = 0
    while sum(run.sent.values()) < KILLS:
        folder = tmp_path / f"run-{number}"
        # What is killed again and again before it has saved anything comes to no end: the later kills are not so soon.
        while sum(run.sent.values()) < KILLS and run.kill(folder, seconds):
            pass
        run.finish(folder)
        assert outcome(folder) == expected
        assert not [path for path in folder.rglob(".*") if path.name.endswith(".part")]
        number += 1
        assert number < 10 * KILLS
