"""Shared by the tests of commands: `upop ...` in this process, as `main` runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from upop.cli.app import app, main


@pytest.fixture
def upop_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `upop ...` in this process; return its exit code and all that it printed, on one line."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["upop", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main(app)
        printed = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), " ".join((printed.out + printed.err).split())

    return run
