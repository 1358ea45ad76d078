"""Trackers: TensorBoard's event files, read back, hold what metrics.jsonl holds; a resumed run goes on in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs
from upop.errors import SettingError
from upop.runs.trackers import check_trackers, scalars
from upop.runs.verbs import compress, train
from upop.tasks.nlvr import NlvrTask


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("nlvr"))


def described(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What the event files say: tag -> (step, value), in the order of steps."""
    events = EventAccumulator(str(run / "trackers" / "upop"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def written(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """What metrics.jsonl says, in the same form."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for row in runs.rows(run):
        for tag, value in scalars(row).items():
            found.setdefault(tag, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_tensorboard_holds_every_row(config: Path, tmp_path: Path) -> None:
    compress(*runs.nlvr(config, output_dir=tmp_path, max_epoch=1, trackers=["tensorboard"]))
    found = described(tmp_path)
    assert found == written(tmp_path)
    assert {"loss", "lr", "ratio", "kept/vision", "kept/text", "dev/accuracy"} <= set(found)
    assert [step for step, _ in found["loss"]] == list(range(1, 9))
    assert found["ratio"][-1] == (2, 0.5)  # the search is a third of so short a training


class _Dies(NlvrTask):
    """Ends without a word in the middle of an epoch."""

    def __init__(self, after: int) -> None:
        self.left = after

    def loss(self, *given: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().loss(*given)


def test_a_resumed_run_goes_on_without_doubles(config: Path, tmp_path: Path) -> None:
    """It died two steps after its last checkpoint, and had told them."""
    given = {"output_dir": tmp_path, "max_epoch": 3, "trackers": ["tensorboard"], "pretrained": None}
    with pytest.raises(KeyboardInterrupt):
        train(_Dies(10), runs.nlvr(config, **given)[1])
    assert [step for step, _ in described(tmp_path)["loss"]] == list(range(1, 11))
    train(*runs.nlvr(config, **given, resume="must"))
    found = described(tmp_path)
    assert [step for step, _ in found["loss"]] == list(range(1, 13))
    assert [step for step, _ in found["dev/accuracy"]] == [4, 8, 12]
    assert found == written(tmp_path)


@pytest.mark.slow
def test_a_new_run_in_the_folder_begins_anew(config: Path, tmp_path: Path) -> None:
    for epochs in (2, 1):
        train(*runs.nlvr(config, output_dir=tmp_path, max_epoch=epochs, trackers=["tensorboard"], pretrained=None))
    assert [step for step, _ in described(tmp_path)["loss"]] == [1, 2, 3, 4]


class _Memory(tracking.GeneralTracker):
    """Keeps what it is told."""

    name = "memory"
    requires_logging_directory = True
    rows: list[tuple[int | None, dict[str, Any]]]
    ended: bool

    def __init__(self, run_name: str, logging_dir: str, **_kwargs: Any) -> None:
        super().__init__()
        type(self).rows, type(self).ended = [], False
        self.place = Path(logging_dir, run_name)

    @property
    def tracker(self) -> _Memory:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **_kwargs: Any) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        type(self).ended = True


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Memory]]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "memory", _Memory)
    yield _Memory


def test_any_tracker_of_accelerate_is_told(config: Path, tmp_path: Path, memory: type[_Memory]) -> None:
    train(*runs.nlvr(config, output_dir=tmp_path, max_epoch=1, trackers=["memory", "tensorboard"], pretrained=None))
    assert memory.rows == [(row["step"], scalars(row)) for row in runs.rows(tmp_path)]
    assert memory.ended
    assert described(tmp_path) == written(tmp_path)


def test_trackers_are_told_of_before_any_work(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"'tensorbord' is not known .did you mean 'tensorboard'"):
        train(*runs.nlvr(config, output_dir=tmp_path / "run", trackers=["tensorbord"]))
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upop.runs.trackers.find_spec", lambda _name: None)
    with pytest.raises(SettingError, match=r"pip install 'upop\[tensorboard\]'"):
        check_trackers(["tensorboard"])
    with pytest.raises(SettingError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_the_average_has_tags_of_its_own() -> None:
    row = {"phase": "train", "epoch": 0, "step": 4, "split": "val", "average": {"acc@1": 50}}
    assert scalars(row) == {"val/average/acc@1": 50.0}
