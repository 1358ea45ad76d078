"""The share of time spent waiting for data: what is measured, and when it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
from upop.runs.verbs import train
from upop.runs.watch import LoaderWatch, usable_cores
from upop.settings import RunSettings


class Clock:
    """Stands still but for what is added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def slow(clock: Clock, seconds: list[float]) -> Iterator[int]:
    for number, each in enumerate(seconds):
        clock.now += each
        yield number


def work(watch: LoaderWatch, clock: Clock, waits: list[float], takes: float, phase: str = "train") -> list[str]:
    described = []
    for _ in watch.batches(slow(clock, waits), phase):
        clock.now += takes
        if line := watch.warning():
            described.append(line)
    return described


def test_the_share_is_waiting_by_all_time_without_the_first_batches() -> None:
    clock = Clock()
    watch = LoaderWatch(4, cores=16, window=40, clock=clock)
    described = work(watch, clock, [50.0] * 10 + [3.0] * 45, takes=1.0)
    assert watch.share == pytest.approx(0.75)
    (line,) = described
    assert line.startswith(
        "waiting for data took 75 % of the time of the last 40 batches: raise num_workers (now 4; this "
    )
    assert line.endswith("machine has 16 cores), or use faster storage")


def test_nothing_is_said_before_enough_batches_were_seen_or_where_data_keeps_up() -> None:
    clock = Clock()
    watch = LoaderWatch(4, cores=16, window=40, clock=clock)
    assert watch.share is None
    assert work(watch, clock, [5.0] * 12, takes=1.0) == []
    assert watch.share is None  # two batches are no measurement
    watch = LoaderWatch(4, cores=16, window=40, clock=clock)
    assert work(watch, clock, [0.1] * 100, takes=1.0) == []
    assert watch.share == pytest.approx(1 / 11)


def test_the_window_slides_and_each_phase_is_told_once() -> None:
    clock = Clock()
    watch = LoaderWatch(0, cores=2, window=20, clock=clock)
    assert work(watch, clock, [0.0] * 60, takes=1.0) == []
    assert len(work(watch, clock, [1.0] * 200, takes=1.0)) == 1
    assert watch.share == pytest.approx(0.5)
    assert len(work(watch, clock, [1.0] * 60, takes=1.0, phase="retrain")) == 1
    assert work(watch, clock, [1.0] * 60, takes=1.0, phase="retrain") == []


def test_with_a_worker_per_core_more_workers_are_not_what_helps() -> None:
    clock = Clock()
    watch = LoaderWatch(4, processes=4, cores=16, window=20, clock=clock)
    (line,) = work(watch, clock, [1.0] * 60, takes=1.0)
    assert "num_workers is 4 per process" in line and "16 cores" in line and "faster storage" in line
    assert "raise" not in line


def test_cores_are_counted() -> None:
    assert usable_cores() >= 1


def test_a_run_that_waits_says_so_and_keeps_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that runs while batches are made, and stands still else."""
    clock = Clock()
    monkeypatch.setattr("upop.runs.loop.LoaderWatch", lambda workers: LoaderWatch(workers, window=30, clock=clock))
    config = runs.make_task("classification", tmp_path, batch_size_train=2, repeats=1)

    class Slow(type(runs.find_task("classification"))):  # type: ignore[misc]
        def collate(self, settings: RunSettings):
            collate = super().collate(settings)

            def slowly(items):
                clock.now += 1.0
                return collate(items)

            return slowly

        def loss(self, *given):
            clock.now += 1.0
            return super().loss(*given)

    task = Slow()
    train(task, runs.read_settings(task.settings, config, {"output_dir": tmp_path / "run", "max_epoch": 2}))
    shares = [row.get("waiting") for row in runs.rows(tmp_path / "run") if "loss" in row]
    assert shares[:29] == [None] * 29
    assert shares[-1] == pytest.approx(0.5, abs=0.05)
    assert capsys.readouterr().out.count("waiting for data took") == 1
