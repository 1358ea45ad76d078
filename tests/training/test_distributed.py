"""Two gloo processes under torchrun, through the published command: the same masks and numbers as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import runs
from upop.pruning import Plan
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.verbs import compress

ROOT = Path(__file__).parents[2]


def run_two(script: str, *flags: str | Path) -> None:
    """Run a published command in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    # The launcher of torch 2.14 and later takes --p for an option of its own, unless -- goes before the script.
    command += ["--", str(ROOT / script), "--p", "0.5", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_alike(one: Path, two: Path) -> None:
    """The same plan, numbers and steps in two run folders."""
    plans = [Plan.from_json((folder / "plan.json").read_text()) for folder in (one, two)]
    assert dict(plans[0]) == dict(plans[1])
    first, second = (json.loads((folder / "results.json").read_text())["models"] for folder in (one, two))
    assert [model["metrics"] for model in first] == [model["metrics"] for model in second]
    assert [row["step"] for row in runs.rows(one)] == [row["step"] for row in runs.rows(two)]


def test_two_processes_are_one(tmp_path: Path) -> None:
    config = runs.make_data(tmp_path)
    compress(*runs.nlvr(config, output_dir=tmp_path / "one", max_epoch=1))
    # Half the batch in each of two processes is the same global batch; 200 dev records are no multiple of 2 x 24.
    two = runs.edited(config, {"batch_size_train": 8, "batch_size_test": 24})
    run_two("compress_nlvr.py", "--epoch", "1", "--config", two, "--output_dir", tmp_path / "two")
    assert_alike(tmp_path / "one", tmp_path / "two")


def test_two_processes_are_one_for_repeated_and_augmented_pictures(tmp_path: Path) -> None:
    """Not for mixed ones, or with dropped paths: each process draws its own. The rate grows with the batch of both."""
    alone = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
    config = runs.make_task("classification", tmp_path, **alone, lr_batch=32, batch_size_test=50)
    task = find_task("classification")
    compress(task, read_settings(task.settings, config, {"output_dir": tmp_path / "one"}))
    flags = ("--epochs-search", "1", "--epochs", "1", "--batch-size", "8", "--repeated-aug", "--model-ema")
    run_two("compress_deit.py", *flags, "--config", config, "--output_dir", tmp_path / "two")
    assert_alike(tmp_path / "one", tmp_path / "two")
    first, second = ([row["lr"] for row in runs.rows(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert first == second
