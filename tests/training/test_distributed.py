"""Two gloo processes under torchrun, through the published command: the same masks and numbers as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import runs
from upop.pruning import Plan
from upop.tasks.verbs import compress

ROOT = Path(__file__).parents[2]


def test_two_processes_are_one(tmp_path: Path) -> None:
    config = runs.make_data(tmp_path)
    compress(*runs.nlvr(config, output_dir=tmp_path / "one", max_epoch=1))
    # Half the batch in each of two processes is the same global batch; 200 dev records are no multiple of 2 x 24.
    two = runs.edited(config, {"batch_size_train": 8, "batch_size_test": 24})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    # The launcher of torch 2.14 and later takes --p for an option of its own, unless -- goes before the script.
    command += ["--", str(ROOT / "compress_nlvr.py"), "--p", "0.5", "--epoch", "1"]
    command += ["--config", str(two), "--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    plans = [Plan.from_json((tmp_path / name / "plan.json").read_text()) for name in ("one", "two")]
    assert dict(plans[0]) == dict(plans[1])
    first, second = (json.loads((tmp_path / name / "results.json").read_text())["models"] for name in ("one", "two"))
    assert [model["metrics"] for model in first] == [model["metrics"] for model in second]
    assert [row["step"] for row in runs.rows(tmp_path / "one")] == [row["step"] for row in runs.rows(tmp_path / "two")]
