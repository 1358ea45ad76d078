"""A task from outside of the package: what it takes to add one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from typer.testing import CliRunner

import upop
from upop.cli import app
from upop.errors import SettingError
from upop.runs.task import Batch, Task
from upop.settings import RunSettings
from upop.tasks import TASKS, find_task, register


class ParitySettings(RunSettings):
    """Settings of the task; flags and --set take them like any others."""

    neurons: int = Field(32, ge=1)
    samples: int = Field(64, ge=1)


class Bits(Dataset[dict[str, Any]]):
    """Eight numbers, and whether most of them are positive."""

    def __init__(self, count: int, seed: int) -> None:
        self.numbers = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = self.numbers[index]
        return {"numbers": numbers, "label": int((numbers > 0).sum() > 4)}


class Net(nn.Module):
    """Two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, width), nn.LayerNorm(8), nn.Linear(width, 2)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.norm(numbers))))


class ParityTask(Task[ParitySettings]):
    """Are most of eight numbers positive?"""

    name: ClassVar[str] = "parity"
    metric: ClassVar[str] = "accuracy"
    shown: ClassVar[tuple[str, ...]] = ("accuracy",)
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val", "test": "test"}
    settings: ClassVar[type[RunSettings]] = ParitySettings

    def build(self, settings: ParitySettings) -> nn.Module:
        return Net(settings.neurons)

    def dataset(self, settings: ParitySettings, split: str) -> Dataset[Any]:
        return Bits(settings.samples, ["train", "val", "test"].index(split))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"numbers": batch["numbers"]}

    def loss(self, model: nn.Module, batch: Batch, settings: ParitySettings, epoch: float) -> Tensor:
        return F.cross_entropy(model(batch["numbers"]), batch["label"])

    def predict(self, model: nn.Module, batch: Batch, settings: ParitySettings) -> dict[str, Tensor]:
        return {"right": model(batch["numbers"]).argmax(1) == batch["label"]}

    def score(self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: Any) -> dict[str, float]:
        return {"accuracy": 100 * float(predictions["right"].double().mean())}

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        return {"numbers": torch.zeros(batch_size, 8)}


def test_a_task_from_outside_is_trained_compressed_and_evaluated_by_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upop.tasks._tasks._made", dict(upop.tasks._tasks._made))  # type: ignore[attr-defined]
    register(ParityTask())
    assert "parity" in TASKS
    shared = ["--device", "cpu", "--set", "num_workers=0", "--set", "batch_size_train=16", "--set", "distill=0"]

    def run(verb: str, *words: str) -> None:
        done = CliRunner().invoke(app.app, [verb, "parity", *shared[: 4 if verb == "evaluate" else None], *words])
        assert done.exit_code == 0, (done.output, done.exception)

    run("train", "--epochs", "3", "--set", "init_lr=1.0e-2", "--output-dir", str(tmp_path / "dense"))
    dense = ["--pretrained", str(tmp_path / "dense" / "best")]
    run("compress", *dense, "--epochs", "3", "--ratio", "0.5", "--output-dir", str(tmp_path / "2x"))
    model = upop.load_into(Net(32), tmp_path / "2x" / "best")
    assert model.first.out_features == 16
    run("evaluate", "--pretrained", str(tmp_path / "2x" / "best"), "--output-dir", str(tmp_path / "e"))
    found = [json.loads((tmp_path / name / "results.json").read_text())["models"][-1] for name in ("2x", "e")]
    assert found[0]["metrics"] == found[1]["metrics"]


def test_upops_own_names_are_taken_and_unknown_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nlvr(ParityTask):
        name: ClassVar[str] = "nlvr"

    with pytest.raises(SettingError, match="of its own"):
        register(Nlvr())
    monkeypatch.delattr(ParityTask, "shown")
    with pytest.raises(SettingError, match="ParityTask lacks shown"):
        register(ParityTask())
    with pytest.raises(SettingError, match="dual-encoder"):
        find_task("dual_encoder")
