"""Whole runs through the same verbs as the command line: train, compress, evaluate."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runs
import upop
from upop.errors import DeviceError, RunFolderError, SettingError, TrainingError
from upop.ownership import MARKER
from upop.pruning import Plan, find_groups
from upop.runs.lock import FolderLock
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.tasks.nlvr import NlvrTask


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("nlvr"))


@pytest.fixture(scope="module")
def compressed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "2x"
    compress(*runs.nlvr(config, output_dir=folder))
    return folder


def test_run_folder_holds_everything(compressed: Path) -> None:
    names = {path.relative_to(compressed).as_posix() for path in compressed.rglob("*") if path.is_file()}
    assert names == {
        *(f"{folder}{MARKER}" for folder in ("", "best/", "last/", "examples/")),
        "settings.yaml",
        "versions.json",
        "metrics.jsonl",
        "plan.json",
        "results.json",
        "figures/kept.png",
        "figures/history.png",
        "scores.safetensors",
        "checkpoints/step-00000012.pt",
        "checkpoints/step-00000016.pt",
        *(f"{name}/{file}" for name in ("best", "last") for file in ("model.safetensors", "upop.json", "README.md")),
        *(f"{name}/{file}" for name in ("best", "last") for file in ("tokenizer.json", "tokenizer_config.json")),
        "examples/examples.json",
        # Eight of the pairs of the test split.
        *(f"examples/{number}-{side}.png" for number in range(0, runs.HELD_OUT, runs.HELD_OUT // 8) for side in (0, 1)),
    }
    assert (
        json.loads((compressed / "versions.json").read_text())["libraries"]["torch"] == torch.__version__.split("+")[0]
    )


def test_results_are_those_of_the_saved_model(config: Path, compressed: Path, tmp_path: Path) -> None:
    results = json.loads((compressed / "results.json").read_text())
    dense, small = results["models"]
    model = upop.load(compressed / "best")
    assert small["name"] == f"UPop {dense['parameters'] / small['parameters']:.3g}x"
    assert small["parameters"] == upop.count_parameters(model) < dense["parameters"]
    again = evaluate_checkpoint(*runs.nlvr(config, pretrained=str(compressed / "best"), output_dir=tmp_path))
    assert again is not None
    assert dict(again.models[0].metrics) == small["metrics"]


def _content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and its time, but for those of evaluations."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and "evaluations" not in path.relative_to(folder).parts
    }


def test_an_evaluation_stays_out_of_the_run_that_it_evaluates(config: Path, compressed: Path, tmp_path: Path) -> None:
    """Its results go beside, under a name that the same evaluation alone has; other folders of ours are spared too."""
    run = tmp_path / "run"
    shutil.copytree(compressed, run)
    before = _content(run)
    names = []
    for model, place, changes in (
        ("best", run, {}),
        ("best", run, {}),
        ("best", run / "best", {}),
        ("best", run / "figures", {"num_workers": 1}),
        ("last", run, {}),
        ("best", run, {"batch_size_test": 7}),
    ):
        evaluate_checkpoint(*runs.nlvr(config, pretrained=str(run / model), output_dir=place, **changes))
        assert _content(run) == before
        names.append({path.name for path in (run / "evaluations").glob("*.json")})
    assert [len(found) for found in names] == [1, 1, 1, 1, 2, 3]
    described = json.loads((run / "evaluations" / names[0].pop()).read_text())
    assert described["models"][0]["metrics"] == json.loads((run / "results.json").read_text())["models"][1]["metrics"]
    assert described["evaluation"]["pretrained"] == str(run / "best")
    alone = tmp_path / "model"
    shutil.copytree(run / "best", alone)
    evaluate_checkpoint(*runs.nlvr(config, pretrained=str(alone), output_dir=alone))
    assert {path.name for path in alone.iterdir()} == {path.name for path in (run / "best").iterdir()} | {"evaluations"}


@pytest.mark.parametrize("name", ["results.json", "settings.yaml", "versions.json", "checkpoints/mine.pt"])
def test_an_evaluation_adds_nothing_to_a_folder_of_others(name: str, config: Path, tmp_path: Path) -> None:
    """Names that runs use too make no run of it."""
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = {found: found.stat().st_mtime_ns for found in path.parents[1].rglob("*") if found.is_file()}
    with pytest.raises(RunFolderError, match=name.partition("/")[0]):
        evaluate_checkpoint(
            *runs.nlvr(config, pretrained=str(config.with_name("dense")), output_dir=tmp_path / "theirs")
        )
    assert {found: found.stat().st_mtime_ns for found in path.parents[1].rglob("*") if found.is_file()} == before


def test_an_evaluation_of_a_run_that_goes_on_lets_it_go_on(config: Path, compressed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(compressed, run)
    (run / "results.json").unlink()
    before = _content(run)
    going = FolderLock(run, print)
    evaluate_checkpoint(*runs.nlvr(config, pretrained=str(run / "best"), output_dir=run))
    going.release()
    assert _content(run) == before


def test_an_evaluation_replaces_an_earlier_one_in_a_folder_of_its_own(config: Path, tmp_path: Path) -> None:
    dense = str(config.with_name("dense"))
    for batch in (48, 7):
        evaluate_checkpoint(*runs.nlvr(config, pretrained=dense, output_dir=tmp_path / "own", batch_size_test=batch))
    assert "batch_size_test: 7" in (tmp_path / "own" / "settings.yaml").read_text()
    assert not (tmp_path / "own" / "evaluations").exists()


def test_best_is_the_best_epoch(compressed: Path) -> None:
    retrained = [row["accuracy"] for row in runs.rows(compressed) if row["phase"] == "retrain" and "split" in row]
    results = json.loads((compressed / "results.json").read_text())
    assert results["models"][1]["metrics"]["dev"]["accuracy"] == max(retrained)


def test_plan_meets_the_budget_and_the_saved_shapes(compressed: Path) -> None:
    plan = Plan.from_json((compressed / "plan.json").read_text())
    kept = {group.name: group.size for group in find_groups(upop.load(compressed / "best"))}
    assert kept == {name: len(entries) for name, entries in plan.items()}


def test_rows_tell_the_search(compressed: Path) -> None:
    """It takes a third of so few steps, 5 of 16, the model is cut in its second epoch; one rate falls over all four."""
    rows = [row for row in runs.rows(compressed) if "loss" in row]
    searched = [row for row in rows if row["phase"] == "search"]
    assert [row["step"] for row in searched] == list(range(1, 6))
    ratios = [row["ratio"] for row in searched]
    assert ratios == sorted(ratios)
    assert ratios[3] < ratios[4] == 0.5
    assert searched[3]["kept"] != searched[4]["kept"]
    assert not any("ratio" in row for row in rows[5:])
    assert [row["lr"] for row in rows] == [
        pytest.approx(1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2) for epoch in range(4) for _ in range(4)
    ]


def test_the_published_search_takes_its_epochs_at_a_constant_rate(config: Path, tmp_path: Path) -> None:
    results = compress(*runs.nlvr(config, output_dir=tmp_path, method="reference", search_lr=5e-4))
    assert results is not None
    dense, small = results.models
    assert small.name == f"reference {dense.parameters / small.parameters:.3g}x"
    rows = [row for row in runs.rows(tmp_path) if "loss" in row]
    searched = [row for row in rows if row["phase"] == "search"]
    assert [row["step"] for row in searched] == list(range(1, 9))
    assert [row["ratio"] for row in searched] == [
        pytest.approx(0.5 * math.sin(math.pi / 2 * step / 8)) for step in range(1, 9)
    ]
    assert {row["lr"] for row in searched} == {5e-4}
    assert [row["lr"] for row in rows[8:]] == [1e-3] * 4 + [pytest.approx(5e-4)] * 4


@pytest.mark.slow
def test_settings_of_the_published_search_do_not_matter_to_the_other_methods(
    config: Path, compressed: Path, tmp_path: Path
) -> None:
    compress(*runs.nlvr(config, output_dir=tmp_path, interval=7, search_lr=0.3))
    first, second = (Plan.from_json((folder / "plan.json").read_text()) for folder in (compressed, tmp_path))
    assert dict(first) == dict(second)
    assert [row["lr"] for row in runs.rows(compressed) if "lr" in row] == [
        row["lr"] for row in runs.rows(tmp_path) if "lr" in row
    ]


@pytest.mark.slow
def test_same_seed_same_result(config: Path, compressed: Path, tmp_path: Path) -> None:
    compress(*runs.nlvr(config, output_dir=tmp_path))
    first, second = (upop.load(folder / "last").state_dict() for folder in (compressed, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_dense_model_teaches(config: Path, compressed: Path, tmp_path: Path) -> None:
    """At the first step the model is its own teacher; evaluation and what is saved know of no teacher."""
    alone, taught = tmp_path / "alone", compressed
    assert compress(*runs.nlvr(config, output_dir=alone, distill=0.0)) is not None
    losses = ([row["loss"] for row in runs.rows(folder) if "loss" in row] for folder in (alone, taught))
    first, second = losses
    assert second[0] == pytest.approx(first[0])
    assert second[1] > 1.005 * first[1]
    assert sum(second) > 1.005 * sum(first)
    names = upop.load(alone / "best").state_dict().keys()
    assert upop.load(taught / "best").state_dict().keys() == names


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"method": "reference"}, {"correct": False}], ids=str)
def test_accumulated_gradients_give_the_same_search(config: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """But for the correction, which lets rounding grow."""
    for name, portions in (("one", {}), ("two", {"batch_size_train": 8, "accumulate": 2})):
        compress(*runs.nlvr(config, output_dir=tmp_path / name, max_epoch=1, **method, **portions))
    first, second = (Plan.from_json((tmp_path / name / "plan.json").read_text()) for name in ("one", "two"))
    assert dict(first) == dict(second)


@pytest.mark.slow  # averages and warm-up are in the runs of test_resume and test_classification
@pytest.mark.parametrize(
    "changes",
    [
        {"amp": True},
        {"vit_grad_ckpt": True},
        {"clip_grad": 0.5, "round_to": 8},
        {"cost": "macs"},
        {"cost": "reference", "method": "reference"},
        {"importance": "squared", "correct": False, "search_share": 0.4},
        {"importance": "signed"},
        {"ema_decay": 0.5, "warmup_epochs": 1},
    ],
    ids=str,
)
def test_variants_run_through(config: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    results = compress(*runs.nlvr(config, output_dir=tmp_path, max_epoch=1, **changes))
    assert results is not None
    assert results.models[1].parameters < results.models[0].parameters
    if changes.get("cost") == "reference":
        assert any("loss_sparsity" in row for row in runs.rows(tmp_path))


def test_workers_change_nothing(config: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        train(*runs.nlvr(config, output_dir=tmp_path / str(workers), num_workers=workers, max_epoch=1))
        assert not multiprocessing.active_children()
    losses = [[row["loss"] for row in runs.rows(tmp_path / name) if "loss" in row] for name in "02"]
    assert losses[0] == losses[1]


class _Interrupted(NlvrTask):
    """Is stopped by Ctrl-C at the third step."""

    def __init__(self) -> None:
        self.left = 2

    def loss(self, *given: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().loss(*given)


def test_neither_a_stopped_run_nor_one_that_goes_on_leaves_workers(config: Path, tmp_path: Path) -> None:
    """The latter makes the rest of its epoch by workers of their own."""
    given = {"output_dir": tmp_path, "num_workers": 2, "checkpoint_minutes": 0, "max_epoch": 1, "resume": "auto"}
    with pytest.raises(KeyboardInterrupt):
        train(_Interrupted(), runs.nlvr(config, **given)[1])
    assert not multiprocessing.active_children()
    train(*runs.nlvr(config, **given))
    assert not multiprocessing.active_children()
    assert [row["step"] for row in runs.rows(tmp_path) if "loss" in row] == [1, 2, 3, 4]


def test_magnitude_cut_gets_as_many_steps(config: Path, compressed: Path, tmp_path: Path) -> None:
    results = compress(*runs.nlvr(config, output_dir=tmp_path, method="magnitude"))
    assert results is not None
    assert re.fullmatch(r"magnitude 1\.\d+x", results.models[1].name)
    assert max(row["step"] for row in runs.rows(tmp_path)) == max(row["step"] for row in runs.rows(compressed))


def test_training_from_nothing_runs_every_step_and_keeps_the_best(config: Path, tmp_path: Path) -> None:
    task, settings = runs.nlvr(config, output_dir=tmp_path, pretrained=None, max_epoch=3)
    results = train(task, settings)
    assert results is not None
    losses = [row["loss"] for row in runs.rows(tmp_path) if "loss" in row]
    assert len(losses) == 12
    assert upop.count_parameters(upop.load(tmp_path / "best")) == results.models[0].parameters


class _Poisoned(NlvrTask):
    """Gives a loss that is not a number at some steps."""

    def __init__(self, bad: set[int]) -> None:
        self.bad, self.calls = bad, 0

    def loss(self, model: nn.Module, *given: Any) -> Tensor:
        self.calls, self.model = self.calls + 1, model
        loss = super().loss(model, *given)
        return loss * float("nan") if self.calls - 1 in self.bad else loss


@pytest.mark.filterwarnings("ignore:.*search steps had gradients that are not finite")
def test_a_bad_step_is_skipped_and_the_search_goes_on(config: Path, tmp_path: Path) -> None:
    _, settings = runs.nlvr(config, output_dir=tmp_path, max_epoch=1)
    compress(_Poisoned({1, 6}), settings)
    assert [row["step"] for row in runs.rows(tmp_path) if "loss" in row][-1] == 8
    state = upop.load(tmp_path / "best").state_dict()
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.filterwarnings("ignore:.*search steps had gradients that are not finite")
def test_too_many_bad_steps_stop_the_run(config: Path, tmp_path: Path) -> None:
    _, settings = runs.nlvr(config, output_dir=tmp_path, max_bad_steps=3)
    task = _Poisoned(set(range(2, 99)))
    with pytest.raises(TrainingError, match=r"3 steps in a row.*Lower init_lr") as held:
        compress(task, settings)
    # The error holds all that the run made, and yet nothing looks at the model any more, nor masks it.
    assert "_train_epoch" in [entry.name for entry in held.traceback]
    modules = list(task.model.modules())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in modules)
    assert upop.Pruner(task.model, 0.5, 8).current_ratio == 0


def test_errors_come_before_long_work(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be reached"):
        compress(*runs.nlvr(config, output_dir=tmp_path, ratio=0.99))
    assert not runs.rows(tmp_path)
    with pytest.raises(SettingError, match="A checkpoint is needed"):
        compress(*runs.nlvr(config, output_dir=tmp_path, pretrained=None))
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="--device cuda"):
            compress(*runs.nlvr(config, output_dir=tmp_path, device="cuda"))


def test_a_run_folder_that_is_a_file_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match="taken"):
        train(*runs.nlvr(config, output_dir=tmp_path / "taken"))


def test_unwritable_run_folder(config: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        train(*runs.nlvr(config, output_dir=Path("/proc/upop-run")))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to play a full disk")
def test_full_disk_while_logging(config: Path, tmp_path: Path) -> None:
    from upop.runs.folder import RunFolder

    folder = RunFolder(tmp_path, main=True)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        folder.log({"step": 1})


def test_mixed_precision_leaves_the_model_as_it_was(config: Path, tmp_path: Path) -> None:
    """A forward that stays patched to bfloat16 would make the check of every cut a loose one."""
    built: list[nn.Module] = []

    class Watched(NlvrTask):
        def build(self, settings: Any) -> nn.Module:
            built.append(super().build(settings))
            return built[0]

    _, settings = runs.nlvr(config, output_dir=tmp_path, pretrained=None, max_epoch=1, amp=True)
    train(Watched(), settings)
    assert "forward" not in vars(built[0])
    inputs = Watched().example(built[0], 2)
    with torch.no_grad():
        found, exact = built[0](**inputs), built[0].double()(**{**inputs, "images": inputs["images"].double()})
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_run_reaches_a_target_for_the_whole_model(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = {"params": 0.9, "macs": 0.9}
    results = compress(*runs.nlvr(config, output_dir=tmp_path, target=target, max_epoch=1))
    assert results is not None
    dense, small = results.models
    shares = {"params": small.parameters / dense.parameters, "macs": small.gmacs / dense.gmacs}
    assert all(share <= 0.9 for share in shares.values())
    assert max(shares.values()) > 0.89
    assert small.name == f"UPop {dense.parameters / small.parameters:.3g}x"
    assert f"{small.parameters:,} of {dense.parameters:,} parameters" in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "best" / "README.md").read_text()
    assert f"left of the whole model: {small.parameters:,} of {dense.parameters:,} parameters" in card
    assert "target for the whole model: params=0.9,macs=0.9" in card
