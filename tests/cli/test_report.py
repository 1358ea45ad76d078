"""`upop report` as a person types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from report.pages import Page, check_alone, results, write_run

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def report(upop_command: Command) -> Command:
    """Run `upop report ...`; return its exit code and all that it printed, on one line."""
    return lambda *words: upop_command("report", *words)


def test_a_page_lies_in_the_run_or_where_it_was_asked_for(report: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert report(run) == (0, f"Written to {run / 'report.html'}")
    check_alone(Page((run / "report.html").read_text()))
    elsewhere = tmp_path / "pages" / "mine.html"
    assert report(run, "--out", elsewhere) == (0, f"Written to {elsewhere}")
    assert elsewhere.read_text() == (run / "report.html").read_text()


def test_runs_are_compared_here_or_where_it_was_asked_for(
    report: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", results(name="magnitude 2x"))]
    monkeypatch.chdir(tmp_path)
    assert report("--compare", *runs) == (0, "Written to comparison.html")
    page = Page((tmp_path / "comparison.html").read_text())
    check_alone(page)
    assert "magnitude 2x" in page.text
    assert report("--compare", *runs, "--out", tmp_path / "both.html")[0] == 0
    assert (tmp_path / "both.html").is_file()


def test_what_is_not_there_yet_is_said_in_the_terminal_too(report: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "results.json").unlink()
    code, text = report(run)
    assert code == 0
    assert f"{run}: The run has not ended" in text
    assert (run / "report.html").is_file()


def test_mistakes_are_answered_without_a_traceback(report: Command, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    for words, said in (
        ([tmp_path], "is not a run directory, but it holds runs"),
        ([tmp_path / "c"], "it does not exist"),
        (runs, "Add --compare"),
        (["--compare", runs[0]], "at least two runs; found 1"),
        ([runs[0], "--out", runs[1] / "settings.yaml" / "page.html"], "cannot be written"),
    ):
        code, text = report(*words)
        assert code == 1
        assert said in text
        assert "Traceback" not in text
