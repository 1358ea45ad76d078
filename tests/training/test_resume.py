"""Runs that are killed anywhere and go on, and end as if nothing had happened: the same bytes, row for row."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import runs
from tiers import mostly_slow
from together import FORKS
from upop.cli.app import main
from upop.errors import CheckpointError, RunFolderError, SettingError
from upop.ownership import MARKER
from upop.runs.checkpoints import Checkpoints
from upop.runs.verbs import compress, train
from upop.settings import read_settings
from upop.tasks import find_task


def _run(verb: str, task: str, config: Path, settings: Mapping[str, Any], kill_at: int | None = None) -> None:
    """Run a verb in this process, which kills itself before so many file operations, if it is told to."""
    torch.set_num_threads(1)
    # As in a process of one's own: workers are its children, and end when it does.
    multiprocessing.set_start_method("fork", force=True)
    if kill_at is not None:
        _kill_self_at(kill_at)
    found = find_task(task)
    {"compress": compress, "train": train}[verb](found, read_settings(found.settings, config, settings))


def _kill_self_at(operation: int) -> None:
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    # All that changes a name or makes sure that bytes are there, in files and folders.
    for name in ("fsync", "replace", "rename", "mkdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def start(
    task: str, config: Path, folder: Path, *, verb: str = "compress", kill_at: int | None = None, **settings: Any
) -> Any:
    """Start a run in a process of its own that goes on with what is in `folder`."""
    given = {"output_dir": folder, "resume": "auto", "checkpoint_minutes": 0, **settings}
    process = FORKS.Process(target=_run, args=(verb, task, config, given, kill_at))
    process.start()
    return process


def finish(task: str, config: Path, folder: Path, **settings: Any) -> None:
    """Run to the end."""
    process = start(task, config, folder, **settings)
    process.join()
    assert process.exitcode == 0


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run's result is made of, but for times."""
    found: dict[str, Any] = {}
    for name in ("best", "last"):
        for key, value in load_file(folder / name / "model.safetensors").items():
            found[f"{name} {key}"] = value
    if (folder / "plan.json").exists():
        found["plan"] = (folder / "plan.json").read_text()
    if (folder / "scores.safetensors").exists():
        found |= {f"score {key}": value for key, value in load_file(folder / "scores.safetensors").items()}
    found["rows"] = [{key: value for key, value in row.items() if key != "seconds"} for row in runs.rows(folder)]
    models = json.loads((folder / "results.json").read_text())["models"]
    found["metrics"] = [(model["name"], model["metrics"], model["parameters"]) for model in models]
    return found


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Bit-identical outcomes."""
    assert one.keys() == two.keys()
    different = [
        name
        for name, value in one.items()
        if not (torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name])
    ]
    assert not different


def no_leftovers(folder: Path) -> None:
    """Nothing half-written is left of what kills interrupted."""
    assert not [path for path in folder.rglob(".*") if path.name != MARKER]
    assert not (folder / "run.lock").exists()


@pytest.fixture(scope="module")
def nlvr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Settings of a run with drop-out, dropped paths and augmentation, and what comes out of it: the folder `whole`."""
    folder = tmp_path_factory.mktemp("nlvr")
    model = {**runs.TINY["nlvr"]["model"], "dropout": 0.1, "drop_path": 0.1}
    config = runs.make_task("nlvr", folder, max_epoch=2, model=model, augment=True, ema_decay=0.8)
    finish("nlvr", config, folder / "whole", keep_checkpoints=3)
    return config, outcome(folder / "whole")


def ended_run(config: Path, folder: Path) -> Path:
    """Return a copy of the run that the settings were used for."""
    return Path(shutil.copytree(config.parent / "whole", folder))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 12])
def test_killed_at_random_moments(nlvr: tuple[Path, dict[str, Any]], tmp_path: Path, kills: int) -> None:
    config, expected = nlvr
    draw, killed = random.Random(0), 0
    for _ in range(kills):
        process = start("nlvr", config, tmp_path / "run")
        metrics, rows = tmp_path / "run" / "metrics.jsonl", draw.randrange(6)
        while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") >= rows):
            time.sleep(0.01)
        process.join(timeout=draw.uniform(0, 0.3))
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
    assert killed
    finish("nlvr", config, tmp_path / "run")
    assert_same(outcome(tmp_path / "run"), expected)
    no_leftovers(tmp_path / "run")


@pytest.mark.parametrize("kills", mostly_slow([2, 12], 2))
def test_killed_while_it_writes(nlvr: tuple[Path, dict[str, Any]], tmp_path: Path, kills: int) -> None:
    """Before any of the operations that make a file or folder take its place."""
    config, expected = nlvr
    draw = random.Random(1)
    for _ in range(kills):
        process = start("nlvr", config, tmp_path / "run", kill_at=draw.randrange(3, 60))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    finish("nlvr", config, tmp_path / "run")
    assert_same(outcome(tmp_path / "run"), expected)
    no_leftovers(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("task", [name for name in sorted(runs.TINY) if name != "nlvr"])
def test_every_task_goes_on(task: str, tmp_path: Path) -> None:
    """Moving averages, queues and momentum copies, momentum of SGD, mixed and repeated images, workers."""
    config = runs.make_task(task, tmp_path, augment=True)
    finish(task, config, tmp_path / "whole")
    for kill_at in (30, 24, 25):
        process = start(task, config, tmp_path / "killed", kill_at=kill_at, num_workers=kill_at % 2)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(task, config, tmp_path / "killed")
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_dense_training_and_accumulated_gradients_go_on(tmp_path: Path) -> None:
    config = runs.make_task("nlvr", tmp_path, batch_size_train=8, accumulate=3)
    given: dict[str, Any] = {"verb": "train", "pretrained": None}
    finish("nlvr", config, tmp_path / "whole", **given)
    process = start("nlvr", config, tmp_path / "killed", kill_at=15, **given)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish("nlvr", config, tmp_path / "killed", **given)
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"method": "magnitude"}, {"method": "reference"}, {"method": "upop", "distill": 1.0}], ids=str
)
def test_other_methods_and_a_teacher_go_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    task = "classification" if settings["method"] == "reference" else "nlvr"
    config = runs.make_task(task, tmp_path, **settings)
    finish(task, config, tmp_path / "whole")
    process = start(task, config, tmp_path / "killed", kill_at=30)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(task, config, tmp_path / "killed")
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_an_ended_run_can_be_resumed_and_stays_what_it_is(nlvr: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    config, expected = nlvr
    finish("nlvr", config, ended_run(config, tmp_path / "run"), resume="must")
    assert_same(outcome(tmp_path / "run"), expected)


def _as_a_command(config: Path, folder: Path) -> None:
    sys.argv = ["upop", "compress", "nlvr", "--config", str(config), "--output-dir", str(folder), "--resume", "auto"]
    torch.set_num_threads(1)
    main()


def test_sigterm_saves_and_leaves_with_a_code_of_its_own(nlvr: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    config, expected = nlvr
    folder = tmp_path / "run"
    codes = []
    for _ in range(2):
        steps = len(runs.rows(folder)) if (folder / "metrics.jsonl").exists() else 0
        process = FORKS.Process(target=_as_a_command, args=(config, folder))
        process.start()
        while process.is_alive() and (not (folder / "metrics.jsonl").exists() or len(runs.rows(folder)) <= steps):
            time.sleep(0.01)
        process.terminate()
        process.join()
        codes.append(process.exitcode)
        if codes[-1] == 0:
            break
        assert (folder / "checkpoints").exists()
    assert 75 in codes
    assert set(codes) <= {0, 75}
    finish("nlvr", config, folder)
    assert_same(outcome(folder), expected)


def test_only_the_newest_checkpoints_are_kept(nlvr: tuple[Path, dict[str, Any]]) -> None:
    config, _ = nlvr
    names = sorted(path.name for path in (config.parent / "whole" / "checkpoints").iterdir())
    assert names == ["step-00000014.pt", "step-00000015.pt", "step-00000016.pt"]


@pytest.mark.filterwarnings("ignore:.*It is skipped")
def test_a_damaged_checkpoint_is_passed_over(nlvr: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    config, expected = nlvr
    ended_run(config, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    finish("nlvr", config, tmp_path / "run")
    assert_same(outcome(tmp_path / "run"), expected)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"(?s)resumed.*none of its checkpoints.*Remove .*checkpoints"):
        compress(*runs.nlvr(config, output_dir=tmp_path / "run", resume="auto"))


@pytest.mark.parametrize(
    ("name", "content"), mostly_slow([("cut", None), ("gone", b""), ("spoilt", b"\xff\0 no row")], ("gone", b""))
)
def test_rows_that_were_lost_are_told_and_done_without(
    nlvr: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, content: bytes | None
) -> None:
    """metrics.jsonl is only what is told of a run: it goes on, to the same weights."""
    config, expected = nlvr
    folder = tmp_path / name
    process = start("nlvr", config, folder, kill_at=40)
    process.join()
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[: metrics.stat().st_size // 2] if content is None else content)
    if name == "gone":
        metrics.unlink()
        (folder / "settings.yaml").unlink()
        (folder / "versions.json").write_text("{")
    with pytest.warns(UserWarning, match=r"earlier steps"):
        compress(*runs.nlvr(config, output_dir=folder, resume="must"))
    found = outcome(folder)
    assert_same({**found, "rows": []}, {**expected, "rows": []})
    assert found["rows"][-1] == expected["rows"][-1]
    assert "ratio: 0.5" in (folder / "settings.yaml").read_text()
    assert json.loads((folder / "versions.json").read_text())["verb"] == "compress"


def test_what_cannot_be_resumed_says_why(nlvr: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    config, _ = nlvr
    folder = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"--resume was given, but .*run holds no checkpoint"):
        compress(*runs.nlvr(config, output_dir=folder, resume="must"))
    process = start("nlvr", config, folder, kill_at=40)
    process.join()
    with pytest.raises(RunFolderError, match=r"(?s)holds an unfinished run.*--resume"):
        compress(*runs.nlvr(config, output_dir=folder))
    with pytest.raises(SettingError, match=r"init_lr was 0.001 and is 0.002") as caught:
        compress(*runs.nlvr(config, output_dir=folder, resume="auto", init_lr=0.002, ratio=0.75))
    assert "ratio was 0.5 and is 0.75" in str(caught.value)
    with pytest.raises(SettingError, match=r"a step had 16 samples .* has 8"):
        compress(*runs.nlvr(config, output_dir=folder, resume="auto", batch_size_train=8))


def test_a_compression_that_an_earlier_version_began_is_refused(
    nlvr: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config, _ = nlvr
    folder = ended_run(config, tmp_path / "run")
    checkpoints = Checkpoints(folder / "checkpoints", keep=3)
    found = checkpoints.newest(whole=True)
    assert found is not None
    content = found[1]
    content["notes"] |= {"plan": content.pop("compression")["plan"]}
    checkpoints.write(content["place"]["steps"], {**content, "pruner": None})
    with pytest.raises(CheckpointError, match=r"earlier version.*another --output-dir"):
        compress(*runs.nlvr(config, output_dir=folder, resume="must"))


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [24, 30])
def test_the_samples_of_a_step_may_come_in_other_portions(tmp_path: Path, kill_at: int) -> None:
    """Rounding apart it is the same run: as many steps, each on the same samples."""
    config = runs.make_task("nlvr", tmp_path)
    finish("nlvr", config, tmp_path / "whole")
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-4)) for row in rows_of_steps(tmp_path / "whole")]
    folder = tmp_path / "killed"
    process = start("nlvr", config, folder, kill_at=kill_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish("nlvr", config, folder, batch_size_train=4, accumulate=4)
    assert [(row["step"], row["loss"]) for row in rows_of_steps(folder)] == expected


def rows_of_steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that tell of a step."""
    return [row for row in runs.rows(folder) if "loss" in row]
