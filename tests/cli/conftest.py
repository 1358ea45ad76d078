"""Shared by the tests of commands: `upop ...` in this process, as `main` runs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from upop.cli.app import main


@pytest.fixture
def upop_command(
    monkeypatch: pytest.MonkeyPatch, ended: Callable[..., tuple[int, str]]
) -> Callable[..., tuple[int, str]]:
    """Run `upop ...` in this process; return its exit code and all that it printed, on one line."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", "160")
        code, text = ended(main, "upop", *words)
        return code, " ".join(text.split())

    return run
