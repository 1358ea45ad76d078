"""The lines of a run: printed above its bar, and records of the logger `upop.runs`."""

from __future__ import annotations

import logging

import pytest

from upop.runs.progress import RunProgress

LOGGER = logging.getLogger("upop.runs")


def test_lines_are_printed_and_logged(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    progress = RunProgress(0, main=True)
    progress.notify("epoch 1 of [2]")
    progress.notify("the step is skipped", "yellow")
    assert capsys.readouterr().out == "epoch 1 of [2]\nthe step is skipped\n"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "epoch 1 of [2]"),
        ("WARNING", "the step is skipped"),
    ]


def test_other_processes_and_a_higher_level_are_silent(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    RunProgress(0, main=False).notify("epoch 1")
    with caplog.at_level(logging.ERROR, LOGGER.name):
        RunProgress(0, main=True).notify("epoch 1", "yellow")
    assert not capsys.readouterr().out
    assert not caplog.records
