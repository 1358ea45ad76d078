"""Two gloo processes, sharing the batch or the weights too: the same masks, weights and numbers as one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from tiers import mostly_slow
from together import finish, free_port, run_together, torchrun
from training.ranks import compress_task, predict_all
from upop.errors import DeviceError
from upop.pruning import Plan

SCRIPT = Path(__file__).parents[2] / "compress_nlvr.py"


def assert_alike(one: Path, two: Path, *, corrected: bool = False) -> None:
    """The same plan, numbers, losses and weights in two run folders; weights up to what docs/gpus.md says."""
    plans = [Plan.from_json((folder / "plan.json").read_text()) for folder in (one, two)]
    assert dict(plans[0]) == dict(plans[1])
    first, second = (json.loads((folder / "results.json").read_text())["models"] for folder in (one, two))
    for model, other in zip(first, second, strict=True):
        for split, metrics in model["metrics"].items():
            assert other["metrics"][split] == pytest.approx(metrics, rel=1e-6)
    for row, other in zip(runs.rows(one), runs.rows(two), strict=True):
        assert row["step"] == other["step"]
        assert other.get("loss", 0.0) == pytest.approx(row.get("loss", 0.0), rel=1e-4 if corrected else 1e-5)
        assert other.get("kept") == row.get("kept")
        assert other.get("lr") == row.get("lr")
    for name in ("best", "last"):
        weights, others = (load_file(folder / name / "model.safetensors") for folder in (one, two))
        # What is added to all keys cancels in the softmax, so its gradient is noise, which Adam makes as large as any.
        for key in (key for key in weights if not key.endswith(("qkv.bias", "key.bias"))):
            if corrected and weights[key].is_floating_point():
                assert (others[key] - weights[key]).norm() <= 0.01 * weights[key].norm(), key
            else:
                torch.testing.assert_close(others[key], weights[key], rtol=1e-5, atol=2e-6, msg=key)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one process, and the settings by which each of two takes half of every batch."""
    folder = tmp_path_factory.mktemp("one")
    # The correction lets rounding grow. As long as the model is its teacher,
    # what this one adds to gradients is noise, which Adam makes as large as any.
    config = runs.make_task("nlvr", folder, correct=False, distill=0.0)
    compress_task("nlvr", config, {"output_dir": folder / "one", "max_epoch": 1})
    # Half the batch in each of two processes is the same global batch; the dev samples are no multiple of 2 x 24.
    return folder / "one", runs.edited(config, {"batch_size_train": 8, "batch_size_test": 24})


@pytest.mark.slow
def test_two_processes_are_one(one: tuple[Path, Path], tmp_path: Path) -> None:
    alone, two = one
    run_together(compress_task, "nlvr", two, {"output_dir": tmp_path / "two", "max_epoch": 1})
    assert_alike(alone, tmp_path / "two")


@pytest.mark.slow
def test_two_processes_are_one_with_a_teacher_and_corrected_layers(tmp_path: Path) -> None:
    """As compressions are by default: the plan, the metrics and the losses are the same."""
    config = runs.make_task("nlvr", tmp_path)
    compress_task("nlvr", config, {"output_dir": tmp_path / "one"})
    half = {"batch_size_train": 8, "batch_size_test": 24, "output_dir": tmp_path / "two"}
    run_together(compress_task, "nlvr", config, half)
    assert_alike(tmp_path / "one", tmp_path / "two", corrected=True)


@pytest.mark.slow
def test_two_nodes_are_one(one: tuple[Path, Path], tmp_path: Path) -> None:
    """Started by two launchers that meet, and sharing the weights too."""
    alone, two = one
    flags = ("--method", "upop", "--epoch", "1", "--config", two, "--output_dir", tmp_path / "nodes", "--fsdp")
    flags += ("--set", "grad_checkpointing=true")  # which changes no number
    meeting = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    nodes = [torchrun(SCRIPT, "--p", "0.5", *flags, how=(*meeting, f"--node_rank={node}")) for node in range(2)]
    for node in nodes:
        finish(node)
    assert_alike(alone, tmp_path / "nodes")


@pytest.mark.parametrize("sharding", mostly_slow(["none", "fsdp"], "none"))
def test_two_processes_are_one_for_repeated_and_augmented_images(tmp_path: Path, sharding: str) -> None:
    """Not for mixed ones, or with dropped paths: each process draws its own. The rate grows with the batch of both."""
    # The correction solves for weights by sums that are rounded otherwise, and lets that grow.
    alone = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "correct": False}
    rest = {"search_epochs": 1, "max_epoch": 1, "clip_grad": 0.5}
    config = runs.make_task("classification", tmp_path, **alone, **rest, lr_batch=32, batch_size_test=50)
    compress_task("classification", config, {"output_dir": tmp_path / "one"})
    half = {"batch_size_train": 8, "output_dir": tmp_path / "two", "sharding": sharding}
    run_together(compress_task, "classification", config, half)
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "tasks", [("classification", "retrieval-clip"), pytest.param(tuple(runs.TINY), marks=pytest.mark.slow)], ids=len
)
def test_every_task_counts_uneven_last_batches_once(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    uneven = {"retrieval": 7, "segmentation": 3}
    configs = {}
    for name in tasks:
        (tmp_path / name).mkdir()
        configs[name] = runs.make_task(name, tmp_path / name, batch_size_test=uneven.get(name, 9))
    predict_all(configs, tmp_path)
    run_together(predict_all, configs, tmp_path)
    for name in configs:
        one, two = (torch.load(tmp_path / f"{name}-{count}.pt") for count in (1, 2))
        assert set(one) == set(two)
        for split, (scores, predictions) in one.items():
            assert two[split][0] == pytest.approx(scores, rel=1e-6), name
            for key, rows in predictions.items():
                assert two[split][1][key].shape == rows.shape
                torch.testing.assert_close(two[split][1][key], rows, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")


def test_one_process_has_nobody_to_share_weights_with(tmp_path: Path) -> None:
    config = runs.make_task("nlvr", tmp_path)
    with pytest.raises(DeviceError, match=r"--fsdp .*only one"):
        compress_task("nlvr", config, {"output_dir": tmp_path / "run", "sharding": "fsdp"})
