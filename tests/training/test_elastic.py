"""Processes that die: the run ends at once with the cause named, or starts again by itself and goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import runs
from together import finish, torchrun
from training.test_distributed import assert_alike
from upop.runs.verbs import compress

SCRIPT = Path(__file__).parents[2] / "compress_nlvr.py"


def processes_of(launcher: Any) -> dict[int, int]:
    """The processes that torchrun started, by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            values = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue  # it has ended
        ranks = [value.partition(b"=")[2] for value in values if value.startswith(b"RANK=")]
        if parent == launcher.pid and ranks:
            found[int(ranks[0])] = int(folder.name)
    return found


def kill_after_steps(launcher: Any, run: Path, rank: int, rows: int) -> None:
    """Kill a process when so many steps were logged."""
    until = time.monotonic() + 120
    while time.monotonic() < until and launcher.poll() is None:
        if (run / "metrics.jsonl").exists() and len(runs.rows(run)) >= rows:
            os.kill(processes_of(launcher)[rank], signal.SIGKILL)
            return
        time.sleep(0.05)
    pytest.fail("the run ended, or did not begin")


@pytest.mark.slow
def test_a_run_whose_process_dies_goes_on_by_itself(tmp_path: Path) -> None:
    """With shared weights, and killed in the search; it ends as one process ends that nobody killed."""
    # Sums are rounded otherwise in two processes; the correction and a teacher who is met exactly let that grow.
    config = runs.edited(runs.make_data(tmp_path), {"correct": False, "distill": 0.0})
    compress(*runs.nlvr(config, output_dir=tmp_path / "one", max_epoch=1))
    two = runs.edited(config, {"batch_size_train": 8, "batch_size_test": 24, "checkpoint_minutes": 0})
    flags = ("--epoch", "1", "--config", two, "--output_dir", tmp_path / "two", "--fsdp", "--resume", "auto")
    launcher = torchrun(
        SCRIPT, "--p", "0.5", "--method", "upop", *flags, how=("--standalone", "--nproc_per_node=2", "--max-restarts=3")
    )
    kill_after_steps(launcher, tmp_path / "two", rank=1, rows=3)
    described = finish(launcher)
    assert re.search(r"failed \(exitcode: -9\) local_rank: 1", described)
    assert re.search(r"resumed after step \d+", described)
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_with_our_message(tmp_path: Path) -> None:
    """The only traceback is the launcher's own, and the run goes on from what was saved."""
    config = runs.edited(runs.make_data(tmp_path), {"checkpoint_minutes": 0, "batch_size_train": 8})
    flags = ("--epoch", "20", "--config", config, "--output_dir", tmp_path / "run")
    launcher = torchrun(SCRIPT, "--p", "0.5", "--method", "upop", *flags)
    kill_after_steps(launcher, tmp_path / "run", rank=1, rows=3)
    described, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    words = " ".join(described.split())
    message = re.search(r"Error \(rank 0 of 2\): (LostProcessError: Another process of this run|PreemptedError)", words)
    assert message, described
    if "LostProcessError" in message[0]:
        assert re.search(r"with --resume goes on from step \d+", words)
    # A signal may come while Python lets go of the lock of an import, which ignores what is raised, and says so.
    described = re.sub(r"Exception ignored in:[^\n]*\nTraceback[^\n]*\n(?: [^\n]*\n)*[^\n]*\n?", "", described)
    assert "upop" not in "".join(re.findall(r'File "[^"]*"', described))
    assert any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_run_and_is_its_cause(tmp_path: Path) -> None:
    """A broken image is met by one of two processes; the other one waits for it in vain."""
    config = runs.make_data(tmp_path)
    annotation = tmp_path / "data/annotation/nlvr_train.json"
    *others, last = json.loads(annotation.read_text())
    shared = [{**sample, "images": others[0]["images"]} for sample in others if sample["images"] == last["images"]]
    kept = [sample for sample in others if sample["images"] != last["images"]]
    annotation.write_text(json.dumps([*kept, *shared, last]))
    broken = next((tmp_path / "data").rglob(Path(last["images"][0]).name))
    broken.write_bytes(b"no image")
    flags = ("--epoch", "1", "--config", config, "--output_dir", tmp_path / "run")
    launcher = torchrun(SCRIPT, "--p", "0.5", "--method", "upop", *flags)
    began = time.monotonic()
    described, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert time.monotonic() - began < 120
    message = re.search(r"Error \(rank ([01]) of 2\): BadImageError: .*", described)
    assert message and broken.name in message[0]
    cause = described.partition("Root Cause (first observed failure):")[2]
    assert f"rank      : {message[1]} (local_rank: {message[1]})" in cause
    assert "BadImageError" in cause and broken.name in cause
